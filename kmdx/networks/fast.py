"""Prepare networks for inference: use faster layers, and store parameters in the right precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from demucs.demucs import DConv, LocalState
from demucs.transformer import LayerScale, MyGroupNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kmdx.networks.attention import ExactLocalState, FusedAttention
from kmdx.networks.convolution import (
    MatmulConvTranspose1d,
    MatmulConvTranspose2d,
    ShuffledConvTranspose2d,
    WinogradConv2d,
)
from kmdx.networks.product import OneDnnLinear
from kmdx.networks.residual import BlockedDecoderLayer, BlockedEncoderLayer

AnyModule = TypeVar("AnyModule", bound=nn.Module)

FAST = (
    WinogradConv2d,
    MatmulConvTranspose1d,
    MatmulConvTranspose2d,
    ShuffledConvTranspose2d,
    OneDnnLinear,
    FusedAttention,
    BlockedEncoderLayer,
    BlockedDecoderLayer,
)
"""Layers with faster implementations, and with the same parameters and state dict."""


def make_local_attention_exact(network: nn.Module) -> None:
    """Make local attention compute in float32, whatever the network's precision."""
    for module in network.modules():
        if isinstance(module, LocalState):
            module.__class__ = ExactLocalState


def accelerate(network: nn.Module, winograd: bool = True) -> None:
    """Replace the class of every layer that has a faster implementation; optionally not Winograd's."""
    for module in network.modules():
        for fast in FAST:
            if fast.fits(module) and (winograd or fast is not WinogradConv2d):
                module.__class__ = fast


def fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch normalization directly after a convolution into the convolution's parameters."""
    for layers in network.modules():
        if isinstance(layers, nn.Sequential) and len(layers) > 1 and isinstance(layers[1], nn.BatchNorm2d):
            conv = layers[0]
            if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
                transposed = isinstance(conv, nn.ConvTranspose2d)
                layers[0] = fuse_conv_bn_eval(conv, layers[1], transposed).requires_grad_(False)
                layers[1] = nn.Identity()


def store_products(layers: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters once instead of for every window by autocast, except in layers that use float32."""
    if isinstance(layers, ExactLocalState):
        return
    if isinstance(layers, (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)):
        for parameter in layers.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    for part in layers.children():
        store_products(part, dtype)


def store_all_but_batch_norms(layers: nn.Module, dtype: torch.dtype) -> None:
    """Convert a part of a U-Net, except norms that accept half precision with float32 parameters."""
    for module in layers.modules():
        if not isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


class _HalfNorm:
    """A norm that reads and writes the precision of its parameters, and computes in float32.

    On a GPU, autocast would convert its input to float32, and that of the next layer to half precision again.
    Kernels for GPUs require parameters in the precision of the input.
    """

    weight: Any

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a tensor of any floating type."""
        with torch.autocast(x.device.type, enabled=False):
            normalized: Tensor = super().forward(x.to(self.weight.dtype))  # type: ignore[misc]
        return normalized


class HalfGroupNorm(_HalfNorm, nn.GroupNorm):
    """A group normalization in half precision."""


class HalfLayerNorm(_HalfNorm, nn.LayerNorm):
    """A layer normalization in half precision."""


class HalfTransposedGroupNorm(_HalfNorm, MyGroupNorm):
    """The group normalization of Demucs' transformer in half precision."""


class HalfDConv(DConv):
    """Demucs' residual branches, which are scaled and added by one operation."""

    layers: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, T)``."""
        for layer in self.layers:
            *branch, last = layer
            y = x
            for module in branch:
                y = module(y)
            x = torch.addcmul(x, last.scale[:, None], y)
        return x


HALF: dict[type, type] = {
    nn.GroupNorm: HalfGroupNorm,
    nn.LayerNorm: HalfLayerNorm,
    MyGroupNorm: HalfTransposedGroupNorm,
    DConv: HalfDConv,
    LayerScale: LayerScale,
    nn.Embedding: nn.Embedding,
}
"""Layers between products, by their class in float32."""


def store_others(layers: nn.Module, dtype: torch.dtype) -> None:
    """Make everything between products read and write float16, too.

    With the real htdemucs, the error rises from -59 to -57 dB. In bfloat16, which has a larger error already,
    nothing changes.
    """
    for module in layers.modules():
        if type(module) in HALF and dtype == torch.float16:
            module.__class__ = HALF[type(module)]
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def source_indices(available: Sequence[str], sources: Sequence[str]) -> list[int]:
    """The positions of sources in a network's output; raises :class:`ValueError` if one is not available."""
    unknown = [source for source in sources if source not in available]
    if unknown:
        raise ValueError(f"this network estimates {', '.join(available)}, not {', '.join(unknown)}")
    return [available.index(source) for source in sources]


def shared_copy(network: AnyModule) -> AnyModule:
    """A copy of a network that shares its parameters and buffers."""
    return copy.deepcopy(network, {id(each): each for each in (*network.parameters(), *network.buffers())})


def keep_sources(conv: nn.modules.conv._ConvNd, indices: Sequence[int], count: int) -> None:
    """Keep only some of the ``count`` equal groups of a convolution's output channels."""
    axis = 1 if conv.transposed else 0
    weight = conv.weight.detach().unflatten(axis, (count, -1))
    kept = weight.index_select(axis, torch.tensor(indices, device=weight.device)).flatten(axis, axis + 1)
    conv.weight = nn.Parameter(kept, requires_grad=False)
    conv.out_channels = kept.shape[axis]
    if conv.bias is not None:
        bias = conv.bias.detach().unflatten(0, (count, -1))[indices].flatten()
        conv.bias = nn.Parameter(bias, requires_grad=False)
