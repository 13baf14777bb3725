"""State dicts match their network in names, shapes and types, or are refused with the reason."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from kmdx.networks import demucs
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.state import NoInitialization, load_strictly
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig

SPECTROGRAM = SpectrogramConfig(**tiny.TRANSFORM)
SIZES = {"layers": 5, "convolutions": 1, "growth": 4, "norm_groups": None}
OPTIONS = {name: value for name, value in tiny.HTDEMUCS.items() if name != "type"}


@functools.cache
def demucs_state() -> dict[str, Tensor]:
    return tiny.demucs(tiny.HTDEMUCS, seed=1).state_dict()


@contextlib.contextmanager
def building_nothing() -> Iterator[None]:
    """It is refused before any part of a network is created."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__init__", lambda *_, **__: pytest.fail("a part of the network was built"))
        yield


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1)
        self.norm = nn.BatchNorm1d(3)


STATE = {
    name: torch.rand(tensor.shape) if tensor.ndim else tensor for name, tensor in Small().state_dict().items()
}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


FIRST_MISSING = {name: STATE[name] for name in list(STATE)[1:]}


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "state",
    [
        STATE,
        prefixed("module."),
        prefixed("model."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod.model."),
        prefixed("model.model.module.module."),
        {name.replace("conv.", "conv._orig_mod."): tensor for name, tensor in STATE.items()},
        {**prefixed("model."), **prefixed("ema.", OTHER), "ema.decay": torch.tensor(0.99)},
        {**prefixed("ema_model.module.", OTHER), **prefixed("model.")},
        {**STATE, **prefixed("model_ema.", OTHER)},
        {"n_averaged": torch.tensor(5), **prefixed("module.")},
        {("module." if number % 2 else "model.") + name: STATE[name] for number, name in enumerate(STATE)},
        {("module." if number % 2 else "") + name: STATE[name] for number, name in enumerate(STATE)},
        {("model._orig_mod." if number == 3 else "module.") + name: STATE[name] for number, name in enumerate(STATE)},
    ],
    ids=lambda state: " ".join(sorted({name.rpartition("conv")[0] or name for name in state})),
)  # fmt: skip
def test_prefixes_added_by_training_frameworks_are_removed(state: dict[str, Tensor]) -> None:
    network = Small()
    load_strictly(network, state)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (prefixed("encoder."), r"names of its tensors begin with encoder\.: expected conv\.weight and so on"),
        (prefixed("model.net."), r"begin with model\.net\.:"),
        (prefixed("ema."), r"begin with ema\.:"),
        ({**prefixed("generator."), **prefixed("discriminator.")}, r"begin with generator\.; without it, of 7 tensors 7 unknown"),
        ({**prefixed("model."), "loss.weight": torch.ones(3)}, r"of 7 tensors 1 unknown \(loss.weight\), after removing model\. from"),
        ({**prefixed("module."), "module.extra": torch.ones(3)}, r"of 7 tensors 1 unknown \(module\.extra\), after removing module\. from"),
        (prefixed("module.", FIRST_MISSING), r"of 7 tensors 1 missing \(conv\.weight\), after removing module\. from"),
        (prefixed("module.", {**STATE, "conv.bias": torch.ones(1)}), r"of 7 tensors 1 of the wrong shape \(conv\.bias\), after removing module\."),
        ({**prefixed("model.", FIRST_MISSING), **prefixed("ema.", OTHER)}, r"of 7 tensors 1 missing \(conv\.weight\), after removing model\. from"),
        (prefixed("encoder.", FIRST_MISSING), r"begin with encoder\.; without it, of 7 tensors 1 missing \(conv\.weight\): expected"),
        (prefixed("module.encoder.", FIRST_MISSING), r"begin with module\.encoder\.; without it, of 7 tensors 1 missing"),
        (prefixed("net_", {**STATE, "conv.bias": torch.ones(1)}), r"begin with net_; without it, of 7 tensors 1 of the wrong shape \(conv\.bias\)"),
        ({**STATE, "model.conv.bias": torch.ones(3)}, r"two tensors for conv\.bias, conv\.bias and model\.conv\.bias"),
        ({**STATE, "extra": torch.ones(1)}, r"of 7 tensors 1 unknown \(extra\)"),
        ({name: STATE[name] for name in list(STATE)[1:]}, r"1 missing \(conv\.weight\)"),
        ({**STATE, "conv.weight": torch.ones(3, 2)}, r"1 of the wrong shape \(conv\.weight\)"),
        ({**STATE, "conv.weight": torch.ones(3, 2, 1, dtype=torch.int8)}, r"conv\.weight has the type int8"),
        ({**STATE, "norm.num_batches_tracked": torch.tensor(True)}, r"tracked has the type bool"),
        ({**prefixed("x\n" * 1000)}, r"begin with 'x\\nx"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_with_the_reason(state: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        load_strictly(Small(), state)
    assert "\n" not in str(caught.value)


def test_the_constants_of_the_authors_files_may_have_the_prefix_too() -> None:
    network = tiny.unet("vocals", None, seed=1)
    state = prefixed("model.", tiny.author_state(network))
    again = TfcTdf.of_state(network.config, "vocals", state)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="its window is not"):
        TfcTdf.of_state(network.config, "vocals", {**state, "model.window": torch.ones(1024)})


def test_a_prefix_and_a_constants_name_are_distinguished() -> None:
    network = tiny.unet("vocals", None, seed=1)
    state = prefixed("encoder.", tiny.author_state(network))
    with pytest.raises(ValueError, match=r"begin with encoder\.: expected first_conv\.0\.weight and so on"):
        TfcTdf.of_state(network.config, "vocals", state)
    del state["encoder.first_conv.0.weight"]
    with pytest.raises(ValueError, match=r"begin with encoder\.; without it, of \d+ tensors 1 missing"):
        TfcTdf.of_state(network.config, "vocals", state)


def test_a_network_keeps_its_weights_when_the_tensors_change() -> None:
    network, state = Small(), {name: tensor.clone() for name, tensor in STATE.items()}
    load_strictly(network, state)
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in network.state_dict().items())


def test_tensors_are_converted_to_the_types_of_the_network() -> None:
    network = Small()
    load_strictly(network, {name: tensor.double() for name, tensor in STATE.items()})
    assert network.conv.weight.dtype == torch.float32
    assert network.norm.num_batches_tracked.dtype == torch.int64


HUGE_UNETS: list[dict[str, int]] = [
    {"layers": 99_999_999_999},
    {"layers": 99_999},
    {"convolutions": 10**9},
    {"convolutions": 60_000},
    {"growth": 10**9},
    {"growth": 10_000},
    {"growth": 65_000},
    {"bottleneck": 0},
    {"norm_groups": 0},
    {"growth": -4},
    {"layers": True},
]


@pytest.mark.parametrize("sizes", HUGE_UNETS, ids=str)
def test_a_unet_larger_than_its_file_is_refused_before_it_is_built(sizes: dict[str, int]) -> None:
    state = tiny.author_state(tiny.unet("vocals", None, seed=1))
    with building_nothing(), pytest.raises(ValueError, match="another network's weights|must be|layers"):
        TfcTdf.of_state(TfcTdfConfig(SPECTROGRAM, **{**SIZES, **sizes}), "vocals", state)


HUGE_DEMUCS: list[dict[str, Any]] = [
    {"channels": 100_000},
    {"channels": 2**40},
    {"growth": 1e300},
    {"growth": 8, "depth": 16},
    {"depth": 10**8},
    {"depth": 16, "dconv_depth": 16, "multi_freqs": [0.5] * 15},
    {"t_layers": 10**8},
    {"bottom_channels": 65_000},
    {"t_emb": "scaled", "t_max_positions": 2**20},
    {"nfft": 2**30},
    {"kernel_size": 10**9},
    {"context": 10**9},
    {"dconv_depth": 10**9},
    {"multi_freqs": [0.5] * 10**5},
    {"sources": ["vocals"] * 10_000},
]


@pytest.mark.parametrize("options", HUGE_DEMUCS, ids=lambda options: str(options)[:40])
def test_a_demucs_larger_than_its_file_is_refused_before_it_is_built(options: dict[str, Any]) -> None:
    state = demucs_state()
    reason = "another network's weights|must be|too large|duplicate source"
    with building_nothing(), pytest.raises(ValueError, match=reason):
        demucs.build({"type": "htdemucs", **OPTIONS, **options}, 0.5, state)


TOO_LARGE = [{"t_layers": 64}, {"t_hidden_scale": 64.0}, {"channels": 4096}, {"channels_time": 4096}]


@pytest.mark.parametrize("options", TOO_LARGE, ids=str)
def test_a_demucs_with_more_parameters_than_its_file_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="more parameters|wrong shape|has shape"):
        demucs.build({"type": "htdemucs", **OPTIONS, **options}, 0.5, demucs_state())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sources": "vocals"}, "the sources must be a list of names"),
        ({"sources": []}, "the sources must be a list of names"),
        ({"channels": "8"}, "channels must be a whole number from 1 to 8192, not '8'"),
        ({"channels": 8.5}, "channels must be a whole number"),
        ({"channels": True}, "channels must be a whole number"),
        ({"channels": None}, "channels must be a whole number"),
        ({"depth": 0}, "depth must be .* 1 to 12, not 0"),
        ({"stride": 0}, "stride must be .* 1 to 64, not 0"),
        ({"growth": float("nan")}, "growth must be a number from 1 to 8, not nan"),
        ({"segment": [7.8]}, "segment must be a number from 0.001 to 3600, not .7.8."),
        ({"samplerate": 0}, "samplerate must be"),
        ({"audio_channels": 1}, "audio_channels must be .* 2 to 2, not 1"),
        ({"cac": "yes"}, "cac must be true or false, not 'yes'"),
        ({"t_emb": "rotary"}, "t_emb must be sin or cape or scaled, not 'rotary'"),
        ({"multi_freqs": 3}, "multi_freqs must be a list of fewer than 16 fractions"),
        ({"t_sparse_self_attn": True}, "t_sparse_self_attn is not supported"),
        ({"wiener_iters": 1}, "htdemucs cannot be built: its sizes are inconsistent"),
        ({"t_heads": 3}, "htdemucs cannot be built"),
        ({"norm_starts": 0, "norm_groups": 3}, "htdemucs cannot be built: num_channels"),
        ({"growth": 1.5}, "htdemucs cannot be built"),
    ],
)
def test_options_that_demucs_does_not_have_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        demucs.build({"type": "htdemucs", **OPTIONS, **options}, 0.5, demucs_state())


def test_a_network_with_frequency_bands_is_not_considered_too_large() -> None:
    architecture = {**tiny.HDEMUCS, "multi_freqs": [0.3, 0.6], "depth": 4}
    network = tiny.demucs(architecture, seed=1)
    options = {name: value for name, value in architecture.items() if name != "type"}
    with pytest.raises(
        ValueError, match="the sizes of its layers do not match"
    ):  # found when it runs: it was built
        demucs.build({"type": "hdemucs", **options}, 1.5, network.state_dict())


@pytest.mark.parametrize(
    "sizes", [{"n_fft": 2**40}, {"frames": 10**9}, {"hop": 1000}, {"hop": 0}, {"bins": 514}, {"frames": 2}]
)
def test_an_impossible_transform_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be|must lie in|leaves gaps|is too long"):
        SpectrogramConfig(**{**tiny.TRANSFORM, **sizes})


def test_memory_is_counted_before_it_is_allocated() -> None:
    with NoInitialization(values=10), pytest.raises(ValueError, match="is too large"):
        nn.Linear(10**9, 10**9)
    with NoInitialization(values=10):
        nn.Linear(2, 4, bias=False)
