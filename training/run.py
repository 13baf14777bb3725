"""A run's folder: what lies in it, and that only one process works on it at a time.

``config.yaml`` what it is to do, ``data.yaml`` the songs, ``checkpoints/last.ckpt`` where it goes on and
``checkpoints/best.ckpt`` what is exported, ``steps.csv`` and ``validation.csv`` what happened,
``tensorboard/`` the same for TensorBoard, ``report.html`` the page to read, ``exports.txt`` digests of what
was exported.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from kmdx.documents import read_yaml
from kmdx.errors import DocumentError
from kmdx.weights import file_sha256
from training import config as configs
from training.config import Config, TrainingError

CHECKPOINTS = 3  # the best, the last, and the one that is being written
FREE = ("at_once", "checkpointing", "compile")  # keys that change how a step is computed, not what it learns
DATA_BYTES, DATA_NODES = 2**26, 2**21  # of data.yaml, which grows with the number of songs
MARGIN = 2**27  # bytes for logs and the page


class Run:
    """One run's folder.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.yaml"
        self.data_file = folder / "data.yaml"
        self.exports_file = folder / "exports.txt"
        self.last = folder / "checkpoints" / "last.ckpt"
        self.best = folder / "checkpoints" / "best.ckpt"
        self.steps = folder / "steps.csv"
        self.validation = folder / "validation.csv"
        self.page = folder / "report.html"

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """A folder that holds a run with something to show.

        Raises
        ------
        TrainingError
            If it holds none.
        """
        run = cls(folder)
        if not run.config_file.is_file():
            raise TrainingError(f"{folder}: no training run: there is no config.yaml in it")
        if not run.weights.is_file():
            raise TrainingError(f"{folder}: the run has no checkpoint yet")
        return run

    @property
    def weights(self) -> Path:
        """The best checkpoint, or the last where nothing was validated yet."""
        return self.best if self.best.is_file() else self.last

    def config(self) -> Config:
        """What the run is to do."""
        return configs.load(str(self.config_file))

    def data(self) -> dict[str, Any]:
        """The arguments that its songs were found with."""
        try:
            found: dict[str, Any] = read_yaml(self.data_file, DATA_BYTES, DATA_NODES)
        except DocumentError as error:
            raise TrainingError(f"{self.data_file}: cannot be read: {error}") from error
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which is made where it is missing.

        Raises
        ------
        TrainingError
            If it cannot be made, or another process works on it.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise TrainingError(f"{self.folder}: another process works on this run") from error
        except OSError as error:
            raise TrainingError(f"{self.folder}: cannot be written to: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def at_once(self) -> int:
        """Windows that go through the network together, as was settled when the run began."""
        size: int = self.data()["at_once"]
        return size

    def checkpoint(self) -> tuple[dict[str, Any], float | None]:
        """What :attr:`weights` holds, and its score in dB; ``None`` where nothing was validated yet.

        It stays as it is when a better one takes its place.
        """
        path = self.weights
        found = _checkpoint(path)
        scores = [state.get("best_model_score") for state in found["callbacks"].values()]
        score = next((float(value) for value in scores if value is not None), None)
        return found, score if path == self.best else None

    def ended(self) -> bool:
        """Whether nothing is left to do."""
        if not self.last.is_file():
            return False
        return _checkpoint(self.last)["global_step"] >= self.config().steps or self.stopped_early()

    def wrote(self, file: Path) -> bool:
        """Whether this run exported the file that lies there, or none does."""
        return not file.is_file() or file_sha256(file) in self._exports()

    def note_export(self, file: Path) -> None:
        """Remember a file as this run's own."""
        digests = {**self._exports(), file_sha256(file): None}
        _write(self.exports_file, "".join(f"{digest}\n" for digest in digests))

    def _exports(self) -> dict[str, None]:
        if not self.exports_file.is_file():
            return {}
        return dict.fromkeys(self.exports_file.read_text("utf-8").split())

    def stopped_early(self) -> bool:
        """Whether it ended for want of a better score, which lightning does not remember."""
        if not self.last.is_file():
            return False
        states = _checkpoint(self.last)["callbacks"]
        return any(
            state["wait_count"] >= state["patience"]
            for name, state in states.items()
            if name.startswith("EarlyStopping")
        )

    def begin(
        self, config: Config, data: dict[str, Any], parameters: int, at_once: Callable[[], int]
    ) -> None:
        """Note what the run is to do, or check that it is what it was.

        Parameters
        ----------
        config : Config
            Keys of :data:`FREE` may be others than before.
        data : dict
            Its songs, and how many devices it runs on.
        parameters : int
            Of the network.
        at_once : callable
            Settles how many windows go together, where neither the config nor the run says it.

        Raises
        ------
        TrainingError
            If the run was begun with another config or other songs, or the disk has no room for it.
        """
        self._room(config, parameters)
        if not self.config_file.is_file() or not self.last.is_file():
            self._note(config, {**data, "at_once": at_once()})
            return
        noted = self.data()
        before = self.config().absolute().model_dump(mode="json")
        now = config.model_dump(mode="json")
        if noted.get("vocals") and data["vocals"]:  # runs, which are known by their weights wherever they lie
            before["rest"]["vocals"] = now["rest"]["vocals"]
        differing = [key for key in now if before.get(key) != now[key] and key not in FREE]
        if differing:
            key = differing[0]
            raise TrainingError(
                f"{self.folder}: begun with {key} {before.get(key)}, not {now[key]}; "
                "take another folder, or the config it was begun with"
            )
        settled = noted.pop("at_once")
        other = _difference(noted, data)
        if other:
            raise TrainingError(f"{self.folder}: cannot go on: {other}")
        self._note(config, {**data, "at_once": settled if config.at_once == "auto" else at_once()})

    def _room(self, config: Config, parameters: int) -> None:
        """See that the disk has room for what is still to be written."""
        if self.config_file.is_file() and self.ended():
            return
        held = sum(file.stat().st_size for file in self.last.parent.iterdir())
        need = max(0, CHECKPOINTS * checkpoint_size(config, parameters) - held) + MARGIN
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise TrainingError(
                f"{self.folder}: checkpoints and logs need {need / 1e9:.2f} GB, and "
                f"{free / 1e9:.2f} GB are free"
            )

    def _note(self, config: Config, data: dict[str, Any]) -> None:
        _write(self.config_file, configs.dump(config))
        _write(self.data_file, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def _difference(noted: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What a run would learn from that is not as it was; where the songs lie does not count."""
    if noted["devices"] != now["devices"]:
        return f"{noted['devices']} devices, not {now['devices']}"
    for kind in ("training", "validation"):
        before, after = noted[kind], now[kind]
        for name in before:
            if name not in after:
                return f"{name} is gone from the songs for {kind}"
        for name in after:
            if name not in before:
                return f"{name} is new in the songs for {kind}"
        if before != after:
            return f"the songs for {kind} come in another order: name the folders in the order they had"
    if noted.get("vocals") and noted["vocals"] != now["vocals"]:
        return "the run of the vocals network has other weights by now"
    if len(noted["variants"]) != len(now["variants"]):
        return f"{len(noted['variants'])} folders of variants, not {len(now['variants'])}"
    for name, versions in noted.get("stems", {}).items():  # which earlier runs did not note
        if len(versions) != len(now["stems"][name]):
            return f"{name} had {len(versions) - 1} variants, not {len(now['stems'][name]) - 1}"
        for before, after in zip(versions, now["stems"][name], strict=True):
            for stem in sorted({*before, *after}):
                was, has = before.get(stem, "no file"), after.get(stem, "no file")
                if was != has:
                    return f"{stem} of {name} had {was}, and has {has}"
    return None


def checkpoint_size(config: Config, parameters: int) -> int:
    """Bytes of a checkpoint: the weights, their average, and the optimizer's moments."""
    moments = {"adamw": 2, "rmsprop": 1}[config.optimizer.kind]
    return 4 * parameters * (1 + (config.average is not None) + moments)


def _checkpoint(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(path)
