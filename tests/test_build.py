"""From weight files to fast networks: published ONNX graphs are ported, others are unchanged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
import yaml
from conftest import decibels, noise
from torch import Tensor

from kmdx import Separator, plan_file, precisions
from kmdx.build import load_for_inference, load_network
from kmdx.errors import WeightsError
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.fast import FAST
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.tfc_tdf import TfcTdf
from kmdx.plan import NetworkUse

CPU = torch.device("cpu")
RATE = 44100


def use_of(path: Path, name: str) -> NetworkUse:
    return plan_file.load(path).networks[name]


def song(network: Network) -> Tensor:
    return torch.from_numpy(noise(network.length or 10_000).T.copy())[None]


def write_vocals(folder: Path, norm_groups: int | None = None, sizes: Sequence[tuple[str, int]] = ()) -> Path:
    """Write a U-Net as an ONNX graph, and a plan of that alone; return the plan's path."""
    tiny.export(tiny.unet("vocals", norm_groups, seed=3), folder / "vocals.onnx")
    architecture = {"type": "onnx", "sources": ["vocals"], **tiny.TRANSFORM, **dict(sizes)}
    plan = {
        "networks": {
            "mdx": {
                "weights": {"file": "vocals.onnx", "architecture": architecture},
                "trim_and_join": {"chunk": tiny.CHUNK, "trim": 109},
            }
        },
        "signals": {"V": {"network": "mdx", "hears": "mixture"}},
        "stems": {"vocals": {"sum": {"V.vocals": 1}}},
    }
    path = folder / "vocals.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")
    return path


@pytest.mark.parametrize("name", ["mdx_vocals", "mdx_drums", "ft_bass", "mmi", "extra"])
@torch.inference_mode()
def test_a_fast_network_equals_the_plain_one(leaderboard: Path, name: str) -> None:
    use = use_of(leaderboard, name)
    plain, fast = load_network(use, RATE, CPU), load_for_inference(use, RATE, CPU)
    assert fast.sources == plain.sources
    assert fast.length == plain.length
    assert decibels(plain(song(plain)), fast(song(plain))) > 100
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_a_published_graph_is_ported_only_for_inference(tmp_path: Path) -> None:
    use = use_of(write_vocals(tmp_path), "mdx")
    assert isinstance(load_network(use, RATE, CPU), OnnxNetwork)
    assert isinstance(load_for_inference(use, RATE, CPU), TfcTdf)
    assert Separator(tmp_path / "vocals.yaml", device="cpu").providers == {}


def test_the_plain_engine_runs_a_published_graph_in_torch(tmp_path: Path) -> None:
    network = load_for_inference(use_of(write_vocals(tmp_path), "mdx"), RATE, CPU, engine="plain")
    assert isinstance(network, TfcTdf)
    assert not any(isinstance(module, FAST) for module in network.modules())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_unknown_graph_runs_in_onnx_runtime(tmp_path: Path) -> None:
    path = write_vocals(tmp_path, norm_groups=2)
    use = use_of(path, "mdx")
    fast = load_for_inference(use, RATE, CPU, precision="fp16", speed="fast")
    assert isinstance(fast, OnnxNetwork)
    separator = Separator(path, device="cpu")
    assert separator.providers == {"mdx": ("CPUExecutionProvider",)}
    with torch.inference_mode():
        expected = tiny.unet("vocals", 2, seed=3)(song(fast))
        assert decibels(expected, fast(song(fast))) > 100
    mixture = noise(10_000)
    vocals = separator.separate(mixture, RATE)["vocals"]
    assert vocals.shape == mixture.shape
    assert vocals.any()


def test_a_graph_whose_sizes_differ_from_the_architecture_is_refused(tmp_path: Path) -> None:
    path = write_vocals(tmp_path, sizes=[("bins", 256)])
    with pytest.raises(WeightsError, match=r"vocals\.onnx cannot be used: its inputs have the shapes"):
        load_for_inference(use_of(path, "mdx"), RATE, CPU)


@pytest.mark.parametrize(
    ("name", "speed", "demucs", "mdx"),
    [
        ("auto", "leaderboard", torch.float32, torch.float32),
        ("auto", "balanced", torch.bfloat16, torch.float32),
        ("auto", "fast", torch.bfloat16, torch.bfloat16),
        ("fp32", "fast", torch.float32, torch.float32),
        ("bf16", "leaderboard", torch.bfloat16, torch.float32),
    ],
)
def test_a_network_gets_a_precision_that_it_supports(
    leaderboard: Path,
    name: str,
    speed: str,
    demucs: torch.dtype,
    mdx: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    uses = [use_of(leaderboard, network) for network in ("mmi", "mdx_vocals", "mdx_drums")]
    networks = [load_for_inference(use, RATE, CPU, precision=name, speed=speed) for use in uses]
    assert [type(network) for network in networks] == [DemucsNetwork, TfcTdf, TfcTdf]
    assert [network.dtype for network in networks] == [demucs, mdx, mdx]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_published_graph_with_nan_is_refused_by_name(tmp_path: Path, value: float) -> None:
    use = use_of(write_vocals(tmp_path), "mdx")
    model = onnx.load(tmp_path / "vocals.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.raw_data = np.float32(value).tobytes() + weight.raw_data[4:]
    onnx.save(model, tmp_path / "vocals.onnx")
    for load in (load_network, load_for_inference):
        with pytest.raises(WeightsError, match=f"vocals.onnx is refused: its tensor {weight.name} holds NaN"):
            load(use, RATE, CPU)


def test_errors_are_the_same_as_for_the_plain_network(tmp_path: Path) -> None:
    use = use_of(write_vocals(tmp_path), "mdx")
    (tmp_path / "vocals.onnx").write_bytes(b"\x08\x07 no graph")
    messages = []
    for load in (load_network, load_for_inference):
        with pytest.raises(WeightsError) as caught:
            load(use, RATE, CPU)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    with pytest.raises(WeightsError, match="it needs 44100 Hz, but the plan's sample rate is 48000 Hz"):
        load_for_inference(use_of(tiny.write_htdemucs(tmp_path), "htdemucs"), 48_000, CPU)


def test_arguments_in_a_file_do_not_replace_the_sizes_of_a_unet(tmp_path: Path) -> None:
    state = tiny.author_state(tiny.unet("vocals", 2, 5))
    torch.save({"state": state, "kwargs": {"n_fft": 8}}, tmp_path / "unet.pt")
    architecture = {**tiny.UNET, "sources": ["vocals"], "norm_groups": 2}
    text = (
        f"networks: {{u: {{weights: {{file: unet.pt, architecture: {json.dumps(architecture)}}}, overlap_add: {{overlap: 0}}}}}}\n"
        "signals: {U: {network: u, hears: mixture}}\n"
        "stems: {vocals: {sum: {U.vocals: 1}}}\n"
    )
    (use,) = plan_file.parse(text, "plan", tmp_path).networks.values()
    assert load_network(use, 44100, torch.device("cpu")).length == use.chunking.length
