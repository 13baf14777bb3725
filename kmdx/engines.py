"""Engines: alternative implementations of the same network functions."""

from __future__ import annotations

from kmdx.errors import PlanError, quoted, suggest

TUNED, PLAIN = "tuned", "plain"
ENGINES = {
    TUNED: "the project's own kernels where they are faster on this processor",
    PLAIN: "only torch's own operations",
}
"""A description of each engine, by name."""

DEFAULT = TUNED


def check(name: str) -> str:
    """Return an engine's name; raises :class:`PlanError` if no such engine exists."""
    if name not in ENGINES:
        hint = suggest(str(name), ENGINES)
        raise PlanError(f"unknown engine {quoted(name)}{hint}; available: {', '.join(ENGINES)}")
    return name
