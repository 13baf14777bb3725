"""Which of the project's own kernels this processor runs, by a table of measured processors.

The choice follows from facts about the processor and the build of torch, never from a measurement at run
time: the kernels differ in the order of their sums, so the same command would give other bits in a busier
minute. The table is ``kernels.yaml``; ``python -m benchmarks.kernels`` measures an entry of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from kmdx import host
from kmdx.documents import load_yaml
from kmdx.host import Processor


@dataclass(frozen=True)
class Kernels:
    """An entry of the table: the processors that it is for, and which kernels pay on them.

    Attributes
    ----------
    name : str
        The processors, in words.
    products : bool
        Matrix products in float32 by oneDNN where torch would ask MKL.
    winograd : bool
        3×3 convolutions by Winograd's minimal filtering in NNPACK.
    attention : tuple of str
        Precisions, ``fp32`` and ``bf16``, in which attention runs as matrix products, a block of queries
        at a time.
    measured : str
        What this is based on.
    architecture, vendor, family
        What a processor must be, if given; see :class:`kmdx.host.Processor`.
    features : tuple of str
        Instruction sets that it must have.
    """

    name: str
    products: bool
    winograd: bool
    attention: tuple[str, ...]
    measured: str
    architecture: str | None = None
    vendor: str | None = None
    family: int | None = None
    features: tuple[str, ...] = ()

    def fit(self, found: Processor) -> bool:
        """Whether a processor is one of these."""
        return (
            self.architecture in (None, found.architecture)
            and self.vendor in (None, found.vendor)
            and self.family in (None, found.family)
            and found.features.issuperset(self.features)
        )


def table() -> list[Kernels]:
    """All entries; the last one fits every processor."""
    text = (resources.files("kmdx") / "kernels.yaml").read_text("utf-8")
    return [Kernels(**{key: _frozen(value) for key, value in entry.items()}) for entry in load_yaml(text)]


def choose(found: Processor, entries: Collection[Kernels] | None = None) -> Kernels:
    """The first entry of the table that fits a processor."""
    return next(entry for entry in entries or table() if entry.fit(found))


@cache
def here() -> Kernels:
    """The entry of the processor that this process runs on."""
    return choose(host.processor())


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
