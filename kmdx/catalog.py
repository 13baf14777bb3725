"""Ensembles and weights by name: which exist, and pulling what a name stands for. Does not import torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kmdx import plan_file, weights
from kmdx.errors import KmdxError, KmdxWarning, PlanError, quoted, suggest
from kmdx.plan import Plan
from kmdx.weights import Progress, Weight

if TYPE_CHECKING:
    from kmdx.msst import Imported


def ensembles() -> dict[str, Plan]:
    """The ensembles that come with the package, and those in the models folder, by name.

    Warns about a file in the models folder that is not an ensemble, and leaves it out.
    """
    found = {}
    for name in (*plan_file.names(), *plan_file.imported()):
        try:
            found[name] = plan_file.load(name)
        except KmdxError as error:
            reason = str(error).removeprefix(f"{name}: ")
            warnings.warn(
                f"{weights.models_folder() / name}.yaml is not an ensemble: {reason}",
                KmdxWarning,
                stacklevel=2,
            )
    return found


@dataclass(frozen=True)
class Summary:
    """What helps to choose an ensemble."""

    name: str
    title: str
    description: str
    stems: tuple[str, ...]
    score: str
    """Its published score, and on which songs; empty if it was not measured."""
    license: str
    """The licenses of its weights."""
    gflops: float | None
    """Arithmetic in GFLOP per second of audio; None if it is unknown."""
    download: int | None
    """Bytes of its weights that are not on this machine; None if unknown."""
    is_here: bool
    """Whether all its weights are on this machine."""


def summaries() -> list[Summary]:
    """A summary of each of the :func:`ensembles`."""
    found = []
    for name, plan in ensembles().items():
        used = {use.weight.name: use.weight for use in plan.networks.values()}
        files = weights.find_all(used.values())
        missing = [weight.bytes for weight in used.values() if files[weight.name] is None]
        sizes = [size for size in missing if size is not None]
        found.append(
            Summary(
                name,
                plan.title,
                plan.description,
                plan.stems,
                plan.score,
                ", ".join(dict.fromkeys(weight.licence for weight in used.values())),
                plan.gflops(plan.stems),
                sum(sizes) if len(sizes) == len(missing) else None,
                not missing,
            )
        )
    return found


def pull(
    names: str | Iterable[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Download the weights that names stand for, unless they are already there, and check them.

    A community checkpoint is also imported as an ensemble of its name. Each step, and each license, is
    logged as information.

    Parameters
    ----------
    names : str or iterable of str
        Ensembles, weights, community checkpoints, or paths of plans (.yaml).
    folder : path_like, optional
        Folder of the weight files; by default the models folder.
    progress : callable, optional
        Called with the bytes so far and, if known, in total, of each file.

    Returns
    -------
    dict of str to Path
        The file of each weight, by its name.

    Raises
    ------
    PlanError, WeightsError
        If a name is unknown, or the models folder cannot be written to.
    DownloadError
        If no source could deliver a file; the message gives each one's reason.
    """
    names = [names] if isinstance(names, str) else list(names)
    place = weights.models_folder(None if folder is None else Path(folder))
    community = [name for name in dict.fromkeys(names) if name in weights.checkpoints()]
    found = {}
    others = weights_of(name for name in names if name not in community)
    for name in community:
        made = pull_checkpoint(name, folder=place, progress=progress)
        found[name] = made.weight_file if made else _weight_file(name, place)
    found |= {weight.name: path for weight, path in weights.pull_all(others, place, progress=progress)}
    return found


def pull_checkpoint(
    name: str,
    config: Path | None = None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Imported | None:
    """Pull a community checkpoint and import it as an ensemble, unless it was imported before.

    If the file of an imported checkpoint is missing or damaged, it is pulled again.

    Parameters
    ----------
    config : Path, optional
        Its config, by default the published one. With a config, it must not be imported yet.
    folder : Path, optional
        By default the models folder.
    progress : callable, optional
        As for :func:`pull`.

    Returns
    -------
    Imported or None
        What was imported; None if it was imported before.

    Raises
    ------
    KmdxError
        If it cannot be pulled or imported, or the ensemble of its name is not a plan.
    """
    place = weights.models_folder(folder)
    if config is None and (place / f"{name}.yaml").exists():
        file, weight = _weight_file(name, place), weights.checkpoints()[name].weight()
        (status,) = weights.verify(place, [weight])
        if not file.is_file() or (file == status.path and not status.ok):
            weights.pull(weight, place, progress=progress)
        return None
    from kmdx import msst  # reads the checkpoint with torch

    return msst.pull(name, config, place, progress)


def _weight_file(name: str, folder: Path) -> Path:
    """The file from which an imported ensemble loads its weights."""
    plan = folder / f"{name}.yaml"
    for use in plan_file.load(plan).networks.values():
        if use.weight.path is not None:
            return use.weight.path
    raise PlanError(f"{plan} is not the imported ensemble: it names no weight file; rename it")


def weights_of(names: Iterable[str]) -> list[Weight]:
    """The weights that names of weights, community checkpoints and ensembles refer to, each once.

    Raises :class:`KmdxError` if a name is unknown.
    """
    known, checkpoints = [*plan_file.names(), *plan_file.imported()], weights.checkpoints()
    found = {}
    for name in names:
        if name in checkpoints:
            meant = [checkpoints[name].weight()]
        elif name in known or name.endswith((".yaml", ".yml")):
            meant = [use.weight for use in plan_file.load(name).networks.values()]
        else:
            try:
                meant = [weights.get(name)]
            except KmdxError as error:
                everything = [*known, *checkpoints, *weights.known()]
                hint = (
                    suggest(name, everything)
                    or "; `kmdx models list` and `kmdx ensembles` list the known names"
                )
                raise KmdxError(f"unknown weight or ensemble {quoted(name)}{hint}") from error
        found.update({weight.name: weight for weight in meant})
    return list(found.values())
