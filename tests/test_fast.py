"""Fast networks against the plain ones; attention with the fused kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import decibels
from demucs.demucs import LocalState
from torch import Tensor, nn

from kmdx.networks import attention as attentions
from kmdx.networks import convolution, product
from kmdx.networks.attention import ExactLocalState, FusedAttention
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.fast import FAST
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.tfc_tdf import TfcTdf

NEEDED = 100  # dB
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HALVES = [torch.bfloat16, torch.float16]


def demucs(architecture: dict) -> DemucsNetwork:
    return DemucsNetwork(tiny.demucs({**architecture, "segment": 0.25}, seed=5).requires_grad_(False))


def unet(norm_groups: int | None) -> TfcTdf:
    """A U-Net whose parameters are all distinct."""
    network = tiny.unet("bass", norm_groups, seed=5).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.2, 0.2)
    return network


MAKE = {
    "HTDemucs": lambda: demucs(tiny.HTDEMUCS),
    "HDemucs": lambda: demucs(tiny.HDEMUCS),
    "hybrid_old": lambda: demucs(tiny.HYBRID_OLD),
    "batch norm": lambda: unet(None),
    "two groups": lambda: unet(2),
    "four groups": lambda: unet(4),
}
NETWORKS = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
DEMUCS = pytest.mark.parametrize("make", [MAKE["HTDemucs"], MAKE["HDemucs"]], ids=["HTDemucs", "HDemucs"])
UNETS = pytest.mark.parametrize("make", [MAKE["batch norm"], MAKE["two groups"]], ids=["batch", "groups"])
Make = Callable[[], "DemucsNetwork | TfcTdf"]


@pytest.fixture(autouse=True)
def _every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd, oneDNN and blocks wherever they are available, even if they are slower."""
    monkeypatch.setattr(convolution, "winograd_is_used", torch._nnpack_available)
    monkeypatch.setattr(product, "onednn_is_used", lambda: ONEDNN)
    monkeypatch.setattr(attentions, "blocks_are_used", lambda dtype: dtype in attentions.PRECISIONS)
    monkeypatch.setattr(attentions, "SHORT", 0)


def prepared(make: Make, dtype: torch.dtype = torch.float32) -> DemucsNetwork | TfcTdf:
    network = make()
    network.accelerate(dtype)
    return network


def song(network: nn.Module, count: int = 1) -> Tensor:
    samples = network.length or 10_000
    return 0.1 * torch.randn(count, 2, samples, generator=torch.Generator().manual_seed(7))


@NETWORKS
@torch.inference_mode()
def test_fast_equals_plain_and_a_batch_its_parts(make: Make) -> None:
    network = prepared(make)
    batch = song(network, 3)
    before = batch.clone()
    together = network(batch)
    assert torch.equal(batch, before)
    expected = make()(batch)
    assert together.shape == expected.shape == (3, len(network.sources), *batch.shape[1:])
    assert together.dtype == torch.float32
    for source in range(len(network.sources)):
        assert decibels(expected[:, source], together[:, source]) > NEEDED
    alone = torch.cat([network(window[None]) for window in batch])
    assert decibels(alone, together) > NEEDED


@NETWORKS
def test_every_layer_with_a_faster_implementation_uses_it(make: Make) -> None:
    plain, network = make(), prepared(make)
    eligible = sum(klass.fits(module) for module in plain.modules() for klass in FAST)
    taken = sum(isinstance(module, FAST) for module in network.modules())
    assert taken == eligible > 0
    assert not any(klass.fits(module) for module in network.modules() for klass in FAST)


@NETWORKS
@torch.inference_mode()
def test_the_plain_engine_equals_torchs_operations_bit_for_bit(make: Make) -> None:
    network = make()
    network.accelerate(torch.float32, tuned=False)
    assert not any(isinstance(module, FAST) for module in network.modules())
    assert torch.equal(network(song(network)), make()(song(network)))


@NETWORKS
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 25), (torch.float16, 45)])
@torch.inference_mode()
def test_the_plain_engine_computes_in_half_precision_too(make: Make, dtype: torch.dtype, least: int) -> None:
    network = make()
    network.accelerate(dtype, tuned=False)
    assert not any(isinstance(module, FAST) for module in network.modules())
    assert least < decibels(make()(song(network)), network(song(network))) < 95


def test_batch_norms_after_convolutions_are_folded_and_the_others_stay() -> None:
    def norms(network: TfcTdf) -> int:
        return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())

    plain, network = unet(None), prepared(MAKE["batch norm"])
    behind_linear = 2 * tiny.UNET["layers"]
    assert norms(plain) > behind_linear
    assert norms(network) == behind_linear
    for layers in network.modules():
        if isinstance(layers, nn.Sequential):
            for first, second in zip(layers, list(layers)[1:], strict=False):
                assert not (isinstance(second, nn.BatchNorm2d) and not isinstance(first, nn.Linear))
    assert not any(parameter.requires_grad for parameter in network.parameters())


@DEMUCS
def test_demucs_keeps_the_names_of_its_state(make: Make) -> None:
    assert list(prepared(make).state_dict()) == list(make().state_dict())


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        (tiny.HTDEMUCS, torch.float32),
        (tiny.HTDEMUCS, torch.bfloat16),
        (tiny.HDEMUCS, torch.float32),
        (tiny.HYBRID_OLD, torch.float32),
    ],
)
@torch.inference_mode()
def test_a_fast_network_can_still_be_narrowed(architecture: dict, dtype: torch.dtype) -> None:
    network = prepared(lambda: demucs(architecture), dtype)
    everything = network(song(network))
    narrow = network.narrow(["vocals", "bass"])
    assert narrow.dtype == dtype
    own = {parameter.data_ptr() for parameter in network.parameters()}
    assert sum(parameter.data_ptr() not in own for parameter in narrow.parameters()) == 4, "more than shared"
    fast_layers = [type(module) for module in narrow.modules() if isinstance(module, FAST)]
    assert fast_layers == [type(module) for module in network.modules() if isinstance(module, FAST)]
    assert decibels(everything[:, [3, 1]], narrow(song(network))) > NEEDED
    assert torch.equal(network(song(network)), everything), "narrowing changed the network it came from"


@NETWORKS
@torch.inference_mode()
def test_a_copy_of_a_fast_network_is_the_same(make: Make) -> None:
    network = prepared(make)
    assert torch.equal(copy.deepcopy(network)(song(network)), network(song(network)))


@NETWORKS
@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 25, 80), (torch.float16, 45, 95)])
@torch.inference_mode()
def test_half_precision_changes_estimates_by_a_known_amount(
    make: Make, dtype: torch.dtype, least: int, most: int
) -> None:
    network = prepared(make, dtype)
    estimate = network(song(network))
    assert estimate.dtype == torch.float32
    assert estimate.isfinite().all()
    assert least < decibels(make()(song(network)), estimate) < most


@DEMUCS
@pytest.mark.parametrize("dtype", HALVES)
def test_demucs_stores_its_products_in_half_precision(make: Make, dtype: torch.dtype) -> None:
    network = prepared(make, dtype)
    assert network.dtype == dtype
    products = (
        nn.Conv1d,
        nn.Conv2d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.Linear,
        nn.MultiheadAttention,
    )
    exact = {
        part
        for module in network.modules()
        if isinstance(module, (LocalState, nn.LSTM))
        for part in module.modules()
    }
    others = torch.float16 if dtype == torch.float16 else torch.float32  # norms, scales and embeddings
    for module in network.modules():
        kept = torch.float32 if module in exact else others
        expected = dtype if isinstance(module, products) and module not in exact else kept
        assert all(parameter.dtype == expected for parameter in module.parameters(recurse=False))
    assert all(buffer.dtype != dtype for buffer in network.buffers())


@torch.inference_mode()
def test_local_attention_counts_frames_exactly_in_half_precision() -> None:
    torch.manual_seed(0)
    plain = LocalState(16)
    plain.query_decay.bias.fill_(2.0)  # near frames weigh more
    x = torch.randn(1, 16, 900)
    exact = copy.deepcopy(plain)
    exact.__class__ = ExactLocalState
    with torch.autocast("cpu", torch.bfloat16):
        branch = exact(x.bfloat16()) - x
        broken = plain(x.bfloat16()).float() - x
    expected = plain(x) - x
    assert decibels(expected, branch) > 30
    assert decibels(expected, broken) < 20, "torch or demucs has mended it; the class may go"


@UNETS
@pytest.mark.parametrize("dtype", HALVES)
def test_a_unet_stores_all_intermediate_tensors_in_half_precision(make: Make, dtype: torch.dtype) -> None:
    network = prepared(make, dtype)
    for name, tensor in network.state_dict().items():
        layer = network.get_submodule(name.rpartition(".")[0])
        in_float = name.startswith(("first_conv", "final_conv")) or isinstance(layer, nn.BatchNorm2d)
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if in_float else dtype), name
    assert network.spectrogram.window.dtype == torch.float32


@UNETS
@torch.inference_mode()
def test_convolutions_of_a_unet_keep_channels_last_in_bfloat16(make: Make) -> None:
    network, found = prepared(make, torch.bfloat16), []
    for layer in network.encoding_blocks[0].tfc.H:
        layer[0].register_forward_hook(
            lambda _, inputs, output: found.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    network(song(network))
    assert found
    assert all(found)


@NETWORKS
def test_float32_stays_float32(make: Make) -> None:
    assert {parameter.dtype for parameter in prepared(make).parameters()} == {torch.float32}


@torch.inference_mode()
def test_an_onnx_runtime_session_is_not_changed(tmp_path: Path) -> None:
    network = unet(None)
    tiny.export(network, tmp_path / "bass.onnx")
    session = OnnxNetwork(
        tmp_path / "bass.onnx", network.config.spectrogram, "bass", torch.device("cpu")
    ).eval()
    wave = song(network)
    before = session(wave)
    session.accelerate(torch.bfloat16)
    assert torch.equal(session(wave), before)


# Attention


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(**{"embed_dim": 24, "num_heads": 3, "batch_first": True, **options}).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases too, which begin as zeros
    return layer


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("kind", ["self", "cross"])
@torch.inference_mode()
def test_fused_attention_equals_torchs_own(kind: str, steps: int) -> None:
    plain = attention()
    fused = copy.deepcopy(plain)
    assert FusedAttention.fits(fused)
    fused.__class__ = FusedAttention
    query = torch.randn(2, steps, 24)
    key = query if kind == "self" else torch.randn(2, 31, 24)
    expected, _ = plain(query, key, key, need_weights=False)
    ours, none = fused(query, key, key, attn_mask=None, key_padding_mask=None, need_weights=False)
    assert none is None
    assert decibels(expected, ours) > 110
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": False},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 12, "vdim": 12},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_attention_are_not_replaced(options: dict) -> None:
    assert not FusedAttention.fits(attention(**options))


def test_subclasses_of_attention_are_not_replaced() -> None:
    class Own(nn.MultiheadAttention):
        pass

    assert not FusedAttention.fits(Own(24, 3, batch_first=True))
    assert not FusedAttention.fits(nn.Linear(24, 24))
