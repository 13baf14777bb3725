"""Measure a cluster's own cost: ``python -m benchmarks.cluster``.

The tasks wait instead of computing, so that several workers on one machine do not compete for its cores. For
1, 2 and 4 workers, the efficiency is the shortest possible time divided by the time taken, from the end of
the first task to that of the last. The overhead per task is measured with tasks that do nothing. With
``--many N``, the command runs N tasks that do nothing. It then shows the time to the first result, the time
from there to the last, and the peak memory of this process.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmdx import cluster, terminal
from kmdx.cluster import ClusterOptions, Finished, Pool
from kmdx.inputs import InputSong

EMPTY = 500  # tasks that do nothing


@dataclass(frozen=True)
class Waiting:
    """Makes workers that wait for a number of seconds."""

    seconds: float

    def __call__(self) -> Callable[[InputSong, cluster.Progress], None]:
        return lambda _, progress: time.sleep(self.seconds)


def run(tasks: int, seconds: float, workers: int) -> tuple[float, float]:
    """Seconds from the start to the first result, and from there to the last."""
    options = ClusterOptions(workers=workers, cpus=1)
    songs = [InputSong(Path(f"/music/{number:06}.wav"), f"{number:06}") for number in range(tasks)]
    with tempfile.TemporaryDirectory() as folder, cluster.connected(options):
        began = time.perf_counter()
        ends = [
            time.perf_counter()
            for event in Pool(songs, Waiting(seconds), Path(folder), [], options).run()
            if isinstance(event, Finished)
        ]
    assert len(ends) == tasks
    return ends[0] - began, ends[-1] - ends[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--many", type=int, metavar="N", help="run this many tasks that do nothing instead")
    arguments = parser.parse_args()
    if arguments.many:
        first, rest = run(arguments.many, 0.0, 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        terminal.out.print(
            f"{arguments.many} tasks: {first:.1f} s to the first, {rest:.1f} s to the last, {peak:.0f} MB"
        )
        return
    for workers in (1, 2, 4):
        seconds, each = 1.0, 24
        _, taken = run(each * workers, seconds, workers)
        # A worker handles AT_ONCE tasks at a time; the first of them end together.
        least = (each / cluster.AT_ONCE - 1) * seconds
        _, idle = run(EMPTY, 0.0, workers)
        overhead = 1000 * idle / EMPTY
        terminal.out.print(
            f"{workers} workers: efficiency {least / taken:.1%}; overhead {overhead:.1f} ms per task"
        )


if __name__ == "__main__":
    terminal.run(main)
