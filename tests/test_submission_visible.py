"""What is read from a submission's folder before it runs, and what its files cannot make visible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluator import process, replies, results, visible
from evaluator.process import SubmissionError
from evaluator.records import RecordError, SongRecord
from evaluator.sandbox import Spec, _rules
from evaluator.startup.sitecustomize import OwnModules
from kmdx.files import remove_tree

POSIX = pytest.mark.skipif(os.name != "posix", reason="links and FIFOs are POSIX's")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "submission" / "my_submission").mkdir(parents=True)
    (tmp_path / "submission" / "my_submission" / "model.py").write_text("x = 1")
    return tmp_path / "submission"


def test_the_commit_is_read_without_running_commands_from_the_repository(
    folder: Path, tmp_path: Path
) -> None:
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    ran = tmp_path / "ran"
    (tmp_path / "spy.sh").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "spy.sh").chmod(0o755)
    subprocess.run([*git, "config", "core.fsmonitor", str(tmp_path / "spy.sh")], check=True)
    assert results._git_commit(folder) == head[:12]
    subprocess.run([*git, "pack-refs", "--all"], check=True, env={**os.environ, "GIT_CONFIG_COUNT": "1",
                   "GIT_CONFIG_KEY_0": "core.fsmonitor", "GIT_CONFIG_VALUE_0": "false"})  # fmt: skip
    ran.unlink(missing_ok=True)
    assert results._git_commit(folder) == head[:12], "packed"
    assert not ran.exists()


@pytest.mark.parametrize(
    "head", ["ref: refs/../../secret", "ref: refs/heads/none", "x" * 40, "", "ref: /etc/passwd"]
)
def test_a_malformed_head_is_not_a_commit(folder: Path, head: str) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text(head)
    assert results._git_commit(folder) is None


@POSIX
def test_only_regular_files_of_a_submission_are_read(folder: Path, tmp_path: Path) -> None:
    before, _ = results.describe_foreign(folder)
    (folder / "endless.th").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.th")
    linked, big = results.describe_foreign(folder)
    assert (linked != before, big) == (True, [])
    (tmp_path / "elsewhere").mkdir()
    (folder / "loop").symlink_to(folder)
    results.describe_foreign(folder)


def test_code_next_to_a_virtual_environments_settings_is_part_of_a_submission(folder: Path) -> None:
    (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    (folder / "lib" / "python3.11" / "site-packages" / "package.py").write_text("x = 1")
    (folder / "other").mkdir()
    before = results.describe_foreign(folder)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin")
    assert [path.name for path in visible.entries_of(folder)] == [
        "lib", "my_submission", "other", "pyvenv.cfg", "model.py",
    ]  # fmt: skip
    (folder / "my_submission" / "model.py").write_text("x = 2")
    (folder / "other" / "pyvenv.cfg").write_text("home = /usr/bin")
    after = results.describe_foreign(folder)
    assert before != after
    assert folder / "other" / "pyvenv.cfg" not in visible.entries_of(folder)


def test_the_run_and_the_data_are_not_part_of_a_submission(folder: Path) -> None:
    before, _ = results.describe_foreign(folder)
    (folder / "out").mkdir()
    (folder / "out" / "evaluation.log").write_text("anything")
    assert results.describe_foreign(folder)[0] != before
    assert results.describe_foreign(folder, [folder / "out"])[0] == before


def test_a_giant_submission_is_refused_by_its_size(folder: Path) -> None:
    with (folder / "model.th").open("wb") as file:
        file.truncate(results.MAX_BYTES + 1)
    with pytest.raises(SubmissionError, match=r"more than 100 GB: move .* such as model\.th, elsewhere"):
        results.describe_foreign(folder)


@POSIX
@pytest.mark.parametrize("how", ["pth", "finder", "home", "pipe"])
def test_a_submissions_own_environment_makes_nothing_else_visible(
    folder: Path, tmp_path: Path, how: str
) -> None:
    secret = tmp_path / "secret"
    (secret / "bin").mkdir(parents=True)
    (secret / "bin" / "python3").write_text("")
    python = folder / ".venv" / "bin" / "python"
    packages = folder / ".venv" / "lib" / "python3.11" / "site-packages"
    python.parent.mkdir(parents=True)
    packages.mkdir(parents=True)
    python.symlink_to(sys.executable)
    if how == "pth":
        (packages / "x.pth").write_text(f"{secret}\n")
    elif how == "finder":
        (packages / "__editable___x_finder.py").write_text(f"MAPPING = {{'x': {str(secret)!r}}}\n")
    elif how == "home":
        (folder / ".venv" / "pyvenv.cfg").write_text(f"home = {secret / 'bin'}\n")
    else:
        os.mkfifo(packages / "x.pth")
    found = visible.interpreter_folders(python, {}, folder)
    assert folder / ".venv" in found
    assert not any(path == secret or path.is_relative_to(secret) for path in found)


def test_an_interpreter_makes_nothing_hidden_visible(folder: Path, tmp_path: Path) -> None:
    packages = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    data = tmp_path / "data" / "test"
    data.mkdir(parents=True)
    (packages / "x.pth").write_text(f"{data}\n")
    (tmp_path / "env" / "bin").mkdir()
    python = tmp_path / "env" / "bin" / "python"
    python.symlink_to(sys.executable)
    assert data in visible.interpreter_folders(python, {}, folder)
    assert data not in visible.interpreter_folders(python, {}, folder, [tmp_path / "data"])


def test_a_folder_named_like_a_standard_module_does_not_hide_it(folder: Path) -> None:
    for name in ("logging", "queue", "kmdx"):
        (folder / name).mkdir()
        (folder / name / "helper.py").write_text("")
    modules = OwnModules(str(folder))
    assert modules.find_spec("logging") is None
    assert modules.find_spec("queue") is None
    assert list(modules.find_spec("kmdx").submodule_search_locations) == [str(folder / "kmdx")]


@pytest.mark.parametrize(
    "content",
    [
        {"song": "a", "status": "ok", "global_sdr": 5, "museval_sdr": {}},
        {"schema": 2, "song": "a", "status": "ok", "warnings": None, "scores": {"global_sdr": {"bass": 1}}},
        {"schema": 2, "song": "a", "status": "ok", "scores": {}},
    ],
)
def test_several_damaged_records_are_one_error(content: dict) -> None:
    with pytest.raises(RecordError, match="a damaged record"):
        SongRecord.from_json(content)


def test_the_interpreter_of_an_earlier_call_is_kept(tmp_path: Path) -> None:
    assert results.interpreter_of(tmp_path) is None
    found = {"executable": "python", "version": "3.11", "packages": {}, "device": None}
    (tmp_path / "results.json").write_text(json.dumps({"run": {"interpreter": found}}))
    assert results.interpreter_of(tmp_path) == found
    (tmp_path / "results.json").write_text("{")
    assert results.interpreter_of(tmp_path) is None


def make_deep(top: Path) -> None:
    """Nested folders, deeper than Python recurses."""
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("x", dir_fd=here)
        below = os.open("x", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


@POSIX
def test_a_tree_of_any_depth_is_removed(tmp_path: Path) -> None:
    make_deep(tmp_path / "deep")
    remove_tree(tmp_path / "deep")
    assert not (tmp_path / "deep").exists()


@POSIX
def test_a_submission_of_absurd_depth_is_refused(folder: Path) -> None:
    make_deep(folder / "deep")
    with pytest.raises(SubmissionError, match="has more than 100 levels of folders"):
        results.describe_foreign(folder)
    assert process.find_pointer(folder) is None
    assert process.find_outside_link(folder) is None
    remove_tree(folder / "deep")


def test_too_many_entries_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MAX_FILES", 5)
    for number in range(6):
        (folder / f"empty {number}").mkdir()
    with pytest.raises(SubmissionError, match="has more than 5 files"):
        results.describe_foreign(folder)


@POSIX
def test_hidden_files_stay_hidden_behind_a_link_to_a_parent_folder(tmp_path: Path) -> None:
    data = tmp_path / "big" / "data"
    data.mkdir(parents=True)
    link = tmp_path / "zzz"
    link.symlink_to(tmp_path / "big")
    spec = Spec([], {}, "/", [str(link)], [str(data)], [], "", 0, 0, [])
    assert _rules(spec) == [(str(link), True), (str(data), False)]


@POSIX
def test_sending_to_a_full_request_pipe_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "KILL_TIMEOUT", 0.5)
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE) as sleeper:
        running = process._Running.__new__(process._Running)
        running.process = sleeper
        began = time.monotonic()
        running.send({"song": "x" * 10**6})
        assert time.monotonic() - began < 30
        sleeper.kill()


def test_a_full_log_still_has_the_end_of_what_was_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "FIRST", 1000)
    monkeypatch.setattr(replies, "TAIL", 50)
    log = tmp_path / "submission.log"
    for number in range(3):
        source, sink = os.pipe()
        writer = replies.LogWriter(source, log)
        os.write(sink, b"progress " * 500 + b"the real reason %d" % number)
        os.close(sink)
        writer.stop(30)
        os.close(source)
    content = log.read_bytes()
    assert content.startswith(b"progress ")
    assert all(b"the real reason %d" % number in content for number in range(3))
    assert len(content) < 1000 + 3 * (50 + len(replies.TRUNCATED) + 1)
