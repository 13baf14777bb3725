"""SCNet, its masked form and MDX23C: reference outputs, sizes from the weights, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import golden_today
import pytest
import torch
from conftest import decibels
from torch import Tensor, nn

from kmdx import Separator, stand_in
from kmdx.networks import types

NEEDED = 110  # dB
SCNET = {
    "type": "scnet", "sources": ["vocals", "drums", "other"], "dims": [4, 8, 12], "nfft": 256, "hop_size": 64,
    "win_size": 256, "band_SR": [0.25, 0.35, 0.4], "band_stride": [1, 4, 8], "band_kernel": [3, 4, 8],
    "conv_depths": [2, 1, 1], "compress": 2, "conv_kernel": 3, "num_dplayer": 2, "expand": 1,
}  # fmt: skip
MASKED = {**SCNET, "type": "scnet_masked"}
MDX23C = {
    "type": "mdx23c", "sources": ["vocals", "drums", "other"], "n_fft": 512, "hop_length": 128, "dim_f": 128,
    "num_subbands": 2, "num_channels": 8, "growth": 4, "num_scales": 2, "num_blocks_per_scale": 1,
    "bottleneck_factor": 2, "scale": [2, 2], "norm": "InstanceNorm", "act": "gelu",
}  # fmt: skip
ALL = pytest.mark.parametrize("architecture", [SCNET, MASKED, MDX23C], ids=["scnet", "masked", "mdx23c"])
UNTOLD = {
    "type", "sources", "nfft", "hop_size", "win_size", "band_SR", "band_stride", "n_fft", "hop_length", "norm", "act"
}  # fmt: skip


def state_of(architecture: dict[str, Any]) -> dict[str, Tensor]:
    made: nn.Module = types.function(types.TYPES[architecture["type"]].stand_in)(architecture, "seed")
    return made.state_dict()


def build(architecture: dict[str, Any], state: dict[str, Tensor]) -> Any:
    return types.function(types.TYPES[architecture["type"]].build)(architecture, None, state)


def noise(samples: int, channels: int = 2) -> Tensor:
    return 0.1 * torch.randn(1, channels, samples, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def run(network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return network(batch)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("family", "name"),
    [("scnet", "tiny_four"), ("scnet", "full_large"), ("scnet_masked", "tiny_four"), ("mdx23c", "tiny_two")],
)
def test_outputs_match_the_reference(family: str, name: str, tuned: bool) -> None:
    golden = golden_today.load(family, name)
    settings = {**golden.config["audio"], **golden.config["model"]}
    stated = {key: value for key, value in settings.items() if key in types.TYPES[family].sizes}
    network = build({"type": family, "sources": golden.sources, **stated}, golden.state)
    network.accelerate(torch.float32, tuned)
    found = run(network, golden.input[None])[0]
    assert found.shape[-1] == golden.input.shape[-1]
    expected = golden.output.reshape(len(golden.sources), *golden.output.shape[-2:])
    assert decibels(expected, found[..., : expected.shape[-1]]) > NEEDED


@ALL
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_sizes_are_inferred_from_the_weights(architecture: dict[str, Any], prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in state_of(architecture).items()}
    found = types.infer(state, architecture)
    assert found["type"] == architecture["type"]
    assert found["num_stems"] == 3
    assert {key: architecture[key] for key in found if key in architecture} == {
        key: value for key, value in found.items() if key in architecture
    }
    untold = {key: value for key, value in architecture.items() if key in UNTOLD}
    compress = {"compress": architecture["compress"]} if "compress" in architecture else {}
    assert build({**untold, **compress}, state).config == build(architecture, state).config


@ALL
@pytest.mark.parametrize("samples", [1, 100, 1000, 4097, 20_000])
def test_any_length_gives_estimates_of_this_length(architecture: dict[str, Any], samples: int) -> None:
    network = build(architecture, state_of(architecture))
    estimates = run(network, noise(samples))
    assert estimates.shape == (1, 3, 2, samples)
    assert estimates.isfinite().all()


@ALL
def test_a_narrow_network_gives_the_same_estimates(architecture: dict[str, Any]) -> None:
    network = build(architecture, state_of(architecture))
    song = noise(9000)
    whole = run(network, song)
    narrow = network.narrow(["other", "vocals"])
    assert narrow.sources == ("other", "vocals")
    assert decibels(whole[:, [2, 0]], run(narrow, song)) > 120
    with pytest.raises(ValueError, match="estimates vocals, drums, other, not guitar"):
        network.narrow(["guitar"])


@ALL
@pytest.mark.parametrize("dtype", [torch.float16])
def test_half_precision_stays_close(architecture: dict[str, Any], dtype: torch.dtype) -> None:
    state = state_of(architecture)
    song = noise(9000)
    half = build(architecture, {name: tensor.half() for name, tensor in state.items()})
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    half.accelerate(dtype)
    assert half.dtype == dtype
    assert decibels(run(build(architecture, state), song), run(half, song)) > 30


@ALL
def test_other_weights_are_refused_in_one_line(architecture: dict[str, Any]) -> None:
    state = state_of(architecture)
    name = next(name for name in state if name.endswith("weight"))
    for changed in (
        {**state, "extra.hyperace.weight": torch.zeros(2)},
        {key: tensor for key, tensor in state.items() if key != name},
        {**state, name: torch.zeros(1, 1)},
    ):
        with pytest.raises(ValueError, match=r"\w") as caught:
            build(architecture, changed)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="estimate 3 sources, not 2"):
        build({**architecture, "sources": ["a", "b"]}, state)


@ALL
def test_a_stand_in_separates_a_song(architecture: dict[str, Any], tmp_path: Any) -> None:
    import yaml

    stems = {source: {"sum": {f"E.{source}": 1}} for source in architecture["sources"]}
    plan = {
        "networks": {
            "net": {
                "weights": {"file": "none.ckpt", "architecture": architecture},
                "fade_and_add": {"chunk": 8192, "overlap": 2},
            }
        },
        "signals": {"E": {"network": "net", "hears": "mixture"}},
        "stems": stems,
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")
    made = stand_in.write(path, tmp_path)
    separated = Separator(made, device="cpu").separate(noise(20_000)[0].T.numpy().copy(), 44100)
    assert {name: samples.shape for name, samples in separated.items()} == dict.fromkeys(stems, (20_000, 2))
