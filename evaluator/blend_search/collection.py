"""Reads a collection: the flat plan, the inner products of each stem, and the time that networks took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluator.blend_search.collecting import FORM, PLAN
from evaluator.blend_search.flat_plan import scored_stems
from evaluator.blend_search.inner_products import InnerProducts, Weights, is_silent
from evaluator.run_folder import read_json
from kmdx import plan_file
from kmdx.challenge import CHANNELS, RATE
from kmdx.errors import KmdxError
from kmdx.plan import Plan

TOLERANCE = 0.01  # dB between the rendered and the predicted score, above which there is a warning


@dataclass(frozen=True)
class StemProducts:
    """A stem's signals and their inner products in all songs."""

    name: str
    signals: tuple[str, ...]  # nodes of the flat plan
    published: Weights  # ``(signals,)``: the weights in the plan
    products: InnerProducts
    values: NDArray[np.float64]  # ``(songs,)``: samples times channels of each song

    @property
    def silent(self) -> NDArray[np.intp]:
        """Indices of the songs in which the true stem is silent."""
        return np.flatnonzero(is_silent(self.products.energy, self.values))

    @property
    def counted(self) -> NDArray[np.intp]:
        """Indices of the songs that count: all others."""
        return np.flatnonzero(~is_silent(self.products.energy, self.values))


@dataclass(frozen=True)
class Collection:
    """A collection of songs."""

    folder: Path
    plan: Plan  # flat, with the published weights and the ensemble's name
    songs: tuple[str, ...]
    stems: tuple[StemProducts, ...]
    failed: Mapping[str, str]  # songs that are left out, and why
    warnings: tuple[str, ...]
    costs: Mapping[str, float]  # seconds that each network run took per second of audio


def load(folder: Path) -> Collection:
    """Read a collection.

    Raises :class:`KmdxError` if the folder is not a collection, is damaged, or contains no collected song.
    """
    path = folder / "run.json"
    if not path.exists():
        raise KmdxError(f"{folder} is not a collection; `python -m evaluator.blend_search collect` makes one")
    run = read_json(path)
    if run.get("form") != FORM:
        raise KmdxError(f"{folder} is another kind of run, or a collection of another version; collect again")
    name, digest, own = (run.get(key) for key in ("ensemble", "plan_sha256", "own"))
    plan = plan_file.load(folder / PLAN)
    if not (isinstance(name, str) and isinstance(digest, str) and isinstance(own, dict)):
        raise KmdxError(f"{path} is damaged; collect again into another folder")
    if own.keys() != {*plan.stems}:
        raise KmdxError(f"{folder}: {PLAN} is not the collected plan; collect again")
    plan = replace(plan, name=name, digest=digest)
    records = [_record(path, plan) for path in (folder / "songs").glob("*.json")]
    records.sort(key=lambda record: record["song"])
    done = [record for record in records if record["status"] == "ok"]
    failed = {record["song"]: record["reason"] for record in records if record["status"] != "ok"}
    if not done:
        why = "; ".join(f"{song}: {reason}" for song, reason in list(failed.items())[:1])
        raise KmdxError(f"{folder}: none of its {len(records)} songs was collected{why and f'; {why}'}")
    stems = tuple(_stem(plan, name, done) for name in scored_stems(plan))
    return Collection(
        folder=folder,
        plan=plan,
        songs=tuple(record["song"] for record in done),
        stems=stems,
        failed=failed,
        warnings=tuple(_warnings(stems, done)),
        costs=_costs(plan, done),
    )


def _record(path: Path, plan: Plan) -> dict[str, Any]:
    """Read a song's record; raise :class:`KmdxError` if it is incomplete."""
    record = read_json(path)
    try:
        if record["status"] == "ok":
            for stem in plan.stems:
                count = len(plan.nodes[stem].inputs)
                found = record["stems"][stem]
                shapes = {"energy": (), "constant": (), "cross": (count,), "gram": (count, count)}
                if any(np.shape(found[name]) != shape for name, shape in shapes.items()):
                    raise ValueError(f"the signals of {stem} differ from those of the plan")
                float(found["published_sdr"])
            sum(record["seconds"][run] for run in plan.runs(plan.stems))
            float(record["duration"])
        return {"song": str(record["song"]), **record}
    except (KeyError, TypeError, ValueError) as error:
        raise KmdxError(f"{path} is damaged ({error}); delete it and collect again") from error


def _stem(plan: Plan, name: str, records: Sequence[Mapping[str, Any]]) -> StemProducts:
    terms = plan.nodes[name].terms
    found = [record["stems"][name] for record in records]
    names = [field.name for field in fields(InnerProducts)]
    products = InnerProducts(**{name: np.array([each[name] for each in found]) for name in names})
    values = np.array([round(record["duration"] * RATE) * CHANNELS for record in records], np.float64)
    return StemProducts(name, tuple(terms), np.array([*terms.values()], np.float64), products, values)


def _warnings(stems: Sequence[StemProducts], records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warnings about songs whose rendered score differs from the predicted one."""
    for stem in stems:
        sdr = stem.products.sdr(stem.published)
        for number in stem.counted.tolist():
            record, predicted = records[number], sdr[number]
            rendered = record["stems"][stem.name]["published_sdr"]
            if abs(rendered - predicted) > TOLERANCE:
                yield (
                    f"{record['song']}: {stem.name} scores {rendered:.3f} dB with the published weights, but "
                    f"{predicted:.3f} dB were predicted: it clips, or a blend in it has weights that "
                    "do not sum to one"
                )


def _costs(plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    duration = math.fsum(record["duration"] for record in records)
    return {
        run: math.fsum(record["seconds"][run] for record in records) / duration
        for run in plan.runs(plan.stems)
    }
