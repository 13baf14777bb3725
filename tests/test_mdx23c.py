"""MDX23C: reference outputs, sizes from the weights, and what is refused."""

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
from kmdx.networks import mdx23c, types
from kmdx.networks.mdx23c import Mdx23c

NEEDED = 110  # dB
INSTANCE = {
    "type": "mdx23c", "sources": ["vocals", "drums", "other"], "n_fft": 512, "hop_length": 128, "dim_f": 256,
    "num_subbands": 4, "num_channels": 6, "growth": 2, "num_scales": 2, "num_blocks_per_scale": 2,
    "bottleneck_factor": 2, "scale": [2, 2], "norm": "InstanceNorm", "act": "gelu",
}  # fmt: skip
BATCH = {
    **INSTANCE, "sources": ["vocals", "other"], "dim_f": 250, "num_subbands": 1, "scale": [1, 5], "growth": 0,
    "num_blocks_per_scale": 1, "norm": "BatchNorm", "act": "elu0.7",
}  # fmt: skip
GROUP = {**INSTANCE, "norm": "GroupNorm2", "act": "relu", "num_subbands": 2, "scale": [3, 2]}
NONE = {**INSTANCE, "norm": "none", "num_scales": 1}
ALL = pytest.mark.parametrize(
    "architecture", [INSTANCE, BATCH, GROUP, NONE], ids=["instance", "batch", "group", "none"]
)
UNTOLD = ("type", "sources", "n_fft", "hop_length", "norm", "act")


def minimal(architecture: dict[str, Any]) -> dict[str, Any]:
    """Only what the weights do not determine."""
    return {key: value for key, value in architecture.items() if key in UNTOLD}


def state_of(architecture: dict[str, Any]) -> dict[str, Tensor]:
    return mdx23c.stand_in(architecture, "seed").state_dict()


def noise(samples: int, channels: int = 2, count: int = 1) -> Tensor:
    return 0.1 * torch.randn(count, channels, samples, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def run(network: Mdx23c, batch: Tensor) -> Tensor:
    return network(batch)


@pytest.mark.parametrize("tuned", [False, True])
def test_outputs_match_the_reference(tuned: bool) -> None:
    golden = golden_today.load("mdx23c", "tiny_two")
    audio = {key: golden.config["audio"][key] for key in ("n_fft", "hop_length", "dim_f")}
    stated = {"type": "mdx23c", "sources": golden.sources, **audio, **golden.config["model"]}
    network = mdx23c.build(stated, None, golden.state)
    network.accelerate(torch.float32, tuned)
    assert decibels(golden.output, run(network, golden.input[None])[0]) > NEEDED


@ALL
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
def test_sizes_are_inferred_from_the_weights(architecture: dict[str, Any], prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in state_of(architecture).items()}
    found = mdx23c.infer(state)
    assert found["num_stems"] == len(architecture["sources"])
    told = {key: value for key, value in architecture.items() if key not in UNTOLD[1:]}
    assert {key: found[key] for key in told} == told
    assert found.get("norm", architecture["norm"]) == architecture["norm"]
    stated = mdx23c.build(architecture, None, state)
    assert mdx23c.build(minimal(architecture), None, state).config == stated.config


def test_a_network_without_norms_may_name_them_otherwise() -> None:
    mdx23c.build({**NONE, "norm": "Identity"}, None, state_of(NONE))
    with pytest.raises(ValueError, match="another network's weights"):
        mdx23c.build({**INSTANCE, "norm": "Identity"}, None, state_of(INSTANCE))


def test_a_mono_network_takes_each_channel_alone() -> None:
    mono = {**INSTANCE, "stereo": False}
    network = mdx23c.build({**minimal(mono), "stereo": False}, None, state_of(mono))
    assert network.config.num_subbands == 4
    stereo = noise(3000, count=2)
    together = run(network, stereo)
    assert together.shape == (2, 3, 2, 3000)
    for channel in range(2):
        alone = run(network, stereo[:, channel : channel + 1])
        assert decibels(alone, together[:, :, channel : channel + 1]) > NEEDED


@ALL
def test_any_length_returns_as_many_samples(architecture: dict[str, Any]) -> None:
    network = mdx23c.stand_in(architecture, "seed")
    for samples in (1, 2, 127, 128, 128 * 35, 128 * 35 + 1, 4321):
        found = run(network, noise(samples, count=2))
        assert found.shape == (2, len(network.sources), 2, samples)
        assert found.isfinite().all()
    with pytest.raises(ValueError, match="this network needs 2 channels, not 1"):
        run(network, noise(100, channels=1))


def test_a_window_of_whole_frames_is_not_extended() -> None:
    network = mdx23c.stand_in(INSTANCE, "seed")
    assert network.config.extended(128 * 63) == 128 * 63
    assert network.config.extended(128 * 63 + 1) == 128 * 67


@ALL
def test_a_batch_equals_its_items_alone(architecture: dict[str, Any]) -> None:
    network, batch = mdx23c.stand_in(architecture, "seed"), noise(5000, count=3)
    alone = torch.cat([run(network, item[None]) for item in batch])
    assert decibels(run(network, batch), alone) > NEEDED


@ALL
@pytest.mark.parametrize("tuned", [False, True])
def test_a_narrowed_network_estimates_the_same_and_shares_its_weights(
    architecture: dict[str, Any], tuned: bool
) -> None:
    network, batch, chosen = mdx23c.stand_in(architecture, "seed"), noise(3000), ("other", "vocals")
    network.accelerate(torch.float32, tuned)
    narrowed = network.narrow(chosen)
    expected = run(network, batch)[:, [network.sources.index(source) for source in chosen]]
    assert decibels(expected, run(narrowed, batch)) > NEEDED
    own = {id(each) for each in network.parameters()}
    assert sum(id(each) not in own for each in narrowed.parameters()) == 1  # the last layer's
    assert network.narrow(network.sources) is network
    with pytest.raises(ValueError, match="estimates vocals, .*other, not bass"):
        network.narrow(["bass"])


@ALL
def test_a_float16_checkpoint_is_loaded_as_float32(architecture: dict[str, Any]) -> None:
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in state_of(architecture).items()
    }
    network = mdx23c.build(architecture, None, state)
    assert {each.dtype for each in network.parameters()} == {torch.float32}


@ALL
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 25), (torch.float16, 40)])
def test_half_precision_stays_close(architecture: dict[str, Any], dtype: torch.dtype, least: float) -> None:
    network, batch = mdx23c.stand_in(architecture, "seed"), noise(5000)
    exact = run(network, batch)
    network.accelerate(dtype)
    assert {each.weight.dtype for each in network.modules() if isinstance(each, torch.nn.Linear)} == {dtype}
    found = run(network, batch)
    assert found.dtype == torch.float32
    assert least < decibels(exact, found) < least + 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_blocks.0.tfc_tdf.blocks.0.shortcut.weight": None}, "not an MDX23C: it has no tensor encoder_blocks.0"),
        ({"first_conv.weight": None}, "not an MDX23C: it has no tensor first_conv.weight with 4 axes"),
        ({"first_conv.weight": [6, 0, 1, 1]}, "with 4 axes"),
        ({"first_conv.weight": [6, 14, 1, 1]}, "its input of 14 features cannot be cut into sub-bands of 4"),
        ({"decoder_blocks.1.upscale.conv.0.bias": None}, r"1 missing \(decoder_blocks.1.upscale.conv.0.bias\)"),
        ({"encoder_blocks.1.attention.weight": [3]}, "an MDX23C with parts that are not supported: 1 unknown tensor, the first is encoder_blocks.1.attention.weight"),
        ({"encoder_blocks.0.downscale.conv.2.weight": [4, 6, 2, 2]}, "growth must be a whole number from 0"),
        ({"final_conv.2.weight": [64, 6, 1, 1]}, "the weights estimate 4 sources, not 3"),
        ({"encoder_blocks.3.tfc_tdf.blocks.0.tdf.2.weight": [1, 1]}, "missing|wrong shape|more parameters"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(change: dict[str, list[int] | None], message: str) -> None:
    """With one tensor left out, or another one of this shape."""
    state = state_of(INSTANCE)
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message) as caught:
        mdx23c.build(minimal(INSTANCE), None, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 8}, "num_channels is 6 in the weights, but 8 in the architecture"),
        ({"num_scales": 10**9}, "num_scales must be a whole number from 1 to 12"),
        ({"scale": [2, 4]}, r"scale is \[2, 2\] in the weights, but"),
        ({"sources": ["a", "b"]}, "the weights estimate 3 sources, not 2: a, b"),
        ({"norm": "BatchNorm"}, r"running_mean"),
        ({"norm": "LayerNorm"}, "norm must be InstanceNorm, BatchNorm, GroupNorm and a number, or none, not 'LayerNorm'"),
        ({"norm": "GroupNorm4"}, "divisible by the groups of GroupNorm4: 6 and 2 do not fit"),
        ({"act": "swish"}, "act must be gelu, relu or elu and a number, not 'swish'"),
        ({"n_fft": 509}, "n_fft must be even, not 509"),
        ({"n_fft": 256}, "dim_f must be from 1 to 129, not 256"),
        ({"hop_length": 500}, "a hop_length of 500 leaves gaps between windows of 512 samples"),
        ({"stereo": False}, "num_subbands is 8 in the weights, but 4"),
        ({"dim_t": 256}, "unknown key 'dim_t' of type mdx23c"),
    ],
)  # fmt: skip
def test_an_architecture_of_another_network_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mdx23c.build({**INSTANCE, **change}, None, state_of(INSTANCE))


@pytest.mark.parametrize("key", ["n_fft", "hop_length", "norm", "act"])
def test_an_architecture_states_what_the_weights_do_not(key: str) -> None:
    lacking = {name: value for name, value in INSTANCE.items() if name != key}
    with pytest.raises(ValueError, match=f"missing {key}"):
        types.read(lacking)


def test_a_window_that_needs_too_much_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        mdx23c.build(INSTANCE, 3000, state_of(INSTANCE))
    with pytest.raises(ValueError, match="a window of 7938000 samples needs a tensor of .* GB"):
        mdx23c.build({**INSTANCE, "hop_length": 1}, 180, state_of(INSTANCE))


def test_a_stand_in_needs_all_sizes_and_separates_a_song(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    text = (
        "networks: {n: {weights: {file: none.pt, architecture: {type: mdx23c, sources: [vocals], n_fft: 512,"
        " hop_length: 128, norm: InstanceNorm, act: geluSIZES}}, overlap_add: {overlap: 0.25, segment: 1}}}\n"
        "signals: {N: {network: n, hears: mixture}}\n"
        "stems: {vocals: {sum: {N.vocals: 1}}}\n"
    )
    plan.write_text(text.replace("SIZES", ""))
    with pytest.raises(KmdxError, match="weights of n: missing dim_f, num_subbands, num_channels, growth"):
        stand_in.write(plan, tmp_path)
    sizes = {key: value for key, value in INSTANCE.items() if key not in UNTOLD}
    plan.write_text(text.replace("SIZES", "".join(f", {key}: {value}" for key, value in sizes.items())))
    (tmp_path / "made").mkdir()
    song = noise(50_000)[0].T.numpy()
    stems = Separator(stand_in.write(plan, tmp_path / "made"), device="cpu").separate(song, 44100)
    assert 0.3 < stems["vocals"].std() / song.std() < 0.7
