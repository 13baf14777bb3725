"""Golden outputs that every clone has: leaderboard C on eight seconds of sound, with small networks.

The plan is the real one, with its stages, blend weights, segments, overlaps, chunks and trims. The networks
are the registry's, with few channels and without the residual branches. Their weights are the raw output of
PCG64, which NumPy guarantees never to change. ``python tests/golden_small.py`` writes ``golden_small.npz``
with ``plain.py``, a second implementation with numbers of its own, and with Demucs' own networks; only the
U-Net is the library's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plain
import tiny
import torch
import yaml
from torch import nn

from kmdx import plan_file
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig, spectrogram_of

FILE = Path(__file__).with_suffix(".npz")
SAMPLES = 400_000  # the second window of each network weighs enough to show: the longest stride is 8 s
STEP = 197  # of the samples, one in this many is stored
DEMUCS = {"ft_vocals": (7.7, 0.85), "ft_drums": (7.8, 0.85), "ft_bass": (7.8, 0.85), "ft_other": (7.8, 0.80), "mmi": (44, 0.85),
          "extra": (40, 0.80)}  # fmt: skip
"""Seconds of a segment and share of overlap, as published."""
CHUNK = 261_120
TRIMS = {"vocals": 1500, "drums": 1754, "other": 1754, "bass": 1350}
SIZES = {"layers": 5, "convolutions": 1, "growth": 4}
NARROW = {
    "htdemucs": {"channels": 4, "dconv_mode": 0, "bottom_channels": 16, "t_layers": 2, "t_heads": 2},
    "hdemucs": {"channels": 4, "dconv_mode": 0},
    "tfc_tdf": {"bins": 128, **SIZES},
    "onnx": {"bins": 128},
}
GAIN = {"mdx_vocals": 4, "mdx_drums": 25, "mdx_other": 50, "mdx_bass": 80, "extra": 1}
"""Of the last layers, so that estimates are about as loud as the input."""


def uniform(seed: str, *shape: int) -> np.ndarray:
    """Values in [-1, 1) that are the same everywhere and forever."""
    raw = np.random.PCG64(zlib.crc32(seed.encode())).random_raw(int(np.prod(shape)))
    return ((raw >> 11) / 2.0**52 - 1).reshape(shape)


def mixture() -> np.ndarray:
    """Noise and a chord with an offset, float32 ``(samples, 2)``."""
    time = np.arange(SAMPLES)[:, None] / 44100
    tones = sum(np.sin(2 * np.pi * pitch * time * [1, 1.01]) for pitch in (110, 277.2, 659.3, 1760))
    swell = 0.6 + 0.4 * np.sin(time * [2, 3])
    return (0.05 * swell * tones + 0.1 * uniform("mixture", SAMPLES, 2) + 0.01).astype(np.float32)


def networks() -> dict[str, tuple[nn.Module, dict]]:
    """The plan's networks by name, and their architectures."""
    made = {}
    for name, use in plan_file.load("leaderboard_c").networks.items():
        real = {key: value for key, value in use.weight.architecture.items() if key != "gflops"}
        architecture = {**real, **NARROW[real["type"]]}
        made[name] = (network(name, architecture), architecture)
    return made


@torch.no_grad()
def network(name: str, architecture: dict) -> nn.Module:
    """A network with weights that keep signals at their level; they follow from its name."""
    kind = architecture["type"]
    if kind in ("onnx", "tfc_tdf"):
        sizes = TfcTdfConfig(
            spectrogram_of(architecture), **SIZES, norm_groups=architecture.get("norm_groups")
        )
        made: nn.Module = TfcTdf(sizes, architecture["sources"][0])
        last = [made.final_conv]
    else:
        made = tiny.demucs(architecture, 0)
        last = [made.decoder[-1].conv_tr, made.tdecoder[-1].conv_tr]
    for key, tensor in made.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(weights(f"{name} {key}", tensor.shape)))
    for parameter in (parameter for layer in last for parameter in layer.parameters()):
        parameter.mul_(GAIN.get(name, 4))
    return made.eval().requires_grad_(False)


def weights(name: str, shape: Sequence[int]) -> np.ndarray:
    """The values of one tensor, by the end of its name."""
    values = uniform(name, *shape)
    kind = name.rpartition(".")[2]
    if kind == "scale":  # of a residual branch
        return 0.1 + 0.01 * values
    if "bias" in kind or kind == "running_mean":
        return 0.02 * values
    if len(shape) >= 2:
        return values * (3 / np.prod(shape[1:])) ** 0.5
    return 1 + 0.1 * values  # of a norm


def write(folder: Path) -> Path:
    """Write the networks and the plan over them; return the plan's path."""
    plan = yaml.safe_load(tiny.LEADERBOARD_C.read_text("utf-8"))
    for name, (made, architecture) in networks().items():
        plan["networks"][name]["weights"] = tiny.save(made, folder / name, architecture)
    path = folder / "golden_small.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")
    return path


def reference() -> dict[str, np.ndarray]:
    """Both halves of each stem and the stems, float32 ``(samples / STEP, 2)``."""
    made = {name: each for name, (each, _) in networks().items()}
    for name, (seconds, _) in DEMUCS.items():
        made[name].segment = seconds
    signals = plain.leaderboard_c(
        {name: made[name] for name in DEMUCS},
        {name: overlap for name, (_, overlap) in DEMUCS.items()},
        {stem: made[f"mdx_{stem}"] for stem in TRIMS},
        TRIMS,
        CHUNK,
        torch.from_numpy(mixture().T.copy()),
    )
    return {name: signal.T[::STEP].numpy() for name, signal in signals.items()}


if __name__ == "__main__":
    np.savez(FILE, **reference())
