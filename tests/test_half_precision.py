"""Half precision on any machine: the benchmark rounds what hardware would round, however torch is asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import tiny
import torch
from torch import Tensor, nn

from benchmarks import half_precision
from kmdx.networks import attention, product
from kmdx.networks.demucs import DemucsNetwork

BF16 = torch.bfloat16


def rounded(tensor: Tensor) -> Tensor:
    return tensor.to(BF16).float()


@pytest.mark.parametrize("gradients", [torch.inference_mode, torch.no_grad])
def test_products_are_rounded(gradients: Callable[[], AbstractContextManager[None]]) -> None:
    torch.manual_seed(0)
    signal, weight, bias = torch.randn(3, 64), torch.randn(8, 64), torch.randn(8)
    expected = rounded(nn.functional.linear(rounded(signal), rounded(weight), rounded(bias)))
    with gradients(), half_precision.Rounding(BF16, half_precision.PRODUCTS):
        found = nn.functional.linear(signal, weight, bias)
        wide = nn.functional.conv1d(signal[None], torch.ones(2, 3, 5))
        attended = nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 16, 8))
        total = signal + 1
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3)
    assert torch.equal(found, rounded(found))
    assert torch.equal(wide, rounded(wide))
    assert torch.equal(attended, rounded(attended))
    assert not torch.equal(total, rounded(total)), "a sum stays in float32"


@pytest.mark.parametrize("pays", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(("kind", "least"), [("unet", -50), ("HTDEMUCS", -70), ("HDEMUCS", -70)])
def test_whole_networks_are_rounded(
    kind: str, least: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way their products and their attention are computed."""
    monkeypatch.setattr(product, "onednn_is_used", lambda: pays)
    monkeypatch.setattr(attention, "blocks_are_used", lambda dtype: pays)
    monkeypatch.setattr(attention, "SHORT", 0)
    if kind == "unet":
        network = tiny.unet("bass", 2, 5).requires_grad_(False)
    else:
        architecture = {**getattr(tiny, kind), "segment": 0.25}
        network = DemucsNetwork(tiny.demucs(architecture, 5).requires_grad_(False))
    network.accelerate(torch.float32)
    signal = 0.1 * torch.randn(1, 2, network.length or 10_000, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        exact = network(signal)
        with half_precision.precision("bf16", [network]):
            found = network(signal)
    assert least < half_precision.decibels(exact, found) < -30
