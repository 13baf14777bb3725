"""BS-RoFormer and Mel-Band RoFormer: reference outputs, sizes from the weights, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_today
import pytest
import torch
from conftest import decibels
from torch import Tensor

from kmdx import Separator, stand_in
from kmdx.errors import KmdxError
from kmdx.networks import roformer, types
from kmdx.networks.roformer import Roformer

NEEDED = 110  # dB
BS = {
    "type": "bs_roformer", "sources": ["vocals", "drums", "other"], "dim": 16, "depth": 2, "heads": 2, "dim_head": 8,
    "freqs_per_bands": [2, 2, 4, 9, 16, 32], "stft_n_fft": 128, "stft_hop_length": 32, "stft_win_length": 128,
    "time_transformer_depth": 2, "freq_transformer_depth": 1, "mask_estimator_depth": 3, "skip_connection": True,
}  # fmt: skip
MEL = {
    "type": "mel_band_roformer", "sources": ["vocals", "other"], "dim": 8, "depth": 2, "heads": 3, "dim_head": 4,
    "num_bands": 12, "stft_n_fft": 512, "stft_hop_length": 128, "stft_win_length": 400, "linear_transformer_depth": 1,
    "time_transformer_depth": 1, "freq_transformer_depth": 2, "mlp_expansion_factor": 2, "zero_dc": False,
}  # fmt: skip
BOTH = pytest.mark.parametrize("architecture", [BS, MEL], ids=["bs", "mel"])
UNTOLD = (
    "type", "sources", "stft_hop_length", "stft_win_length", "skip_connection", "zero_dc",
)  # fmt: skip


def sizes(architecture: dict[str, Any]) -> dict[str, Any]:
    """Those that the weights determine."""
    return {key: value for key, value in architecture.items() if key not in UNTOLD}


def minimal(architecture: dict[str, Any]) -> dict[str, Any]:
    """Only what the weights do not determine."""
    return {key: value for key, value in architecture.items() if key in UNTOLD}


def state_of(architecture: dict[str, Any]) -> dict[str, Tensor]:
    return roformer.stand_in(architecture, "seed").state_dict()


def noise(samples: int, channels: int = 2, count: int = 1) -> Tensor:
    return 0.1 * torch.randn(count, channels, samples, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def run(network: Roformer, batch: Tensor) -> Tensor:
    return network(batch)


@pytest.mark.parametrize(
    ("family", "name", "tuned"),
    [
        ("bs_roformer", "tiny_vocals", False), ("bs_roformer", "tiny_vocals", True),
        ("bs_roformer", "full_viperx_317", True),
        ("mel_band_roformer", "tiny_four", False), ("mel_band_roformer", "tiny_four", True),
        ("mel_band_roformer", "full_kim", True),
    ],
)  # fmt: skip
def test_outputs_match_the_reference(family: str, name: str, tuned: bool) -> None:
    golden = golden_today.load(family, name)
    stated = {key: value for key, value in golden.config["model"].items() if key in types.TYPES[family].sizes}
    network = roformer.build({"type": family, "sources": golden.sources, **stated}, None, golden.state)
    network.accelerate(torch.float32, tuned)
    found = run(network, golden.input[None])[0]
    expected = golden.output.reshape(len(golden.sources), *golden.output.shape[-2:])
    assert found.shape[-1] == golden.input.shape[-1]
    assert decibels(expected, found[..., : expected.shape[-1]]) > NEEDED


def test_mel_bands_are_those_of_the_published_networks() -> None:
    bands = roformer.mel_bands(2048, 60, 44100)
    assert bands[:4] == ((0, 7), (4, 10), (7, 13), (10, 16))
    assert bands[-3:] == ((782, 895), (836, 958), (895, 1025))
    assert sum(end - start for start, end in bands) == 1979
    assert [end - start for start, end in roformer.mel_bands(1024, 24, 44100)] == [
        8, 8, 7, 7, 8, 8, 8, 10, 13, 14, 16, 20, 24, 28, 32, 38, 46, 54, 63, 74, 88, 104, 122, 144,
    ]  # fmt: skip


@BOTH
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
def test_sizes_are_inferred_from_the_weights(architecture: dict[str, Any], prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in state_of(architecture).items()}
    found = roformer.infer(state)
    assert found["type"] == architecture["type"]
    assert found["num_stems"] == len(architecture["sources"])
    assert found["stereo"]
    assert {key: found[key] for key in sizes(architecture)} == sizes(architecture)
    stated = roformer.build(architecture, None, state)
    assert roformer.build(minimal(architecture), None, state).config == stated.config


@BOTH
def test_a_network_needs_no_rotary_frequencies_in_its_file_but_compares_them(
    architecture: dict[str, Any],
) -> None:
    state = state_of(architecture)
    name = f"layers.0.{architecture.get('linear_transformer_depth', 0)}.layers.0.0.rotary_embed.freqs"
    own = roformer.rotary_frequencies(architecture["dim_head"])
    roformer.build(architecture, None, {**state, name: own.half()})
    with pytest.raises(ValueError, match=f"{name} differs from the rotary frequencies of base 10000"):
        roformer.build(architecture, None, {**state, name: 2 * own})
    with pytest.raises(ValueError, match=f"{name} differs"):
        roformer.build(architecture, None, {**state, name: own[1:]})


@BOTH
def test_a_mono_network_is_recognized_and_takes_each_channel_alone(architecture: dict[str, Any]) -> None:
    mono = {**architecture, "stereo": False}
    state = state_of({**mono, "sources": ["a"]})
    assert not roformer.infer(state)["stereo"]  # both have a band of an odd number of bins
    network = roformer.build({**mono, "sources": ["a"]}, None, state)
    stereo = noise(3000)
    together = run(network, stereo)
    assert together.shape == (1, 1, 2, 3000)
    for channel in range(2):
        alone = run(network, stereo[:, channel : channel + 1])
        assert decibels(alone, together[:, :, channel : channel + 1]) > NEEDED


def test_a_mono_network_of_even_bands_is_recognized_by_what_is_stated() -> None:
    mono = {
        **BS,
        "stereo": False,
        "freqs_per_bands": [2, 2, 4, 8, 16, 32],
        "stft_n_fft": 126,
        "stft_win_length": 126,
    }
    state = state_of(mono)
    assert roformer.infer(state)["stereo"]
    for key in ("stereo", "freqs_per_bands", "stft_n_fft"):
        assert not roformer.infer(state, {key: mono[key]})["stereo"]


@BOTH
def test_any_length_returns_as_many_samples(architecture: dict[str, Any]) -> None:
    network = roformer.stand_in(architecture, "seed")
    hop = architecture["stft_hop_length"]
    for samples in (1, 2, 31, hop, 3 * hop - 1, 10 * hop, 10 * hop + 1, 4321):
        found = run(network, noise(samples, count=2))
        assert found.shape == (2, len(network.sources), 2, samples)
        assert found.isfinite().all()
    with pytest.raises(ValueError, match="this network needs 2 channels, not 1"):
        run(network, noise(100, channels=1))


def test_hops_of_half_a_window_reach_the_last_sample() -> None:
    network = roformer.stand_in({**BS, "stft_hop_length": 64}, "seed")
    for samples in range(640, 704):
        assert run(network, noise(samples)).isfinite().all()


@BOTH
def test_a_batch_equals_its_items_alone(
    architecture: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = roformer.stand_in(architecture, "seed")
    batch = noise(5000, count=3)
    together = run(network, batch)
    monkeypatch.setattr(roformer, "TOKENS", 50)
    alone = torch.cat([run(network, item[None]) for item in batch])
    assert decibels(together, alone) > NEEDED


def test_digital_silence_stays_silent() -> None:
    network = roformer.stand_in(MEL, "seed")
    assert torch.equal(run(network, torch.zeros(1, 2, 5000)), torch.zeros(1, 2, 2, 5000))


@BOTH
def test_a_narrowed_network_estimates_the_same_and_shares_its_weights(architecture: dict[str, Any]) -> None:
    network = roformer.stand_in(architecture, "seed")
    batch, chosen = noise(3000), ("other", "vocals")
    narrowed = network.narrow(chosen)
    expected = run(network, batch)[:, [network.sources.index(source) for source in chosen]]
    assert torch.equal(run(narrowed, batch), expected)
    assert {id(each) for each in narrowed.parameters()} <= {id(each) for each in network.parameters()}
    assert network.narrow(network.sources) is network
    with pytest.raises(ValueError, match="estimates vocals, .*other, not bass"):
        network.narrow(["bass"])


@BOTH
def test_a_float16_checkpoint_is_loaded_as_float32(architecture: dict[str, Any]) -> None:
    state = {name: tensor.half() for name, tensor in state_of(architecture).items()}
    network = roformer.build(architecture, None, state)
    assert {each.dtype for each in (*network.parameters(), *network.buffers())} == {torch.float32}


@BOTH
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 30), (torch.float16, 48)])
def test_half_precision_stays_close(architecture: dict[str, Any], dtype: torch.dtype, least: float) -> None:
    network, batch = roformer.stand_in(architecture, "seed"), noise(5000)
    exact = run(network, batch)
    network.accelerate(dtype)
    products = [each for each in network.modules() if isinstance(each, torch.nn.Linear)]
    assert {each.weight.dtype for each in products} == {dtype}
    found = run(network, batch)
    assert found.dtype == torch.float32
    assert least < decibels(exact, found) < least + 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"band_split.to_features.0.1.weight": None}, "not a RoFormer: it has no tensor band_split.to_features.0.1.weight"),
        ({"band_split.to_features.3.0.gamma": None}, "not a RoFormer: it has no tensor band_split.to_features.3.0.gamma"),
        ({"final_norm.gamma": None}, "not a RoFormer: its norms are neither"),
        ({"layers.1.0.layers.1.1.net.4.bias": None}, "1 missing .layers.1.0.layers.1.1.net.4.bias"),
        ({"layers.0.0.layers.0.0.to_gates.weight": None}, "no tensor layers.0.0.layers.0.0.to_gates.weight"),
        ({"segm.layer.weight": [3]}, r"a RoFormer with parts .* 1 unknown tensor, the first is segm\.layer\.weight"),
        ({"layers.0.0.layers.0.0.pope.bias": [2]}, "the first is layers.0.0.layers.0.0.pope.bias"),
        ({"layers.0.0.layers.0.0.to_value_residual_mix.weight": [2]}, "to_value_residual_mix"),
        ({"layers.0.0.layers.0.0.to_qkv.lora_A": [2, 2]}, "lora_A"),
        ({"layers.9.0.norm.gamma": [16]}, "1 unknown|missing"),
        ({"band_split.to_features.0.0.gamma": [7]}, "bands are not those of complex numbers"),
        ({"mask_estimators.60.to_freqs.0.0.0.weight": [1, 1]}, "the weights estimate 4 sources, not 3"),
        ({"layers.0.0.layers.0.0.to_gates.weight": [0, 16]}, "with 2 axes"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(change: dict[str, list[int] | None], message: str) -> None:
    """With one tensor left out, or another one of this shape."""
    state = state_of(BS)
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message) as caught:
        roformer.build(minimal(BS), None, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 32}, "dim is 16 in the weights, but 32 in the architecture"),
        ({"depth": 3}, "depth is 2 in the weights, but 3"),
        ({"depth": 10**9}, "depth must be a whole number from 1 to 64"),
        ({"freqs_per_bands": [65]}, "freqs_per_bands is .* in the weights, but .65. in the architecture"),
        ({"stereo": False}, "stereo is True in the weights, but False"),
        ({"stft_n_fft": 256}, "stft_n_fft is 128 in the weights, but 256"),
        ({"sources": ["a", "b"]}, "the weights estimate 3 sources, not 2: a, b"),
        ({"type": "mel_band_roformer", "freqs_per_bands": None}, "unknown key 'freqs_per_bands'"),
        ({"stft_hop_length": 65}, "stft_win_length must be at least twice stft_hop_length .65."),
        ({"stft_win_length": 256}, "at most stft_n_fft .128., not 256"),
        ({"num_bands": 60}, "unknown key 'num_bands' of type bs_roformer"),
    ],
)  # fmt: skip
def test_an_architecture_of_another_network_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roformer.build({**BS, **change}, None, state_of(BS))


def test_the_other_family_is_refused() -> None:
    with pytest.raises(ValueError, match="type is 'mel_band_roformer' in the weights, but 'bs_roformer'"):
        roformer.build({**minimal(MEL), "type": "bs_roformer"}, None, state_of(MEL))
    with pytest.raises(ValueError, match="bands are not those of a mel bank at 22050 Hz"):
        roformer.build({**minimal(MEL), "sample_rate": 22050}, None, state_of(MEL))


def test_a_window_that_needs_too_much_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        roformer.build(BS, 3000, state_of(BS))
    with pytest.raises(ValueError, match="a window of 7938000 samples needs a tensor of .* GB"):
        roformer.build({**BS, "stft_hop_length": 1}, 180, state_of(BS))


def test_hostile_weights_are_refused_before_a_network_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(BS)
    monkeypatch.delattr(roformer, "Roformer")
    for stem in range(64):
        state[f"mask_estimators.{stem}.to_freqs.0.0.0.weight"] = torch.zeros(1, 1)
    state["layers.99999999999.0.norm.gamma"] = torch.zeros(10**6)
    with pytest.raises(ValueError, match="not a RoFormer: expected .* tensors of masks"):
        roformer.build({**minimal(BS), "sources": [str(stem) for stem in range(64)]}, None, state)


def test_a_stand_in_needs_the_sizes_without_default_and_separates_a_song(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    text = (
        "networks: {n: {weights: {file: none.pt, architecture: {type: mel_band_roformer, sources: [vocals]SIZES}},"
        " overlap_add: {overlap: 0.25, segment: 1}}}\n"
        "signals: {N: {network: n, hears: mixture}}\n"
        "stems: {vocals: {sum: {N.vocals: 1}}}\n"
    )
    plan.write_text(text.replace("SIZES", ""))
    with pytest.raises(KmdxError, match="stand-in for the weights of n: missing dim, depth"):
        stand_in.write(plan, tmp_path)
    plan.write_text(text.replace("SIZES", ", dim: 8, depth: 1, heads: 2, num_bands: 30"))
    (tmp_path / "made").mkdir()
    song = noise(50_000)[0].T.numpy()
    stems = Separator(stand_in.write(plan, tmp_path / "made"), device="cpu").separate(song, 44100)
    assert 0.4 < stems["vocals"].std() / song.std() < 0.6
