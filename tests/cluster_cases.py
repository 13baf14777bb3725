"""Work for a cluster's workers that waits, fails or ends its process, and leaves a trace on the disk."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmdx import files
from kmdx.errors import KmdxWarning


@dataclass(frozen=True)
class Work:
    """Writes ``<task>.<random>`` into a folder for each task that it does, and does what the task's name says."""

    folder: Path
    seconds: float = 0.0

    def __call__(self) -> Callable[[str, Callable[[float, float], None]], str]:
        return self.do

    def do(self, task: str, progress: Callable[[float, float], None]) -> str:
        progress(0.5, 1.0)
        self.trace(f"began {task}")
        time.sleep(self.seconds)
        if task.startswith("kills"):
            os.kill(os.getpid(), signal.SIGKILL)
        if task.startswith("raises"):
            raise RuntimeError("out of ideas")
        if task.startswith("warns"):
            warnings.warn("too loud", KmdxWarning, stacklevel=1)
        if task.startswith("is busy") and len(self.traces(f"began {task}")) < 2:
            raise files.Locked
        self.trace(f"did {task}")
        return task.upper()

    def trace(self, what: str) -> None:
        (self.folder / f"{what}.{os.urandom(4).hex()}").touch()

    def traces(self, what: str) -> list[Path]:
        return list(self.folder.glob(f"{what}.*"))
