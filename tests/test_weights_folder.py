"""The models folder: where it is, and what happens if several processes write to it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import weight_cases as cases
from weight_cases import CONTENT, Server

from evaluator import visible
from kmdx import Separator, weights
from kmdx.errors import KmdxWarning, WeightsError
from kmdx.weights import Weight, pulling
from kmdx.weights import folder as folder_module
from kmdx.weights.folder import locked, where
from kmdx.weights.local import PulledFile, add_record, records

server, alone, published = cases.server, cases.alone, cases.published
TRAINED = {"type": "htdemucs", "sources": ["bass"]}


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "mine"))
    assert where() == (tmp_path / "mine", "KMDX_MODELS names it")
    assert weights.models_folder() == tmp_path / "mine"
    assert weights.models_folder(tmp_path) == tmp_path


def test_a_file_is_not_a_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="is not a folder"):
        where()


@pytest.fixture
def unnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside of checkouts, to which an installed package does not belong either."""
    monkeypatch.delenv("KMDX_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_module, "_PACKAGE", tmp_path / "site-packages" / "kmdx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkout(folder: Path) -> Path:
    """Make a folder look like a checkout; return its models folder."""
    for name in ("models", "my_submission"):
        (folder / name).mkdir(parents=True)
    (folder / "aicrowd.json").touch()
    return folder / "models"


def test_outside_of_checkouts_the_folder_is_in_the_users_cache(unnamed: Path) -> None:
    assert where().reason == "it is in the user's cache"
    assert where().path.parts[-2:] == ("kmdx", "models")


def test_an_installed_package_uses_the_checkout_that_contains_the_current_folder(
    unnamed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = checkout(unnamed / "clone")
    (unnamed / "clone" / "deep" / "er").mkdir(parents=True)
    for inside in ("clone", "clone/deep/er", "clone/models"):
        monkeypatch.chdir(unnamed / inside)
        assert where() == (models, "it belongs to the checkout that contains the current folder")


def test_a_checkouts_own_package_uses_its_folder_from_everywhere(
    unnamed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = checkout(unnamed / "clone")
    monkeypatch.setattr(folder_module, "_PACKAGE", unnamed / "clone" / "kmdx")
    assert where() == (models, "it belongs to the checkout that contains kmdx")
    monkeypatch.setattr(folder_module, "_PACKAGE", unnamed / "clone/.venv/lib/python3.12/site-packages/kmdx")
    assert where().path == models
    other = checkout(unnamed / "other")
    monkeypatch.chdir(unnamed / "other")
    assert where().path == other, "the submission in the current folder imports its own package"
    assert where(unnamed / "clone").path == models


@pytest.mark.parametrize("lacking", ["aicrowd.json", "my_submission", "models"])
def test_another_folder_is_not_a_checkout(unnamed: Path, lacking: str) -> None:
    checkout(unnamed)
    (unnamed / lacking).rename(unnamed / "renamed")
    assert "cache" in where().reason


def test_a_deleted_current_folder_is_no_error(unnamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = unnamed / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "cache" in where().reason


def test_messages_state_why_the_folder_was_searched(unnamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(unnamed / "clone")
    monkeypatch.chdir(unnamed / "clone")
    why = r"in .*clone/models \(it belongs to the checkout that contains the current folder\)"
    with pytest.raises(weights.MissingWeights, match=f"{why}; `kmdx models pull htdemucs_ft_bass`"):
        weights.find(weights.get("htdemucs_ft_bass"))
    with pytest.raises(weights.MissingWeights, match=f"{why}: htdemucs_ft_vocals, "):
        Separator("htdemucs_ft")
    with pytest.raises(weights.MissingWeights, match=rf"in {unnamed}; "):
        weights.find(weights.get("htdemucs_ft_bass"), unnamed)


def test_the_command_and_the_submission_use_the_same_folder(
    unnamed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = unnamed / "clone"
    models = checkout(clone)
    assert "KMDX_MODELS" not in visible.environment(os.environ, clone), "it finds its own folder"
    assert models in visible.weights(os.environ, clone)
    other = unnamed / "theirs"
    cached = visible.environment(os.environ, other)["KMDX_MODELS"]
    assert Path(cached) == where().path, "its home is another one"
    monkeypatch.setattr(folder_module, "_PACKAGE", clone / "kmdx")
    assert visible.environment(os.environ, other)["KMDX_MODELS"] == str(models)


# ---- several processes at once


class Pull(threading.Thread):
    """A pull in a thread; to a file lock it is like another process."""

    def __init__(self, weight: Weight, folder: Path) -> None:
        super().__init__()
        self.weight, self.folder = weight, folder
        self.lines: list[str] = []
        self.waits = threading.Event()
        self.path: Path | None = None
        self.start()

    def report(self, line: str) -> None:
        self.lines.append(line)
        if "waiting" in line:
            self.waits.set()

    def run(self) -> None:
        self.path = weights.pull(self.weight, self.folder, self.report)


def test_one_of_two_simultaneous_pulls_waits_and_finds_the_others_file(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    server.go.clear()
    pulls = [Pull(published, tmp_path) for _ in range(2)]
    waiting = any(pull.waits.wait(0.05) for _ in range(300) for pull in pulls)
    server.go.set()
    for pull in pulls:
        pull.join()
    assert waiting
    (waited,) = (pull for pull in pulls if pull.waits.is_set())
    path = tmp_path / published.sources[0].file
    assert [pull.path for pull in pulls] == [path, path]
    assert waited.lines[:2] == [
        "htdemucs_ft_bass: waiting for another process that is pulling it",
        f"htdemucs_ft_bass: already there ({path})",
    ]
    assert len(server.asked) == 1


def test_many_threads_of_a_process_pull_at_once_and_all_find_the_file(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    pulls = [Pull(published, tmp_path) for _ in range(8)]
    for pull in pulls:
        pull.join()
    assert [pull.path for pull in pulls] == [tmp_path / published.sources[0].file] * 8
    assert len(server.asked) == 1
    assert not list(tmp_path.glob(".probe*"))


def holder(folder: Path, name: str) -> subprocess.Popen:
    """A process that holds a lock until it is killed."""
    code = (
        "import pathlib, sys, time; from kmdx.weights.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), sys.argv[2], print) as held:\n"
        "    print(held, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), name], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"True\n"
    return process


def test_a_process_that_is_killed_while_it_pulls_leaves_no_lock(published: Weight, tmp_path: Path) -> None:
    with holder(tmp_path, published.name) as other:
        pull = Pull(published, tmp_path)
        assert pull.waits.wait(30)
        other.kill()
        pull.join()
    assert pull.path == tmp_path / published.sources[0].file


def test_waiting_ends_with_an_interrupt(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from kmdx.weights.folder import locked\n"
        "try:\n"
        "    with locked(pathlib.Path(sys.argv[1]), 'one', lambda: print('waiting', flush=True)): pass\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    with locked(tmp_path, "one", lambda: None):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == b"interrupted\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")]
)
def test_without_locks_each_process_pulls_into_its_own_workspace(
    error: Exception, published: Weight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(lock: Any, *arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    places: list[Path] = []
    real = pulling.download
    monkeypatch.setattr(
        pulling,
        "download",
        lambda url, path, *more, **stated: places.append(path) or real(url, path, *more, **stated),
    )
    lines: list[str] = []
    path = weights.pull(published, tmp_path, lines.append)
    assert path.read_bytes() == CONTENT
    assert records(tmp_path)[path.name].known
    assert f"htdemucs_ft_bass: {tmp_path} cannot be locked" in lines[0]
    assert places[0].parts[-3] == f"{published.name}.{os.getpid()}.{threading.get_ident()}", (
        "written to by nobody else"
    )
    assert not (tmp_path / ".partial").exists()


def test_records_written_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")

    def write(thread: int) -> None:
        for number in range(4):
            name = f"{thread}-{number}"
            add_record(tmp_path, name, PulledFile("w", "0" * 64, 1, "somewhere", "2026-01-01", known=True))
            weights.register(tmp_path, name, title="", file="a.pt", architecture=TRAINED, trained="today")

    threads = [threading.Thread(target=write, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records(tmp_path)) == 20
    assert len(weights.trained(tmp_path)) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".locks",
        "a.pt",
        "pulled.json",
        "trained.yaml",
    ]


def test_waiting_to_write_a_record_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.01)
    warned: list[str] = []
    with holder(tmp_path, "pulled.json") as other, warnings.catch_warnings():
        warnings.simplefilter("always", KmdxWarning)

        def show(message: Any, *more: Any) -> None:
            warned.append(str(message))
            other.kill()

        monkeypatch.setattr(warnings, "showwarning", show)
        add_record(tmp_path, "a", PulledFile("w", "0" * 64, 1, "somewhere", "2026-01-01", known=True))
    assert warned == [f"waiting for another process that writes {tmp_path / 'pulled.json'}"]
    assert list(records(tmp_path)) == ["a"]


def test_a_record_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "trained.yaml").mkdir()
    (tmp_path / "a").touch()
    with pytest.raises(WeightsError, match=r"trained\.yaml cannot be written: "):
        weights.register(tmp_path, "mine", title="", file="a", architecture={}, trained="today")
