"""Ensembles and weights by name: which exist, and pulling what a name stands for. Does not import torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from kmdx import plan_file, weights
from kmdx.errors import KmdxError, KmdxWarning, quoted, suggest
from kmdx.plan import Plan
from kmdx.weights import Progress, Weight


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
    for name in community:
        if (place / f"{name}.yaml").exists():
            found[name] = weights.pull(weights.checkpoints()[name].weight(), place, progress=progress)
        else:
            from kmdx import msst  # reads the checkpoint with torch

            found[name] = msst.pull(name, folder=place).weight_file
    others = weights_of(name for name in names if name not in community)
    found |= {weight.name: path for weight, path in weights.pull_all(others, place, progress=progress)}
    return found


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
