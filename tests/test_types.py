"""The table of network types: every entry is complete, and a new type is one module and one entry."""

from __future__ import annotations

import json
import subprocess
import sys
import types as python
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import noise

from kmdx import Separator, plan_file, precisions, stand_in, weights
from kmdx.errors import PlanError
from kmdx.networks import types
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.types import TYPES

SCNET = {
    "type": "scnet", "sources": ["vocals", "other"], "dims": [4, 8], "nfft": 256, "hop_size": 64, "win_size": 256,
    "band_SR": [0.25, 0.35, 0.4], "band_stride": [1, 4, 8], "band_kernel": [3, 4, 8], "conv_depths": [1, 1, 1],
    "compress": 2, "conv_kernel": 3, "num_dplayer": 2, "expand": 1,
}  # fmt: skip
EXAMPLES = {
    "htdemucs": tiny.HTDEMUCS,
    "hdemucs": tiny.HDEMUCS,
    "tfc_tdf": {**tiny.UNET, "sources": ["vocals"], "norm_groups": 2},
    "bs_roformer": {
        "type": "bs_roformer", "sources": tiny.SOURCES, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4,
    },
    "mel_band_roformer": {
        "type": "mel_band_roformer", "sources": ["vocals"], "dim": 8, "depth": 1, "heads": 2, "dim_head": 4,
    },
    "onnx": {**tiny.UNET, "type": "onnx", "sources": ["vocals"], "norm_groups": None},
    "mdx23c": {
        "type": "mdx23c", "sources": ["vocals", "other"], "n_fft": 512, "hop_length": 128, "dim_f": 128,
        "num_subbands": 2, "num_channels": 8, "growth": 4, "num_scales": 1, "num_blocks_per_scale": 1,
        "bottleneck_factor": 2, "scale": [2, 2], "norm": "InstanceNorm", "act": "gelu",
    },
    "scnet": SCNET,
    "scnet_masked": {**SCNET, "type": "scnet_masked"},
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_every_entry_is_complete(name: str) -> None:
    kind, example = TYPES[name], EXAMPLES[name]
    architecture = types.read(example)
    assert architecture.type is kind
    assert architecture.sources == tuple(example["sources"])
    assert (architecture.sample_rate, architecture.channels) == (44100, 2)
    assert set(kind.needed) <= set(kind.sizes)
    assert kind.rate in kind.sizes
    length = architecture.length or 10_000
    assert kind.largest_tensor(example, length) > length
    module = types.function(kind.stand_in)(example, "seed")
    state = {key: value.float() for key, value in module.state_dict().items()}
    if kind.file == "graph":
        return
    network = types.function(kind.build)(example, 0.5, state)
    assert network.sources == architecture.sources
    assert network.length == (architecture.length or network.length)
    supported = {precisions.NAMES[dtype] for dtype in network.supported_dtypes}
    assert supported == set(kind.precisions)
    network.accelerate(torch.float32)
    with torch.no_grad():
        estimate = network(torch.from_numpy(noise(network.length or 22_050).T.copy())[None])
    assert estimate.shape[:3] == (1, len(network.sources), 2)


def test_a_graph_supports_no_half_precision() -> None:
    assert OnnxNetwork.supported_dtypes == () == TYPES["onnx"].precisions


def test_the_registry_has_only_types_of_the_table() -> None:
    for weight in weights.published().values():
        assert types.read(weight.architecture).type.name in TYPES


@pytest.mark.parametrize("name", TYPES)
def test_a_plan_at_another_rate_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    example = json.loads(json.dumps(EXAMPLES[name]))
    window = "overlap_add: {overlap: 0.25, segment: 1}"
    if length := types.read(example).length:
        window = f"trim_and_join: {{chunk: {length}, trim: 0}}"
    source = example["sources"][0]
    text = (
        "sample_rate: 48000\n"
        f"networks: {{n: {{weights: {{file: x, architecture: {json.dumps(example)}}}, {window}}}}}\n"
        "signals: {N: {network: n, hears: mixture}}\n"
        f"stems: {{{source}: {{sum: {{N.{source}: 1}}}}}}\n"
    )
    with pytest.raises(
        PlanError,
        match=r"line 2: networks\.n\.weights: .* needs 44100 Hz, but the plan's sample rate is 48000",
    ):
        plan_file.parse(text, "plan", tmp_path)
    example[TYPES[name].rate] = 48000
    stated = text.replace(json.dumps(EXAMPLES[name]), json.dumps(example))
    assert plan_file.parse(stated, "plan", tmp_path).sample_rate == 48000


class Gain(torch.nn.Module):
    """A network with a single parameter."""

    length, supported_dtypes, dtype = None, (), torch.float32

    def __init__(self, sources: Sequence[str]) -> None:
        super().__init__()
        self.sources = tuple(sources)
        self.gain = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.gain * batch)[:, None]

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        pass

    def narrow(self, sources: Sequence[str]) -> Gain:
        return self


def build(architecture: Mapping[str, Any], segment: float | None, state: Mapping[str, torch.Tensor]) -> Gain:
    network = Gain(architecture["sources"])
    network.load_state_dict(state)
    return network


def gain_of_a_half(architecture: Mapping[str, Any], seed: str) -> Gain:
    return build(architecture, None, {"gain": torch.tensor([0.5])})


def test_a_new_type_is_one_module_and_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = python.ModuleType("gain_network")
    module.build, module.stand_in = build, gain_of_a_half  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gain_network", module)
    entry = replace(
        TYPES["htdemucs"], name="gain", build="gain_network:build", stand_in="gain_network:stand_in",
        precisions=(), sizes={"samplerate": types.COMMON["segment"]}, check=lambda sizes: None,
        largest_tensor=lambda sizes, length: 2 * length, others=(),
    )  # fmt: skip
    monkeypatch.setitem(TYPES, "gain", entry)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "networks: {g: {weights: {file: none.pt, architecture: {type: gain, sources: [vocals]}},"
        " overlap_add: {overlap: 0, segment: 1}}}\n"
        "signals: {G: {network: g, hears: mixture}}\n"
        "stems: {vocals: {sum: {G.vocals: 1}}}\n"
    )
    (tmp_path / "made").mkdir()
    made = stand_in.write(plan, tmp_path / "made")
    song = noise(50_000)
    stems = Separator(made, device="cpu").separate(song, 44100)
    assert np.allclose(stems["vocals"], 0.5 * song, atol=1e-6)


def test_the_manual_lists_every_type_with_what_it_needs() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "ensembles.md").read_text("utf-8")
    for name, kind in TYPES.items():
        (row,) = (
            line for line in manual.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]
        )
        assert all(key in row for key in kind.needed), name


def test_the_table_needs_no_torch() -> None:
    program = "import sys, kmdx.networks.types; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
