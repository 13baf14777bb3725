"""Who may use a device now: the threads of a process take turns, and forked processes are refused.

A song uses all cores of the CPU, or a GPU's whole memory budget, so two songs at a time on one device would
only be slower. Songs on different devices are separated at the same time.

A forked process has the memory of its parent, but not its threads. torch would wait forever for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kmdx.errors import DeviceError

_turns: dict[str, threading.RLock] = {}  # by device; reentrant, for a callback that separates another song
_owner: int | None = None
"""The process whose torch has threads, or uses a GPU, for this package. A forked process inherits it."""

if hasattr(os, "register_at_fork"):  # not on Windows
    # A thread that does not exist in the forked process may hold its turn.
    os.register_at_fork(after_in_child=_turns.clear)


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Wait until no other thread uses a device, and use it alone.

    Raises :class:`DeviceError` as :func:`check_process` does.
    """
    check_process(device)
    with _turns.setdefault(str(device), threading.RLock()):
        yield


def check_process(device: torch.device) -> None:
    """Raise :class:`DeviceError` in a process forked from one whose torch has threads or uses a GPU.

    Otherwise, remember whether torch has them in this process from now on.
    """
    global _owner
    if _owner not in (None, os.getpid()):
        raise DeviceError(
            f"process {os.getpid()} was forked from process {_owner}, which had already used kmdx; torch's "
            "threads and GPUs do not work in a forked process: start processes with "
            "multiprocessing.get_context('spawn')"
        )
    if device.type != "cpu" or torch.get_num_threads() > 1:
        _owner = os.getpid()
