"""Engines: by which operations networks compute the same function."""

from __future__ import annotations

from kmdx.errors import PlanError
from kmdx.plan import suggest

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
        raise PlanError(f"no engine {name!r}{suggest(str(name), ENGINES)}; there are {', '.join(ENGINES)}")
    return name
