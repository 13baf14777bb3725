"""Random weights with which a network can be measured in place of its real ones.

They are seeded, and scaled so that signals keep their level from layer to layer. Nothing vanishes or
explodes, so the effect of a lower precision can be measured, too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

LEVEL = 0.5  # level of an estimate, relative to the input


def random_state(shapes: Mapping[str, Tensor], seed: str) -> dict[str, Tensor]:
    """A state dict of these shapes that keeps signals at their level."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    state = {}
    for name, like in shapes.items():
        if not like.is_floating_point():  # number of batches that a norm has seen
            state[name] = torch.zeros(like.shape, dtype=like.dtype)
            continue
        noise = torch.randn(like.shape, generator=generator)
        own = name.rpartition(".")[2]
        if own == "running_var":
            state[name] = 1 + 0.1 * noise.abs()
        elif own == "scale":  # of a residual branch
            state[name] = 0.1 + 0.01 * noise
        elif "bias" in own or own == "running_mean":
            state[name] = 0.02 * noise
        elif like.ndim >= 2:
            state[name] = noise / math.sqrt(math.prod(like.shape[1:]))
        else:  # of a norm
            state[name] = 1 + 0.1 * noise
    return state


def gain_to_level(network: nn.Module, samples: int) -> Tensor:
    """The gain that brings a network's estimates of ``samples`` samples of noise to :data:`LEVEL`."""
    noise = 0.1 * torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(0))  # as loud as music
    return LEVEL * noise.std() / network(noise).std()
