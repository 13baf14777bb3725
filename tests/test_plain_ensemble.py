"""The baseline against a hand-written implementation of leaderboard C."""

from __future__ import annotations

from pathlib import Path

import plain
import pytest
import tiny
import torch
import yaml
from conftest import decibels, noise

from benchmarks import plain_ensemble
from kmdx.build import load_network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.plan import Plan
from kmdx.plan_file import load, parse
from kmdx.windows import OverlapAdd

CPU = torch.device("cpu")


def networks_of(plan: Plan) -> dict:
    return {name: load_network(use, plan.sample_rate, CPU) for name, use in plan.networks.items()}


def mixture_of(samples: int) -> torch.Tensor:
    return torch.from_numpy(noise(samples).T.copy()) + 0.01


def test_every_signal_matches_the_plain_implementation(
    leaderboard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load(leaderboard)
    networks = networks_of(plan)
    demucs = {name: use for name, use in plan.networks.items() if isinstance(use.chunking, OverlapAdd)}
    stems = ("vocals", "drums", "other", "bass")
    mixture = mixture_of(12_000)
    expected = plain.leaderboard_c(
        {name: networks[name].model for name in demucs},
        {name: use.chunking.overlap for name, use in demucs.items()},
        {stem: networks[f"mdx_{stem}"] for stem in stems},
        {stem: plan.networks[f"mdx_{stem}"].chunking.trim for stem in stems},
        plan.networks["mdx_bass"].chunking.chunk,
        mixture,
    )

    sessions = []
    opened = OnnxNetwork.__init__
    monkeypatch.setattr(
        OnnxNetwork, "__init__", lambda self, *given: (sessions.append(given), opened(self, *given))[1]
    )
    signals = plain_ensemble.run(plan, networks, mixture, CPU)
    assert len(sessions) == 1, "an ONNX session for each song"
    assert {"x1", "x2", "x3", "mdx_rest", *plan.stems} <= set(signals), "every sum"
    for name, signal in expected.items():
        assert signal.std() > 1e-3, "a signal too quiet to prove anything"
        assert decibels(signal, signals[name]) > 110, name


def test_nodes_that_nothing_needs_run_too_and_all_their_sources(small: Path) -> None:
    tree = yaml.safe_load(small.read_text("utf-8"))
    tree["signals"]["idle"] = {"network": "htdemucs", "hears": "mixture"}
    plan = parse(yaml.safe_dump(tree, sort_keys=False), "idle", small.parent)
    networks = networks_of(plan)
    shapes = []
    networks["htdemucs"].model.register_forward_hook(lambda _, given, made: shapes.append(made.shape))
    plain_ensemble.run(plan, networks, mixture_of(10_000), CPU)
    assert [shape[:2] for shape in shapes] == [(1, 4)] * 4


def test_networks_of_fixed_length_can_be_overlapped_too(tmp_path: Path) -> None:
    torch.save(tiny.author_state(tiny.unet("vocals", 2, 5)), tmp_path / "unet.pt")
    tree = {
        "networks": {
            "unet": {
                "weights": {
                    "file": "unet.pt",
                    "architecture": {**tiny.UNET, "sources": ["vocals"], "norm_groups": 2},
                },
                "overlap_add": {"overlap": 0.5},
            }
        },
        "signals": {"V": {"network": "unet", "hears": "mixture"}},
        "stems": {"vocals": {"sum": {"V.vocals": 1}}},
    }
    plan = parse(yaml.safe_dump(tree, sort_keys=False), "overlapped", tmp_path)
    networks = networks_of(plan)
    mixture = mixture_of(20_000)
    how = plan.networks["unet"].chunking
    window = torch.cat([torch.arange(1, how.length // 2 + 1), torch.arange(how.length // 2, 0, -1)]) * 1.0
    total, weight = torch.zeros(2, 20_000), torch.zeros(20_000)
    for start in range(0, 20_000, how.stride):
        end = min(start + how.length, 20_000)
        before = (how.length - (end - start)) // 2  # a short segment is heard with the song around it
        first = start - before
        around = mixture[:, first : first + how.length]
        heard = torch.nn.functional.pad(around, (0, how.length - around.shape[1]))
        with torch.no_grad():
            estimate = networks["unet"](heard[None])[0, 0, :, before : before + end - start]
        total[:, start:end] += window[: end - start] * estimate
        weight[start:end] += window[: end - start]
    assert decibels(total / weight, plain_ensemble.run(plan, networks, mixture, CPU)["vocals"]) > 110
