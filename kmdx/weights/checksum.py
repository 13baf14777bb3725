"""Checksums: of a file's bytes, and of a network's tensors whatever file holds them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kmdx import files

if TYPE_CHECKING:
    from torch import Tensor


def file_sha256(path: Path) -> str:
    """The sha256 of a file, remembered for as long as its size and time stay the same."""
    stat = path.stat()
    return _file_sha256(path, stat.st_size, stat.st_mtime_ns)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """The sha256 of a state dict: the same for one network in float16 and widened to float32.

    It covers the sorted names, the shapes, and the values in float16 where that loses nothing.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = _narrowest(state[name].detach().cpu())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, modified: int) -> str:
    return files.sha256(path)


def _narrowest(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if half.to(tensor.dtype).equal(tensor) else tensor


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
