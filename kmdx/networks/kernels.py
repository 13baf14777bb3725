"""Choose the project's own kernels for this processor from a table of measured processors.

The choice depends only on the processor and the build of torch, never on a measurement at run time. Kernels
add in different orders, so timing them could change the last bits of a result from run to run. The table is
``kernels.yaml``; ``python -m benchmarks.kernels`` measures a processor for it.
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
    """An entry of the table: a kind of processor, and the kernels that are faster on it."""

    name: str  # description of the processors
    products: bool  # whether float32 matrix products use oneDNN instead of MKL
    winograd: bool  # whether 3×3 convolutions use Winograd's minimal filtering in NNPACK
    attention: tuple[str, ...]
    """Precisions, ``fp32`` and ``bf16``, in which attention runs as matrix products, a block of queries at a
    time."""
    measured: str  # the measurements that this is based on
    architecture: str | None = None
    vendor: str | None = None
    family: int | None = None
    """``architecture``, ``vendor`` and ``family``: required properties of the processor, if given; see
    :class:`kmdx.host.Processor`."""
    features: tuple[str, ...] = ()  # required instruction sets

    def fit(self, found: Processor) -> bool:
        """Whether the entry applies to a processor."""
        return (
            self.architecture in (None, found.architecture)
            and self.vendor in (None, found.vendor)
            and self.family in (None, found.family)
            and found.features.issuperset(self.features)
        )


def table() -> list[Kernels]:
    """All entries; the last one applies to every processor."""
    text = (resources.files("kmdx") / "kernels.yaml").read_text("utf-8")
    return [Kernels(**{key: _as_tuple(value) for key, value in entry.items()}) for entry in load_yaml(text)]


def choose(found: Processor, entries: Collection[Kernels] | None = None) -> Kernels:
    """The first entry of the table that applies to a processor."""
    return next(entry for entry in entries or table() if entry.fit(found))


@cache
def here() -> Kernels:
    """The entry for the processor that this process runs on."""
    return choose(host.processor())


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
