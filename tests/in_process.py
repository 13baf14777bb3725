"""Run a command's ``main`` in the tests' process, and read what it wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    """The result of a run of a command."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def exit_code(main: Callable[[], object], *arguments: object) -> int:
    """Run a command, whose name is the first argument; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(argument) for argument in arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def run(capsys: pytest.CaptureFixture[str], main: Callable[[], object], *arguments: object) -> Result:
    """Run a command as :func:`exit_code` does; return its result, which contains no traceback."""
    code = exit_code(main, *arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return Result(code, captured.out, captured.err)
