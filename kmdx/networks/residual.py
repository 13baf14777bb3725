"""Demucs' layers on a CPU, computed in blocks that stay in its caches.

A residual branch of Demucs widens a few hidden channels to twice its own channels, normalizes them, applies a
gated linear unit (GLU), and adds the result to its input. Layer by layer, each step reads and writes all of
these channels in memory. Here, the norm is part of the product that widens: its mean and variance follow from
the second moments of the hidden channels. The rest is computed one block of columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from demucs.demucs import DConv
from demucs.hdemucs import HDecLayer, HEncLayer
from demucs.transformer import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 1 << 20  # values in the three buffers of a block


class BlockedEncoderLayer(HEncLayer):
    """An encoder layer without norms outside its residual branches."""

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Map ``(B, C, F, T)``, or ``(B, C, T)`` in the time branch."""
        if not _applies(x, self.conv):
            return super().forward(x, inject)
        if not self.freq:
            x = x.flatten(1, -2)
            x = F.pad(x, (0, -x.shape[-1] % self.stride))
        y = self.conv(x)
        if inject is not None:
            y = y + (inject[:, :, None] if inject.dim() < y.dim() else inject)
        y = F.gelu(y).contiguous()
        _add_branches(self.dconv, y)
        with torch.autocast("cpu", enabled=False):
            for item in y.flatten(2):
                _rewrite(self.rewrite, item)
        return y

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether this class can replace a layer."""
        return (
            type(layer) is HEncLayer
            and not layer.empty
            and isinstance(layer.norm1, nn.Identity)
            and layer.rewrite is not None
            and set(layer.rewrite.kernel_size) == {1}
            and _has_plain_branches(layer.dconv)
        )


class BlockedDecoderLayer(HDecLayer):
    """A decoder layer without norms outside its residual branches."""

    def forward(self, x: Tensor, skip: Any, length: int) -> tuple[Tensor, Tensor]:
        """Map ``(B, C, F, T)``, or ``(B, C, T)`` in the time branch, and return its last input, too."""
        if not _applies(x, self.conv_tr):
            return super().forward(x, skip, length)
        if self.freq and x.dim() == 3:
            x = x.unflatten(1, (self.chin, -1))
        y = F.glu(self.rewrite(x + skip), dim=1).contiguous()
        _add_branches(self.dconv, y)
        z = self.conv_tr(y)
        if not self.freq:
            z = z[..., self.pad : self.pad + length]
        elif self.pad:
            z = z[..., self.pad : -self.pad, :]
        return z if self.last else F.gelu(z), y

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether this class can replace a layer."""
        return (
            type(layer) is HDecLayer
            and not layer.empty
            and isinstance(layer.norm2, nn.Identity)
            and layer.rewrite is not None
            and _has_plain_branches(layer.dconv)
        )


def _applies(x: Tensor, conv: nn.Module) -> bool:
    """Whether a layer runs on a CPU, without gradients, in a precision that CPUs compute in."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and conv.weight.dtype != torch.float16


def _has_plain_branches(branches: Any) -> bool:
    """Whether branches consist of convolutions, norms over all channels, and activations only."""
    if type(branches) is not DConv:
        return False
    kinds = (nn.Conv1d, nn.GroupNorm, nn.GELU, nn.Conv1d, nn.GroupNorm, nn.GLU, LayerScale)
    layers: Any = branches.layers
    return all(
        tuple(type(module) for module in layer) == kinds and layer[1].num_groups == layer[4].num_groups == 1
        for layer in layers
    )


def _add_branches(branches: Any, y: Tensor) -> None:
    """Add residual branches to ``(B, C, F, T)`` or ``(B, C, T)`` in place."""
    with torch.autocast("cpu", enabled=False):
        for item in y:
            rows = item if item.dim() == 3 else item[:, None]
            for branch in branches.layers:
                _add_branch(branch, rows)


def _add_branch(branch: Any, rows: Tensor) -> None:
    """Add a residual branch to ``(C, R, T)`` in place; each row has its own norms."""
    narrow, norm, _, widen, wide_norm, _, scale = branch
    hidden = F.gelu(
        F.group_norm(_narrowed(narrow, rows), 1, norm.weight.float(), norm.bias.float(), norm.eps)
    )
    hidden = F.pad(
        hidden, (0, 0, 0, 1), value=1.0
    )  # (R, h + 1, T): the last channel is multiplied by the bias
    moments = torch.bmm(hidden, hidden.transpose(1, 2)) / hidden.shape[-1]
    weights = torch.cat([widen.weight[..., 0], widen.bias[:, None]], 1).float()  # (2C, h + 1)
    mean = moments[:, -1] @ weights.mean(0)  # of each row after widening
    weights = weights.repeat(len(mean), 1, 1)
    weights[..., -1] -= mean[:, None]
    variance = (torch.bmm(weights, moments) * weights).sum(2).mean(1)
    weights *= torch.rsqrt(variance + wide_norm.eps)[:, None, None] * wide_norm.weight.float()[:, None]
    weights[..., -1] += wide_norm.bias
    values, gates = weights.chunk(2, 1)
    values = (scale.scale[:, None] * values).to(rows.dtype)
    gates, hidden = gates.to(rows.dtype), hidden.to(rows.dtype)
    target = rows.transpose(0, 1)
    count, channels, frames = target.shape
    for first, last in _blocks(count, channels * frames):
        for start, stop in _blocks(frames, channels * (last - first)):
            columns = hidden[first:last, :, start:stop]
            gate = torch.bmm(gates[first:last], columns).sigmoid_()
            target[first:last, :, start:stop].addcmul_(torch.bmm(values[first:last], columns), gate)


def _narrowed(conv: Any, rows: Tensor) -> Tensor:
    """Convolve ``(C, R, T)`` to float32 ``(R, h, T)``, as one product whose parts are shifted and added."""
    (taps,), (step,) = conv.kernel_size, conv.dilation
    weight = conv.weight.permute(2, 0, 1).flatten(0, 1).to(rows.dtype)  # (k · h, C)
    parts = torch.mm(weight, rows.flatten(1)).view(taps, -1, *rows.shape[1:]).float().transpose(1, 2)
    frames = rows.shape[-1]
    result = parts[taps // 2] + conv.bias.float()[:, None]
    for tap in range(taps):
        shift = min(abs(tap - taps // 2) * step, frames)
        if tap < taps // 2:
            result[..., shift:] += parts[tap][..., : frames - shift]
        elif tap > taps // 2:
            result[..., : frames - shift] += parts[tap][..., shift:]
    return result


def _rewrite(conv: Any, columns: Tensor) -> None:
    """Apply a convolution of width 1 and its GLU to ``(C, N)`` in place."""
    values, gates = conv.weight.flatten(1).to(columns.dtype).chunk(2)
    value_bias, gate_bias = conv.bias[:, None].to(columns.dtype).chunk(2)
    for start, stop in _blocks(columns.shape[1], len(columns)):
        block = columns[:, start:stop]
        gate = torch.addmm(gate_bias, gates, block).sigmoid_()
        torch.mul(torch.addmm(value_bias, values, block), gate, out=block)


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``count`` items of ``size`` values."""
    step = max(1, BLOCK // (3 * size))
    return ((start, min(start + step, count)) for start in range(0, count, step))
