"""Music source separation with the ensemble of MDX23's leaderboard C.

>>> from kmdx import Separator
>>> stems = Separator("htdemucs").separate(samples, rate)  # {"vocals": (n, channels), …}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmdx.errors import KmdxError
    from kmdx.separator import Separator

__all__ = ["KmdxError", "Separator"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: torch takes a second."""
    if name == "Separator":
        from kmdx.separator import Separator

        return Separator
    if name == "KmdxError":
        from kmdx.errors import KmdxError

        return KmdxError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
