"""Is each weight there, is it the right one, and is it whole?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kmdx.errors import WeightsError
from kmdx.weights.checksum import file_sha256, state_sha256
from kmdx.weights.finding import FoundWeight, contradiction, find_quietly, missing_message
from kmdx.weights.folder import models_folder
from kmdx.weights.loading import Checkpoint, load
from kmdx.weights.pulled_files import PulledFile, record_of
from kmdx.weights.registry import Weight, registry


@dataclass(frozen=True)
class WeightStatus:
    """What is known of the file that plays a role.

    Attributes
    ----------
    weight : Weight
        The role.
    path : Path, optional
        The file, where there is one.
    known : bool
        Whether its content is known to be that weight.
    intact : bool
        Whether it is whole: as published, as pulled, or at least readable from end to end.
    mismatch : bool
        Whether the file says that it was tuned for another source.
    message : str
        The same in words.
    """

    weight: Weight
    path: Path | None
    known: bool
    intact: bool
    mismatch: bool
    message: str

    @property
    def ok(self) -> bool:
        """Whether the file can be used for the role."""
        return self.intact and not self.mismatch


def verify(folder: Path | None = None, weights: Iterable[Weight] | None = None) -> list[WeightStatus]:
    """The status of each weight (of the whole registry, if none are given)."""
    chosen = registry().values() if weights is None else weights
    return [status(weight, folder) for weight in chosen]


def status(weight: Weight, folder: Path | None = None) -> WeightStatus:
    """The status of one weight; a file of unknown content is read from end to end."""
    folder = models_folder(folder)
    found = find_quietly(weight, folder)
    if found is None:
        return _status(weight, None, missing_message(weight, folder))
    if found.known:
        return _status(weight, found, "known content, intact", known=True, intact=True)
    if record := record_of(found.path, folder):
        return _status_by_record(weight, found, record)
    if problem := contradiction(weight, found, folder):
        return _status(weight, found, problem)
    try:
        checkpoint = load(found.path)
    except WeightsError as error:
        return _status(weight, found, str(error))
    return _status_of_unknown(weight, found, checkpoint)


def _status_of_unknown(weight: Weight, found: FoundWeight, checkpoint: Checkpoint) -> WeightStatus:
    if checkpoint.state and weight.state_sha256 and state_sha256(checkpoint.state) == weight.state_sha256:
        return _status(weight, found, "known tensors, intact", known=True, intact=True)
    other = _owner_of(checkpoint)
    if other is not None:
        message = (
            f"mismatch: by {found.how} it plays {weight.name}, but its tensors are those of {other.name}"
        )
        return _status(weight, found, message, intact=True, mismatch=True)
    tuned_for = checkpoint.tuned_for
    if weight.tuned_for and tuned_for and tuned_for != weight.tuned_for:
        return _status(
            weight,
            found,
            f"mismatch: by {found.how} it plays {weight.tuned_for}, but it says it was tuned for {tuned_for}",
            intact=True,
            mismatch=True,
        )
    evidence = f", tuned for {tuned_for} as it says itself" if tuned_for else ""
    return _status(weight, found, f"unknown content, readable; role by {found.how}{evidence}", intact=True)


def _owner_of(checkpoint: Checkpoint) -> Weight | None:
    """The weight whose tensors a checkpoint holds, where they are known."""
    known = {weight.state_sha256: weight for weight in registry().values() if weight.state_sha256}
    return known.get(state_sha256(checkpoint.state)) if checkpoint.state else None


def _status_by_record(weight: Weight, found: FoundWeight, record: PulledFile) -> WeightStatus:
    """The status of a file that was pulled though nobody publishes its checksum, or changed since."""
    if file_sha256(found.path) == record.sha256:
        return _status(weight, found, f"unknown content, intact: as pulled on {record.date}", intact=True)
    return _status(weight, found, f"damaged: not what was pulled on {record.date}; delete it and pull again")


def _status(
    weight: Weight,
    found: FoundWeight | None,
    message: str,
    *,
    known: bool = False,
    intact: bool = False,
    mismatch: bool = False,
) -> WeightStatus:
    return WeightStatus(weight, found.path if found else None, known, intact, mismatch, message)
