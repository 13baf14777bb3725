"""In float16, what is between products reads and writes float16, also under a GPU's autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from demucs.demucs import DConv
from demucs.transformer import MyGroupNorm
from test_types import EXAMPLES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kmdx.networks import fast, types
from kmdx.networks.roformer import Norm
from kmdx.networks.types import TYPES

FP16, FP32 = torch.float16, torch.float32


class Norms(TorchDispatchMode):
    """Lists the types that norms and activations read and write, and counts casts."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()
        self.casts = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.casts += name == "_to_copy"
        if name in ("native_group_norm", "native_layer_norm", "glu", "gelu", "addcmul"):
            made = result[0] if isinstance(result, tuple) else result
            self.types |= {each.dtype for each in (made, *args) if isinstance(each, Tensor)}
        return result


def network_of(name: str) -> Any:
    kind, example = TYPES[name], EXAMPLES[name]
    state = types.function(kind.stand_in)(example, "seed").state_dict()
    return types.function(kind.build)(example, 0.5, {key: value.float() for key, value in state.items()})


@pytest.mark.parametrize("name", ["htdemucs", "hdemucs"])
def test_norms_and_activations_of_demucs_are_in_float16(name: str) -> None:
    network = network_of(name)
    network.accelerate(FP16)
    with torch.no_grad(), Norms() as norms:
        network(torch.randn(1, 2, network.length or 4410, generator=torch.Generator().manual_seed(0)))
    assert norms.types == {FP16}
    if name == "htdemucs":  # the recurrent layers of the other convert their weights
        assert norms.casts <= 8, "at both ends"


@pytest.mark.parametrize("name", ["bs_roformer", "mel_band_roformer"])
def test_sums_and_norms_of_roformers_are_in_float16(name: str) -> None:
    network = network_of(name)
    spectrum = torch.randn(1, 5, network.config.bins, network.config.channels, dtype=torch.complex64)
    for dtype, expected in ((torch.bfloat16, FP32), (FP16, FP16)):
        network.accelerate(dtype)
        with torch.inference_mode():
            assert network.features(spectrum).dtype == expected
        norms = [each for each in network.layers.modules() if isinstance(each, Norm)]
        assert {each.gamma.dtype for each in norms} == {expected}


def test_norms_of_scnets_convolutions_are_in_float16() -> None:
    network = network_of("scnet")
    network.accelerate(FP16)
    for part, dtype in ((network.encoder, FP16), (network.separation_net, FP32)):
        norms = [each for each in part.modules() if isinstance(each, nn.GroupNorm)]
        assert {each.weight.dtype for each in norms} == {dtype}


@pytest.mark.parametrize("kind", [nn.GroupNorm, MyGroupNorm, nn.LayerNorm])
def test_autocast_of_a_gpu_leaves_norms_in_float16(kind: type[nn.Module]) -> None:
    with FakeTensorMode(), torch.no_grad(), gpu_autocast():
        norm = kind(8) if kind is nn.LayerNorm else kind(2, 8)
        for name, parameter in [*norm.named_parameters()]:
            setattr(norm, name, nn.Parameter(torch.empty_like(parameter, device="cuda")))
        x = torch.empty(1, 8, 8, dtype=FP16, device="cuda")
        assert norm(x).dtype == FP32
        fast.store_others(norm, FP16)
        with Norms() as norms:
            assert norm(x).dtype == FP16
    assert norms.types == {FP16}, "kernels for GPUs need parameters of the same type"


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Autocast of a GPU, which torch does not offer on a machine without one."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_branches_are_added_as_demucs_adds_them() -> None:
    branches = DConv(8, init=0.5).eval()
    x = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = branches(x)
        branches.__class__ = fast.HalfDConv
        torch.testing.assert_close(branches(x), expected)
