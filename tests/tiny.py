"""Networks of a few kilobytes with the code paths of the real ones, and a plan that stages them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs

from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig

SOURCES = ["drums", "bass", "other", "vocals"]
HTDEMUCS = {
    "type": "htdemucs", "sources": SOURCES, "channels": 8, "bottom_channels": 16, "t_layers": 2, "t_heads": 2,
    "dconv_mode": 3, "segment": 0.5,
}  # fmt: skip
HDEMUCS = {"type": "hdemucs", "sources": SOURCES, "channels": 8, "segment": 1.5}
HYBRID_OLD = {**HDEMUCS, "hybrid_old": True, "cac": False}
TRANSFORM = {"n_fft": 1024, "hop": 256, "bins": 128, "frames": 32}
CHUNK = 256 * 31
UNET = {"type": "tfc_tdf", **TRANSFORM, "layers": 5, "convolutions": 1, "growth": 4}
LEADERBOARD_C = Path(__file__).parents[1] / "kmdx" / "plans" / "leaderboard_c.yaml"


def demucs(architecture: dict[str, Any], seed: int) -> HTDemucs | HDemucs:
    """Make a small Demucs network with random weights that leave something to hear."""
    torch.manual_seed(seed)
    options = {key: value for key, value in architecture.items() if key != "type"}
    return {"htdemucs": HTDemucs, "hdemucs": HDemucs}[architecture["type"]](**options).eval()


def unet(source: str, norm_groups: int | None, seed: int) -> TfcTdf:
    """Make a small TFC-TDF U-Net with random weights; batch norms get statistics of their own."""
    torch.manual_seed(seed)
    network = TfcTdf(
        TfcTdfConfig(
            SpectrogramConfig(**TRANSFORM), layers=5, convolutions=1, growth=4, norm_groups=norm_groups
        ),
        source,
    )
    network.final_conv[0].weight.data.mul_(50)  # about as loud as its input
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def author_state(network: TfcTdf) -> dict[str, torch.Tensor]:
    """A state dict as the author's ``.pt`` files hold it, with the transform's constants."""
    padding = torch.zeros(1, 4, *network.padding_shape)
    return {"window": network.spectrogram.window, "freq_pad": padding, **network.state_dict()}


def export(network: TfcTdf, path: Path, dynamic: bool = True) -> None:
    """Export the U-Net to ONNX as the published training code does."""
    spectrogram = network.config.spectrogram
    waveform_forward, network.forward = network.forward, network.unet
    torch.onnx.export(
        network,
        (torch.zeros(1, 4, spectrogram.bins, spectrogram.frames),),
        str(path),
        input_names=["input"],
        output_names=["output"],
        opset_version=13,
        dynamo=False,
        dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}} if dynamic else None,
    )
    network.forward = waveform_forward


def save(network: torch.nn.Module, path: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """Write a network as its author would, ``path`` with the ending of its kind; return a plan's ``weights``."""
    path = path.with_suffix({"onnx": ".onnx", "tfc_tdf": ".pt"}.get(architecture["type"], ".ckpt"))
    if path.suffix == ".onnx":
        export(network, path)
    else:
        torch.save(author_state(network) if path.suffix == ".pt" else {"state": network.state_dict()}, path)
    return {"file": path.name, "architecture": architecture}


def write_leaderboard(folder: Path) -> Path:
    """Write ten small networks and a plan with leaderboard C's graph over them; return the plan's path."""
    plan = yaml.safe_load(LEADERBOARD_C.read_text("utf-8"))
    groups = {"mdx_drums": 2, "mdx_other": 2, "mdx_bass": 4}
    for seed, (name, network) in enumerate(plan["networks"].items()):
        if name.startswith("mdx_"):
            source = name.removeprefix("mdx_")
            made: torch.nn.Module = unet(source, groups.get(name), seed)
            architecture = {**UNET, "sources": [source], "norm_groups": groups.get(name)}
            if name == "mdx_vocals":
                architecture = {"type": "onnx", "sources": ["vocals"], **TRANSFORM}
        else:
            architecture = {"mmi": HDEMUCS, "extra": HYBRID_OLD}.get(name, HTDEMUCS)
            made = demucs(architecture, seed)
        network["weights"] = save(made, folder / name.removeprefix("mdx_"), architecture)
        if "trim_and_join" in network:
            network["trim_and_join"] = {"chunk": CHUNK, "trim": network["trim_and_join"]["trim"] // 16}
        else:
            network["overlap_add"]["segment"] = {"mmi": 1.5, "extra": 1.3}.get(name, 0.5)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False, default_flow_style=None), "utf-8")
    return path


HTDEMUCS_PLAN = LEADERBOARD_C.with_name("htdemucs.yaml")


def write_htdemucs(folder: Path) -> Path:
    """Write one small HTDemucs and the htdemucs plan over it; return the plan's path."""
    plan = yaml.safe_load(HTDEMUCS_PLAN.read_text("utf-8"))
    torch.save({"state": demucs(HTDEMUCS, 0).state_dict()}, folder / "small.ckpt")
    plan["networks"]["htdemucs"]["weights"] = {"file": "small.ckpt", "architecture": HTDEMUCS}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")
    return path


def spoil(path: Path, how: str) -> str:
    """Damage a weight file in one way; returns what the message must say."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return "damaged or cut off"
    if how == "empty":
        path.write_bytes(b"")
        return "is empty"
    if how == "another network's":
        torch.save({"state": demucs(HDEMUCS, 1).state_dict()}, path)
        return "another network's weights"
    if how == "text":
        path.write_text("not weights")
        return "is not a weight file"
    marker = path.with_name("ran")
    torch.save({"state": Attack(marker)}, path)
    return "a pickle that could run code"


class Attack:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)
