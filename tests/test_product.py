"""Fast matrix products and attention against torch's own, and the cases in which torch computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import decibels
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.networks import attention, kernels, product

NEEDED = 110  # dB
ONEDNN = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch has no oneDNN here",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Enables oneDNN; returns the products that it computed."""
    asked: list[Tensor] = []
    multiply = product._onednn

    def noted(rows: Tensor, *others: Tensor | None) -> Tensor:
        asked.append(rows)
        return multiply(rows, *others)

    monkeypatch.setattr(product, "onednn_is_used", lambda: True)
    monkeypatch.setattr(product, "_onednn", noted)
    return asked


def sound(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@ONEDNN
@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (2, 3, 7, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_onednn_layer_equals_torchs(shape: tuple[int, ...], bias: bool, calls: list[Tensor]) -> None:
    layer = nn.Linear(5, 11, bias=bias)
    wave = sound(*shape)
    expected = layer(wave)
    assert product.OneDnnLinear.fits(layer)
    layer.__class__ = product.OneDnnLinear
    ours = layer(wave)
    assert len(calls) == 1
    assert ours.shape == expected.shape
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(
        layer(sound(*shape[:-1], 10)[..., ::2]),
        F.linear(sound(*shape[:-1], 10)[..., ::2], layer.weight, layer.bias),
        atol=1e-5,
    )


@ONEDNN
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_a_matrix_is_multiplied_with_each_item_of_a_batch(batch: int, calls: list[Tensor]) -> None:
    first, second = sound(12, 7), sound(batch, 7, 9)
    assert decibels(torch.matmul(first, second), product.matmul(first, second)) > NEEDED
    assert len(calls) == batch


@ONEDNN
def test_torch_computes_other_products(calls: list[Tensor]) -> None:
    layer = product.OneDnnLinear(5, 3)
    wave = sound(4, 5)
    assert layer(wave).requires_grad
    with torch.inference_mode():
        assert layer(wave).shape == (4, 3)
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(wave).dtype == torch.bfloat16
        half = nn.Linear(5, 3).bfloat16()
        half.__class__ = product.OneDnnLinear
        assert half(wave.bfloat16()).dtype == torch.bfloat16
        assert layer.double()(wave.double()).dtype == torch.float64
        assert product.matmul(wave.double(), sound(2, 5, 3).double()).dtype == torch.float64
    assert len(calls) == 1


class Own(nn.Linear):
    pass


def test_subclasses_are_not_replaced() -> None:
    assert not product.OneDnnLinear.fits(Own(4, 4))


@pytest.mark.parametrize("how", ["not built in", "no such operator", "fails", "wrong"])
@ONEDNN
def test_torch_computes_all_products_without_onednn(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError("no such thing here")

    if how == "not built in":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif how == "no such operator":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    elif how == "fails":
        monkeypatch.setattr(product, "_onednn", fails)
    else:
        monkeypatch.setattr(product, "_onednn", lambda rows, weight, bias=None: 0.9 * F.linear(rows, weight))
    assert not product.onednn_works()


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("steps", "others"), [(1, 1), (50, 31), (attention.BLOCK + 5, 2 * attention.BLOCK)])
@pytest.mark.parametrize(("dtype", "needed"), [(torch.float32, NEEDED), (torch.bfloat16, 40)])
@torch.inference_mode()
def test_attention_in_blocks_equals_torchs(
    dtype: torch.dtype, needed: float, steps: int, others: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "onednn_is_used", lambda: onednn and product.onednn_works())
    query, key, value = sound(2, 3, steps, 8), 2 * sound(2, 3, others, 8), sound(2, 3, others, 8).flip(2)
    half = [part.to(dtype) for part in (query, key, value)]
    expected = F.scaled_dot_product_attention(*(part.double() for part in half))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = attention.attend_in_blocks(*half)
    assert ours.dtype == dtype
    assert decibels(expected, ours.double()) > needed


@torch.inference_mode()
def test_attention_uses_the_implementation_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []

    def noted(way: str) -> Callable[..., Tensor]:
        return lambda query, key, value: ways.append(way) or query

    monkeypatch.setattr(attention, "attend_in_blocks", noted("blocks"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted("fused"))
    entry = replace(kernels.here(), attention=("bf16",))
    monkeypatch.setattr(kernels, "here", lambda: entry)
    parts = sound(3, 1, 2, attention.SHORT, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        attention.attend(*parts.to(dtype))
    attention.attend(*parts[..., 1:, :].bfloat16())
    assert ways == ["fused", "blocks", "fused", "fused", "fused"]
