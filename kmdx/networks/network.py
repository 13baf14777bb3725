"""The interface of every network: a batch of stereo waveforms in, one estimate per source out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """The interface of a network."""

    sources: tuple[str, ...]  # the sources it estimates, in the order of its output
    length: int | None  # the only length, in samples, that it accepts; ``None`` if it accepts any length
    supported_dtypes: tuple[torch.dtype, ...]  # half precisions whose error is far below that of its estimate
    dtype: torch.dtype  # its precision

    def __call__(self, batch: Tensor) -> Tensor:
        """Estimate the sources: float32 ``(B, 2, T)`` in, ``(B, len(sources), 2, T)`` out."""
        ...

    def forward(self, batch: Tensor) -> Tensor:
        """Do the same without kernels of torch's compiler."""
        ...

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Prepare a newly loaded network for inference, in place.

        It computes in ``dtype``, in which it also stores the parameters of convolutions and matrix products.
        With ``tuned``, layers use faster implementations where they exist; otherwise, only torch's own.
        """
        ...

    def narrow(self, sources: Sequence[str]) -> Network:
        """Return a network with shared weights that computes only ``sources``, in this order."""
        ...

    def compile(self, **options: Any) -> None:
        """Let torch's compiler make its kernels at its first call with each shape; see ``torch.compile``."""
        ...
