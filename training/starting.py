"""Read the weights that a run starts from: a file, or another run's best weights.

Only weights are loaded and, on request, a run's optimizer state. Steps, the learning rate schedule, the
average of weights and the windows start from the beginning.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kmdx import weights
from kmdx.errors import KmdxError, quoted, shown
from kmdx.networks.state import NoInitialization
from kmdx.networks.tfc_tdf import TfcTdf
from training import freezing
from training.config import Config, TrainingError
from training.run import Run

PREFIX = "network."  # of the names in a run's checkpoint
FREE = ("type", "sources", "gflops")  # keys of an architecture in which compatible weights may differ


@dataclass(frozen=True)
class Start:
    """Weights to start from."""

    path: Path  # the weight file, or the run's folder
    sha256: str  # checksum of the weight file, or of the run's checkpoint
    state: Mapping[str, Tensor]  # state dict of the network, float32
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """State of the optimizer by parameter name; empty if it is not loaded."""
    step: int | None = None  # completed steps of the run
    trained_with: str | None = None  # test songs, if any, that the weights were trained with

    def record(self) -> dict[str, Any]:
        """The entry in a run's ``data.yaml``."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "optimizer": bool(self.moments),
            "step": self.step,
            "trained_with": self.trained_with,
        }


def read(name: str, config: Config, with_optimizer: bool = False) -> Start:
    """Read weights to start from.

    Raises :class:`TrainingError` if the file, run or weight does not exist, cannot be read, or does not match
    the config.

    Parameters
    ----------
    name : str
        A weight file (``.pt``, ``.ckpt``, ``.safetensors``, ``.onnx``), the folder of a run, or the name of a
        weight in the registry or the models folder.
    config : Config
        Config of the new run; its network must have the same sizes.
    with_optimizer : bool
        Whether to load the optimizer's state too; only runs have one.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _of_run(path, config, with_optimizer)
        if with_optimizer:
            raise TrainingError("a weight file has no optimizer state: leave out --with-optimizer")
        if path.is_file():
            return _of_file(path, config, None)
        if len(path.parts) == 1 and name in weights.known():
            weight = weights.get(name)
            return _of_file(weights.find(weight).path, config, weight)
    except KmdxError as error:
        raise TrainingError(f"--from {shown(name)}: {error}") from error
    raise TrainingError(
        f"--from {shown(name)}: not found; expected a weight file, the folder of a run, or a weight's name"
    )


def _of_run(folder: Path, config: Config, with_optimizer: bool) -> Start:
    run = Run.existing(folder)
    other = run.config()
    _same_sizes(other.network.architecture(other.source), config)
    checkpoint = _checkpoint(run)
    state = _fit_state(without_prefix(weights.load(run.weights).state or {}), config)
    moments = _moments(checkpoint, other, config) if with_optimizer else {}
    return Start(
        folder.resolve(),
        weights.file_sha256(run.weights),
        state,
        moments,
        checkpoint["global_step"],
        run.trained_with,
    )


def _checkpoint(run: Run) -> dict[str, Any]:
    try:
        return run.checkpoint()[0]
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{run.weights}: damaged or incomplete; train that run again") from error


def _moments(
    checkpoint: Mapping[str, Any], other: Config, config: Config
) -> Mapping[str, Mapping[str, Tensor]]:
    """The optimizer's state by parameter name."""
    if other.optimizer.kind != config.optimizer.kind:
        raise TrainingError(
            f"its optimizer is {other.optimizer.kind}, not {config.optimizer.kind}: leave out "
            f"--with-optimizer, or set optimizer.kind={other.optimizer.kind}"
        )
    names = [name for name, _ in _network(config).named_parameters()]
    there, here = (freezing.matching(names, each.freeze) for each in (other, config))
    optimizers = checkpoint.get("optimizer_states") or [{"state": {}}]
    states = optimizers[0]["state"]
    trained = enumerate(name for name in names if name not in there)
    found = {name: states[number] for number, name in trained if number in states and name not in here}
    if not found:
        raise TrainingError(
            "its optimizer has no state for the parameters that this run trains: leave out --with-optimizer"
        )
    return found


def _of_file(path: Path, config: Config, weight: weights.Weight | None) -> Start:
    checkpoint = weights.load(path)
    if checkpoint.klass is not None:
        raise TrainingError(f"expected a TFC-TDF U-Net, found a network of class {checkpoint.klass}")
    weight = weight or _trained_here(path)
    if weight is not None and weight.architecture["type"] == "tfc_tdf":
        _same_sizes(weight.architecture, config)
    digest = weights.file_sha256(path)
    if checkpoint.state is None:
        sizes = config.network
        graph = _graph(path, (sizes.bins, sizes.frames))
        _same_sizes({"bins": graph.bins, "frames": graph.frames, **graph.sizes}, config)
        state = _fit_state(graph.state, config)
    else:
        state = _fit_state(without_prefix(checkpoint.state), config)
    weight, run = weight or _published(digest), Run(path.parent.parent)
    origin = run if path in (run.best, run.last) and run.data_file.is_file() else weight
    return Start(path.resolve(), digest, state, trained_with=None if origin is None else origin.trained_with)


def _graph(path: Path, spectrum: tuple[int, int]) -> weights.UnetGraph:
    try:
        return weights.unet(path, spectrum)
    except KmdxError as error:
        other = path.with_suffix(".pt")
        hint = f"; use {other.name} next to it" if other.is_file() else ""
        raise TrainingError(f"{error}{hint}") from error


def _trained_here(path: Path) -> weights.Weight | None:
    """The entry of a file in the ``trained.yaml`` next to it; a graph has the same entry as its weights."""
    for weight in weights.trained(path.parent).values():
        if weight.path is not None and weight.path.with_suffix(path.suffix).resolve() == path.resolve():
            return weight
    return None


def _published(digest: str) -> weights.Weight | None:
    """The published weight with this checksum; None if there is none."""
    for weight in weights.published().values():
        if any(source.sha256 == digest for source in weight.contents):
            return weight
    return None


def _same_sizes(architecture: Mapping[str, Any], config: Config) -> None:
    """Check that an architecture has the sizes of the config's network."""
    expected = config.network.architecture(config.source)
    given = {key: architecture[key] for key in expected if key in architecture and key not in FREE}
    differing = [key for key, value in given.items() if value != expected[key]]
    if differing:
        one, other = (
            ", ".join(f"{key} {'null' if of[key] is None else quoted(of[key])}" for key in differing)
            for of in (given, expected)
        )
        raise TrainingError(f"another network's weights: {one}; the config has {other}")


def without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict without the prefix of a run's checkpoint."""
    if not all(name.startswith(PREFIX) for name in state):
        return state
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def _network(config: Config) -> TfcTdf:
    with NoInitialization():
        return TfcTdf(config.network.unet(), config.source)


def _fit_state(state: Mapping[str, Tensor], config: Config) -> Mapping[str, Tensor]:
    """The tensors of a state dict as float32, with the network's own names."""
    network = _network(config)
    try:
        network.load(state)
    except ValueError as error:
        raise TrainingError(f"{error}{_first_difference(state, network)}") from error
    return network.state_dict()


def _first_difference(state: Mapping[str, Tensor], network: TfcTdf) -> str:
    """The shape of the first tensor that differs from the network's."""
    for name, own in network.state_dict().items():
        for given, tensor in state.items():
            same = given == name or given.endswith(f".{name}")
            if same and tensor.shape != own.shape:
                return f"; {shown(given)} has the shape {tuple(tensor.shape)}, expected {tuple(own.shape)}"
    return ""
