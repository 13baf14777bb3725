"""The log of a run: CSV files, and progress on the terminal."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import TextColumn

from kmdx import files
from kmdx.errors import counted
from kmdx.terminal import progress_bar
from training.losses import LOSSES
from training.module import Unmixing
from training.run import Run

VALIDATION = ("step", "song", "sdr")
EVERY = 10  # steps between two rows


class CsvTable:
    """A CSV file to append to; when a run resumes, rows of steps that are repeated are removed.

    If a row has a new column, the column is added and is empty in earlier rows.

    Parameters
    ----------
    columns : sequence of str
        Initial columns; those of an existing file are kept.
    after : int
        The last step whose rows are kept.
    """

    def __init__(self, path: Path, columns: Sequence[str], after: int) -> None:
        self.path = path
        found, rows = self._read()
        self.columns = [*dict.fromkeys((*found, *columns))]
        self._open([row for row in rows if _number(row.get("step")) <= after])

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, with numbers rounded to six digits."""
        new = [name for name in row if name not in self.columns]
        if new:
            self.file.close()
            self.columns += new
            self._open(self._read()[1])
        self.writer.writerow(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        )
        self.file.flush()

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Return the columns and rows of the file."""
        if not self.path.is_file():
            return [], []
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            return [name for name in reader.fieldnames or [] if name], list(reader)

    def _open(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Rewrite the file with these rows, and open it for appending."""
        with files.atomic(self.path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.file = self.path.open("a", encoding="utf-8", newline="")
        self.writer = csv.DictWriter(self.file, self.columns)


def _number(text: str | None) -> float:
    """The number of a step; infinity for an incomplete row."""
    return int(text) if text and text.isdigit() else float("inf")


class RunLog(Callback):
    """Writes the run's CSV files and shows its progress."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run = run
        self.console = console
        self.bar = progress_bar(TextColumn("{task.fields[text]}"), console=console)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Open the CSV files at the current step."""
        assert isinstance(module, Unmixing)
        self.began = self.since = time.perf_counter()
        self.first = self.last = self.noted = self.reported = trainer.global_step
        self.validated: set[str] = set()  # names logged in validation, which later steps still report
        columns = ("step", "loss", *LOSSES, "learning_rate", "gradient", "skipped", "seconds")
        self.steps = CsvTable(self.run.steps, columns, self.first)
        self.validation = CsvTable(self.run.validation, VALIDATION, self.first)
        self.bar.start()
        self.task = self.bar.add_task("steps", total=module.config.steps, completed=self.first, text="")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
    ) -> None:
        """Log a step."""
        assert isinstance(module, Unmixing)
        step = trainer.global_step
        if step == self.last:
            return  # gradients are still accumulated
        if step % EVERY == 0 or step == module.config.steps:
            now = time.perf_counter()
            logged = trainer.logged_metrics.items()
            values = {name: float(value) for name, value in logged if name not in self.validated}
            values["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
            values["seconds"] = (now - self.since) / (step - self.noted)
            self.since, self.noted = now, step
            self.steps.add({"step": step, **values, "skipped": module.skipped})
            self.bar.update(
                self.task, completed=step, text=f"{step} of {module.config.steps}, {self.left(module, step)}"
            )
        self.last = step

    def left(self, module: Unmixing, step: int) -> str:
        """Time left at the pace since this process began, including validation."""
        pace = (time.perf_counter() - self.began) / max(1, step - self.first)
        return f"{timedelta(seconds=round(pace * (module.config.steps - step)))} left"

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Pause the clock of the steps."""
        self.paused = time.perf_counter()
        self.before = {*trainer.logged_metrics} - self.validated

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Log the scores."""
        assert isinstance(module, Unmixing)
        step = trainer.global_step
        self.validated = {*trainer.logged_metrics} - self.before
        whole = {name: float(trainer.logged_metrics[name]) for name in sorted(self.validated - {"sdr"})}
        for song, score in sorted(module.scores.items()):
            self.validation.add({"step": step, "song": song, "sdr": score, **whole})
        mean = f"SDR {float(trainer.callback_metrics['sdr']):.3f} dB"
        self.report(trainer, module, f"{mean} on {counted(len(module.scores), 'song')}")
        self.since += time.perf_counter() - self.paused

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Report an epoch without validation if there is no progress bar."""
        assert isinstance(module, Unmixing)
        if not self.console.is_terminal and self.reported != trainer.global_step:
            self.report(trainer, module)

    def report(self, trainer: lightning.Trainer, module: Unmixing, *what: str) -> None:
        """Print one line: the step, the score if there is one, the loss and the time left."""
        step = self.reported = trainer.global_step
        parts = [*what]
        loss = trainer.callback_metrics.get("loss")
        if loss is not None:
            parts.append(f"loss {float(loss):.4g}")
        if module.skipped:
            parts.append(f"{module.skipped} steps skipped (not finite)")
        parts.append(self.left(module, step))
        self.console.print(f"step {step} of {module.config.steps}: {', '.join(parts)}", highlight=False)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Remove the progress bar."""
        self.bar.stop()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, error: BaseException
    ) -> None:
        """Remove the progress bar after an error."""
        self.bar.stop()


def quiet() -> None:
    """Silence lightning's own messages, which are about its API."""
    import logging
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
