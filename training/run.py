"""A run's folder: what lies in it, and that only one process works on it at a time.

``config.yaml`` what it is to do, ``data.yaml`` the songs, ``checkpoints/last.ckpt`` where it goes on and
``checkpoints/best.ckpt`` what is exported, ``steps.csv`` and ``validation.csv`` what happened,
``tensorboard/`` the same for TensorBoard, ``report.html`` the page to read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from training import config as configs
from training.config import Config, TrainingError

COPIES = 10  # of the weights that checkpoints take: two files of weights, their mean, two moments
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
        found: dict[str, Any] = yaml.safe_load(self.data_file.read_text("utf-8"))
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which is made where it is missing.

        Raises
        ------
        TrainingError
            If it cannot be made, or another process works on it.
        """
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise TrainingError(f"{self.folder}: another process works on this run") from error
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise TrainingError(f"{self.folder}: cannot be written to: {error.strerror}") from error

    def begin(self, config: Config, data: dict[str, Any], parameters: int) -> None:
        """Note what the run is to do, or check that it is what it was.

        Raises
        ------
        TrainingError
            If the run was begun with another config or other songs, or the disk has no room for it.
        """
        need = COPIES * 4 * parameters + MARGIN
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise TrainingError(
                f"{self.folder}: checkpoints and logs need {need / 1e9:.2f} GB, and "
                f"{free / 1e9:.2f} GB are free"
            )
        if not self.config_file.is_file() or not self.last.is_file():
            _write(self.config_file, configs.dump(config))
            _write(self.data_file, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
            return
        before = self.config().model_dump(mode="json")
        now = config.model_dump(mode="json")
        differing = [key for key in now if before.get(key) != now[key]]
        if differing:
            key = differing[0]
            raise TrainingError(
                f"{self.folder}: begun with {key} {before.get(key)}, not {now[key]}; "
                "take another folder, or the config it was begun with"
            )
        if self.data() != data:
            raise TrainingError(f"{self.folder}: begun with other songs: see {self.data_file}")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(path)
