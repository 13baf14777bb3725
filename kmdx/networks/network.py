"""The one face of every network: a batch of stereo waveforms in, one estimate per source out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """What the rest of the library knows of a network.

    Attributes
    ----------
    sources : tuple of str
        The sources it estimates, in the order of its output.
    length : int or None
        The only length, in samples, that it accepts; ``None`` where any length will do.
    supported_dtypes : tuple of torch.dtype
        Half precisions whose error is far below that of its estimate.
    dtype : torch.dtype
        What it computes in.
    """

    sources: tuple[str, ...]
    length: int | None
    supported_dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype

    def __call__(self, batch: Tensor) -> Tensor:
        """Estimate the sources: float32 ``(B, 2, T)`` in, ``(B, len(sources), 2, T)`` out."""
        ...

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Make a network that was just loaded ready for inference, in place.

        It computes in ``dtype``, and parameters of convolutions and matrix products are stored so. With
        ``tuned``, layers that have a faster implementation use it; without, only torch's own operations run.
        """
        ...

    def narrow(self, sources: Sequence[str]) -> Network:
        """Return the same network computing only ``sources``, in that order, from shared weights."""
        ...
