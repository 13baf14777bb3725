"""Evaluations that are killed or interrupted continue where they ended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluation_cases
import psutil
import pytest
import soundfile
import submissions
from evaluation_cases import NAMES, ROOT, results, scores

data = evaluation_cases.data

SLOW = "time.sleep(0.3)"


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that a process has started and that has not ended."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_five_kills_change_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    songs = tmp_path / "data"
    for number in range(6):
        shutil.copytree(data / "test" / NAMES[number % 3], songs / f"song {number}")
        if number >= 3:  # not the same content twice
            for path in (songs / f"song {number}").iterdir():
                samples, rate = soundfile.read(path)
                soundfile.write(path, samples[: -100 * number], rate)
    monkeypatch.setitem(submissions.BODIES, "is slow", SLOW)
    submission = submissions.write(tmp_path / "submission", "is slow")

    def start(run: str) -> subprocess.Popen[str]:
        arguments = [songs, "-o", tmp_path / run, "--submission", submission, "--time-limit-factor", "60"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "local_evaluation.py"), *map(str, arguments)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    whole = start("whole")
    began = time.monotonic()
    assert whole.wait(120) == 0
    takes = time.monotonic() - began
    whole.stderr.close()

    moments = random.Random(7)
    done = []
    started: list[psutil.Process] = []
    for _ in range(5):
        process = start("killed")
        time.sleep(moments.random() * takes)
        started += below(process)
        process.kill()
        process.wait()
        process.stderr.close()
        kept = list((tmp_path / "killed").glob("songs/*.json"))
        for path in kept:
            json.loads(path.read_text("utf-8"))
        done.append(len(kept))
    assert done == sorted(done), "a record was lost"
    assert started
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, "a process outlived the evaluator"
    last = start("killed")
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert [record["song"] for record in results(tmp_path / "killed")["songs"]] == [
        f"song {n}" for n in range(6)
    ]
    assert not list((tmp_path / "killed").glob(".work-*"))


def test_ctrl_c_shows_how_to_continue(data: Path, tmp_path: Path) -> None:
    submission = submissions.write(tmp_path / "submission", "sleeps")
    arguments = [data, "-o", tmp_path / "run", "--submission", submission]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "local_evaluation.py"), *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(started := below(process)) < 3:  # the launcher, the guard and the submission
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "stopped; repeat the command to resume the run"
    assert "Traceback" not in errors
    assert not psutil.wait_procs(started, timeout=60)[1]
