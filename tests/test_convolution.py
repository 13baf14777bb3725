"""Fast convolutions against torch's own, and the cases in which torch computes them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import decibels
from torch import Tensor, nn

from kmdx.networks import convolution
from kmdx.networks.convolution import (
    MatmulConvTranspose1d,
    MatmulConvTranspose2d,
    ShuffledConvTranspose2d,
    WinogradConv2d,
)
from kmdx.networks.fast import accelerate

NEEDED = 100  # dB
NNPACK = pytest.mark.skipif(not torch._nnpack_available(), reason="torch has no NNPACK here")
Make = Callable[..., nn.Module]

ELIGIBLE = [
    pytest.param(WinogradConv2d, lambda **o: nn.Conv2d(3, 5, 3, padding=1, **o), (3, 17, 9), marks=NNPACK),
    pytest.param(WinogradConv2d, lambda **o: nn.Conv2d(1, 1, 3, padding=1, **o), (1, 5, 5), marks=NNPACK),
    pytest.param(WinogradConv2d, lambda **o: nn.Conv2d(8, 16, 3, padding=1, **o), (8, 6, 200), marks=NNPACK),
    (MatmulConvTranspose1d, lambda **o: nn.ConvTranspose1d(3, 5, 8, 4, **o), (3, 17)),
    (MatmulConvTranspose1d, lambda **o: nn.ConvTranspose1d(3, 2, 2, 1, **o), (3, 6)),
    (MatmulConvTranspose1d, lambda **o: nn.ConvTranspose1d(1, 1, 6, 3, **o), (1, 1)),
    (MatmulConvTranspose2d, lambda **o: nn.ConvTranspose2d(3, 5, (8, 1), (4, 1), **o), (3, 7, 9)),
    (MatmulConvTranspose2d, lambda **o: nn.ConvTranspose2d(4, 2, (2, 1), 1, **o), (4, 3, 5)),
    (MatmulConvTranspose2d, lambda **o: nn.ConvTranspose2d(3, 4, (8, 1), (4, 1), **o), (3, 1, 9)),
    (ShuffledConvTranspose2d, lambda **o: nn.ConvTranspose2d(3, 5, 2, 2, **o), (3, 7, 9)),
    (ShuffledConvTranspose2d, lambda **o: nn.ConvTranspose2d(4, 1, 3, 3, **o), (4, 1, 5)),
]
ONE_OF_EACH = [ELIGIBLE[0], ELIGIBLE[3], ELIGIBLE[6], ELIGIBLE[9]]


@pytest.fixture(autouse=True)
def _winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd's algorithm wherever it is available, even if it is slower."""
    monkeypatch.setattr(convolution, "winograd_is_used", torch._nnpack_available)


class Ordinary:
    """Counts what torch's own classes compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        for klass in (nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d):
            monkeypatch.setattr(klass, "forward", self._counted(klass.forward))

    def _counted(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: object) -> Tensor:
            self.calls += 1
            return forward(*arguments)

        return counted


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Ordinary:
    return Ordinary(monkeypatch)


def pair(make: Make, **options: object) -> tuple[nn.Module, nn.Module]:
    """A convolution and the same one accelerated."""
    torch.manual_seed(0)
    plain = make(**options)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain, fast


def sound(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("klass", "make", "shape"), ELIGIBLE)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_convolutions_equal_torchs(
    klass: type, make: Make, shape: tuple[int, ...], batch: int, bias: bool, ordinary: Ordinary
) -> None:
    plain, fast = pair(make, bias=bias)
    assert type(fast) is klass
    wave = sound(batch, *shape)
    before = wave.clone()
    with torch.inference_mode():
        ours = fast(wave)
        assert ordinary.calls == 0, "it went the ordinary way"
        expected = plain(wave)
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    assert decibels(expected, ours) > NEEDED
    assert torch.equal(wave, before)


@pytest.mark.parametrize(("klass", "make", "shape"), ONE_OF_EACH)
def test_the_input_may_have_any_memory_layout(klass: type, make: Make, shape: tuple[int, ...]) -> None:
    plain, fast = pair(make)
    turned = sound(3, *reversed(shape)).permute(0, *range(len(shape), 0, -1))
    assert not turned.is_contiguous()
    with torch.inference_mode():
        assert decibels(plain(turned), fast(turned)) > NEEDED


@pytest.mark.parametrize(("klass", "make", "shape"), ONE_OF_EACH)
def test_torch_computes_convolutions_with_gradients(
    klass: type, make: Make, shape: tuple[int, ...], ordinary: Ordinary
) -> None:
    plain, fast = pair(make)
    heard, also_heard = (sound(2, *shape).requires_grad_() for _ in range(2))
    ours, expected = fast(heard), plain(also_heard)
    assert ordinary.calls == 2
    assert torch.equal(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(heard.grad, also_heard.grad)
    assert torch.equal(fast.weight.grad, plain.weight.grad)


@pytest.mark.parametrize(("klass", "make", "shape"), ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.inference_mode()
def test_torch_computes_convolutions_in_other_precisions(
    klass: type, make: Make, shape: tuple[int, ...], dtype: torch.dtype, ordinary: Ordinary
) -> None:
    plain, fast = (network.to(dtype) for network in pair(make))
    wave = sound(2, *shape).to(dtype)
    ours = fast(wave)
    assert ordinary.calls == 1
    assert ours.dtype == dtype
    assert torch.equal(ours, plain(wave))


@pytest.mark.parametrize(("klass", "make", "shape"), ONE_OF_EACH)
@torch.inference_mode()
def test_torch_computes_convolutions_under_autocast(
    klass: type, make: Make, shape: tuple[int, ...], ordinary: Ordinary
) -> None:
    plain, fast = pair(make)
    wave = sound(2, *shape)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fast(wave)
        assert ordinary.calls == 1
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, plain(wave))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, padding=0),
        nn.Conv2d(4, 4, 3, padding=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 5, padding=1),
        nn.Conv2d(4, 4, (3, 1), padding=1),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.ConvTranspose1d(4, 4, 8, 3),
        nn.ConvTranspose1d(4, 4, 4, 4),
        nn.ConvTranspose1d(4, 4, 8, 4, padding=1),
        nn.ConvTranspose1d(4, 4, 8, 4, output_padding=1),
        nn.ConvTranspose1d(4, 4, 8, 4, dilation=2),
        nn.ConvTranspose1d(4, 4, 8, 4, groups=2),
        nn.ConvTranspose2d(4, 4, (8, 1), (3, 1)),
        nn.ConvTranspose2d(4, 4, (8, 1), (4, 2)),
        nn.ConvTranspose2d(4, 4, (8, 2), (4, 1)),
        nn.ConvTranspose2d(4, 4, (1, 8), (1, 4)),
        nn.ConvTranspose2d(4, 4, (8, 1), (4, 1), padding=(1, 0)),
        nn.ConvTranspose2d(4, 4, (8, 1), (4, 1), output_padding=(1, 0)),
        nn.ConvTranspose2d(4, 4, (8, 1), (4, 1), dilation=2),
        nn.ConvTranspose2d(4, 4, (8, 1), (4, 1), groups=2),
        nn.ConvTranspose2d(4, 4, (2, 3), (2, 3)),
        nn.ConvTranspose2d(4, 4, 2, 2, padding=1),
        nn.ConvTranspose2d(4, 4, 2, 2, output_padding=1),
        nn.ConvTranspose2d(4, 4, 2, 2, dilation=2),
        nn.ConvTranspose2d(4, 4, 2, 2, groups=2),
    ],
    ids=str,
)
def test_torch_computes_convolutions_with_unsupported_settings(module: nn.Module) -> None:
    klass = type(module)
    accelerate(module)
    assert type(module) is klass


def test_subclasses_are_not_replaced() -> None:
    class Own(nn.Conv2d):
        pass

    module = Own(4, 4, 3, padding=1)
    accelerate(module)
    assert type(module) is Own


@pytest.mark.parametrize(("klass", "make", "shape"), ONE_OF_EACH)
def test_names_and_parameters_of_a_network_stay_the_same(
    klass: type, make: Make, shape: tuple[int, ...], ordinary: Ordinary
) -> None:
    network = nn.Sequential(nn.ModuleDict({"inner": make()}), nn.ReLU())
    inner = network[0]["inner"]
    state = dict(network.state_dict())
    shared = list(network.parameters())
    accelerate(network)
    assert type(network[0]["inner"]) is klass
    assert network[0]["inner"] is inner
    assert all(ours is theirs for ours, theirs in zip(network.parameters(), shared, strict=True))
    assert list(network.state_dict()) == list(state) == ["0.inner.weight", "0.inner.bias"]
    twin = copy.deepcopy(inner)
    assert type(twin) is klass
    twin.load_state_dict({"weight": 2 * inner.weight, "bias": 2 * inner.bias})
    wave = sound(1, *shape)
    with torch.inference_mode():
        assert decibels(2 * inner(wave), twin(wave)) > NEEDED
    assert ordinary.calls == 0


@NNPACK
@pytest.mark.parametrize("shape", [(3, 1, 200), (3, 4, 50), (3, 50, 4), (3, 1, 1)])
@torch.inference_mode()
def test_winograd_leaves_thin_images_to_torch(shape: tuple[int, ...], ordinary: Ordinary) -> None:
    plain, fast = pair(lambda: nn.Conv2d(3, 5, 3, padding=1))
    wave = sound(2, *shape)
    ours = fast(wave)
    assert ordinary.calls == 1
    assert torch.equal(ours, plain(wave))


@pytest.mark.parametrize("how", ["not built in", "no such call", "no such CPU", "fails", "wrong"])
def test_torch_computes_all_convolutions_without_winograd(
    how: str, monkeypatch: pytest.MonkeyPatch, ordinary: Ordinary
) -> None:
    if how == "not built in":
        monkeypatch.delattr(torch, "_nnpack_available")
    elif how == "no such call":
        monkeypatch.delattr(torch, "_nnpack_spatial_convolution")
    elif how == "no such CPU":
        monkeypatch.setattr(torch, "_nnpack_available", lambda: False)
    else:
        monkeypatch.setattr(torch, "_nnpack_available", lambda: True)
        monkeypatch.setattr(torch, "_nnpack_spatial_convolution", _fails if how == "fails" else _wrong)
    monkeypatch.setattr(convolution, "winograd_is_used", convolution.winograd_works)
    assert not convolution.winograd_works()
    ordinary.calls = 0
    plain, fast = pair(lambda: nn.Conv2d(3, 5, 3, padding=1))
    with torch.inference_mode():
        wave = sound(2, 3, 17, 9)
        assert torch.equal(fast(wave), plain(wave))
    assert ordinary.calls == 2


def _fails(*_: object, **__: object) -> Tensor:
    raise RuntimeError("NNPACK SpatialConvolution_updateOutput failed")


def _wrong(input: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    return 1.01 * nn.functional.conv2d(input, weight, bias, padding=padding)
