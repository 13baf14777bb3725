"""Sizes of networks before they are built: those of the networks that are built, and bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import training_cases
from demucs.hdemucs import HDemucs

from kmdx import stand_in, weights
from kmdx.errors import KmdxError
from kmdx.networks import architecture as architectures
from kmdx.networks import types
from kmdx.networks.demucs import build
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdfConfig
from kmdx.networks.tfc_tdf import build as build_unet
from training.config import TrainingError

UNET = {**tiny.UNET, "sources": ["vocals"], "norm_groups": 2}
PUBLISHED = {name: dict(weight.architecture) for name, weight in weights.published().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_windows_of_published_networks_are_far_below_the_bounds(name: str) -> None:
    architecture = PUBLISHED[name]
    types.read(architecture)
    length = int(44100 * architecture.get("segment", 6))
    assert (
        types.TYPES[architecture["type"]].largest_tensor(architecture, length) < architectures.MAX_VALUES / 4
    )


HTDEMUCS = {"type": "htdemucs", "sources": ["drums", "vocals"]}


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({**UNET, "layers": 99_999_999_999}, "layers must be a whole number from 3 to 63"),
        ({**UNET, "layers": 4}, "layers must be odd"),
        ({**UNET, "n_fft": 1023}, "n_fft must be even"),
        ({**UNET, "layers": 5.0}, "layers must be a whole number"),
        ({**UNET, "bottleneck": 0}, "bottleneck must be a whole number from 1"),
        ({**UNET, "bottleneck": "8"}, "bottleneck must be .*, not '8'"),
        ({**UNET, "growth": True}, "growth must be a whole number from 1 to 4096, not True"),
        ({**UNET, "convolutions": 10**8}, "convolutions must be a whole number from 1 to 64"),
        ({**UNET, "norm_groups": 3}, "growth must be divisible by norm_groups: 4 and 3 do not fit"),
        ({**UNET, "hop": 1024}, "a hop of 1024 leaves gaps between windows of 1024 samples"),
        ({**UNET, "n_fft": 2**16}, "n_fft must be below 15872, twice the window of 7936 samples, not 65536"),
        ({**UNET, "bins": 514}, "bins must be from 1 to 513, not 514"),
        ({**UNET, "hop": 64, "frames": 2**16, "growth": 1024}, "a tensor of .* GB in the network"),
        ({**UNET, "botleneck": 8}, "unknown key 'botleneck' of type tfc_tdf [(]did you mean 'bottleneck'[?][)]"),
        ({**UNET, "sources": ["a", "b"]}, "must have one source, not a, b"),
        ({**HTDEMUCS, "sources": ["a", "a"]}, "duplicate source"),
        ({**HTDEMUCS, "sources": ["a\nb"]}, r"expected a source name of 1 to 100 bytes, not 'a\\nb'"),
        ({**HTDEMUCS, "sources": []}, "must be a list of names"),
        ({**HTDEMUCS, "channels": 10**8}, "channels must be a whole number from 1 to 8192"),
        ({**HTDEMUCS, "t_layers": -1}, "t_layers must be a whole number from 0 to 64"),
        ({**HTDEMUCS, "audio_channels": 1}, "audio_channels must be a whole number from 2 to 2"),
        ({**HTDEMUCS, "segment": float("nan")}, "segment must be a number from 0.001 to 3600, not nan"),
        ({**HTDEMUCS, "t_emb": "none"}, "t_emb must be sin or cape or scaled"),
        ({**HTDEMUCS, "bottom_channels": 18}, "a transformer of 18 channels: expected a multiple of 4"),
        ({**HTDEMUCS, "channels": 4}, "dconv_comp must be at most the number of channels, 4, not 8"),
        ({**HTDEMUCS, "cac": "yes"}, "cac must be true or false"),
        ({**HTDEMUCS, "depth": [1]}, "depth must be a number, a string, true or false"),
        ({**HTDEMUCS, "x": 1}, "unknown key 'x' of type htdemucs; expected"),
        ({"type": "hdemucs", "sources": ["a"], "t_layers": 3}, "unknown key 't_layers' of type hdemucs"),
        ({**{key: UNET[key] for key in ("n_fft", "hop", "bins", "frames")}, "type": "onnx", "sources": ["a"], "layers": 5},
         "layers given without convolutions, growth: state all of them, or none"),
        ({"type": "roformer", "sources": ["a"]}, "unknown type 'roformer' [(]did you mean 'bs_roformer'[?][)]; available: htdemucs, hdemucs, onnx, tfc_tdf"),
        ({**HTDEMUCS, "t_sparse_self_attn": True}, "not supported"),
        ({**HTDEMUCS, "multi_freqs": [2]}, "multi_freqs must be a list of fewer than 16 fractions"),
    ],
)  # fmt: skip
def test_architectures_with_impossible_sizes_are_refused(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        types.read(architecture)


def test_networks_with_impossible_sizes_are_not_built() -> None:
    with pytest.raises(ValueError, match="layers must be a whole number"):
        TfcTdfConfig(SpectrogramConfig(1024, 256, 128, 32), 99_999_999_999, 1, 4, None)
    with pytest.raises(ValueError, match="bottleneck must be"):
        TfcTdfConfig(SpectrogramConfig(1024, 256, 128, 32), 5, 1, 4, None, bottleneck=0)
    with pytest.raises(ValueError, match="n_fft must be a whole number"):
        SpectrogramConfig(2**40, 256, 128, 32)
    state = tiny.demucs(tiny.HTDEMUCS, 0).state_dict()
    for sizes in ({"channels": 8000}, {"growth": 8, "depth": 12}, {"t_layers": 64, "t_hidden_scale": 64}):
        with pytest.raises(ValueError, match="another network's weights"):
            build({**tiny.HTDEMUCS, **sizes}, None, state)
    with pytest.raises(ValueError, match="another network's weights"):
        build_unet({**UNET, "growth": 4000}, None, tiny.unet("vocals", 2, 0).state_dict())
    with pytest.raises(ValueError, match="windows of 441000000 samples are too long"):
        build(tiny.HDEMUCS, 10_000, tiny.demucs(tiny.HDEMUCS, 0).state_dict())


@pytest.mark.parametrize("change", [{"depth": 3}, {"nfft": 512}, {"kernel_size": 4, "stride": 2}])
def test_mismatched_layers_are_detected_when_a_network_is_built(change: dict[str, int]) -> None:
    options = {key: value for key, value in {**tiny.HDEMUCS, **change}.items() if key != "type"}
    state = HDemucs(**options).state_dict()
    with pytest.raises(ValueError, match="the sizes of its layers do not match"):
        build({**options, "type": "hdemucs"}, 0.1, state)


def test_networks_that_are_too_large_are_neither_trained_nor_replaced_by_stand_ins(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="network: a network of more than 1,000,000,000 parameters is too large"
    ):
        training_cases.small(network={**training_cases.NETWORK, "growth": 4000})
    for name, weights_of, window in (
        ("unet", {**UNET, "growth": 4000}, "trim_and_join: {trim: 256, chunk: 7936}"),
        ("demucs", {**HTDEMUCS, "channels": 8000}, "overlap_add: {overlap: 0.25, segment: 1}"),
    ):
        plan = tmp_path / f"{name}.yaml"
        plan.write_text(
            f"networks: {{n: {{weights: {{file: a, architecture: {json.dumps(weights_of)}}}, {window}}}}}\n"
            "signals: {v: {network: n, hears: mixture}}\nstems: {vocals: {sum: {v.vocals: 1}}}\n"
        )
        with pytest.raises(KmdxError, match="cannot make a stand-in for the weights of n: .* is too large"):
            stand_in.write(plan, tmp_path)
