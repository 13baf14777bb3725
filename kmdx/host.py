"""Cores, memory and heap of this process, and facts about the processor. torch is imported only when needed.

Sizes are in bytes; a value that the system does not report is ``None``. A container's limits are in files of
the kernel's control groups, version 2 or 1; a process is limited by its own group and all groups around it.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

CPUINFO = Path("/proc/cpuinfo")
ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}
ARITHMETIC = {  # torch's name of an instruction set: the vendor's name
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_fp16": "AMX-FP16",
    "neon": "NEON",
    "bf16": "BF16",
    "fp16_arith": "FP16",
    "sve": "SVE",
}
VENDORS = {"authenticamd": "amd", "hygongenuine": "amd", "genuineintel": "intel"}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NO_THRESHOLD = 2**31 - 1
# Bytes. By default, glibc raises its thresholds to these values when large blocks are freed. After mallopt it
# no longer does so, and its initial values are far lower.
MMAP_THRESHOLD = 32 * 2**20
TRIM_THRESHOLD = 2 * MMAP_THRESHOLD


def usable_cores() -> int:
    """The number of cores that this process may use, rounded up."""
    return max(1, math.ceil(min(_visible_cores(), _cpu_quota())))


def is_running(pid: int) -> bool:
    """Whether a process exists on this machine; true if the system does not show it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        pass
    return True


def memory() -> int | None:
    """Bytes of memory that this process may use; ``None`` if the system does not report it."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    limits = [_words(folder / "memory.max") for folder in _folders("")]
    limits += [_words(folder / "memory.limit_in_bytes") for folder in _folders("memory")]
    return min([whole, *(int(words[0]) for words in limits if words and words[0].isdigit())])


def cap_threads() -> None:
    """Limit torch's threads to the cores of this process; by default, torch counts the machine's cores.

    A number set by the user with ``OMP_NUM_THREADS`` or ``torch.set_num_threads`` is not changed.
    """
    import torch

    visible, usable = _visible_cores(), usable_cores()
    by_default = {cores // share for cores in (visible, os.cpu_count() or 1) for share in (1, 2)}  # 2: SMT
    if any(map(os.environ.get, THREADS)) or torch.get_num_threads() not in by_default:
        return
    if usable < min(visible, torch.get_num_threads()):
        torch.set_num_threads(usable)


@contextmanager
def warm_heap() -> Iterator[None]:
    """Let glibc reuse large blocks instead of requesting new pages from the system each time.

    A network allocates and frees blocks of hundreds of megabytes. With malloc's defaults, each block is a new
    mapping whose pages are zeroed on first use. Measured on HDemucs (two cores of an AMD EPYC): 4.5 s instead
    of 5.3 s for ten seconds of signal. Afterwards all memory is returned, and glibc keeps blocks of up to
    32 MiB, as in any process that has freed large blocks. This works in the main thread, and has no effect
    with another C library.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, NO_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, NO_THRESHOLD)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        libc.malloc_trim(0)


def peak_memory(process: int | None = None) -> int | None:
    """Peak memory of a process, by default this one, in bytes, since its start or the last reset."""
    peak = kilobytes(Path(f"/proc/{_process(process)}/status"), "VmHWM")
    if peak is not None or process is not None:
        return peak
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_size * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(process: int | None = None) -> bool:
    """Restart measuring a process's peak memory; returns whether the system supports it (only Linux)."""
    try:
        Path(f"/proc/{_process(process)}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _process(process: int | None) -> str:
    return "self" if process is None else str(process)


def kilobytes(file: Path, name: str) -> int | None:
    """Bytes from a line ``name: 123 kB`` of a Linux status file; ``None`` if there is no such line."""
    found = field(file, name)
    return int(found.split()[0]) * 1024 if found else None


@dataclass(frozen=True)
class Processor:
    """A processor."""

    architecture: str  # ``x86_64``, ``arm64``, or the system's name of another one
    vendor: str | None  # ``amd`` or ``intel``; ``None`` for others, or if unknown
    family: int | None  # the family of an x86 processor, such as 25 for AMD's Zen 3 and Zen 4
    features: frozenset[str]
    """Instruction sets by torch's names, such as ``avx2``, ``avx512_f`` and ``amx_bf16``."""


def processor() -> Processor:
    """The processor that this process runs on."""
    machine = platform.machine().lower()
    architecture = ARCHITECTURES.get(machine, machine)
    vendor, family = field(CPUINFO, "vendor_id"), field(CPUINFO, "cpu family")
    if vendor is None and architecture == "x86_64":
        # Windows: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD". Macs with x86 have Intel's.
        described = platform.processor()
        found = re.search(r"Family (\d+)", described)
        vendor = "GenuineIntel" if sys.platform == "darwin" else described.rpartition(", ")[2]
        family = found and found[1]
    return Processor(
        architecture,
        VENDORS.get((vendor or "").lower()),
        int(family) if family and family.isdigit() else None,
        features(),
    )


def features() -> frozenset[str]:
    """Instruction sets of the processor, by the names in ``torch.cpu.get_capabilities()``."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, value in capabilities().items() if value is True)
    # Before torch 2.6, each instruction set has its own function, and fewer are known.
    widest = torch.backends.cpu.get_cpu_capability()
    found = {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512_f"}}.get(widest, set())
    older = {"_is_avx512_bf16_supported": "avx512_bf16", "_is_amx_tile_supported": "amx_bf16"}
    return frozenset(found | {name for test, name in older.items() if getattr(torch.cpu, test, bool)()})


def arithmetic() -> tuple[str, ...]:
    """Instruction sets for arithmetic, by the vendors' names, the widest last."""
    found = features()
    return tuple(name for key, name in ARITHMETIC.items() if key in found)


def capabilities() -> Mapping[str, Any]:
    """What torch reports about the processor; empty for old versions of torch."""
    import torch

    return getattr(torch.cpu, "get_capabilities", dict)()


def cpu_name() -> str:
    """The CPU's model, or else its architecture."""
    return _name_from_the_system() or platform.processor() or platform.machine() or "unknown CPU"


def _name_from_the_system() -> str | None:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    if sys.platform == "win32":
        import winreg

        try:
            with winreg.OpenKey(
                winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            ) as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        except OSError:
            return None
    return field(CPUINFO, "model name") or capabilities().get("cpu_name")


def field(file: Path, name: str) -> str | None:
    """The first value with this name in a file of ``name : value`` lines; ``None`` if there is none."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None


def _visible_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_quota() -> float:
    """The CPU quota of this process in cores; infinite without a limit."""
    limits = [_words(folder / "cpu.max") for folder in _folders("")]  # "200000 100000", or "max 100000"
    limits += [
        [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]  # -1 means no quota
        for folder in _folders("cpu")
    ]
    shares = [
        int(words[0]) / int(words[1]) for words in limits if len(words) == 2 and all(map(str.isdigit, words))
    ]
    return min(shares, default=math.inf)


def _folders(controller: str) -> Iterator[Path]:
    """Folders of the process's group and all groups around it; version 2 if ``controller`` is empty."""
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
