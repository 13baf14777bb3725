"""Speed levels: less overlap and lower precision, for faster results. Numbers in speeds.yaml."""

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
    """One level.

    Attributes
    ----------
    title : str
        For people.
    overlap : float
        No network's segments overlap more than this share of their length.
    cpu_half : bool
        With precision ``auto``, half precision also on CPUs that are fast at it.
    force_half : bool
        Half precision also for networks that do not bear it well.
    """

    title: str
    overlap: Annotated[float, Number(0, 1)] = 1.0
    cpu_half: bool = False
    force_half: bool = False


@cache
def levels() -> dict[str, Speed]:
    """All levels by name, the slowest first."""
    text = (resources.files("kmdx") / "speeds.yaml").read_text("utf-8")
    return {name: part.read(Speed) for name, part in parse(text).entries().items()}


def get(name: str) -> Speed:
    """Return a level; raises :class:`PlanError` if there is none of that name."""
    known = levels()
    if name not in known:
        raise PlanError(
            f"unknown speed {quoted(name)}{suggest(str(name), known)}; available: {', '.join(known)}"
        )
    return known[name]
