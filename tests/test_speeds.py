"""Speed levels as data."""

from __future__ import annotations

import pytest

from kmdx import plan_file, speeds
from kmdx.errors import PlanError
from kmdx.speeds import Speed
from kmdx.windows import OverlapAdd


def test_the_levels_get_faster_one_by_one() -> None:
    levels = speeds.levels()
    assert list(levels) == ["leaderboard", "balanced", "fast"]
    overlaps = [level.overlap for level in levels.values()]
    assert overlaps == sorted(overlaps, reverse=True)
    assert len(set(overlaps)) == 3
    assert [level.force_half for level in levels.values()] == [False, False, True]
    assert len({level.title for level in levels.values()}) == 3


def test_the_default_is_as_published() -> None:
    level = speeds.get(speeds.DEFAULT)
    assert (level.overlap, level.force_half) == (1.0, False)
    for name in plan_file.names():
        published = plan_file.load(name)
        assert published.capped(level.overlap) == published


@pytest.mark.parametrize("name", speeds.levels())
def test_a_level_is_found_by_its_name(name: str) -> None:
    level = speeds.get(name)
    assert isinstance(level, Speed)
    assert level is speeds.levels()[name]


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_a_level_needs_less_arithmetic_and_caps_the_overlap(name: str) -> None:
    published = plan_file.load("leaderboard_c")
    level = speeds.get(name)
    capped = published.capped(level.overlap)
    overlaps = [
        use.chunking.overlap for use in capped.networks.values() if isinstance(use.chunking, OverlapAdd)
    ]
    assert max(overlaps) == level.overlap
    assert capped.gflops(capped.stems) < published.gflops(published.stems)


@pytest.mark.parametrize(
    ("name", "hint"), [("fats", " (did you mean 'fast'?)"), ("warp", ""), ("", ""), (None, ""), (3, "")]
)
def test_an_unknown_speed_is_a_one_line_error(name: object, hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        speeds.get(name)
    assert str(caught.value) == f"unknown speed {name!r}{hint}; available: leaderboard, balanced, fast"
