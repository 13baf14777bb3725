"""``submit.sh``: from a clone to a tag, against a local remote with Git LFS."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import submission_repository_cases as cases
import submissions
import tiny
from process_cases import LINUX
from submission_repository_cases import NEEDS_LFS, ROOT, commit, describe, run

identity = cases.identity
pytestmark = [LINUX, NEEDS_LFS]


@pytest.fixture
def clone(tmp_path: Path, identity: None) -> Path:
    """A clone of this project with a small ensemble in ``models/``, which git ignores, and a remote."""
    folder = tmp_path / "clone"
    for name in ("evaluator", "kmdx", "my_submission", "models/mini"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitattributes", ".gitignore", "Dockerfile", "apt.txt", "requirements.txt", "submit.sh"):
        shutil.copy(ROOT / name, folder)
    describe(folder)
    run(folder, "git", "init", "--quiet")
    commit(folder)
    run(folder, "git", "init", "--quiet", "--bare", str(tmp_path / "remote.git"))
    run(folder, "git", "remote", "add", "aicrowd", str(tmp_path / "remote.git"))
    package = folder / "my_submission"
    for name in ("aicrowd_wrapper.py", "user_config.py", "__init__.py"):
        (package / name).unlink()
    submissions.write(tmp_path / "model", "works")
    shutil.copytree(tmp_path / "model" / "my_submission", package, dirs_exist_ok=True)
    config = package / "user_config.py"
    config.write_text('ENSEMBLE = "small"\n' + config.read_text("utf-8"), "utf-8")
    tiny.write_htdemucs(folder / "models")
    (folder / "models" / "unused.th").write_bytes(b"another weight")
    return folder


def submit(clone: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script in another folder; it uses this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, **settings}
    command = [clone / "submit.sh", *words]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


QUICK = ("--seconds", "1", "--accept-python")


def test_one_command_leads_from_a_clone_to_a_tag(clone: Path, tmp_path: Path) -> None:
    ended = submit(clone, "first", *QUICK)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "\nready\n" in f"\n{ended.stdout}"
    remote = tmp_path / "remote.git"
    assert run(remote, "git", "cat-file", "-t", "submission-first") == "tag\n"
    head = run(clone, "git", "rev-parse", "HEAD")
    assert run(remote, "git", "rev-parse", "submission-first^{commit}", "main") == head * 2
    assert run(clone, "git", "rev-parse", "submission-first^{commit}") == head
    run(tmp_path, "git", "clone", "--quiet", "--branch=submission-first", str(remote), "server")
    for name in ("small.ckpt", "small.yaml"):
        sent = tmp_path / "server" / "models" / name
        assert sent.read_bytes() == (clone / "models" / name).read_bytes()
    assert not (tmp_path / "server" / "models" / "unused.th").exists()
    assert run(tmp_path / "server", "git", "lfs", "ls-files", "--name-only") == "models/small.ckpt\n"
    assert run(clone, "git", "status", "--porcelain") == ""

    again = submit(clone, "first", *QUICK)
    assert again.returncode == 1
    assert "the tag submission-first exists" in again.stderr
    again = submit(clone, "second", *QUICK)
    assert again.returncode == 1
    assert "git commit --allow-empty" in again.stderr
    assert run(remote, "git", "tag") == "submission-first\n"


def test_a_song_that_fails_leaves_no_tag_and_the_next_try_can_use_its_name(
    clone: Path, tmp_path: Path
) -> None:
    config = clone / "my_submission" / "user_config.py"
    works = config.read_text("utf-8")
    config.write_text(works.replace("self.count += 1", "raise RuntimeError('out of ideas')"), "utf-8")
    ended = submit(clone, "first", *QUICK)
    assert ended.returncode == 1
    assert "a song failed, correct it: RuntimeError: out of ideas" in ended.stdout
    assert run(clone, "git", "tag") == ""
    assert run(tmp_path / "remote.git", "git", "for-each-ref") == ""
    config.write_text(works, "utf-8")
    assert submit(clone, "first", *QUICK).returncode == 0
    assert run(tmp_path / "remote.git", "git", "tag") == "submission-first\n"


def test_a_remote_that_refuses_the_tag_leaves_none_here(clone: Path, tmp_path: Path) -> None:
    hook = tmp_path / "remote.git" / "hooks" / "update"
    hook.write_text('#!/bin/sh\ncase "$1" in refs/tags/*) echo no tags; exit 1;; esac\n')
    hook.chmod(0o755)
    ended = submit(clone, "first", *QUICK)
    assert ended.returncode == 1
    assert "no tags" in ended.stderr
    assert run(clone, "git", "tag") == ""
    hook.unlink()
    assert submit(clone, "first", *QUICK).returncode == 0
    assert run(clone, "git", "tag") == "submission-first\n"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda clone: (clone / "models" / "small.ckpt").unlink(), "small.ckpt is missing"),
        (lambda clone: describe(clone, authors=["kmdx-net"]), "expected your AIcrowd user name"),
        (lambda clone: (clone / "requirements.txt").write_text("torch>=2"), "torch>=2 is not pinned"),
        (lambda clone: (clone / "song.wav").write_bytes(b"0" * 6 * 10**6), "git lfs track song.wav"),
    ],
)
def test_what_can_be_checked_at_once_stops_it_before_anything_is_committed(
    clone: Path, spoil: Callable[[Path], object], problem: str
) -> None:
    spoil(clone)
    head = run(clone, "git", "rev-parse", "HEAD")
    ended = submit(clone, "first")
    assert ended.returncode == 1
    assert problem in ended.stderr
    assert run(clone, "git", "rev-parse", "HEAD") == head
    assert run(clone, "git", "diff", "--cached", "--name-only") == ""


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ((), {}, "expected a name"),
        (("--before-tag",), {}, "expected a name"),
        (("a b",), {}, "'submission-a b' cannot be the name of a tag"),
        (("first",), {"REMOTE": "nowhere"}, "no remote 'nowhere': git remote add nowhere "),
        (("first",), {"PYTHON": "no-such-python"}, "no command 'no-such-python': activate the environment"),
        (("taken",), {}, "the remote has the tag submission-taken"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(
    clone: Path, words: tuple[str, ...], settings: dict[str, str], message: str
) -> None:
    run(clone, "git", "push", "--quiet", "aicrowd", "HEAD:refs/tags/submission-taken")
    head = run(clone, "git", "rev-parse", "HEAD")
    ended = submit(clone, *words, **settings)
    assert ended.returncode == 1
    assert f"submit.sh: {message}" in ended.stderr
    assert run(clone, "git", "rev-parse", "HEAD") == head
    assert run(clone, "git", "tag") == ""


def test_a_detached_commit_is_refused(clone: Path) -> None:
    run(clone, "git", "checkout", "--quiet", "--detach")
    assert "no branch is checked out" in submit(clone, "first").stderr
