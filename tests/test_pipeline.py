"""kmdx.pipeline: what runs in parallel, and how errors and Ctrl-C are handled."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kmdx import pipeline
from kmdx.errors import KmdxError

PATIENCE = 120  # seconds


class Line:
    """Three steps that note what they did; with errors, and events to wait for, by the step and item."""

    def __init__(self, errors: dict[str, BaseException] | None = None, waits: dict[str, str] | None = None):
        self.errors = errors or {}
        self.waits = waits or {}
        self.begun: dict[str, threading.Event] = {
            f"{step} {item}": threading.Event() for step in ("read", "work", "write") for item in "abcd"
        }
        self.log: list[str] = []
        self.threads: dict[str, set[int]] = {}

    def step(self, step: str, item: str) -> str:
        name = f"{step} {item}"
        self.log.append(name)
        self.threads.setdefault(step, set()).add(threading.get_ident())
        self.begun[name].set()
        if name in self.waits:
            assert self.begun[self.waits[name]].wait(PATIENCE), f"{self.waits[name]} did not begin"
        if name in self.errors:
            raise self.errors[name]
        self.log.append(f"{name} done")
        return name

    def read(self, item: str) -> str:
        return self.step("read", item)

    def work(self, item: str, read: str) -> str:
        assert read == f"read {item}"
        return self.step("work", item)

    def write(self, item: str, result: str) -> None:
        assert result == f"work {item}"
        self.step("write", item)

    def fail(self, item: str, error: KmdxError) -> None:
        self.log.append(f"fail {item}: {error}")

    def run(self, items: str = "abcd") -> Line:
        pipeline.run(items, self.read, self.work, self.write, self.fail)
        return self

    def reported(self) -> list[str]:
        return [
            entry
            for entry in self.log
            if entry.startswith("fail") or (entry.endswith("done") and "write" in entry)
        ]

    def place(self, entry: str) -> int:
        return self.log.index(entry)


def test_each_item_is_read_worked_on_and_written_in_order() -> None:
    line = Line().run()
    for step in ("read", "work", "write"):
        done = [entry for entry in line.log if entry.startswith(step) and entry.endswith("done")]
        assert done == [f"{step} {item} done" for item in "abcd"]
    assert line.threads["work"] == {threading.get_ident()}
    assert not line.threads["work"] & (line.threads["read"] | line.threads["write"])


def test_a_single_item_is_processed() -> None:
    assert Line().run("a").reported() == ["write a done"]


def test_the_next_is_read_and_the_last_is_written_during_the_work() -> None:
    line = Line(
        waits={"work a": "read b", "work b": "read c", "write a": "work b", "write b": "work c"}
    ).run()
    assert line.reported() == [f"write {item} done" for item in "abcd"]


def test_no_more_than_one_is_read_ahead_and_one_is_written() -> None:
    line = Line(waits={"write a": "work b", "write b": "work c"}).run()
    for before, now, after in ("abc", "bcd"):
        assert line.place(f"work {before} done") < line.place(f"read {after}")
        assert line.place(f"write {before} done") < line.place(f"work {after}")
        assert line.place(f"work {now}") < line.place(f"write {now}")


@pytest.mark.parametrize("step", ["read", "work", "write"])
@pytest.mark.parametrize("item", list("abcd"))
def test_an_error_is_reported_in_its_place_and_the_rest_go_on(step: str, item: str) -> None:
    line = Line({f"{step} {item}": KmdxError("no")}).run()
    assert line.reported() == [f"fail {i}: no" if i == item else f"write {i} done" for i in "abcd"]


def test_an_error_is_reported_after_the_write_before_it() -> None:
    line = Line({"read b": KmdxError("no")}, waits={"write a": "read c"}).run()
    assert line.reported() == ["write a done", "fail b: no", "write c done", "write d done"]


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_an_unexpected_error_ends_the_pipeline(step: str) -> None:
    line = Line({f"{step} b": RuntimeError("a bug")})
    with pytest.raises(RuntimeError, match="a bug"):
        line.run()
    assert line.reported() == ["write a done"]
    assert "work d" not in line.log


def test_ctrl_c_waits_for_the_current_write() -> None:
    line = Line({"work b": KeyboardInterrupt()}, waits={"work b": "write a"})
    with pytest.raises(pipeline.Interrupted) as stopped:
        line.run()
    assert stopped.value.item == "b"
    assert line.reported() == ["write a done"]


def test_ctrl_c_while_waiting_for_a_read_ends_the_pipeline() -> None:
    line = Line({"read b": KeyboardInterrupt()})
    with pytest.raises(pipeline.Interrupted) as stopped:
        line.run()
    assert stopped.value.item == "b"
    assert line.reported() == ["write a done"]


def test_ctrl_c_during_the_last_write_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    result = pipeline.Future.result

    def interrupted(future: pipeline.Future[Any]) -> Any:
        if not line.begun["work a"].is_set():
            return result(future)
        assert line.begun["write a"].wait(PATIENCE)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Future, "result", interrupted)
    with pytest.raises(pipeline.Interrupted) as stopped:
        line.run("a")
    assert stopped.value.item is None
    assert line.reported() == ["write a done"]
