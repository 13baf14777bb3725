"""Stand-ins: random weights in place of an ensemble's own, for measuring speed without them.

The arithmetic is the same; the sound is not. Each network's weights are seeded by its name. They are scaled
so that signals keep their level from layer to layer, and an estimate is about half as loud as the input.
Nothing vanishes or explodes, so the effect of a lower precision can be measured, too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kmdx import plan_file
from kmdx.challenge import RATE
from kmdx.errors import KmdxError
from kmdx.networks import types
from kmdx.networks.demucs import CLASSES, build
from kmdx.networks.onnx import write_graph
from kmdx.networks.random_weights import gain_to_level, random_state
from kmdx.networks.state import NoInitialization
from kmdx.networks.tfc_tdf import UNET, TfcTdf, TfcTdfConfig, spectrogram_of
from kmdx.weights import Weight, own

PUBLISHED_GRAPH = {"layers": 11, "convolutions": 3, "growth": 48, "norm_groups": None}
"""Sizes of the U-Net in the registry's ONNX graphs; only the graphs themselves state them."""

SECONDS = 1.0  # most seconds of noise used to set the level


def write(ensemble: str | Path, folder: Path) -> Path:
    """Write stand-ins for all weights of an ensemble, and a copy of its plan that uses them.

    Returns the new plan's file, named after the ensemble, in an existing folder. The user's own graphs are
    used as they are, because only the graphs state their sizes. Raises :class:`PlanError` if the ensemble
    does not exist, and :class:`KmdxError` if an architecture cannot be built.
    """
    plan = plan_file.load(ensemble)
    networks = {}
    files: dict[str, str] = {}
    for number, (name, use) in enumerate(plan.networks.items()):
        weight = use.weight
        if weight.name not in files:
            try:
                files[weight.name] = str(_write_weights(weight, name, folder / str(number)).absolute())
            except (KeyError, TypeError, ValueError) as error:
                raise KmdxError(f"cannot make a stand-in for the weights of {name}: {error}") from error
        networks[name] = replace(use, weight=own(Path(files[weight.name]), weight.architecture))
    path = folder / f"{plan.name}.yaml"
    path.write_text(plan_file.dump(replace(plan, networks=networks)), "utf-8")
    return path


@torch.no_grad()
def _write_weights(weight: Weight, seed: str, path: Path) -> Path:
    """Write one file, named ``path`` plus its extension; return its path."""
    kind = types.type_of(weight.architecture)
    make = types.function(kind.stand_in)
    if kind.file == "graph":
        if weight.path is not None and "layers" not in weight.architecture:
            return weight.path
        return _export(make({**PUBLISHED_GRAPH, **weight.architecture}, seed), path.with_suffix(".onnx"))
    from safetensors.torch import save_file

    path = path.with_suffix(".safetensors")
    state = make(weight.architecture, seed).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@torch.no_grad()
def demucs(architecture: Mapping[str, Any], seed: str) -> nn.Module:
    """A Demucs with random weights, in half precision as Meta publishes them."""
    options = {key: value for key, value in architecture.items() if key not in ("type", "gflops")}
    with torch.device("meta"), NoInitialization():
        shapes = CLASSES[architecture["type"]](**options).state_dict()
    seconds = min(float(options.get("segment", SECONDS)), SECONDS)
    network = build(architecture, seconds, random_state(shapes, seed))
    branches = (network.model.decoder[-1], network.model.tdecoder[-1])
    gain = gain_to_level(network, int(seconds * RATE))
    for branch in branches:
        for parameter in branch.get_submodule("conv_tr").parameters():
            parameter.mul_(gain)
    return network.model.half()


@torch.no_grad()
def unet(architecture: Mapping[str, Any], seed: str) -> TfcTdf:
    """A U-Net with random weights."""
    sizes = {key: architecture[key] for key in UNET if key in architecture}
    config = TfcTdfConfig(spectrogram_of(architecture), **sizes)
    with torch.device("meta"), NoInitialization():
        shapes = TfcTdf(config, "").state_dict()
    network = TfcTdf(config, architecture["sources"][0])
    network.load(random_state(shapes, seed))
    network.eval()
    spectrogram, step = config.spectrogram, 2**config.levels
    frames = step * math.ceil((spectrogram.n_fft / spectrogram.hop + 1) / step)  # few, for speed
    gain = gain_to_level(network, spectrogram.hop * (frames - 1))
    for parameter in network.final_conv.parameters():
        parameter.mul_(gain)
    return network.requires_grad_(False)


def _export(network: TfcTdf, path: Path) -> Path:
    """Write the U-Net as an ONNX graph."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns that it is deprecated
        write_graph(network, path, frames=2**network.config.levels)
    model = onnx.load(path)  # traced with few frames, for speed; no node depends on their number
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[3].dim_value = network.config.spectrogram.frames
    onnx.save(model, path)
    return path
