"""Submissions in git repositories of their own, as entrants make them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import submissions
import tiny

ROOT = Path(__file__).parents[1]
NEEDS_LFS = pytest.mark.skipif(
    shutil.which("git-lfs") is None, reason="needs git-lfs (apt-get install git-lfs)"
)
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
DESCRIPTION = {**json.loads((ROOT / "aicrowd.json").read_text("utf-8")), "authors": ["entrant"], "gpu": False}


def run(folder: Path, *words: str) -> str:
    """Run a command in a folder; return what it prints."""
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout


def commit(folder: Path, *paths: str) -> None:
    """Commit everything that is not ignored, and these paths."""
    run(folder, "git", "add", "--all")
    if paths:
        run(folder, "git", "add", "--force", *paths)
    run(folder, "git", "commit", "--quiet", "--allow-empty", "--message=Work")


def describe(folder: Path, **changes: Any) -> None:
    """Write ``aicrowd.json`` with changes; None removes a key."""
    content = {key: value for key, value in {**DESCRIPTION, **changes}.items() if value is not None}
    (folder / "aicrowd.json").write_text(json.dumps(content), "utf-8")


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git with an identity and without the user's own settings."""
    home = tmp_path / "git home"
    home.mkdir()
    settings = "[user]\nname = Entrant\nemail = entrant@example.org\n[init]\ndefaultBranch = main\n"
    (home / ".gitconfig").write_text(settings)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


@pytest.fixture
def entry(tmp_path: Path, identity: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete submission: a small ensemble in Git LFS, and a model that needs only numpy."""
    folder = tmp_path / "entry"
    submissions.write(folder, "works")
    config = folder / "my_submission" / "user_config.py"
    config.write_text('ENSEMBLE = "small"\n' + config.read_text("utf-8"), "utf-8")
    (folder / "models").mkdir()
    (folder / "models" / "README.md").touch()
    tiny.write_htdemucs(folder / "models")
    describe(folder)
    (folder / "requirements.txt").write_text("# pinned\nnumpy==2.0.0\nsoundfile==0.13.0  # reads\n")
    (folder / "Dockerfile").write_text(f"FROM python:{HERE}\n")
    for name in (".gitattributes", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    run(folder, "git", "init", "--quiet")
    if shutil.which("git-lfs"):
        run(folder, "git", "lfs", "install", "--local")
    commit(folder, "models/small.ckpt", "models/small.yaml")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KMDX_MODELS")
    return folder
