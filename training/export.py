"""Export a run's weights for use in ensembles: as ``.pt`` in the author's layout, and as an ONNX graph."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kmdx import files, weights
from kmdx.challenge import RATE
from kmdx.networks.onnx import write_graph
from kmdx.networks.tfc_tdf import SPECTRUM_CHANNELS, TfcTdf
from training import budget, trainer
from training.config import Config, TrainingError
from training.run import Run

TOLERANCE = 1e-4  # largest difference between graph and network, relative to the largest value
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


class Exported(NamedTuple):
    """An exported network."""

    state: Path
    graph: Path
    difference: float  # between graph and network, relative to the largest value
    name: str  # in plans
    step: int  # of its checkpoint
    score: float | None  # of its checkpoint in dB; None if not validated yet
    ended: bool  # whether the run has no steps left


def write_weights(run: Run, name: str, folder: Path, half: bool = False, replace: bool = False) -> Exported:
    """Export a run's best weights into a models folder and register them there.

    Raises :class:`TrainingError` if the name is invalid or belongs to another run, the folder cannot be
    written to, a weight is too large for float16, or the graph's output differs from the network's.

    Parameters
    ----------
    name : str
        Name of the files, also used in plans.
    folder : Path
        The models folder.
    half : bool
        Round the weights to float16: the ``.pt`` file is half as large, and the graph has the same weights.
    replace : bool
        Replace a weight with the same name from another run.
    """
    state, graph = folder / f"{name}.pt", folder / f"{name}.onnx"
    _check_name(run, name, state, replace)
    config = run.config()
    checkpoint, score = run.checkpoint()
    network = trainer.trained(run, checkpoint)
    if half:
        _round(network)
    start = run.data().get("start") if run.data_file.is_file() else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.atomic(graph) as graph_partial, files.atomic(state) as state_partial:
            torch.save(author_state(network, half), state_partial)
            write_graph(network, graph_partial, network.config.spectrogram.frames)
            difference = compare(network, graph_partial)
            if not difference <= TOLERANCE:  # also if it is NaN
                raise TrainingError(
                    f"the exported graph differs from the network by {difference:.1e} of its peak; "
                    f"expected at most {TOLERANCE:.0e}"
                )
        weights.register(
            folder,
            name,
            title=config.title,
            file=state.name,
            architecture={**config.network.architecture(config.source), "gflops": _gflops(config)},
            trained=date.today().isoformat(),
            started_from=None if start is None else {key: start[key] for key in ("path", "sha256")},
            trained_with=run.trained_with,
        )
        run.note_export(state)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written to: {error.strerror or error}") from error
    return Exported(state, graph, difference, name, checkpoint["global_step"], score, run.ended())


def _check_name(run: Run, name: str, state: Path, replace: bool) -> None:
    """Check that a weight may have this name, and that its file may be written."""
    folder = state.parent
    if not NAME.fullmatch(name):
        raise TrainingError(f"name {name!r}: expected only lower-case letters, digits, '_', '-' and '.'")
    elsewhere = folder.resolve() != weights.shipped_folder().resolve()
    if name in weights.published() or (name in weights.shipped() and elsewhere):
        raise TrainingError(f"name {name!r}: a known weight has this name; choose another")
    if not replace and name in weights.trained(folder) and not run.wrote(state):
        raise TrainingError(
            f"name {name!r}: a weight from another run has this name in {folder}; add --replace to replace it"
        )


@torch.no_grad()
def _round(network: TfcTdf) -> None:
    """Round a network's weights to float16 values."""
    for name, tensor in network.state_dict().items():  # shares memory with the network
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
            if not tensor.isfinite().all():
                raise TrainingError(f"{name} exceeds the range of float16: leave out --half")


def _gflops(config: Config) -> float:
    """Arithmetic of the network in GFLOP per second of signal."""
    return round(budget.measure(config).forward * RATE / config.network.chunk, 2)


def author_state(network: TfcTdf, half: bool = False) -> dict[str, torch.Tensor]:
    """A state dict in the layout of the author's files: parameters, and the constants of the transform."""
    dtype = torch.float16 if half else torch.float32
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    if half:
        return state  # without the constants, which would be most of the file and can be recomputed
    padding = torch.zeros(1, SPECTRUM_CHANNELS, *network.padding_shape)
    return {"window": network.spectrogram.window, "freq_pad": padding, **state}


def compare(network: TfcTdf, graph: Path) -> float:
    """The largest difference between graph and network on noise, relative to the largest value."""
    import onnxruntime

    sizes = network.config.spectrogram
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.randn(2, SPECTRUM_CHANNELS, sizes.bins, sizes.frames, generator=generator)
    session = onnxruntime.InferenceSession(graph.read_bytes(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"input": spectrum.numpy()})
    with torch.inference_mode():
        expected = network.unet(spectrum).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())
