"""Separators over small networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmdx import Separator


@pytest.fixture(scope="module")
def separator(small: Path) -> Separator:
    """A separator with one network, for all stems and the accompaniment."""
    stems = ["bass", "drums", "other", "vocals", "accompaniment"]
    return Separator(small, device="cpu", stems=stems, precision="fp32")


@pytest.fixture(scope="module")
def whole(leaderboard: Path) -> Separator:
    """A separator with all of leaderboard C."""
    return Separator(leaderboard, device="cpu", precision="fp32")
