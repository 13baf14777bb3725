"""Engines: by which operations networks compute the same function."""

from __future__ import annotations

from kmdx.errors import PlanError, quoted

TUNED, PLAIN = "tuned", "plain"
ENGINES = {
    TUNED: "the project's own kernels where they are faster on this processor",
    PLAIN: "torch's own operations alone",
}
"""What each engine is, by its name."""

DEFAULT = TUNED


def check(name: str) -> str:
    """Return an engine's name; raises :class:`PlanError` if there is none of that name."""
    if name not in ENGINES:
        raise PlanError(f"unknown engine {quoted(name)}; available: {', '.join(ENGINES)}")
    return name
