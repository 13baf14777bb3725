"""Which of two runs is better, song by song: ``python -m evaluator.compare RUN_A RUN_B``.

Songs are paired by name, so that a song that is hard for both weighs nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from evaluator import bootstrap
from evaluator.bootstrap import COVERAGE
from evaluator.dataset import STEMS
from evaluator.store import read_json, write_json
from kmdx import terminal
from kmdx.errors import KmdxError, quoted
from kmdx.terminal import out

MEASURES = {"global_sdr": "global SDR", "museval_sdr": "museval SDR, median over frames"}
TIE = 0.005  # dB: what two decimals do not show
MOST_SAMPLES = 1_000_000  # that fit in memory with any number of songs that people have
LIMITS = {
    "time_limit_factor": "time limit",
    "memory_limit": "memory limit",
    "enforced": "enforcing of limits",
}


@dataclass(frozen=True)
class Difference:
    """How far B lies above A in one measure of one stem, in dB over the songs that both have it for."""

    measure: str  # a key of MEASURES
    stem: str  # or "song", the mean of the four
    pairs: int
    a: float | None  # mean over these songs
    b: float | None
    mean: float | None  # of B - A
    low: float | None  # ends of the 95 % interval; None where there are fewer than two songs
    high: float | None
    wins: int  # songs in which B is better
    losses: int
    ties: int  # songs that differ by less than TIE

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.pairs:
            return "no pair"
        if self.low is None or self.high is None:
            return "one song: no interval"
        if self.low <= 0 <= self.high:
            return "may be chance: the interval contains 0"
        return "B is better" if self.low > 0 else "A is better"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side."""

    differences: list[Difference]
    only_a: list[str]  # songs with scores in A alone
    only_b: list[str]
    warnings: list[str]


def compare(a: Mapping[str, Any], b: Mapping[str, Any], samples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare two runs.

    Parameters
    ----------
    a, b : mapping
        As :func:`load` gives them: ``songs``, records of songs, and of the run what is known of
        ``run`` and ``fingerprints``.
    samples : int
        Times that the songs are drawn again.
    seed : int
        Of the drawing.

    Raises
    ------
    KmdxError
        If no song has scores in both, or ``samples`` is out of range.
    """
    if not 1 <= samples <= MOST_SAMPLES:
        raise KmdxError(f"--samples {samples}: expected 1 to {MOST_SAMPLES}")
    scored_a, scored_b = _scored(a), _scored(b)
    names = [name for name in scored_a if name in scored_b]
    if not names:
        raise KmdxError(f"no song has scores in both runs: {len(scored_a)} have in A, {len(scored_b)} in B")
    differences = [
        _difference(
            measure,
            stem,
            [_value(scored_a[name], measure, stem) for name in names],
            [_value(scored_b[name], measure, stem) for name in names],
            samples,
            seed,
        )
        for measure in MEASURES
        for stem in ("song", *STEMS)
    ]
    return Comparison(
        differences,
        [name for name in scored_a if name not in scored_b],
        [name for name in scored_b if name not in scored_a],
        list(_warnings(a, b, names)),
    )


def load(run: Path) -> dict[str, Any]:
    """Read a run's folder, also of an unfinished one: ``run``, ``songs`` and ``fingerprints``.

    Raises
    ------
    KmdxError
        If it holds no run, or a damaged one.
    """
    identity = read_json(run / "run.json") if (run / "run.json").exists() else {}
    results = read_json(run / "results.json") if (run / "results.json").exists() else {}
    # A run that was killed has records that its results, of an earlier start, do not.
    records = [read_json(path) for path in sorted((run / "songs").glob("*.json"))] or results.get("songs")
    if not isinstance(records, list):
        raise KmdxError(f"{run}: no run in it: expected results.json or songs/<song>.json")
    for number, record in enumerate(records, 1):
        if not _is_record(record):
            raise KmdxError(f"{run}: record {number} of {len(records)} is damaged: {quoted(record)}")
    known, fingerprints = results.get("run", identity), identity.get("songs", {})
    if not (isinstance(known, dict) and isinstance(fingerprints, dict)):
        raise KmdxError(f"{run}: what it was made of is damaged; run it again")
    return {"run": known, "songs": records, "fingerprints": fingerprints}


def _is_record(record: Any) -> bool:
    """Whether a song's record has all that is compared."""
    if not isinstance(record, dict) or not isinstance(record.get("song"), str):
        return False
    if record.get("status") != "ok":
        return isinstance(record.get("status"), str)
    scores = [record[measure] for measure in MEASURES if isinstance(record.get(measure), dict)]
    values = [score.get(stem, "") for score in scores for stem in STEMS]
    numbers = [value for value in (*values, record.get("duration")) if value is not None]
    whole = len(scores) == len(MEASURES) and isinstance(record.get("duration"), int | float)
    return whole and all(isinstance(number, int | float) for number in numbers)


def _scored(run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {record["song"]: record for record in run["songs"] if record["status"] == "ok"}


def _value(record: Mapping[str, Any], measure: str, stem: str) -> float | None:
    """A song's value in dB, if it has one."""
    scores = record[measure]
    if stem != "song":
        value: float | None = scores[stem]
        return value
    values = [scores[stem] for stem in STEMS]
    return None if None in values else statistics.fmean(values)


def _difference(
    measure: str,
    stem: str,
    values_a: Sequence[float | None],
    values_b: Sequence[float | None],
    samples: int,
    seed: int,
) -> Difference:
    pairs = [(x, y) for x, y in zip(values_a, values_b, strict=True) if x is not None and y is not None]
    if not pairs:
        return Difference(measure, stem, 0, None, None, None, None, None, 0, 0, 0)
    of_a, of_b = np.array(pairs).T  # (songs,)
    steps = of_b - of_a
    low, high = bootstrap.interval(steps, samples, seed) or (None, None)
    return Difference(
        measure,
        stem,
        len(steps),
        float(of_a.mean()),
        float(of_b.mean()),
        float(steps.mean()),
        low,
        high,
        wins=int(np.sum(steps >= TIE)),
        losses=int(np.sum(steps <= -TIE)),
        ties=int(np.sum(np.abs(steps) < TIE)),
    )


def _warnings(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """What makes the two runs hard to compare."""
    if changed := [name for name in names if _data_differ(name, a, b)]:
        yield f"the data of {len(changed)} songs differ, as of {changed[0]}: these scores do not compare"
    for key, what in LIMITS.items():
        of_a, of_b = (run.get("run", {}).get(key) for run in (a, b))
        if of_a != of_b:
            yield f"the {what} differs: {of_a} in A, {of_b} in B"
    for label, run in (("A", a), ("B", b)):
        planned, done = len(run.get("fingerprints", {})), len(run["songs"])
        if done < planned:
            yield f"{label} is unfinished: {done} of {planned} songs"
        if failed := done - len(_scored(run)):
            yield f"{failed} songs failed in {label} and count in no mean"


def _data_differ(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether a song is another in B, by its fingerprint where both runs have one, and by its length."""
    prints = [run["fingerprints"][name] for run in (a, b) if name in run.get("fingerprints", {})]
    durations = [_scored(run)[name]["duration"] for run in (a, b)]
    return len(set(prints)) > 1 or durations[0] != durations[1]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def command(
    run_a: Annotated[Path, typer.Argument(help="Folder of a run.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of the run to hold against it.")],
    samples: Annotated[int, typer.Option(help="Times that the songs are drawn again.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the drawing.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON.")] = None,
) -> None:
    """Compare two runs of local_evaluation.py song by song: positive differences mean that B is better."""
    comparison = compare(load(run_a), load(run_b), samples, seed)
    out.print(f"A: {escape(str(run_a))}\nB: {escape(str(run_b))}")
    for warning in comparison.warnings:
        out.print(f"[bold yellow]warning:[/bold yellow] {escape(warning)}")
    for label, only in (("A", comparison.only_a), ("B", comparison.only_b)):
        if only:
            out.print(escape(f"scores only in {label}: {', '.join(only)}"))
    for measure, title in MEASURES.items():
        out.print(_table(title, [each for each in comparison.differences if each.measure == measure]))
    if output is not None:
        rows = [{**asdict(each), "verdict": each.verdict} for each in comparison.differences]
        write_json(output, {**asdict(comparison), "differences": rows, "samples": samples, "seed": seed})


def _table(title: str, differences: Sequence[Difference]) -> Table:
    table = Table(title=f"{title} (dB, mean over songs)", title_justify="left", box=None, pad_edge=False)
    table.add_column("stem")
    for heading in ("A", "B", "B − A", f"{COVERAGE:.0%} interval", "B wins", "loses", "ties", "songs"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for each in differences:
        interval = "" if each.low is None or each.high is None else f"{each.low:+.3f} … {each.high:+.3f}"
        table.add_row(
            each.stem,
            *("" if value is None else f"{value:.3f}" for value in (each.a, each.b)),
            "" if each.mean is None else f"{each.mean:+.3f}",
            interval,
            *map(str, (each.wins, each.losses, each.ties, each.pairs)),
            each.verdict,
        )
    return table


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


if __name__ == "__main__":
    main()
