"""The record of a song: a typed object that is saved as JSON.

Schema 2 stores the values of all metrics in ``scores``. Schema 1 stored ``global_sdr``, ``museval_sdr`` and
``museval_frames`` at the top of a record; it can still be read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from kmdx.errors import KmdxError, quoted

SCHEMA = 2
"""Version of new records."""

Scores = dict[str, dict[str, float | None]]
"""Value of each metric and stem."""


DERIVED = {"accompaniment", "instrumental"}
"""Stems that are sums of others."""

SONG = "song"
"""Used as the name of a stem: the mean of a song's stems."""

AVERAGE = "average"
"""Used as the name of a stem: the mean over stems of their values over songs."""


def stems_of_mean(stems: Sequence[str]) -> tuple[str, ...]:
    """The stems that count in a mean over ``stems``: without sums of others, if several others remain."""
    plain = tuple(stem for stem in stems if stem not in DERIVED)
    return plain if len(plain) > 1 else tuple(stems)


def columns(stems: Sequence[str]) -> tuple[str, ...]:
    """The columns of a table of scores: the mean of several stems, and the stems."""
    return (SONG, *stems) if len(stems) > 1 else tuple(stems)


class RecordError(KmdxError):
    """A record is damaged or has an unknown version."""


class SchemaError(RecordError):
    """A record was written by another version of the evaluator."""


@dataclass(frozen=True)
class SongRecord:
    """A song of a run."""

    song: str
    status: Literal["ok", "failed"]
    reason: str | None = None  # why it failed
    duration: float = 0.0  # seconds of audio; 0 if unknown
    stems: tuple[str, ...] = ()  # the scored stems, in order
    scores: Scores = field(default_factory=dict)
    """Value of each metric and stem. For a metric with frames it is the median over frames. None if there is
    no value."""
    frames: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    """Values of each frame, for metrics that have frames."""
    seconds: float | None = None
    real_time_factor: float | None = None
    """``seconds`` and ``real_time_factor``: wall time as measured by the evaluator, and its ratio to the
    duration."""
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None
    """``peak_memory`` and ``peak_gpu_memory``: peak memory in bytes."""
    over_time: bool = False
    over_memory: bool = False
    """``over_time`` and ``over_memory``: whether it exceeded the run's limits."""
    ends_challenge: bool = False  # whether this failure would have ended the challenge
    silent_references: tuple[str, ...] = ()  # stems whose reference is digital silence
    envelopes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Peaks of equal parts of the song, in % of full scale, by stem and side (``reference``,
    ``estimate``)."""
    warnings: tuple[str, ...] = ()
    isolation: tuple[str, ...] = ()  # what the sandbox could not prevent during this song
    load_seconds: float | None = None
    load_peak_memory: int | None = None
    """``load_seconds`` and ``load_peak_memory``: wall time and peak memory of the last load of the model."""
    node: str | None = None  # the machine that separated it, on a cluster

    @property
    def ok(self) -> bool:
        """Whether it was scored."""
        return self.status == "ok"

    def failed(self, reason: str, *, ends_challenge: bool = False) -> SongRecord:
        """The record with status ``failed``."""
        return replace(self, status="failed", reason=reason, ends_challenge=ends_challenge)

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over :func:`stems_of_mean`; None if one of them has no value."""
        stems, values = stems_of_mean(self.stems), self.scores.get(metric, {})
        present = [value for stem in stems if (value := values.get(stem)) is not None]
        return statistics.fmean(present) if present and len(present) == len(stems) else None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON content, with each metric's mean over stems; NaN and infinity become null."""
        means = {metric: self.mean(metric) for metric in self.scores}
        return {"schema": SCHEMA, **finite(asdict(self)), "means": finite(means)}

    @classmethod
    def from_json(cls, content: Any) -> SongRecord:
        """Read a record of any schema.

        Raises
        ------
        RecordError
            If it is damaged, or newer than this version.
        """
        if not isinstance(content, dict):
            raise RecordError(f"expected a record, found {quoted(content)}")
        schema = content.get("schema", 1)
        if schema not in (1, SCHEMA):
            raise SchemaError(f"unknown record schema {quoted(schema)}; expected 1 or {SCHEMA}")
        known = {each.name for each in fields(cls)}
        try:
            content = finite(_upgraded(content) if schema == 1 else content)
            record = cls(**{key: _frozen(value) for key, value in content.items() if key in known})
            record._check()
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecordError(f"a damaged record: {quoted(content)}") from error
        return record

    def _check(self) -> None:
        """Raise ValueError if a value has an unexpected type or size."""
        numbers: list[Any] = [self.seconds, self.real_time_factor, self.peak_memory, self.peak_gpu_memory]
        for values in self.scores.values():
            numbers += values.values()
        for frames in self.frames.values():
            for series in frames.values():
                numbers += series
        whole = (
            isinstance(self.song, str)
            and self.status in ("ok", "failed")
            and isinstance(self.duration, int | float)
            and all(isinstance(stem, str) for stem in self.stems)
            and all(
                isinstance(texts, tuple) for texts in (self.warnings, self.silent_references, self.isolation)
            )
            and all(text is None or isinstance(text, str) for text in (self.reason, self.node))
            and all(
                number is None or (type(number) in (int, float) and float(number) == number)
                for number in numbers
            )
            and (self.status != "ok" or bool(self.scores and all(self.scores.values())))
        )
        if not whole:
            raise ValueError


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not support, by None, and tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record of schema 1 to schema 2."""
    old = ("global_sdr", "museval_sdr")
    scores = {metric: content[metric] for metric in old if metric in content}
    if content.get("status") == "ok" and len(scores) < len(old):
        raise RecordError(f"a damaged record: {quoted(dict(content))}")
    frames = {"museval_sdr": content["museval_frames"]} if "museval_frames" in content else {}
    network = content.get("network")
    isolation = [] if network in (None, "cut") else [f"it could reach the network: {network}"]
    return {
        **content,
        "stems": list(content.get("global_sdr") or ()),
        "scores": scores,
        "frames": frames,
        "isolation": isolation,
    }
