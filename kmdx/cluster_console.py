"""Shows a cluster's work on the terminal: one bar for everything, and a line for each worker."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Generic

from rich.markup import escape
from rich.progress import Progress, TaskID, TextColumn

from kmdx import terminal
from kmdx.batch import Job
from kmdx.cluster import ClusterOptions, Finished, Pool, Task, Value, Worker, connected, pool_of, result_of
from kmdx.inputs import InputSong
from kmdx.song_log import SongLog
from kmdx.terminal import err

MARGIN = 4  # lines of the terminal that the workers' lines leave free


def separate(songs: Sequence[InputSong], job: Job, options: ClusterOptions, log: SongLog) -> int:
    """Separate songs on a cluster, report each, and return how many failed.

    Raises
    ------
    KmdxError
        If an option is wrong, two songs would share a folder, or no node can be used.
    KeyboardInterrupt
        If the user stops it; this has been reported.
    """
    failed = 0
    pool = pool_of(songs, job, options)
    try:
        for finished in run(pool, lambda song: str(song.place), lambda result: result.seconds, log.notice):
            result = result_of(finished, songs, job)
            log.song(result)
            failed += result.error is not None
    except KeyboardInterrupt:
        terminal.complain("stopped; finished songs are kept")
        raise
    finally:
        log.count_finished()
    return failed


def warn(text: str, is_warning: bool) -> None:
    """Show a notice of a pool, if it is a warning."""
    if is_warning:
        terminal.warn(text)


def run(
    pool: Pool[Task, Value],
    label: Callable[[Task], str],
    seconds: Callable[[Value], float],
    notice: Callable[[str, bool], None] = warn,
) -> Iterator[Finished[Task, Value]]:
    """Connect to a pool's cluster, do its tasks, and yield each as it is finished.

    Parameters
    ----------
    pool : Pool
    label : callable
        The name of a task.
    seconds : callable
        Seconds of audio that a result took work for; 0 if it was finished before.
    notice : callable
        Called with each notice about workers and nodes, and whether it is a warning.

    Raises
    ------
    ClusterError
        If the cluster cannot be reached, or no node can be used.
    """
    with connected(pool.options) as dashboard:
        if dashboard:
            err.print(f"Ray's dashboard: http://{dashboard}")
        with terminal.progress_bar(
            TextColumn("{task.fields[text]}"), redirect_stdout=sys.stdout.isatty()
        ) as bar:
            bars = _Bars(bar, pool, label)
            for event in pool.run(bars.update):
                if isinstance(event, Finished):
                    bars.count(0.0 if event.value is None else seconds(event.value))
                    yield event
                else:
                    notice(event.text, event.is_warning)


class _Bars(Generic[Task, Value]):
    """The bar of all songs, with seconds of audio, rate and time left, and below it each worker's song."""

    def __init__(self, bar: Progress, pool: Pool[Task, Value], label: Callable[[Task], str]) -> None:
        self.bar, self.pool, self.label = bar, pool, label
        self.began = time.monotonic()
        self.done = self.separated = 0  # songs
        self.audio = 0.0  # seconds in them
        self.whole = bar.add_task("songs", total=len(pool.tasks), text="")
        self.lines: list[TaskID] = []

    def count(self, seconds: float) -> None:
        """Count a finished song, and the seconds of audio that were separated for it."""
        self.done += 1
        self.separated += seconds > 0
        self.audio += seconds

    def update(self) -> None:
        """Show the current progress."""
        current = [(worker, number) for worker in self.pool.workers for number in worker.progress]
        audio = self.audio + sum(worker.progress[number][0] for worker, number in current)
        seconds = max(time.monotonic() - self.began, 1e-3)
        text = (
            f"{self.done} of {len(self.pool.tasks)}, {audio:.0f} s of audio, "
            f"{audio / seconds:.1f} × real time, {self._time_left(seconds)} left"
        )
        self.bar.update(self.whole, completed=self.done, text=text)
        room = max(0, err.size.height - MARGIN)
        while len(self.lines) < min(len(current), room):
            self.lines.append(self.bar.add_task("", text=""))
        for place, line in enumerate(self.lines):
            if place < min(len(current), room):
                self._show(line, *current[place])
            else:
                self.bar.update(line, visible=False)

    def _show(self, line: TaskID, worker: Worker, number: int) -> None:
        done, total = worker.progress[number]
        label = escape(terminal.one_line(f"{worker.node}: {self.label(self.pool.tasks[number])}"))
        text = f"{done:.0f} of {total:.0f} s"
        self.bar.update(line, description=label, completed=done, total=total, text=text, visible=True)

    def _time_left(self, seconds: float) -> str:
        """An estimate from the songs that were separated so far."""
        if not self.separated:
            return "-:--:--"
        return str(timedelta(seconds=round(seconds / self.separated * (len(self.pool.tasks) - self.done))))
