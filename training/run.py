"""A run's folder: what is in it. Only one process works on it at a time.

``config.yaml`` what the run does, ``data.yaml`` its songs and the weights that it started from,
``checkpoints/last.ckpt`` where it goes on, ``checkpoints/best.ckpt`` what is exported, ``steps.csv`` and
``validation.csv`` losses and scores, ``report.html`` the page to
read, ``exports.txt`` digests of what was exported.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from kmdx import files
from kmdx.documents import read_yaml
from kmdx.errors import DocumentError
from kmdx.weights import file_sha256
from training import config as configs
from training.config import Config, TrainingError
from training.freezing import Trained

CHECKPOINTS = 3  # the best, the last, and the one that is being written
# Keys that change how a step is computed or when the run ends, not what a step learns.
FREE = ("at_once", "checkpointing", "compile", "patience", "steps")
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
            raise TrainingError(f"{folder}: not a training run: it has no config.yaml")
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

    def opening(self, trained: Trained) -> list[str]:
        """Lines to print before the first step: what is trained, from where, and how far.

        Parameters
        ----------
        trained : Trained
            How many parameters are trained.
        """
        lines = [f"training {trained.trained:,} of {trained.total:,} parameters"]
        data, config, done = self.data(), self.config(), self.done()
        start = data.get("start")
        if start and not done:
            lines.append(f"starting from {_described(start)}")
        extension = (data.get("extensions") or [None])[-1]
        if extension and extension["done"] == done < config.steps:
            steps = f"{config.steps} steps"
            outcome = (
                f"the weights are those of a run begun with {steps}"
                if config.optimizer.schedule == "constant"
                else f"the learning rate continues on the cosine of {steps}, so the weights differ from "
                f"those of a run begun with {steps}"
            )
            lines.append(f"step {done} of {steps} instead of {extension['before']}: {outcome}")
        return lines

    def at_once(self) -> int:
        """Windows that go through the network together, as chosen when the run began."""
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

    def done(self) -> int:
        """Steps that are done and need not be done again."""
        return int(_checkpoint(self.last)["global_step"]) if self.last.is_file() else 0

    def ended(self, config: Config | None = None) -> bool:
        """Whether nothing is left to do of a config, the run's own if not given."""
        config = config or self.config()
        return self.done() >= config.steps or self.stopped_early(config)

    def wrote(self, file: Path) -> bool:
        """Whether this run exported the file, or there is none."""
        return not file.is_file() or file_sha256(file) in self._exports()

    def note_export(self, file: Path) -> None:
        """Remember a file as this run's own."""
        digests = {**self._exports(), file_sha256(file): None}
        files.write_text(self.exports_file, "".join(f"{digest}\n" for digest in digests))

    def _exports(self) -> dict[str, None]:
        if not self.exports_file.is_file():
            return {}
        return dict.fromkeys(self.exports_file.read_text("utf-8").split())

    def stopped_early(self, config: Config | None = None) -> bool:
        """Whether it ended for want of a better score, which lightning does not remember."""
        patience = (config or self.config()).patience
        if patience is None or not self.last.is_file():
            return False
        states = _checkpoint(self.last)["callbacks"]
        return any(
            state["wait_count"] >= patience
            for name, state in states.items()
            if name.startswith("EarlyStopping")
        )

    def begin(
        self, config: Config, data: dict[str, Any], parameters: int, at_once: Callable[[], int]
    ) -> None:
        """Note what the run does, or check that it is the same as before.

        Parameters
        ----------
        config : Config
            Keys of :data:`FREE` may be others than before.
        data : dict
            Its songs, how many devices it runs on, and what it starts from.
        parameters : int
            Of the network.
        at_once : callable
            Chooses how many windows go together, where neither the config nor the run gives a number.

        Raises
        ------
        TrainingError
            If the run was begun with another config, other songs or other weights, has done more steps than
            the config has, or the disk has no room for it.
        """
        if self.config_file.is_file() and self.data_file.is_file():
            data = {**data, "start": self._start(data.get("start"))}
        self._room(config, parameters)
        if not self.config_file.is_file() or not self.last.is_file():
            self._note(config, {**data, "at_once": at_once()})
            return
        noted = self.data()
        if config.steps < self.done():
            raise TrainingError(
                f"{self.folder}: {self.done()} steps are done, and steps is {config.steps}; expected "
                f"{self.done()} or more, or another folder"
            )
        before = self.config().absolute().model_dump(mode="json")
        now = config.model_dump(mode="json")
        if noted.get("vocals") and data["vocals"]:  # runs, which are known by their weights wherever they are
            before["rest"]["vocals"] = now["rest"]["vocals"]
        differing = [key for key in now if before.get(key) != now[key] and key not in FREE]
        if differing:
            key = differing[0]
            raise TrainingError(
                f"{self.folder}: begun with {key} {before.get(key)}, not {now[key]}; "
                "take another folder, or the config it was begun with"
            )
        chosen = noted.pop("at_once")
        other = _difference(noted, data)
        if other:
            raise TrainingError(f"{self.folder}: cannot go on: {other}")
        extensions = [*noted.get("extensions", [])]
        if config.steps != before["steps"]:
            extensions.append({"done": self.done(), "before": before["steps"], "steps": config.steps})
        if extensions:
            data = {**data, "extensions": extensions}
        self._note(config, {**data, "at_once": chosen if config.at_once == "auto" else at_once()})

    def _start(self, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """What the run started from, which may be left out once there is a checkpoint.

        Raises
        ------
        TrainingError
            If something else is given, or nothing where it is still needed.
        """
        noted: dict[str, Any] | None = self.data().get("start")
        begun = self.last.is_file()
        if given is None:
            if noted is not None and not begun:
                raise TrainingError(
                    f"{self.folder}: begun from {noted['path']}, and nothing is learned yet: add --from "
                    f"{noted['path']}, or take another folder"
                )
            return noted
        identity = ("sha256", "optimizer")
        if begun and (noted is None or any(noted[key] != given[key] for key in identity)):
            raise TrainingError(
                f"{self.folder}: begun from {_described(noted)}, not {_described(given)}; leave --from out "
                "to go on, or take another folder"
            )
        return given

    def _room(self, config: Config, parameters: int) -> None:
        """See that the disk has room for what is still to be written."""
        if self.config_file.is_file() and self.ended(config):
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
        files.write_text(self.config_file, configs.dump(config))
        files.write_text(self.data_file, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def _described(start: Mapping[str, Any] | None) -> str:
    if start is None:
        return "random weights"
    optimizer = " with its optimizer" if start["optimizer"] else ""
    return f"{start['path']} ({start['sha256'][:12]}{optimizer})"


def _difference(noted: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What a run would learn from that is not as it was; where the songs are does not count."""
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
