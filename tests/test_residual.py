"""Demucs' layers in blocks against demucs' own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import decibels
from demucs.hdemucs import HDecLayer, HEncLayer
from torch import Tensor, nn

from kmdx.networks import residual
from kmdx.networks.residual import BlockedDecoderLayer, BlockedEncoderLayer

NEEDED = 110  # dB
Make = Callable[..., nn.Module]


def encoder(**options: object) -> nn.Module:
    return HEncLayer(3, 8, **{"norm": False, "dconv_kw": {"compress": 2, "init": 0.7}, **options})


def decoder(**options: object) -> nn.Module:
    return HDecLayer(8, 3, **{"norm": False, "dconv_kw": {"compress": 2, "init": 0.7}, **options})


def pair(make: Make, **options: object) -> tuple[nn.Module, nn.Module]:
    """A layer whose parameters are all distinct, and the same one in blocks."""
    torch.manual_seed(0)
    plain = make(**options).eval().requires_grad_(False)
    for module in plain.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
    fast = copy.deepcopy(plain)
    kind = BlockedEncoderLayer if make is encoder else BlockedDecoderLayer
    assert kind.fits(fast)
    fast.__class__ = kind
    return plain, fast


def sound(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def difference(plain: nn.Module, fast: nn.Module, *arguments: object) -> float:
    """The worst agreement of their outputs in dB; an input must not change."""
    copies = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    expected, found = plain(*arguments), fast(*arguments)
    for before, after in zip(copies, arguments, strict=True):
        assert not isinstance(before, Tensor) or torch.equal(before, after)
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    worst = 1000.0
    for theirs, ours in pairs:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        worst = min(worst, decibels(theirs, ours))
    return worst


@pytest.fixture(params=[40, residual.BLOCK], ids=["small blocks", "one block"], autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "BLOCK", request.param)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("frames", [1, 2, 37])
@torch.inference_mode()
def test_an_encoder_layer_of_the_frequency_branch_equals_demucs(batch: int, frames: int) -> None:
    assert difference(*pair(encoder), sound(batch, 3, 32, frames)) > NEEDED


@pytest.mark.parametrize("samples", [4, 5, 150])
@torch.inference_mode()
def test_an_encoder_layer_of_the_time_branch_equals_demucs(samples: int) -> None:
    assert difference(*pair(encoder, freq=False), sound(2, 3, samples)) > NEEDED


@torch.inference_mode()
def test_an_encoder_layer_accepts_what_demucs_joins() -> None:
    layers = pair(encoder)
    for inject in (sound(2, 8, 8, 9), sound(2, 8, 9)):
        assert difference(*layers, sound(2, 3, 32, 9), inject) > NEEDED
    assert difference(*pair(encoder, freq=False), sound(2, 1, 3, 50)) > NEEDED


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 37])
@torch.inference_mode()
def test_a_decoder_layer_of_the_frequency_branch_equals_demucs(frames: int, last: bool) -> None:
    x, skip = sound(2, 8, 6, frames).chunk(2)
    assert difference(*pair(decoder, last=last), x, skip, None) > NEEDED
    assert difference(*pair(decoder, last=last), x.flatten(1, 2), skip, None) > NEEDED


@torch.inference_mode()
def test_a_decoder_layer_of_the_time_branch_equals_demucs() -> None:
    x, skip = sound(2, 8, 30).chunk(2)
    assert difference(*pair(decoder, freq=False), x, skip, 117) > NEEDED


@pytest.mark.parametrize("options", [{"depth": 3}, {"depth": 1}, {"depth": -2}, {"kernel": 5}, {"kernel": 1}])
@torch.inference_mode()
def test_branches_may_have_any_depth_and_kernel(options: dict) -> None:
    branches = {"compress": 4, "init": 0.7, **options}
    assert difference(*pair(encoder, dconv_kw=branches), sound(2, 3, 16, 30)) > NEEDED


@torch.inference_mode()
def test_a_mean_far_from_zero_costs_little_accuracy() -> None:
    plain, fast = pair(encoder)
    for layer in (plain, fast):
        for branch in layer.dconv.layers:
            branch[3].bias += 30
    assert difference(plain, fast, sound(1, 3, 32, 40)) > 95


@torch.inference_mode()
def test_silence_stays_finite() -> None:
    plain, fast = pair(encoder)
    for layer in (plain, fast):
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(fast(torch.zeros(1, 3, 16, 9)), plain(torch.zeros(1, 3, 16, 9)))


@pytest.mark.parametrize("make", [encoder, decoder])
@torch.inference_mode()
def test_bfloat16_has_no_larger_error_than_demucs(make: Make) -> None:
    plain, fast = pair(make)
    arguments = (sound(1, 3, 64, 50),) if make is encoder else (*sound(2, 8, 16, 50).chunk(2), None)
    expected = plain(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = plain(*arguments), fast(*arguments)
    if make is decoder:
        expected, theirs, ours = expected[0], theirs[0], ours[0]
    assert decibels(expected, ours.float()) > decibels(expected, theirs.float()) - 1


@pytest.mark.parametrize("make", [encoder, decoder])
def test_demucs_computes_layers_with_gradients(make: Make) -> None:
    plain, fast = pair(make)
    arguments = (sound(1, 3, 16, 9),) if make is encoder else (*sound(2, 8, 4, 9).chunk(2), None)
    expected, found = plain(*arguments), fast(*arguments)
    if make is decoder:
        expected, found = expected[0], found[0]
    assert torch.equal(expected, found)
    arguments[0].requires_grad_(True)
    ours = fast(*arguments)
    assert (ours[0] if make is decoder else ours).requires_grad


@pytest.mark.parametrize(
    "layer",
    [
        encoder(norm=True),
        encoder(empty=True),
        encoder(rewrite=False),
        encoder(context=1),
        encoder(dconv=False),
        encoder(dconv_kw={"attn": True, "compress": 2}),
        encoder(dconv_kw={"lstm": True}),
        encoder(dconv_kw={"norm": False}),
        encoder(dconv_kw={"gelu": False}),
        decoder(norm=True),
        decoder(empty=True),
        decoder(rewrite=False),
        decoder(dconv=False),
    ],
)
def test_other_layers_are_not_replaced(layer: nn.Module) -> None:
    assert not BlockedEncoderLayer.fits(layer)
    assert not BlockedDecoderLayer.fits(layer)
