"""Sizes of networks before they are built: those of the networks that are built, and bounded."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs

from kmdx import weights
from kmdx.networks import architecture as architectures
from kmdx.networks import types
from kmdx.networks.demucs import build
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig

UNET = {**tiny.UNET, "sources": ["vocals"], "norm_groups": 2}
PUBLISHED = {name: dict(weight.architecture) for name, weight in weights.registry().items()}
VARIANTS = {
    "hdemucs": tiny.HDEMUCS,
    "hybrid_old": tiny.HYBRID_OLD,
    "htdemucs": tiny.HTDEMUCS,
    "unet": UNET,
    "deep": {**tiny.HDEMUCS, "depth": 3, "dconv_attn": 1, "dconv_lstm": 1, "multi_freqs": [0.25], "norm_starts": 3},
    "spectral": {**tiny.HDEMUCS, "hybrid": False, "context": 0, "rewrite": False, "freq_emb": 0},
    "wide": {**tiny.HTDEMUCS, "channels_time": 12, "t_emb": "scaled", "t_layers": 3, "t_cross_first": True},
}  # fmt: skip

PARAMETERS = {
    "htdemucs": architectures.parameters_of_htdemucs,
    "hdemucs": architectures.parameters_of_hdemucs,
    "tfc_tdf": architectures.parameters_of_unet,
    "onnx": lambda sizes: 0,  # only the graph states them
}


def built(architecture: dict[str, Any]) -> int:
    """Parameters of the network itself."""
    options = {key: value for key, value in architecture.items() if key not in ("type", "gflops")}
    with torch.device("meta"):
        if architecture["type"] == "tfc_tdf":
            transform = {key: options[key] for key in architectures.TRANSFORM}
            sizes = {key: options[key] for key in architectures.UNET}
            network: torch.nn.Module = TfcTdf(TfcTdfConfig(SpectrogramConfig(**transform), **sizes), "vocals")
        else:
            network = {"htdemucs": HTDemucs, "hdemucs": HDemucs}[architecture["type"]](**options)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    "name", [*VARIANTS, "htdemucs_ft_bass", "hdemucs_mmi", "mdx_extra_a1d90b5c", "mdx_bass"]
)
def test_the_parameter_count_matches_the_built_network(name: str) -> None:
    architecture = VARIANTS.get(name) or PUBLISHED[name]
    types.read(architecture)
    assert PARAMETERS[architecture["type"]](architecture) == built(architecture)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_far_below_the_bounds(name: str) -> None:
    architecture = PUBLISHED[name]
    types.read(architecture)
    count = PARAMETERS.get(architecture["type"], lambda sizes: 0)  # of other types, only the weights tell
    assert count(architecture) < architectures.MAX_PARAMETERS / 10
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
        ({**UNET, "growth": 4000}, r"a network of [0-9.e+]+ parameters \([0-9.]+ GB\) is too large"),
        ({**UNET, "convolutions": 10**8}, "convolutions must be a whole number from 1 to 64"),
        ({**UNET, "norm_groups": 3}, "growth must be divisible by norm_groups: 4 and 3 do not fit"),
        ({**UNET, "hop": 1024}, "a hop of 1024 leaves gaps between windows of 1024 samples"),
        ({**UNET, "n_fft": 2**16}, "n_fft must be below 15872, twice the window of 7936 samples, not 65536"),
        ({**UNET, "bins": 514}, "bins must be from 1 to 513, not 514"),
        ({**UNET, "hop": 64, "frames": 2**16, "growth": 1024}, "a tensor of .* GB in the network"),
        ({**UNET, "botleneck": 8}, "unknown key 'botleneck' of type tfc_tdf; did you mean 'bottleneck'?"),
        ({**UNET, "sources": ["a", "b"]}, "must have one source, not a, b"),
        ({**HTDEMUCS, "sources": ["a", "a"]}, "duplicate source"),
        ({**HTDEMUCS, "sources": ["a\nb"]}, r"expected a source name of 1 to 100 bytes, not 'a\\nb'"),
        ({**HTDEMUCS, "sources": []}, "must be a list of names"),
        ({**HTDEMUCS, "channels": 10**8}, "channels must be a whole number from 1 to 8192"),
        ({**HTDEMUCS, "channels": 8000}, "parameters .* is too large"),
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
        ({"type": "roformer", "sources": ["a"]}, "unknown type 'roformer'; available: htdemucs, hdemucs, onnx, tfc_tdf"),
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
    with pytest.raises(ValueError, match="is too large"):
        build({"type": "htdemucs", "sources": ["vocals"], "channels": 8000}, None, {})
    with pytest.raises(ValueError, match="windows of 441000000 samples are too long"):
        build(tiny.HDEMUCS, 10_000, tiny.demucs(tiny.HDEMUCS, 0).state_dict())


@pytest.mark.parametrize("change", [{"depth": 3}, {"nfft": 512}, {"kernel_size": 4, "stride": 2}])
def test_mismatched_layers_are_detected_when_a_network_is_built(change: dict[str, int]) -> None:
    options = {key: value for key, value in {**tiny.HDEMUCS, **change}.items() if key != "type"}
    state = HDemucs(**options).state_dict()
    with pytest.raises(ValueError, match="the sizes of its layers do not match"):
        build({**options, "type": "hdemucs"}, 0.1, state)
