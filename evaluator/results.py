"""A run's results: its description, its scores over all songs, and the files that contain them."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import itertools
import platform
import re
import stat
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kmdx
from evaluator import song_warnings, visible
from evaluator.metrics import Metric
from evaluator.process import Limits, SubmissionError
from evaluator.protocol import Task
from evaluator.records import SCHEMA, SongRecord
from evaluator.run_folder import RunError, read_json, write_json, write_text
from kmdx import host, weights
from kmdx.errors import counted, listed
from kmdx.plan import Plan

PACKAGES = ("kmdx-net", "torch", "demucs", "onnxruntime", "onnxruntime-gpu", "numpy", "soundfile", "soxr")
BIG = 10**6  # bytes of a file that is probably a weight
MAX_FILES, MAX_BYTES = 200_000, 10**11  # in a submission's folder
REFERENCE = re.compile(r"refs/[A-Za-z0-9_][\w./-]*")


def describe_weights(plan: Plan, folder: Path | None = None) -> list[dict[str, Any]]:
    """Name, file and sha256 of each weight that a plan uses, and whether its content is known.

    Published weights and those that ship with the package are known. ``folder`` replaces the default folder
    of weight files.

    Raises
    ------
    WeightsError
        If a weight is missing.
    """
    needed = {use.weight.name: use.weight for use in plan.networks.values()}
    described = []
    for weight in needed.values():
        path = weights.find(weight, folder).path
        (status,) = weights.verify(folder, [weight])
        ships = path.is_relative_to(weights.shipped_folder())
        described.append(
            {
                "name": weight.name,
                "file": path.name,
                "sha256": weights.file_sha256(path),
                "known": status.known or ships,
            }
        )
    return described


def describe_foreign(submission: Path, without: Sequence[Path] = ()) -> tuple[str, list[dict[str, Any]]]:
    """The sha256 over all files of someone else's submission, and its big files, which are probably weights.

    The folder is not trusted: links are not followed, and only regular files are read. ``without`` lists
    folders that are not part of the submission, such as the run's folder and the data set.

    Raises
    ------
    SubmissionError
        If a file cannot be read, or the folder exceeds :data:`MAX_FILES` or :data:`MAX_BYTES`.
    """
    digest = hashlib.sha256()
    big = []
    total = 0
    entries = sorted(itertools.islice(visible.entries_of(submission, without), MAX_FILES + 1))
    if len(entries) > MAX_FILES:
        raise SubmissionError(
            f"{submission} has more than {MAX_FILES} files: move files that do not belong to it elsewhere"
        )
    if any(len(path.relative_to(submission).parts) > visible.MAX_DEPTH for path in entries):
        raise SubmissionError(f"{submission} has more than {visible.MAX_DEPTH} levels of folders")
    for path in entries:
        inside = path.relative_to(submission).as_posix()
        if path.is_symlink():
            digest.update(f"{inside} -> {path.readlink()}\n".encode("utf-8", "surrogateescape"))
            continue
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                continue
            total += found.st_size
            if total > MAX_BYTES:
                raise SubmissionError(
                    f"{submission} has more than {MAX_BYTES / 1e9:g} GB: move files that do not belong to "
                    f"it, such as {inside}, elsewhere"
                )
            content = weights.file_sha256(path)
        except OSError as error:
            raise SubmissionError(f"{path}: cannot be read: {error.strerror}") from error
        digest.update(f"{inside} {content}\n".encode("utf-8", "surrogateescape"))
        if found.st_size >= BIG:
            big.append({"name": inside, "file": inside, "sha256": content, "known": False})
    return digest.hexdigest(), big


@dataclass(frozen=True)
class EvaluatedSystem:
    """What is evaluated: a submission, or a folder of existing stems."""

    name: str
    title: str
    digest: str  # the sha256 of the submission's code or of the stems
    submission: Path | None = None  # the submission's folder; None for existing stems
    plan: Plan | None = None  # the plan of this package's own submission
    ensemble: str | None = None  # the ensemble that replaces the submission's own setting
    weights: Sequence[Mapping[str, Any]] = ()
    """What :func:`describe_weights` or :func:`describe_foreign` returned."""
    device: str = "not known"
    precision: str = "not known"
    engine: str = "not known"
    """``device``, ``precision`` and ``engine``: how the stems were computed, in words."""
    limits: Limits | None = None
    lossy_estimates: bool = False
    """Whether existing stems are in a lossy format; a submission's are wav files."""


def describe_run(system: EvaluatedSystem, task: Task, data_warnings: Sequence[str]) -> dict[str, Any]:
    """Everything that a reader must know about a run and that is not in a song's record."""
    submission, limits = system.submission, system.limits
    return {
        "ensemble": system.name,
        "title": system.title,
        "submission": None if submission is None else str(submission),
        "submission_sha256": system.digest,
        "ensemble_option": system.ensemble,
        "plan_sha256": system.plan.digest if system.plan else None,
        "weights": [dict(weight) for weight in system.weights],
        "versions": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{host.cpu_name()}, {host.usable_cores()} cores",
        "device": system.device,
        "precision": system.precision,
        "engine": system.engine,
        "git_commit": None if submission is None else _git_commit(submission),
        "stems": list(task.stems),
        "metrics": [metric.name for metric in task.metrics],
        "lossy_estimates": system.lossy_estimates,
        "accept_incomplete": task.accept_incomplete,
        "time_limit_factor": limits.time_factor if limits else None,
        "memory_limit": limits.memory if limits else None,
        "enforced": limits.enforced if limits else None,
        "data": {
            "path": str(task.data),
            "split": task.songs[0].split,
            "songs": len(task.songs),
            "lossy": any(track.lossy for track in task.songs),
            "warnings": list(data_warnings),
        },
    }


IDENTITY = (
    "ensemble",
    "ensemble_option",
    "submission_sha256",
    "plan_sha256",
    "versions",
    "python",
    "cpu",
    "device",
    "precision",
    "engine",
    "time_limit_factor",
    "memory_limit",
    "enforced",
    "stems",
    "metrics",
    "accept_incomplete",
)


def identity(run: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """The settings that must be the same for all records of a run."""
    return {
        **{key: run[key] for key in IDENTITY},
        **({"interpreter": run["interpreter_path"]} if "interpreter_path" in run else {}),
        "weights": {weight["name"]: weight["sha256"] for weight in run["weights"]},
        "songs": dict(fingerprints),
    }


def summarize(run: Mapping[str, Any], plan: Plan | None, records: Sequence[SongRecord]) -> dict[str, Any]:
    """The content of ``results.json``: the run's description, its songs and their means."""
    scored = [record for record in records if record.ok]
    loads = [record for record in records if record.seconds is not None]
    last = loads[-1] if loads else None
    whole = {
        **run,
        "isolation": list(
            dict.fromkeys(
                [*run.get("isolation", ()), *(line for record in records for line in record.isolation)]
            )
        ),
        "load_seconds": last.load_seconds if last else None,
        "load_peak_memory": last.load_peak_memory if last else None,
    }
    factors = [record.real_time_factor for record in records]
    return {
        "schema": SCHEMA,
        "run": whole,
        "summary": {
            "songs": run["data"]["songs"],
            "scored": len(scored),
            "failed": len(records) - len(scored),
            "scores": {name: over_songs(scored, name, run["stems"]) for name in run["metrics"]},
            "real_time_factor": {
                "mean": _reduce(statistics.fmean, [record.real_time_factor for record in scored]),
                "max": _reduce(max, factors),
            },
            "peak_memory": _reduce(max, [record.peak_memory for record in records]),
            "peak_gpu_memory": _reduce(max, [record.peak_gpu_memory for record in records]),
        },
        "warnings": _warnings(whole, plan, records),
        "songs": [record.to_json() for record in records],
    }


STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
}


def over_songs(
    records: Sequence[SongRecord], metric: str, stems: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Mean and median of a metric over songs, for each stem and for the mean of a song's stems (``song``)."""
    return {
        how: {
            "song": _reduce(reduce, [record.mean(metric) for record in records]),
            **{
                stem: _reduce(reduce, [record.scores.get(metric, {}).get(stem) for record in records])
                for stem in stems
            },
        }
        for how, reduce in STATISTICS.items()
    }


def statistic_title(metric: Metric, how: str) -> str:
    """How a value over songs is computed, such as ``median over 1 s frames, mean over songs``."""
    return f"median over 1 s frames, {how} over songs" if metric.frames else f"{how} over songs"


PLAIN = (
    "song", "status", "reason", "duration", "seconds", "real_time_factor", "peak_memory", "peak_gpu_memory",
    "over_time", "over_memory",
)  # fmt: skip
"""Columns of ``results.csv`` before the scores."""


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json`` and ``results.csv`` into a run's folder."""
    write_json(folder / "results.json", results)
    table = io.StringIO()
    writer = csv.writer(table)
    metrics, stems = results["run"]["metrics"], results["run"]["stems"]
    scores = [(metric, stem) for metric in metrics for stem in ("song", *stems)]
    writer.writerow(
        [*PLAIN, *(f"{metric} {stem}" for metric, stem in scores), "silent_references", "warnings", "node"]
    )
    for content in results["songs"]:
        record = SongRecord.from_json(content)
        writer.writerow(
            [getattr(record, name) for name in PLAIN]
            + [_value(record, metric, stem) for metric, stem in scores]
            + [" ".join(record.silent_references), "; ".join(record.warnings), record.node]
        )
    write_text(folder / "results.csv", table.getvalue())


def _value(record: SongRecord, metric: str, stem: str) -> float | None:
    return record.mean(metric) if stem == "song" else record.scores.get(metric, {}).get(stem)


def code_digest(submission: Path) -> str:
    """The sha256 over the names and contents of this package's Python files and plans."""
    digest = hashlib.sha256()
    code = submission if (submission / "kmdx").is_dir() else Path(kmdx.__file__).parents[1]
    for place in (code / "kmdx", submission / "my_submission"):
        files = [path for path in place.rglob("*") if path.suffix in (".py", ".yaml") and path.is_file()]
        for path in sorted(files):
            digest.update(f"{path.relative_to(place.parent)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _warnings(run: Mapping[str, Any], plan: Plan | None, records: Sequence[SongRecord]) -> list[str]:
    """What a reader must know before reading the numbers."""
    lines = [f"the run failed: {run['failure']}"] if run.get("failure") else []
    lines += run["isolation"]
    lines += run["data"]["warnings"]
    if plan is not None:
        used = {use.weight.name: use.weight for use in plan.networks.values()}
        lines += [
            f"{name} was trained with {weight.trained_with}: its scores on them are optimistic"
            for name, weight in used.items()
            if weight.trained_with
        ]
    unknown = [weight["name"] for weight in run["weights"] if not weight["known"]]
    if unknown:
        lines.append(f"weights of unknown content: {', '.join(unknown)}")
    for what, songs in _song_warnings(records).items():
        lines.append(f"{what} in {counted(len(songs), 'song')}: {listed(songs, most=3)}")
    for what, over in (
        ("time", [record.song for record in records if record.over_time]),
        ("memory", [record.song for record in records if record.over_memory]),
    ):
        if over:
            names = listed(over, most=3)
            lines.append(
                f"{counted(len(over), 'song')} over the {what} limit; this would fail the challenge: {names}"
            )
    failed = [record.song for record in records if not record.ok]
    if failed:
        be = "is" if len(failed) == 1 else "are"
        lines.append(
            f"{counted(len(failed), 'song')} failed and {be} not included in any mean: "
            f"{listed(failed, most=3)}"
        )
    if len(records) < run["data"]["songs"]:
        lines.append(f"unfinished: {len(records)} of {counted(run['data']['songs'], 'song')}")
    return lines


def _song_warnings(records: Sequence[SongRecord]) -> dict[str, list[str]]:
    """The songs that have each kind of warning."""
    kinds: dict[str, list[str]] = {}
    for record in records:
        found = [song_warnings.SILENT_REFERENCE.summary] if record.silent_references else []
        found += map(song_warnings.summary_of, record.warnings)
        for kind in dict.fromkeys(found):
            kinds.setdefault(kind, []).append(record.song)
    return kinds


def _reduce(reduce: Any, values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return reduce(present) if present else None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def interpreter_of(folder: Path) -> dict[str, Any] | None:
    """The submission's interpreter according to the results of an earlier call; None if unknown."""
    try:
        found = read_json(folder / "results.json")["run"]["interpreter"]
    except (RunError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _git_commit(folder: Path) -> str | None:
    """The commit of a checkout's HEAD; None if there is none.

    The files are read directly, up to a limit, because git would run programs from the folder's
    configuration.
    """
    git = folder / ".git"
    head = _line(git / "HEAD")
    if head.startswith("ref: ") and REFERENCE.fullmatch(name := head[5:]) and ".." not in name:
        head = _line(git / name) or next(
            (
                line.split(" ")[0]
                for line in _text(git / "packed-refs").splitlines()
                if line.endswith(f" {name}")
            ),
            "",
        )
    return head[:12] if re.fullmatch(r"[0-9a-f]{40,64}", head) else None


def _line(path: Path) -> str:
    return _text(path).partition("\n")[0].strip()


def _text(path: Path) -> str:
    """The beginning of a small text file; empty for a link or anything else that is not a regular file."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return ""
        with path.open("rb") as file:
            return file.read(2**20).decode("utf-8", "replace")
    except OSError:
        return ""
