"""A run's folder: the run's settings, and each song's record as soon as it exists.

``run.json`` contains the settings, ``songs/<song>.json`` the records. Every file is written to a temporary
file and renamed, so an interruption never leaves half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kmdx import documents, files
from kmdx.challenge import STEMS
from kmdx.errors import DocumentError, KmdxError

DEFAULTS = {
    "metrics": ["global_sdr", "museval_sdr"],
    "stems": [*STEMS],
    "accept_incomplete": False,
}
"""Settings of runs that were started before ``run.json`` contained them."""


UNKNOWN = "unknown"
"""A setting that is found out later."""
INTERPRETER = "interpreter_found"
"""Key of ``run.json`` for what the submission's interpreter reported when it started."""


class RunError(KmdxError):
    """A run's folder cannot be used for this run."""


class RunFolder:
    """The folder of one run.

    Parameters
    ----------
    path : Path
        Created if it does not exist.

    Raises
    ------
    RunError
        If it is a file, cannot be created, or contains something other than a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.songs = path / "songs"
        try:
            names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
            others = [name for name in names if not _is_own(name)]
            if others and "run.json" not in names:
                raise RunError(f"{path} contains other files ({others[0]}, …); choose another --output")
            self.songs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path} cannot be used for a run: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the same run.

        Raises
        ------
        RunError
            If another process is already writing to it.
        """
        try:
            with files.locked(self.path / ".lock"):
                yield
        except files.Locked as error:
            raise RunError(f"another process is writing to {self.path}; wait until it ends") from error

    def start(self, identity: Mapping[str, Any]) -> str:
        """Record the run's settings, or check that they have not changed.

        Settings may change until the first song is done. One whose recorded value is UNKNOWN may be stated
        at any time. Returns when the run was started, in ISO 8601.

        Raises
        ------
        RunError
            If the folder contains a run with other settings. The message lists the differences.
        """
        path = self.path / "run.json"
        content = json.loads(json.dumps(identity))
        if path.exists() and any(self.songs.glob("*.json")):
            before = {key: value for key, value in DEFAULTS.items() if key in content}
            old = {**before, **read_json(path)}
            started = str(old.pop("started", ""))
            old.pop(INTERPRETER, None)
            late = {key: content[key] for key, value in old.items() if value == UNKNOWN and key in content}
            differences = list(_differences({**old, **late}, content))
            if differences:
                raise RunError(
                    f"{self.path} contains another run: {_first_three(differences)}; "
                    "choose another --output, or delete that folder"
                )
            if late:
                write_json(path, {**read_json(path), **late})
            return started
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(path, {"started": started, **content})
        return started

    def settings(self) -> dict[str, Any]:
        """What :meth:`start` recorded; empty before."""
        path = self.path / "run.json"
        return read_json(path) if path.exists() else {}

    def record_interpreter(self, interpreter: Mapping[str, Any]) -> None:
        """Record the submission's interpreter, or check that it has not changed.

        Raises
        ------
        RunError
            If songs of the run were done with another one. The message lists the differences.
        """
        path = self.path / "run.json"
        run, content = read_json(path), json.loads(json.dumps(interpreter))
        before = run.get(INTERPRETER)
        if before is not None and any(self.songs.glob("*.json")):
            # A device is unknown (None) until the submission uses torch.
            content = {key: before.get(key) if value is None else value for key, value in content.items()}
            known = {key: content.get(key) if value is None else value for key, value in before.items()}
            if differences := list(_differences(known, content, INTERPRETER)):
                raise RunError(
                    f"{self.path} contains another run: {_first_three(differences)}; choose another --output"
                )
        if before != content:
            write_json(path, {**run, INTERPRETER: content})

    def record(self, song: str) -> dict[str, Any] | None:
        """Return a song's record, or ``None`` if it is not done."""
        path = self._path(song)
        return read_json(path) if path.exists() else None

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a song's record to the disk."""
        write_json(self._path(record["song"]), record)

    def _path(self, song: str) -> Path:
        name = f"{song}.json"
        if len(os.fsencode(name)) > 255:  # the limit for a file name
            name = f"{song[:40]} {hashlib.sha256(os.fsencode(song)).hexdigest()}.json"
        return self.songs / name


OWN_FILES = ("songs", "media", "predictions", "evaluation.log", "checked.json", "run.json")


def _is_own(name: str) -> bool:
    """Whether the evaluator creates a file or folder of this name."""
    return (
        name in OWN_FILES
        or name.startswith((".lock", ".work-", "report.", "results.", "submission."))
        or name.endswith(".partial")
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the file is complete or unchanged, even after a power loss.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as :func:`write_json` writes JSON."""
    try:
        files.write_text(path, text)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a run.

    Raises
    ------
    RunError
        If it is damaged.
    """
    try:
        content = documents.read_json(path)
    except DocumentError as error:
        raise RunError(f"{path} is damaged ({error}); delete it") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (expected a JSON object); delete it")
    return content


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """The differences between two settings, one text each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key} was {_short(old)}, is {_short(new)}"


def _first_three(differences: Sequence[str]) -> str:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"{'; '.join(differences[:3])}{more}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
