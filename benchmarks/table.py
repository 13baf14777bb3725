"""Print the table of machines in docs/speed.md: ``python -m benchmarks.table [--networks] [FOLDER]``.

It uses the files written by ``python -m benchmarks.baseline --json benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kmdx import terminal
from kmdx.benchmark import Machine
from kmdx.challenge import TIME_FACTOR
from kmdx.errors import KmdxError

RESULTS = Path(__file__).parent / "results"
Report = dict[str, Any]


def load(folder: Path) -> list[Report]:
    """The reports in a folder, sorted by machine and ensemble.

    Raises :class:`KmdxError` if there are none, or one cannot be read.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise KmdxError(f"no reports in {folder}: `python -m benchmarks.baseline --json {folder}` writes one")
    reports = []
    for file in files:
        try:
            report = json.loads(file.read_text("utf-8"))
            Machine(**report["machine"]), report["networks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KmdxError(f"{file} is not a report of `python -m benchmarks.baseline`: {error}") from error
        reports.append(report)
    return sorted(reports, key=lambda report: (name(report), report["ensemble"]))


def name(report: Report) -> str:
    """The name of the machine."""
    return Machine(**report["machine"]).name


def plans(reports: Iterable[Report]) -> Iterator[str]:
    """The lines of a table with one row per report of a whole ensemble."""
    yield (
        f"| machine | ensemble | precision | 4-minute song | limit {TIME_FACTOR:g} × "
        "| relative to the baseline | difference | memory |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for report in reports:
        plan, prediction = report["plan"], report["prediction"]
        if plan is None:
            continue
        settings = "" if report["speed"] == "leaderboard" else f" ({report['speed']})"
        precisions = dict.fromkeys(network["precision"] for network in report["networks"].values())
        ratio = "" if prediction["ratio"] is None else f"{prediction['ratio']:.2f} × faster"
        least = "" if plan["difference"] is None else f"{min(plan['difference'].values()):.0f} dB"
        gpu = plan["peak_device_memory"]
        memory = [] if plan["peak_memory"] is None else [f"{plan['peak_memory'] / 1e9:.1f} GB"]
        memory += [] if gpu is None else [f"GPU {gpu / 1e9:.1f} GB"]
        yield _row(
            name(report),
            f"`{report['ensemble']}`{settings}{', stand-in weights' if report['stand_in'] else ''}",
            ", ".join(precisions),
            f"{prediction['factor']:.2g} × its duration",
            "passes" if prediction["passes"] else "fails",
            ratio,
            least,
            ", ".join(memory),
        )


def networks(report: Report) -> Iterator[str]:
    """The lines of a table with one row per network of a report."""
    yield "| network | in | signal per second | GFLOP/s | of peak | than plain | difference |"
    yield "|---|---|---|---|---|---|---|"
    for network, speed in report["networks"].items():
        yield _row(
            f"`{network}`",
            speed["precision"],
            f"{speed['throughput']:.3g} s",
            "" if speed["gflops"] is None else f"{speed['gflops']:.0f}",
            "" if speed["peak_share"] is None else f"{speed['peak_share']:.0%}",
            "" if speed["ratio"] is None else f"{speed['ratio']:.2g} × faster",
            "" if speed["difference"] is None else f"{speed['difference']:.0f} dB",
        )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--networks", action="store_true", help="also print a table of networks per report")
    options = parser.parse_args(arguments)
    reports = load(options.folder)
    print(*plans(reports), sep="\n")
    if options.networks:
        for report in reports:
            print(f"\n{name(report)}, `{report['ensemble']}`, {report['date'][:10]}:\n")
            print(*networks(report), sep="\n")


if __name__ == "__main__":
    terminal.run(main)
