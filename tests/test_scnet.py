"""SCNet and its masked form: reference outputs, sizes from the weights, and what is refused."""

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
from kmdx.networks import scnet, types
from kmdx.networks.scnet import Scnet

NEEDED = 110  # dB
PLAIN = {
    "type": "scnet", "sources": ["vocals", "drums", "other"], "dims": [4, 8, 12], "nfft": 512, "hop_size": 128,
    "win_size": 512, "band_SR": [0.2, 0.3, 0.5], "band_stride": [1, 2, 8], "band_kernel": [3, 2, 8],
    "conv_depths": [2, 1, 0], "compress": 2, "conv_kernel": 5, "num_dplayer": 2, "expand": 2,
}  # fmt: skip
MASKED = {
    "type": "scnet_masked", "sources": ["vocals", "other"], "dims": [4, 6, 8, 10], "nfft": 1024, "hop_size": 200,
    "win_size": 800, "normalized": False, "band_SR": [0.175, 0.392, 0.433], "band_kernel": [3, 4, 16],
    "conv_depths": [3, 2, 1], "num_dplayer": 2, "expand": 1,
}  # fmt: skip
BOTH = pytest.mark.parametrize("architecture", [PLAIN, MASKED], ids=["plain", "masked"])
UNTOLD = ("type", "sources", "nfft", "hop_size", "win_size", "normalized", "band_SR", "band_stride")


def minimal(architecture: dict[str, Any]) -> dict[str, Any]:
    """Only what the weights do not determine."""
    return {key: value for key, value in architecture.items() if key in UNTOLD}


def state_of(architecture: dict[str, Any]) -> dict[str, Tensor]:
    return scnet.stand_in(architecture, "seed").state_dict()


def noise(samples: int, channels: int = 2, count: int = 1) -> Tensor:
    return 0.1 * torch.randn(count, channels, samples, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def run(network: Scnet, batch: Tensor) -> Tensor:
    return network(batch)


@pytest.mark.parametrize(
    ("family", "name", "tuned"),
    [
        ("scnet", "tiny_four", False), ("scnet", "tiny_four", True), ("scnet", "full_large", True),
        ("scnet_masked", "tiny_four", False), ("scnet_masked", "tiny_four", True),
    ],
)  # fmt: skip
def test_outputs_match_the_reference(family: str, name: str, tuned: bool) -> None:
    golden = golden_today.load(family, name)
    stated = {key: value for key, value in golden.config["model"].items() if key in types.TYPES[family].sizes}
    network = scnet.build({"type": family, **stated, "sources": golden.sources}, None, golden.state)
    network.accelerate(torch.float32, tuned)
    assert decibels(golden.output, run(network, golden.input[None])[0]) > NEEDED


@BOTH
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
def test_sizes_are_inferred_from_the_weights(architecture: dict[str, Any], prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in state_of(architecture).items()}
    found = scnet.infer(state, architecture)
    assert found["type"] == architecture["type"]
    assert found["num_stems"] == len(architecture["sources"])
    told = {key: value for key, value in architecture.items() if key not in UNTOLD}
    assert {key: found[key] for key in told} == told
    stated = scnet.build(architecture, None, state)
    assert scnet.build(minimal(architecture), None, state).config == stated.config


def test_the_masked_form_tells_its_transform_size() -> None:
    assert scnet.infer(state_of(MASKED))["nfft"] == 1024


def test_strides_equal_kernels_above_the_lowest_band_by_default() -> None:
    assert scnet.stand_in(MASKED, "seed").config.band_stride == (1, 4, 16)


@BOTH
def test_a_mono_network_takes_each_channel_alone(architecture: dict[str, Any]) -> None:
    mono = {**architecture, "dims": [2, *architecture["dims"][1:]]}
    network = scnet.build(minimal(mono), None, state_of(mono))
    stereo = noise(3000, count=2)
    together = run(network, stereo)
    assert together.shape == (2, len(network.sources), 2, 3000)
    for channel in range(2):
        alone = run(network, stereo[:, channel : channel + 1])
        assert decibels(alone, together[:, :, channel : channel + 1]) > NEEDED


@BOTH
def test_any_length_returns_as_many_samples(architecture: dict[str, Any]) -> None:
    network, hop = scnet.stand_in(architecture, "seed"), architecture["hop_size"]
    for samples in (1, 2, 31, hop, 3 * hop - 1, 10 * hop, 11 * hop, 10 * hop + 1, 4321):
        found = run(network, noise(samples, count=2))
        assert found.shape == (2, len(network.sources), 2, samples)
        assert found.isfinite().all()
    with pytest.raises(ValueError, match="this network needs 2 channels, not 1"):
        run(network, noise(100, channels=1))


@BOTH
def test_a_batch_equals_its_items_alone(architecture: dict[str, Any]) -> None:
    network, batch = scnet.stand_in(architecture, "seed"), noise(5000, count=3)
    alone = torch.cat([run(network, item[None]) for item in batch])
    assert decibels(run(network, batch), alone) > NEEDED


@BOTH
@pytest.mark.parametrize("tuned", [False, True])
def test_a_narrowed_network_estimates_the_same(architecture: dict[str, Any], tuned: bool) -> None:
    network, batch, chosen = scnet.stand_in(architecture, "seed"), noise(3000), ("other", "vocals")
    network.accelerate(torch.float32, tuned)
    narrowed = network.narrow(chosen)
    expected = run(network, batch)[:, [network.sources.index(source) for source in chosen]]
    assert decibels(expected, run(narrowed, batch)) > NEEDED
    own = {id(each) for each in network.parameters()}
    assert sum(id(each) not in own for each in narrowed.parameters()) <= 6  # the last layers'
    assert network.narrow(network.sources) is network
    with pytest.raises(ValueError, match="estimates vocals, .*other, not bass"):
        network.narrow(["bass"])


@BOTH
def test_a_float16_checkpoint_is_loaded_as_float32(architecture: dict[str, Any]) -> None:
    state = {name: tensor.half() for name, tensor in state_of(architecture).items()}
    network = scnet.build(architecture, None, state)
    assert {each.dtype for each in (*network.parameters(), *network.buffers())} == {torch.float32}


@BOTH
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 25), (torch.float16, 40)])
def test_half_precision_stays_close(architecture: dict[str, Any], dtype: torch.dtype, least: float) -> None:
    network, batch = scnet.stand_in(architecture, "seed"), noise(5000)
    exact = run(network, batch)
    network.accelerate(dtype)
    assert network.encoder[0].globalconv.weight.dtype == dtype
    found = run(network, batch)
    assert found.dtype == torch.float32
    assert least < decibels(exact, found) < least + 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.0.SDlayer.convs.0.weight": None}, "not an SCNet: it has no tensor encoder.0.SDlayer.convs.0.weight"),
        ({"encoder.0.SDlayer.convs.2.weight": None}, "not an SCNet: it has no tensor encoder.0.SDlayer.convs.2.weight with 4 axes"),
        ({"encoder.0.SDlayer.convs.0.weight": [0, 4, 3, 1]}, "with 4 axes"),
        ({"encoder.1.globalconv.bias": None}, r"1 missing \(encoder.1.globalconv.bias\)"),
        ({"encoder.7.globalconv.bias": [1]}, "no tensor encoder.2.SDlayer.convs.0.weight"),
        ({"separation_net.dp_modules.0.lstm_layers.0.weight_hh_l0": None}, "no tensor separation_net.dp_modules.0"),
        ({"separation_net.dp_modules.0.attention.weight": [3]}, r"an SCNet with parts that are not supported: 1 unknown tensor, the first is separation_net\.dp_modules\.0\.attention\.weight"),
        ({"separation_net.dp_modules.2.norm_layers.0.bias": [3]}, "num_dplayer must be even, not 3"),
        ({"pos_embed_f": [1, 4, 257, 1]}, "type is 'scnet_masked' in the weights, but 'scnet' in the architecture"),
        ({"decoder.1.1.convtrs.0.weight": [8, 16, 3, 1]}, "the weights estimate 4 sources, not 3"),
        ({"encoder.0.conv_modules.0.layers.0.1.weight": [10, 8, 5]}, "no compress gives its hidden features"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(change: dict[str, list[int] | None], message: str) -> None:
    """With one tensor left out, or another one of this shape."""
    state = state_of(PLAIN)
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message) as caught:
        scnet.build(minimal(PLAIN), None, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [4, 8, 16]}, r"dims is \[4, 8, 12\] in the weights, but '?\[4, 8, 16\]'? in the architecture"),
        ({"num_dplayer": 4}, "num_dplayer is 2 in the weights, but 4"),
        ({"num_dplayer": 10**9}, "num_dplayer must be a whole number from 0 to 64"),
        ({"compress": 3}, "compress is 2 in the weights, but 3"),
        ({"sources": ["a", "b"]}, "the weights estimate 3 sources, not 2: a, b"),
        ({"type": "scnet_masked"}, "type is 'scnet' in the weights, but 'scnet_masked'"),
        ({"band_SR": [0.2, 0.8]}, "band_SR must have 3 values, not 2"),
        ({"band_SR": [0.5, 0.5, 0.0]}, "leaves a band of 257 bins empty"),
        ({"band_stride": [1, 2, 16]}, "a band of 128 bins does not fit a kernel of 8 and a stride of 16"),
        ({"nfft": 513}, "nfft must be even, not 513"),
        ({"hop_size": 257}, "win_size must be from 514, twice hop_size, to 512, which is nfft, not 512"),
        ({"win_size": 1024}, "to 512, which is nfft, not 1024"),
        ({"hop": 128}, "unknown key 'hop' of type scnet"),
    ],
)  # fmt: skip
def test_an_architecture_of_another_network_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scnet.build({**PLAIN, **change}, None, state_of(PLAIN))


def test_a_window_that_needs_too_much_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        scnet.build(PLAIN, 3000, state_of(PLAIN))
    with pytest.raises(ValueError, match="a window of 7938000 samples needs a tensor of .* GB"):
        scnet.build({**PLAIN, "hop_size": 1}, 180, state_of(PLAIN))


def test_a_network_much_larger_than_the_weights_is_not_built() -> None:
    state = state_of(PLAIN)
    state["encoder.0.SDlayer.convs.0.weight"] = torch.zeros(8000, 4, 3, 1)
    state["encoder.0.conv_modules.0.layers.0.1.weight"] = torch.zeros(8000, 1, 5)
    with pytest.raises(ValueError, match="more parameters than the file"):
        scnet.build(minimal(PLAIN), None, state)


def test_a_stand_in_needs_the_sizes_without_default_and_separates_a_song(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    text = (
        "networks: {n: {weights: {file: none.pt, architecture: {type: scnet, sources: [vocals]SIZES}},"
        " overlap_add: {overlap: 0.25, segment: 1}}}\n"
        "signals: {N: {network: n, hears: mixture}}\n"
        "stems: {vocals: {sum: {N.vocals: 1}}}\n"
    )
    plan.write_text(text.replace("SIZES", ""))
    with pytest.raises(
        KmdxError, match="weights of n: missing dims, band_kernel, conv_depths, num_dplayer, expand"
    ):
        stand_in.write(plan, tmp_path)
    sizes = "dims: [4, 8], band_kernel: [3, 4, 16], conv_depths: [1, 1, 1], num_dplayer: 2, expand: 1"
    plan.write_text(text.replace("SIZES", f", {sizes}"))
    (tmp_path / "made").mkdir()
    song = noise(50_000)[0].T.numpy()
    stems = Separator(stand_in.write(plan, tmp_path / "made"), device="cpu").separate(song, 44100)
    assert 0.4 < stems["vocals"].std() / song.std() < 0.6
