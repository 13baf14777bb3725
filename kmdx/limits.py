"""How many cores and how much memory this process may use, where a container is given less than the machine.

A container's limits stand in files of the kernel's control groups, of version 2 or 1; each group is bound by
those around it as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def usable_cores() -> int:
    """How many cores this process may use, a part of one counted as one."""
    return max(1, math.ceil(min(_visible_cores(), _cpu_quota())))


def memory() -> int | None:
    """Bytes of memory that this process may use; ``None`` where the system does not tell."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    limits = [_words(folder / "memory.max") for folder in _folders("")]
    limits += [_words(folder / "memory.limit_in_bytes") for folder in _folders("memory")]
    return min([whole, *(int(words[0]) for words in limits if words and words[0].isdigit())])


def cap_threads() -> None:
    """Let torch use no more threads than this process has cores, which it takes for all of the machine's.

    What the user has set, by ``OMP_NUM_THREADS`` or ``torch.set_num_threads``, is left alone.
    """
    import torch

    visible, usable = _visible_cores(), usable_cores()
    by_default = {cores // share for cores in (visible, os.cpu_count() or 1) for share in (1, 2)}  # 2: SMT
    if any(map(os.environ.get, THREADS)) or torch.get_num_threads() not in by_default:
        return
    if usable < min(visible, torch.get_num_threads()):
        torch.set_num_threads(usable)


def _visible_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_quota() -> float:
    """Cores' worth of time that this process gets; infinite without a limit."""
    limits = [_words(folder / "cpu.max") for folder in _folders("")]  # "200000 100000", or "max 100000"
    limits += [
        [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]  # a quota of -1 is none
        for folder in _folders("cpu")
    ]
    shares = [
        int(words[0]) / int(words[1]) for words in limits if len(words) == 2 and all(map(str.isdigit, words))
    ]
    return min(shares, default=math.inf)


def _folders(controller: str) -> Iterator[Path]:
    """The process's group and those around it: of version 1 for one controller, of version 2 without."""
    root = GROUPS / controller
    yield root
    for line in _lines(OWN_GROUPS):  # "4:cpu,cpuacct:/docker/12ab", in version 2 "0::/docker/12ab"
        _, controllers, own = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            parts = [part for part in own.split("/") if part not in ("", "..")]
            yield from (root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()
