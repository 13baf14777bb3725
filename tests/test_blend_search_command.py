"""What the blend search's command refuses, in one line each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import blend_cases as cases
import pytest
import yaml
from blend_cases import Result

collected, copied, data, plan_of_two, run, staged = (
    cases.collected,
    cases.copied,
    cases.data,
    cases.plan_of_two,
    cases.run,
    cases.staged,
)


def test_mistakes_are_one_line_errors(
    run: Callable[..., Result], collected: Path, copied: Path, data: Path, plan_of_two: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    strings = tmp_path / "strings.yaml"
    content = yaml.safe_load(plan_of_two.read_text("utf-8"))
    content["stems"] = {"strings": content["stems"]["other"]}
    strings.write_text(yaml.safe_dump(content).replace("one.ckpt", str(plan_of_two.with_name("one.ckpt"))))
    (copied / "songs" / "a.json").write_text("{")
    for arguments, message in (
        (("solve", tmp_path), "is not a collection"),
        (("solve", tmp_path / "other"), "is another kind of run"),
        (("solve", copied), "a.json is damaged"),
        (("solve", collected, "--prior", "much"), "--prior much: expected auto"),
        (("solve", collected, "--prior", "-1"), "--prior -1: expected auto"),
        (("solve", collected, "--prior", "nan"), "--prior nan: expected auto"),
        (("solve", collected, "--folds", "9"), "--folds 9: expected 2 to 4"),
        (("solve", collected, "-o", tmp_path / "found.txt"), "ends in .yaml"),
        (("solve", collected, "-o", tmp_path / "no" / "found.yaml"), "no folder"),
        (("collect", "htdemuks", data, "-o", tmp_path / "new"), "unknown ensemble 'htdemuks'"),
        (("collect", strings, data, "-o", tmp_path / "new"), "no strings among its stems"),
        (("collect", plan_of_two, tmp_path / "nowhere", "-o", tmp_path / "new"), "cannot be read"),
        (("collect", plan_of_two, data, "-o", tmp_path / "new", "--tracks", "zz"), "is named 'zz'"),
        (("collect", plan_of_two, data, "-o", tmp_path / "new", "--device", "moon"), "unknown device 'moon'"),
        (("collect", plan_of_two, data, "-o", data), "contains other files"),
    ):
        done = run(*arguments)
        assert done.code == 2, arguments
        assert message in done.err, (message, done.err)
        assert len([line for line in done.err.splitlines() if not line.startswith("warning")]) == 1, done.err
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".txt"]


@pytest.mark.parametrize("budget", ["0", "-1", "inf", "nan", "1e308"])
def test_impossible_budgets_are_refused(
    run: Callable[..., Result], collected: Path, tmp_path: Path, budget: str
) -> None:
    done = run("members", collected, "--budget", budget, "--svg", tmp_path / "x.svg")
    assert done.code == 2
    assert "expected a real-time factor above 0" in done.err


def test_an_unwritable_scratch_folder_is_refused(
    run: Callable[..., Result], staged: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # restored after the test
    done = run("stages", staged, data, "--scratch", "/proc", "--dry-run")
    assert done.code == 2
    assert "name another folder with --scratch" in done.err


def test_unwritable_outputs_are_refused_before_any_work(
    run: Callable[..., Result], collected: Path, tmp_path: Path
) -> None:
    for arguments in (("solve", "--json"), ("members", "--json"), ("members", "--svg")):
        done = run(arguments[0], collected, arguments[1], tmp_path / "no" / "file")
        assert (done.code, done.out) == (2, "")
        assert "no folder" in done.err
        assert "is a folder" in run(arguments[0], collected, arguments[1], tmp_path).err
