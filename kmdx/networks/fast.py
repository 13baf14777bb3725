"""Makes a network that was just loaded ready for inference: its number format, and faster layers."""

from __future__ import annotations

import torch
from demucs.demucs import LocalState
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kmdx import engine as engines
from kmdx.networks.attention import ExactLocalState, FusedAttention
from kmdx.networks.convolution import (
    MatmulConvTranspose1d,
    MatmulConvTranspose2d,
    ShuffledConvTranspose2d,
    WinogradConv2d,
)
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.network import Network
from kmdx.networks.product import OneDnnLinear
from kmdx.networks.tfc_tdf import TfcTdf

FAST = (
    WinogradConv2d,
    MatmulConvTranspose1d,
    MatmulConvTranspose2d,
    ShuffledConvTranspose2d,
    OneDnnLinear,
    FusedAttention,
)
"""Layers with another way to compute the same: parameters and names in the state dict stay."""


def prepare(network: Network, dtype: torch.dtype = torch.float32, engine: str = engines.DEFAULT) -> None:
    """Change a network in place, for inference.

    Parameters
    ----------
    network : Network
        As :func:`kmdx.build.load_network` gives it. One that ONNX Runtime runs stays as it is.
    dtype : torch.dtype
        What it is to compute in; parameters of convolutions and matrix products are stored so too.
    engine : str
        ``tuned`` or ``plain``; see :mod:`kmdx.engine`.
    """
    tuned = engine == engines.TUNED
    if isinstance(network, DemucsNetwork):
        for module in network.model.modules():
            if isinstance(module, LocalState):
                module.__class__ = ExactLocalState
        if tuned:
            accelerate(network.model)
        network.dtype = dtype
        _store_products(network.model, dtype)
    elif isinstance(network, TfcTdf):
        if tuned:
            _fold_batch_norms(network)
            accelerate(network)
        network.dtype = dtype
        for between in (*network.encoding_blocks, *network.ds, network.bottleneck_block, *network.us):
            _store_between(between, dtype)
        for block in network.decoding_blocks:
            _store_between(block, dtype)


def accelerate(network: nn.Module) -> None:
    """Give every layer of a network, whoever built it, that has a faster way the class that takes it."""
    for module in network.modules():
        for fast in FAST:
            if fast.fits(module):
                module.__class__ = fast


def _fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch normalisation right behind a convolution into the convolution's parameters."""
    for layers in network.modules():
        if isinstance(layers, nn.Sequential) and len(layers) > 1 and isinstance(layers[1], nn.BatchNorm2d):
            conv = layers[0]
            if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
                transposed = isinstance(conv, nn.ConvTranspose2d)
                layers[0] = fuse_conv_bn_eval(conv, layers[1], transposed).requires_grad_(False)
                layers[1] = nn.Identity()


def _store_products(layers: nn.Module, dtype: torch.dtype) -> None:
    """Store what autocast would convert for every window; not where float32 is computed in any case."""
    if isinstance(layers, ExactLocalState):
        return
    if isinstance(layers, (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)):
        for parameter in layers.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    for part in layers.children():
        _store_products(part, dtype)


def _store_between(layers: nn.Module, dtype: torch.dtype) -> None:
    """Store a part of a U-Net; batch norms take half precision in and out with parameters in float32."""
    for module in layers.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
