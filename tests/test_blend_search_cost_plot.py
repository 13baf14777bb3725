"""The picture of scores against costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from evaluator.blend_search import cost_plot


def candidate(members: str, score: float, factor: float) -> Any:
    return SimpleNamespace(members=frozenset(members), score=score, real_time_factor=factor)


ALL = candidate("ABC", 9.2, 5.0)
WITHOUT = {"A": candidate("BC", 8.9, 3.2), "<B>": candidate("AC", 9.1, 4.0)}


def test_every_set_is_a_dot_with_its_members_score_and_cost() -> None:
    drawn = cost_plot.svg(ALL, WITHOUT, [candidate("C", 8.0, 1.0)])
    assert drawn.count("<title>") == 4
    assert "<title>A, B, C: 9.200 dB, 5.00 ×</title>" in drawn
    assert ">without &lt;B&gt;</text>" in drawn


def test_a_budget_beyond_all_costs_is_drawn() -> None:
    assert ">budget 7.5 ×</text>" in cost_plot.svg(ALL, WITHOUT, budget=7.5)
    assert "budget" not in cost_plot.svg(ALL, WITHOUT)


def test_the_same_scores_give_the_same_bytes() -> None:
    assert cost_plot.svg(ALL, WITHOUT) == cost_plot.svg(ALL, WITHOUT)
