"""What a run came to: what it was made of, its scores in all, and the files that say so."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluator.dataset import STEMS, Track
from evaluator.process import Limits
from evaluator.replay import Record
from evaluator.store import write_json, write_text
from kmdx import limits, weights
from kmdx.plan import Plan

PACKAGES = ("kmdx-net", "torch", "demucs", "onnxruntime", "onnxruntime-gpu", "numpy", "soundfile", "soxr")
BIG = 10**6  # bytes
IGNORED = {
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    "node_modules",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
}


def describe_weights(plan: Plan, folder: Path | None = None) -> list[dict[str, Any]]:
    """Name, file, sha256 of each weight that a plan uses, and whether it is a published one.

    ``folder`` is where weight files lie, if not in the usual place.

    Raises
    ------
    WeightsError
        If one is missing.
    """
    needed = {use.weight.name: use.weight for use in plan.networks.values()}
    described = []
    for weight in needed.values():
        path = weights.find(weight, folder).path
        (status,) = weights.verify(folder, [weight])
        described.append(
            {
                "name": weight.name,
                "file": path.name,
                "sha256": weights.file_sha256(path),
                "known": status.known,
            }
        )
    return described


def describe_foreign(submission: Path) -> tuple[str, list[dict[str, Any]]]:
    """sha256 over all files of an entrant's folder, and its big files, which are weights as like as not."""
    digest = hashlib.sha256()
    big = []
    for path in sorted(submission.rglob("*")):
        inside = path.relative_to(submission)
        if not path.is_file() or any(part in IGNORED or part.endswith(".egg-info") for part in inside.parts):
            continue
        content = weights.file_sha256(path)
        digest.update(f"{inside.as_posix()} {content}\n".encode())
        if path.stat().st_size >= BIG:
            name = inside.as_posix()
            big.append({"name": name, "file": name, "sha256": content, "known": False})
    return digest.hexdigest(), big


def describe_run(
    *,
    submission: Path,
    code: str,
    plan: Plan | None,
    ensemble: str | None,
    used_weights: Sequence[Mapping[str, Any]],
    device: str,
    precision: str,
    engine: str,
    limits: Limits,
    data: Path,
    split: str | None,
    tracks: Sequence[Track],
    data_warnings: Sequence[str],
) -> dict[str, Any]:
    """Everything that a reader must know of a run, and that no song's record says."""
    return {
        "ensemble": plan.name if plan else submission.name,
        "title": plan.title if plan else f"the submission in {submission}",
        "submission": str(submission),
        "submission_sha256": code,
        "ensemble_option": ensemble,
        "plan_sha256": plan.digest if plan else None,
        "weights": [dict(weight) for weight in used_weights],
        "versions": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "device": device,
        "precision": precision,
        "engine": engine,
        "git_commit": _git_commit(submission),
        "time_limit_factor": limits.time_factor,
        "memory_limit": limits.memory,
        "enforced": limits.enforced,
        "data": {
            "path": str(data),
            "split": split,
            "songs": len(tracks),
            "lossy": any(track.lossy for track in tracks),
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
)


def identity(run: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for two sets of records to belong to one run."""
    return {
        **{key: run[key] for key in IDENTITY},
        "weights": {weight["name"]: weight["sha256"] for weight in run["weights"]},
        "songs": dict(fingerprints),
    }


def summarize(run: Mapping[str, Any], plan: Plan | None, records: Sequence[Record]) -> dict[str, Any]:
    """Put a run, its songs and their means together: the content of ``results.json``."""
    scored = [record for record in records if record["status"] == "ok"]
    loads = [record for record in records if record["seconds"] is not None]
    last = loads[-1] if loads else {}
    whole = {**run, **{key: last.get(key) for key in ("network", "load_seconds", "load_peak_memory")}}
    return {
        "run": whole,
        "summary": {
            "songs": run["data"]["songs"],
            "scored": len(scored),
            "failed": len(records) - len(scored),
            "global_sdr": {
                "mean over songs": _over_songs(scored, "global_sdr", statistics.fmean),
                "median over songs": _over_songs(scored, "global_sdr", statistics.median),
            },
            "museval_sdr": {
                "median over frames, mean over songs": _over_songs(scored, "museval_sdr", statistics.fmean),
                "median over frames, median over songs": _over_songs(
                    scored, "museval_sdr", statistics.median
                ),
            },
            "real_time_factor": {
                "mean": _reduce(statistics.fmean, [record["real_time_factor"] for record in scored]),
                "max": _reduce(max, [record["real_time_factor"] for record in records]),
            },
            "peak_memory": _reduce(max, [record["peak_memory"] for record in records]),
            "peak_gpu_memory": _reduce(max, [record["peak_gpu_memory"] for record in records]),
        },
        "warnings": _warnings(whole, plan, records),
        "songs": list(records),
    }


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json`` and ``results.csv`` into a run's folder."""
    write_json(folder / "results.json", results)
    table = io.StringIO()
    writer = csv.writer(table)
    measures = ("global_sdr", "museval_sdr")
    writer.writerow(
        [
            "song",
            "status",
            "reason",
            "duration",
            "seconds",
            "real_time_factor",
            "peak_memory",
            "peak_gpu_memory",
        ]
        + ["over_time", "over_memory", "song_sdr"]
        + [f"{measure} {stem}" for measure in measures for stem in STEMS]
        + ["silent_references", "warnings"]
    )
    for record in results["songs"]:
        writer.writerow(
            [record[key] for key in ("song", "status", "reason", "duration", "seconds", "real_time_factor")]
            + [record[key] for key in ("peak_memory", "peak_gpu_memory", "over_time", "over_memory")]
            + [record.get("song_sdr")]
            + [record.get(measure, {}).get(stem) for measure in measures for stem in STEMS]
            + [" ".join(record.get("silent_references", [])), "; ".join(record["warnings"])]
        )
    write_text(folder / "results.csv", table.getvalue())


def code_digest(submission: Path) -> str:
    """sha256 over the names and contents of this package's Python files and plans."""
    digest = hashlib.sha256()
    places = [submission / "my_submission", submission / "kmdx"]
    files = [path for place in places if place.is_dir() for path in place.rglob("*")]
    for path in sorted(path for path in files if path.suffix in (".py", ".yaml") and path.is_file()):
        digest.update(f"{path.relative_to(submission)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _warnings(run: Mapping[str, Any], plan: Plan | None, records: Sequence[Record]) -> list[str]:
    """What a reader must know before the numbers."""
    lines = [f"the run failed: {run['failure']}"] if run.get("failure") else []
    noted = [note for record in records for note in record.get("isolation") or ()]
    lines += dict.fromkeys([*(run.get("isolation") or ()), *noted])
    lines += run["data"]["warnings"]
    if plan is not None:
        used = {use.weight.name: use.weight for use in plan.networks.values()}
        lines += [
            f"{name} was trained with {weight.trained_with}: a score on them is optimistic"
            for name, weight in used.items()
            if weight.trained_with
        ]
    unknown = [weight["name"] for weight in run["weights"] if not weight["known"]]
    if unknown:
        lines.append(f"weights of unknown content: {', '.join(unknown)}")
    silent = [record["song"] for record in records if record.get("silent_references")]
    if silent:
        lines.append(f"a true stem is silent in {_count(silent)}: {_few(silent)}")
    for key, what in (("over_time", "time"), ("over_memory", "memory")):
        over = [record["song"] for record in records if record[key]]
        if over:
            lines.append(
                f"{_count(over)} over the {what} limit, with which the challenge fails: {_few(over)}"
            )
    failed = [record["song"] for record in records if record["status"] != "ok"]
    if failed:
        lines.append(f"{_count(failed)} failed, counted in no mean: {_few(failed)}")
    if len(records) < run["data"]["songs"]:
        lines.append(f"unfinished: {len(records)} of {run['data']['songs']} songs")
    if run["network"] not in (None, "cut") and not any("reach the network" in line for line in lines):
        lines.append(f"the submission could reach the network: {run['network']}")
    return lines


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} song{'s' if len(names) > 1 else ''}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _over_songs(records: Sequence[Record], measure: str, reduce: Any) -> dict[str, float | None]:
    """A measure of each stem over songs, and of the mean of the four."""
    stems = {stem: [record[measure][stem] for record in records] for stem in STEMS}
    songs = [
        statistics.fmean(values) if None not in values else None
        for values in ([record[measure][stem] for stem in STEMS] for record in records)
    ]
    return {
        "song": _reduce(reduce, songs),
        **{stem: _reduce(reduce, values) for stem, values in stems.items()},
    }


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


def _cpu() -> str:
    """Model and number of the processors that may be used."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {limits.usable_cores()} cores"


def _git_commit(folder: Path) -> str | None:
    """The commit of a checkout, marked where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
