"""Which of two ways to compute the same is sooner on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

WORTH = 1.1  # how many times sooner the other way must be to be taken


def sooner(other: Callable[[], Tensor], ordinary: Callable[[], Tensor]) -> bool:
    """Time both, the best of three each; tell whether the other way is worth taking."""
    return _seconds(ordinary) > WORTH * _seconds(other)


def _seconds(compute: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        compute()
        times.append(time.perf_counter() - begin)
    return min(times)
