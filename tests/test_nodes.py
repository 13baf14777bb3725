"""A new kind of node, or of window, is one class: plans read, write, draw, cost, prune and run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import yaml
from conftest import noise

from kmdx import Separator, drawing, nodes, plan_file, windows
from kmdx.documents import Number
from kmdx.errors import PlanError
from kmdx.nodes import Node
from kmdx.signals import Signal
from kmdx.windows import Window


@pytest.fixture(autouse=True)
def no_kind_remains() -> Iterator[None]:
    """Forget the classes that a test defines."""
    kinds, ways = [*nodes.KINDS], {**windows.WINDOWS}
    yield
    nodes.KINDS[:] = kinds
    windows.WINDOWS.clear()
    windows.WINDOWS.update(ways)


def define_delay() -> type[Node]:
    @dataclass(frozen=True)
    class Delay(Node):
        kind: ClassVar[str] = "Delay"
        signal: str
        samples: int

        @classmethod
        def read(cls, delay: str, samples: Annotated[int, Number(0, 1000)]) -> Node:
            return cls(delay, samples)

        @property
        def inputs(self) -> tuple[str, ...]:
            return (self.signal,)

        def settings(self) -> dict[str, Any]:
            return {"delay": self.signal, "samples": self.samples}

        def formula(self) -> str:
            return f"{self.signal} {self.samples} samples later"

        def renamed(self, names: Mapping[str, str]) -> Node:
            return Delay(names.get(self.signal, self.signal), self.samples)

        def run(self, name: str, song: Any) -> dict[str, Signal]:
            return {name: Signal(song.signals[self.signal].tensor.roll(self.samples, -1))}

    return Delay


def with_delay(small: Path, **delay: Any) -> str:
    tree = yaml.safe_load(small.read_text("utf-8"))
    stem = next(iter(tree["stems"]))
    tree["signals"]["late"] = {"delay": "mixture", "samples": 7, **delay}
    tree["stems"][stem] = {"sum": {"late": 0.5}}
    return yaml.safe_dump(tree, sort_keys=False)


def test_a_node_of_a_new_kind_is_run_drawn_and_written(small: Path, tmp_path: Path) -> None:
    define_delay()
    path = tmp_path / "plan.yaml"
    path.write_text(with_delay(small).replace("small.ckpt", str(small.with_name("small.ckpt"))), "utf-8")
    plan = plan_file.load(path)
    stem = plan.stems[0]
    assert plan.networks_used([stem]) == []
    assert plan_file.parse(plan_file.dump(plan), "again", tmp_path).nodes == plan.nodes
    assert plan.checksum([stem]) != plan.checksum(plan.stems)
    assert "mixture 7 samples later" in drawing.svg(plan, plan.stems)
    assert "late = mixture 7 samples later" in drawing.mermaid(plan, plan.stems)
    song = noise(5000)
    separated = Separator(path, device="cpu", stems=[stem]).separate(song, plan.sample_rate)[stem]
    assert np.array_equal(separated, 0.5 * np.roll(song, 7, 0))


def test_mistakes_in_a_node_of_a_new_kind_have_their_line(small: Path) -> None:
    with pytest.raises(PlanError, match=r"unknown key 'delay'"):
        plan_file.parse(with_delay(small), "plan", small.parent)
    define_delay()
    with pytest.raises(PlanError, match=r"line \d+: signals\.late\.samples: expected a whole number"):
        plan_file.parse(with_delay(small, samples=-1), "plan", small.parent)
    with pytest.raises(PlanError, match=r"signals\.late: unknown signal 'mixtur' [(]did you mean 'mixture'"):
        plan_file.parse(with_delay(small, delay="mixtur"), "plan", small.parent)


def test_a_window_of_a_new_kind_is_read_and_run(small: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Whole(Window):
        key: ClassVar[str] = "whole"
        length: int

        @classmethod
        def read(cls, weight: Any, rate: int, samples: Annotated[int, Number(1, 10**6)]) -> Window:
            return cls(samples)

        def settings(self) -> dict[str, Any]:
            return {"samples": self.length}

        @property
        def stride(self) -> int:
            return self.length

        def windows(self, samples: int) -> int:
            return 1

        def run(
            self,
            runner: Any,
            signal: Signal,
            estimates: Sequence[Signal],
            advance: Callable[[], None],
        ) -> None:
            for target, estimate in zip(estimates, runner([signal.tensor])[0], strict=True):
                target.put(0, estimate)
            advance()

        def __str__(self) -> str:
            return "the whole song"

    tree = yaml.safe_load(small.read_text("utf-8"))
    (network,) = tree["networks"].values()
    del network["overlap_add"]
    network["whole"] = {"samples": 22_050}
    network["weights"]["file"] = str(small.with_name("small.ckpt"))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), "utf-8")
    plan = plan_file.load(path)
    assert plan_file.parse(plan_file.dump(plan), "again", tmp_path).networks == plan.networks
    assert plan.capped(0.1).networks == plan.networks
    done: list[float] = []
    stems = Separator(path, device="cpu").separate(
        noise(22_050), plan.sample_rate, progress=lambda seconds, _: done.append(seconds)
    )
    assert all(np.isfinite(stem).all() and stem.any() for stem in stems.values())
    assert done[-1] == pytest.approx(0.5)
    assert done[0] == 0
    assert len(done) == 1 + len(plan.runs(plan.stems))


def test_a_combination_of_estimates_may_be_a_stem(small: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(small.read_text("utf-8"))
    tree["stems"] = {"vocals": {"combine": ["V.vocals", "V.other"], "mode": "max_wave"}}
    plan = plan_file.parse(yaml.safe_dump(tree, sort_keys=False), "plan", small.parent)
    assert plan_file.parse(plan_file.dump(plan), "again", tmp_path).nodes == plan.nodes
    assert "max_wave(V.vocals, V.other)" in drawing.mermaid(plan, plan.stems)
    song = noise(20_000)
    tree["stems"] = {name: {"sum": {f"V.{name}": 1}} for name in ("vocals", "other")}
    parts = plan_file.parse(yaml.safe_dump(tree, sort_keys=False), "parts", small.parent)
    one, two = Separator(parts, device="cpu").separate(song, 44100).values()
    made = Separator(plan, device="cpu").separate(song, 44100)["vocals"]
    assert np.array_equal(made, np.where(abs(one) >= abs(two), one, two))
