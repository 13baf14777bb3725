"""Speed levels: less overlap and lower precision for faster results. The numbers are in speeds.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated

from kmdx.documents import Number, parse
from kmdx.errors import PlanError, quoted, suggest

DEFAULT = "leaderboard"


@dataclass(frozen=True)
class Speed:
    """One speed level."""

    title: str  # a short description
    overlap: Annotated[float, Number(0, 1)] = 1.0
    """The largest overlap of a network's segments, as a fraction of their length."""
    cpu_half: bool = False  # whether precision ``auto`` uses half precision also on CPUs that are fast at it
    force_half: bool = False  # whether to use half precision also for networks that lose accuracy with it


@cache
def levels() -> dict[str, Speed]:
    """All levels by name, the slowest first."""
    text = (resources.files("kmdx") / "speeds.yaml").read_text("utf-8")
    return {name: part.read(Speed) for name, part in parse(text).entries().items()}


def get(name: str) -> Speed:
    """Return a level; raises :class:`PlanError` if no such level exists."""
    known = levels()
    if name not in known:
        raise PlanError(
            f"unknown speed {quoted(name)}{suggest(str(name), known)}; available: {', '.join(known)}"
        )
    return known[name]
