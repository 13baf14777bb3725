"""A run's folder: what it was made of, and each song's record as soon as it is known.

``run.json`` says what the run is; ``songs/<song>.json`` are its records. Every file is written beside its
place and renamed, so that after any interruption it is there whole or not at all.
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

from filelock import FileLock, Timeout

from kmdx import documents, files
from kmdx.errors import DocumentError, KmdxError

DEFAULTS = {
    "metrics": ["global_sdr", "museval_sdr"],
    "stems": ["bass", "drums", "other", "vocals"],
    "accept_incomplete": False,
}
"""What a run was made of if it was begun before ``run.json`` had these."""


INTERPRETER = "interpreter_found"
"""Key of ``run.json`` for what the submission's interpreter reported when it started."""


class RunError(KmdxError):
    """A run's folder that cannot be used for this run."""


class Store:
    """The records of one run.

    Parameters
    ----------
    folder : Path
        The run's folder; made where there is none.

    Raises
    ------
    RunError
        If it is a file, cannot be made, or holds other things than a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.songs = folder / "songs"
        try:
            names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            others = [name for name in names if not _is_own(name)]
            if others and "run.json" not in names:
                raise RunError(
                    f"{folder} holds other things ({others[0]}, …) and no run; choose another --output"
                )
            self.songs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder} cannot be used for a run: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the same run.

        Raises
        ------
        RunError
            If one does already.
        """
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise RunError(f"another process is writing to {self.folder}") from error

    def begin(self, identity: Mapping[str, Any]) -> str:
        """Note what the run is made of, or check that it is still made of the same.

        A run of which no song is done yet may become another one. Returns when it was begun, ISO 8601.

        Raises
        ------
        RunError
            If the folder holds a run that differs; says in what.
        """
        path = self.folder / "run.json"
        content = json.loads(json.dumps(identity))
        if path.exists() and any(self.songs.glob("*.json")):
            before = {key: value for key, value in DEFAULTS.items() if key in content}
            old = {**before, **read_json(path)}
            started = str(old.pop("started", ""))
            old.pop(INTERPRETER, None)
            differences = list(_differences(old, content))
            if differences:
                raise RunError(
                    f"{self.folder} holds another run: {_few(differences)}; "
                    "choose another --output, or delete that folder"
                )
            return started
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(path, {"started": started, **content})
        return started

    def begin_process(self, interpreter: Mapping[str, Any]) -> None:
        """Note the submission's interpreter, or check that it is still the same.

        Raises
        ------
        RunError
            If songs of the run were done with another one; says in what they differ.
        """
        path = self.folder / "run.json"
        run, content = read_json(path), json.loads(json.dumps(interpreter))
        before = run.get(INTERPRETER)
        if before == content:
            return
        if before is not None and any(self.songs.glob("*.json")):
            differences = _few(list(_differences(before, content, INTERPRETER)))
            raise RunError(f"{self.folder} holds another run: {differences}; choose another --output")
        write_json(path, {**run, INTERPRETER: content})

    def record(self, song: str) -> dict[str, Any] | None:
        """Return a song's record, or ``None`` if it is not done."""
        path = self._path(song)
        return read_json(path) if path.exists() else None

    def add(self, record: Mapping[str, Any]) -> None:
        """Put a song's record on the disk."""
        write_json(self._path(record["song"]), record)

    def _path(self, song: str) -> Path:
        name = f"{song}.json"
        if len(os.fsencode(name)) > 255:  # what a file name may have
            name = f"{song[:40]} {hashlib.sha256(os.fsencode(song)).hexdigest()}.json"
        return self.songs / name


OWN = ("songs", "media", "predictions", "evaluation.log", "submission.log", "checked.json", "run.json")


def _is_own(name: str) -> bool:
    """Whether a name in a run's folder is the evaluator's own."""
    return (
        name in OWN
        or name.startswith((".lock", ".work-", "report.", "results."))
        or name.endswith(".partial")
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there whole or not at all, also after a power loss.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text as :func:`write_json` writes JSON."""
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
        raise RunError(f"{path} is damaged (no object); delete it")
    return content


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Lines that say in what two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key} was {_short(old)}, is {_short(new)}"


def _few(differences: Sequence[str]) -> str:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"{'; '.join(differences[:3])}{more}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
