"""Shows a run's progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich import progress
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, TextColumn
from rich.text import Text

from evaluator import protocol
from evaluator.dataset import Track
from evaluator.metrics import Metric
from evaluator.protocol import Task, headline
from evaluator.records import SongRecord
from kmdx import terminal
from kmdx.terminal import err

MAX_TIME_LEFT = 1000 * 3600.0  # seconds; a submission may report any progress


class Lines(protocol.Progress):
    """Prints a line for each song that a cluster has done."""

    def __init__(self, task: Task) -> None:
        self.count, self.metric = len(task.songs), task.metrics[0]
        self.number = 0
        self.is_new = False

    def song(self, track: Track) -> None:
        self.is_new = True

    def finished(self, track: Track, record: SongRecord) -> None:
        self.number += 1
        if self.is_new:
            where = f", on {record.node}" if record.node else ""
            detail = f"{record.duration:.0f} s of audio{where}"
            err.print(_line_of(self.number, self.count, record, self.metric, detail))
        self.is_new = False


def _line_of(number: int, count: int, record: SongRecord, metric: Metric, detail: str) -> str:
    """What the terminal shows about a song that is done."""
    result = headline(record, metric) if record.ok else f"failed: {record.reason}"
    return escape(terminal.one_line(f"[{number}/{count}] {record.song}: {result} ({detail})"))


class Bars(protocol.Progress):
    """Progress bars for all songs and the current one; the time left is estimated from finished songs."""

    def __init__(self, bar: Progress, songs: Sequence[Track], metric: Metric) -> None:
        self.bar = bar
        self.metric = metric
        self.total = sum(track.duration for track in songs if track.rate)
        self.count = len(songs)
        self.number = 0
        self.before = 0.0  # seconds of audio in finished songs
        self.current = 0.0  # and in the current one
        self.played = 0.0  # seconds of audio separated by this command
        self.took = 0.0  # and the wall time for them
        self.began: float | None = None
        self.whole = bar.add_task("songs", total=self.total, text=f"0 of {self.count}")
        self.one = bar.add_task("", total=None, text="", visible=False)

    def song(self, track: Track) -> None:
        self.began = time.monotonic()
        self.bar.reset(self.one, description=escape(track.name), total=track.duration, visible=True)
        self.audio(0.0, track.duration)

    def audio(self, done: float, total: float) -> None:
        self.current = done
        self.bar.update(self.one, completed=done, text=f"{done:.0f} of {total:.0f} s")
        self.bar.update(self.whole, completed=self.before + done)

    def finished(self, track: Track, record: SongRecord) -> None:
        # A song that failed before it was separated says nothing about the speed.
        if self.began is not None and (record.ok or record.seconds is not None):
            self.played += track.duration
            self.took += time.monotonic() - self.began
        fresh, self.began, self.current = self.began is not None, None, 0.0
        self.number += 1
        self.before += track.duration if track.rate else 0.0
        self.bar.update(self.whole, completed=self.before, text=f"{self.number} of {self.count}")
        self.bar.update(self.one, visible=False)
        if fresh:
            left = f", {self.time_left()} left" if self.number < self.count and self.played else ""
            detail = f"{record.duration:.0f} s of audio{left}"
            err.print(_line_of(self.number, self.count, record, self.metric, detail))

    def time_left(self) -> str:
        """Hours, minutes and seconds until all songs are done, at the speed so far."""
        elapsed = time.monotonic() - self.began if self.began is not None else 0.0
        played, took = self.played + self.current, self.took + (elapsed if self.current else 0.0)
        if not played:
            return "-:--:--"
        pace = took / played
        remaining = self.total - self.before
        done = self.current or min(elapsed / pace, remaining)
        left = pace * max(remaining - done, 0.0)
        return str(timedelta(seconds=round(left))) if left < MAX_TIME_LEFT else "-:--:--"


class _TimeLeft(ProgressColumn):
    """The time left until all songs are done, next to the bar of all songs."""

    bars: Bars | None = None

    def render(self, task: progress.Task) -> Text:
        shown = self.bars is not None and task.id == self.bars.whole
        return Text(f"{self.bars.time_left()} left" if self.bars and shown else "")


@contextmanager
def bars_of(task: Task) -> Iterator[Bars]:
    """Show the progress of a task with bars."""
    left = _TimeLeft()
    with terminal.progress_bar(TextColumn("{task.fields[text]}"), left) as bar:
        left.bars = Bars(bar, task.songs, task.metrics[0])
        yield left.bars
