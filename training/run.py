"""A run's folder, which only one process uses at a time.

- ``config.yaml``: the config
- ``data.yaml``: the songs, and the weights that the run started from
- ``checkpoints/last.ckpt``: the state from which the run resumes
- ``checkpoints/best.ckpt``: the weights to export
- ``steps.csv`` and ``validation.csv``: losses and scores
- ``report.html``: the report
- ``exports.txt``: checksums of exported files
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from kmdx import files
from kmdx.documents import read_yaml
from kmdx.errors import DocumentError
from kmdx.weights import file_sha256
from training import config as configs
from training.config import Config, TrainingError
from training.freezing import Trained

CHECKPOINTS = 3  # the best, the last, and the one being written
# Keys that may change when a run resumes: they do not affect what a step learns.
FREE = ("at_once", "checkpointing", "compile", "patience", "steps")
DATA_BYTES, DATA_NODES = 2**26, 2**21  # limits of data.yaml, which grows with the number of songs
MARGIN = 2**27  # bytes for logs and the report


class Run:
    """One run's folder."""

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
        """Open the folder of a run that has a checkpoint.

        Raises :class:`TrainingError` if there is no such run.
        """
        run = cls(folder)
        if not run.config_file.is_file():
            raise TrainingError(f"{folder}: not a training run: it has no config.yaml")
        if not run.weights.is_file():
            raise TrainingError(f"{folder}: the run has no checkpoint yet; wait for its first epoch to end")
        return run

    @property
    def weights(self) -> Path:
        """The best checkpoint, or the last if nothing was validated yet."""
        return self.best if self.best.is_file() else self.last

    def config(self) -> Config:
        """The config of the run."""
        return configs.load(str(self.config_file))

    def data(self) -> dict[str, Any]:
        """The content of ``data.yaml``: songs, devices, and the weights that the run started from."""
        try:
            found: dict[str, Any] = read_yaml(self.data_file, DATA_BYTES, DATA_NODES)
        except DocumentError as error:
            raise TrainingError(f"{self.data_file}: cannot be read: {error}") from error
        return found

    @property
    def trained_with(self) -> str | None:
        """Test songs, if any, that the weights it started from were trained with."""
        start = self.data().get("start") or {}
        return start.get("trained_with")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, and make it if it does not exist.

        Raises :class:`TrainingError` if it cannot be made, or another process uses it.
        """
        with ExitStack() as stack:
            try:
                self.last.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.locked(self.folder / ".lock"))
            except files.Locked as error:
                raise TrainingError(f"{self.folder}: another process is using this run") from error
            except OSError as error:
                raise TrainingError(f"{self.folder}: cannot be written to: {error.strerror}") from error
            yield

    def opening(self, trained: Trained) -> list[str]:
        """Lines to print before the first step: trained parameters, initial weights, and extensions."""
        lines = [f"training {trained.trained:,} of {trained.total:,} parameters"]
        data, config, done = self.data(), self.config(), self.done()
        start = data.get("start")
        if start and not done:
            lines.append(f"starting from {_describe(start)}")
        extension = (data.get("extensions") or [None])[-1]
        if extension and extension["done"] == done < config.steps:
            steps = f"{config.steps} steps"
            outcome = (
                f"the weights will equal those of a run started with {steps}"
                if config.optimizer.schedule == "constant"
                else f"the learning rate continues on the cosine of {steps}, so the weights will differ from "
                f"those of a run started with {steps}"
            )
            lines.append(f"step {done} of {steps} instead of {extension['before']}: {outcome}")
        return lines

    def at_once(self) -> int:
        """Windows that go through the network together, as chosen when the run started."""
        size: int = self.data()["at_once"]
        return size

    def checkpoint(self) -> tuple[dict[str, Any], float | None]:
        """The content of :attr:`weights`, and its score in dB; ``None`` if nothing was validated yet.

        It remains valid when a better checkpoint replaces the file.
        """
        path = self.weights
        found = _checkpoint(path)
        scores = [state.get("best_model_score") for state in found["callbacks"].values()]
        score = next((float(value) for value in scores if value is not None), None)
        return found, score if path == self.best else None

    def done(self) -> int:
        """Number of completed steps, which do not run again."""
        return int(_checkpoint(self.last)["global_step"]) if self.last.is_file() else 0

    def ended(self, config: Config | None = None) -> bool:
        """Whether the run is complete under a config, by default its own."""
        config = config or self.config()
        return self.done() >= config.steps or self.stopped_early(config)

    def wrote(self, file: Path) -> bool:
        """Whether this run exported the file, or the file does not exist."""
        return not file.is_file() or file_sha256(file) in self._exports()

    def note_export(self, file: Path) -> None:
        """Record that this run exported a file."""
        digests = {**self._exports(), file_sha256(file): None}
        files.write_text(self.exports_file, "".join(f"{digest}\n" for digest in digests))

    def _exports(self) -> dict[str, None]:
        if not self.exports_file.is_file():
            return {}
        return dict.fromkeys(self.exports_file.read_text("utf-8").split())

    def stopped_early(self, config: Config | None = None) -> bool:
        """Whether it stopped early because scores did not improve, which lightning does not store."""
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
        """Record the config and data of a new run, or check that those of a resumed run have not changed.

        Raises :class:`TrainingError` if the run was started with another config, other songs or other
        weights, has completed more steps than the config has, or the disk has no room for it.

        Parameters
        ----------
        config : Config
            Values of :data:`FREE` keys may change.
        data : dict
            Its songs, number of devices, and the weights that it starts from.
        parameters : int
            Number of parameters of the network.
        at_once : callable
            Chooses the number of windows at once if neither the config nor the run states it.
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
                f"{self.folder}: {self.done()} steps are complete, but steps is {config.steps}; expected at "
                f"least {self.done()}, or another folder"
            )
        before = self.config().absolute().model_dump(mode="json")
        now = config.model_dump(mode="json")
        if noted.get("vocals") and data["vocals"]:  # runs are identified by their weights, not by their paths
            before["rest"]["vocals"] = now["rest"]["vocals"]
        differing = [key for key in now if before.get(key) != now[key] and key not in FREE]
        if differing:
            key = differing[0]
            raise TrainingError(
                f"{self.folder}: the run was started with {key} {before.get(key)}, not {now[key]}; "
                "use another folder, or the original config"
            )
        chosen = noted.pop("at_once")
        other = _difference(noted, data)
        if other:
            raise TrainingError(f"{self.folder}: cannot resume the run: {other}")
        extensions = [*noted.get("extensions", [])]
        if config.steps != before["steps"]:
            extensions.append({"done": self.done(), "before": before["steps"], "steps": config.steps})
        if extensions:
            data = {**data, "extensions": extensions}
        self._note(config, {**data, "at_once": chosen if config.at_once == "auto" else at_once()})

    def _start(self, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """The weights that the run started from; ``given`` may be None once there is a checkpoint.

        Raises :class:`TrainingError` if ``given`` differs from them, or is None although it is still needed.
        """
        noted: dict[str, Any] | None = self.data().get("start")
        begun = self.last.is_file()
        if given is None:
            if noted is not None and not begun:
                raise TrainingError(
                    f"{self.folder}: the run starts from {noted['path']} and has no checkpoint yet: add "
                    f"--from {noted['path']}, or use another folder"
                )
            return noted
        identity = ("sha256", "optimizer")
        if begun and (noted is None or any(noted[key] != given[key] for key in identity)):
            raise TrainingError(
                f"{self.folder}: the run was started from {_describe(noted)}, not {_describe(given)}; leave "
                "out --from to resume it, or use another folder"
            )
        return given

    def _room(self, config: Config, parameters: int) -> None:
        """Check that the disk has room for the rest of the run."""
        if self.config_file.is_file() and self.ended(config):
            return
        held = sum(file.stat().st_size for file in self.last.parent.iterdir())
        need = max(0, CHECKPOINTS * checkpoint_size(config, parameters) - held) + MARGIN
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise TrainingError(
                f"{self.folder}: checkpoints and logs need {need / 1e9:.2f} GB, but only "
                f"{free / 1e9:.2f} GB are free; choose a folder on another disk"
            )

    def _note(self, config: Config, data: dict[str, Any]) -> None:
        files.write_text(self.config_file, configs.dump(config))
        files.write_text(self.data_file, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def _describe(start: Mapping[str, Any] | None) -> str:
    if start is None:
        return "random weights"
    optimizer = " with its optimizer" if start["optimizer"] else ""
    return f"{start['path']} ({start['sha256'][:12]}{optimizer})"


def _difference(noted: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How the data of a resumed run has changed; the songs' folders do not matter. None if it has not."""
    if noted["devices"] != now["devices"]:
        return f"{noted['devices']} devices, not {now['devices']}"
    for kind in ("training", "validation"):
        before, after = noted[kind], now[kind]
        for name in before:
            if name not in after:
                return f"the {kind} song {name} is missing now"
        for name in after:
            if name not in before:
                return f"the {kind} song {name} is new"
        if before != after:
            return f"the {kind} songs are in another order: give the folders in the original order"
    if noted.get("vocals") and noted["vocals"] != now["vocals"]:
        return "the weights of the vocals network's run have changed"
    if len(noted["variants"]) != len(now["variants"]):
        return f"{len(noted['variants'])} folders of variants, not {len(now['variants'])}"
    for name, versions in noted.get("stems", {}).items():  # old runs do not have this entry
        if len(versions) != len(now["stems"][name]):
            return f"{name} had {len(versions) - 1} variants, not {len(now['stems'][name]) - 1}"
        for before, after in zip(versions, now["stems"][name], strict=True):
            for stem in sorted({*before, *after}):
                was, has = before.get(stem, "no file"), after.get(stem, "no file")
                if was != has:
                    return f"{stem} of {name} had {was}, and now has {has}"
    return None


def checkpoint_size(config: Config, parameters: int) -> int:
    """Bytes of a checkpoint: the weights, their average, and the optimizer's moments."""
    moments = {"adamw": 2, "rmsprop": 1}[config.optimizer.kind]
    return 4 * parameters * (1 + (config.average is not None) + moments)


def _checkpoint(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found
