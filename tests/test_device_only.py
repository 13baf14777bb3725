"""Networks compute windows on their device alone: the host neither waits for it nor makes tensors.

Only float32 and the tuned engine are tested: autocast does not know the device that stands for a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_types import EXAMPLES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kmdx.devices import BatchProfile, Runner
from kmdx.networks import types
from kmdx.networks.demucs import stay_on_device
from kmdx.networks.spectrogram import inverse_stft
from kmdx.networks.types import TYPES
from kmdx.signals import Signal
from kmdx.windows import FadeAndAdd, OverlapAdd, TrimAndJoin, Window

WAITS = {"_local_scalar_dense": 1, "item": 1, "equal": True, "is_nonzero": True, "nonzero": None}
"""Operations whose result the host needs before it can go on, and an answer that lets it."""


class HostWork(TorchDispatchMode):
    """Lists the operations that wait for the device, and those that make tensors on the host.

    Tensors of the device ``meta`` have shapes but no values, and stand for those of a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.made: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.operations += 1
        if name in WAITS:
            self.waits.append(name)
            return WAITS[name]
        if name == "_to_copy" and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.waits.append(name)  # and it fails, because there is no value
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((result, args)) if isinstance(each, Tensor)]
        if not all(each.is_meta for each in tensors):  # made on the host, or copied from it
            self.made.append(name)
        return result


def network_of(name: str) -> Any:
    kind, example = TYPES[name], EXAMPLES[name]
    state = types.function(kind.stand_in)(example, "seed").state_dict()
    return types.function(kind.build)(example, 0.5, {key: value.float() for key, value in state.items()})


def run(network: Any, work: HostWork) -> None:
    """Run a batch of windows, and list what the host does meanwhile."""
    network.to("meta")
    with torch.no_grad(), work:  # in inference mode, it would not see inside of operations
        network(torch.empty(2, 2, network.length or 22_050, device="meta"))


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast does not know the device, and does nothing in float32."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.file != "graph"])
def test_a_window_is_computed_on_the_device_alone(name: str) -> None:
    network, work = network_of(name), HostWork()
    network.accelerate(torch.float32)
    run(network, work)
    assert work.operations > 10
    assert (work.waits, work.made) == ([], [])


WINDOWS = [OverlapAdd(0.75, 0.01, 441), FadeAndAdd(441, 4), TrimAndJoin(441, 20)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.key)
def test_a_song_on_the_device_passes_through_a_network_without_the_host(window: Window) -> None:
    class Double(torch.nn.Module):
        length = None

        def forward(self, batch: Tensor) -> Tensor:
            return 2 * batch[:, None]

    song, estimate = (Signal(torch.empty(2, 10_000, device="meta")) for _ in range(2))
    runner, work = Runner(Double(), torch.device("meta"), BatchProfile(sizes={441: 4})), HostWork()
    with torch.no_grad(), work:
        window.run(runner, song, [estimate], lambda: None)
    assert work.operations > 2 * window.windows(10_000)
    assert (work.waits, work.made) == ([], [])


def test_what_the_published_networks_do_on_the_host_is_noticed() -> None:
    work = HostWork()
    with pytest.raises(NotImplementedError, match="no data"):  # where torch.istft waits for its check
        run(network_of("htdemucs"), work)
    assert {"_local_scalar_dense", "_to_copy"} <= {*work.waits}
    assert {"hann_window", "arange", "zeros"} <= {*work.made}


@pytest.mark.parametrize("length", [1, 700, 1537, 22_051])
@pytest.mark.parametrize("old", [False, True], ids=["reflected", "zeros"])
def test_transforms_on_the_device_equal_those_of_demucs(old: bool, length: int) -> None:
    example = {**EXAMPLES["hdemucs"], "hybrid_old": old, "cac": not old}
    state = types.function(TYPES["hdemucs"].stand_in)(example, "seed").state_dict()
    plain, ours = (types.function(TYPES["hdemucs"].build)(example, 0.5, state) for _ in range(2))
    stay_on_device(ours.model)
    wave = torch.randn(2, 2, length, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(wave), plain(wave), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("n_fft", "hop", "size", "normalized"),
    [(512, 128, 512, False), (512, 100, 300, True), (257, 64, 257, False), (768, 500, 768, True)],
)
def test_the_inverse_transform_equals_torchs(n_fft: int, hop: int, size: int, normalized: bool) -> None:
    window = torch.hann_window(size)
    wave = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    spectrum = torch.stft(wave, n_fft, hop, size, window, normalized=normalized, return_complex=True)
    spectrum *= torch.linspace(0, 1, spectrum.shape[1])[:, None]
    length = hop * (spectrum.shape[2] - 1)
    torch.testing.assert_close(
        inverse_stft(spectrum, n_fft, hop, window, length, normalized),
        torch.istft(spectrum, n_fft, hop, size, window, normalized=normalized, length=length),
        rtol=1e-4,
        atol=1e-5,
    )
