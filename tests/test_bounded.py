"""kmdx.bounded: every call ends, and a failure is a one-line error."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from kmdx import bounded

SECONDS, MEMORY = 2, 5 * 10**8


def echo(*values: Any) -> list[Any]:
    print("what a library prints")
    return list(values)


def crash() -> None:
    ctypes.string_at(0)


def go_on() -> None:
    while True:
        pass


def fill_memory() -> int:
    return len(bytearray(10**10))


def leave() -> None:
    os._exit(7)


def complain() -> None:
    raise UnicodeError("two\nlines\a")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))  # noqa: PTH120


def test_arguments_and_results_are_passed() -> None:
    values = ["Café\udcff\0", 2**70, None, {"a": [1.5]}]
    assert bounded.call(echo, *values, seconds=SECONDS, memory=MEMORY) == values


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (crash, r"it crashes \(SIGSEGV\)"),
        (go_on, "it takes longer than the limit of 2 s"),
        (fill_memory, "it needs more memory than the limit of 500 MB"),
        (leave, r"it crashes \(exit code 0x7\)"),
        (complain, "lines$"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has other limits and exit codes")
def test_a_failed_call_is_a_one_line_error(function: Any, reason: str) -> None:
    with pytest.raises(bounded.Failed, match=reason) as failure:
        bounded.call(function, seconds=SECONDS, memory=MEMORY)
    assert len(str(failure.value).splitlines()) == 1


def test_a_process_that_waits_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, timeout: float, **__: Any) -> None:
        raise bounded.subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(bounded.subprocess, "run", run)
    with pytest.raises(bounded.Failed, match="takes longer"):
        bounded.call(echo, seconds=SECONDS, memory=MEMORY)


def read_text(path: str) -> str:
    return Path(path).read_text("utf-8")


def test_relative_paths_are_relative_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert bounded.call(read_text, "a.txt", seconds=SECONDS, memory=MEMORY) == "here"
