"""Facts about the processor that choices depend on: its maker, its family and its instructions."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}
VENDORS = {"authenticamd": "amd", "hygongenuine": "amd", "genuineintel": "intel"}


@dataclass(frozen=True)
class Processor:
    """A processor.

    Attributes
    ----------
    architecture : str
        ``x86_64``, ``arm64``, or what the system calls another one.
    vendor : str or None
        ``amd`` or ``intel``; ``None`` for others and where the system does not tell.
    family : int or None
        The family of an x86 processor, such as 25 for AMD's Zen 3 and Zen 4.
    features : frozenset of str
        Instruction sets by torch's names, such as ``avx2``, ``avx512_f`` and ``amx_bf16``.
    """

    architecture: str
    vendor: str | None
    family: int | None
    features: frozenset[str]


def here() -> Processor:
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
    # torch before 2.6 has a function for each instead, and knows fewer.
    widest = torch.backends.cpu.get_cpu_capability()
    found = {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512_f"}}.get(widest, set())
    older = {"_is_avx512_bf16_supported": "avx512_bf16", "_is_amx_tile_supported": "amx_bf16"}
    return frozenset(found | {name for test, name in older.items() if getattr(torch.cpu, test, bool)()})


def capabilities() -> Mapping[str, Any]:
    """What torch knows about the processor; nothing where it is too old to tell."""
    import torch

    return getattr(torch.cpu, "get_capabilities", dict)()


def field(file: Path, name: str) -> str | None:
    """The first value of that name in a file of ``name : value`` lines; ``None`` without one."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
