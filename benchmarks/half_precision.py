"""Measure the error of half precision for each network: ``python -m benchmarks.half_precision``.

This computes in float32 and rounds the inputs and outputs of the operations that would be in half precision:
those of autocast for Demucs, RoFormers and SCNet, and all but the Fourier transforms for a U-Net. Hardware
multiplies half-precision numbers exactly and adds in float32, so the result is the same except for the order
of additions. The first and last convolution of a U-Net are rounded too, although the library keeps them in
float32. In float16, the library also keeps norms and sums over layers of Demucs networks and RoFormers in
half precision, which only ``--hardware`` measures.

    python -m benchmarks.half_precision --song SONG [--folder MODELS] [--ensemble leaderboard_c]
    python -m benchmarks.half_precision --dataset FOLDER --ensemble htdemucs    # SDR of whole songs
    python -m benchmarks.half_precision --dataset FOLDER --ensemble htdemucs --hardware --half bf16

``--song`` prints the error of each network in dB on the first window of the song. ``--dataset`` separates
songs in MUSDB18-HQ's layout in float32 and in half precision, and prints the global SDR per stem and its
change. With ``--hardware``, this machine computes in half precision, as with ``kmdx separate --precision``;
networks that do not support it stay in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from evaluator.metrics import global_sdr
from kmdx import Separator, audio, plan_file, terminal
from kmdx.build import load_for_inference
from kmdx.host import warm_heap
from kmdx.networks.mdx23c import Mdx23c
from kmdx.networks.network import Network
from kmdx.networks.tfc_tdf import TfcTdf

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = (
    "convolution", "addmm", "mm", "bmm", "baddbmm", "_scaled_dot_product", "_linear_pointwise", "mkldnn",
    "_nnpack",
)  # fmt: skip
# Names of operations. Autocast keeps sums with float32 parameters or signals in float32, and therefore also
# residual streams and layer norms. A U-Net is entirely in half precision.
AUTOCAST = (*PRODUCTS, "native_group_norm", "gelu", "glu")
THROUGHOUT = (*AUTOCAST, "native_batch_norm", "relu", "clamp_min", "add", "mul")


class Rounding(TorchDispatchMode):
    """Rounds the float32 inputs and outputs of operations that would be in half precision."""

    def __init__(self, dtype: torch.dtype, operations: tuple[str, ...]) -> None:
        super().__init__()
        self.dtype = dtype
        self.operations = operations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, with rounding if it would be in half precision."""
        with self:  # in inference mode, operations arrive here before they are decomposed
            made = function.decompose(*args, **(kwargs or {}))
        if made is not NotImplemented:
            return made
        name = function.overloadpacket.__name__.removesuffix("_")
        if not name.startswith(self.operations) or function._schema.is_mutable:
            return function(*args, **(kwargs or {}))
        return tree_map(self._round, function(*tree_map(self._round, args), **(kwargs or {})))

    def _round(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.to(self.dtype).float()
        return value


@contextmanager
def precision(name: str, networks: Iterable[Network]) -> Iterator[None]:
    """Simulate a precision of these networks: fp32, or one of HALVES."""
    if name == "fp32":
        yield
    else:
        unets = any(isinstance(network, TfcTdf | Mdx23c) for network in networks)
        with Rounding(HALVES[name], THROUGHOUT if unets else AUTOCAST):
            yield


def decibels(reference: Tensor, estimate: Tensor) -> float:
    """Energy of the difference relative to the reference, in dB."""
    error = (estimate.double() - reference.double()).square().sum() / reference.double().square().sum()
    return float(10 * torch.log10(error))


def errors(ensemble: str, song: Path, folder: Path | None, names: list[str] | None) -> None:
    """Print the error of each network on one window."""
    plan = plan_file.load(ensemble)
    sound = audio.read(song)
    signal = torch.from_numpy(audio.resample(sound.samples, sound.rate, plan.sample_rate).T.copy())
    for name in names or plan.networks:
        use = plan.networks[name]
        # HDemucs accepts any length; ten seconds are enough.
        network = load_for_inference(use, plan.sample_rate, torch.device("cpu"), folder)
        length = network.length or 10 * plan.sample_rate
        window = torch.nn.functional.pad(signal[None, :, :length], (0, max(0, length - signal.shape[-1])))
        found = {}
        for how in ("fp32", *HALVES):
            with torch.inference_mode(), precision(how, [network]):
                found[how] = network(window)
        levels = [f"{how} {decibels(found['fp32'], found[how]):6.1f} dB" for how in HALVES]
        print(f"{name:12s} {'   '.join(levels)}", flush=True)


def scores(ensemble: str, dataset: Path, folder: Path | None, halves: list[str], hardware: bool) -> None:
    """Print the SDR of each song and its changes."""
    separators = {
        how: Separator(ensemble, device="cpu", folder=folder, precision=how if hardware else "fp32")
        for how in ("fp32", *halves)
    }
    for mixture in sorted(dataset.rglob("mixture.wav")):
        song = audio.read(mixture)
        truth = {
            stem: audio.read(mixture.with_name(f"{stem}.wav")).samples for stem in separators["fp32"].stems
        }
        print(mixture.parent.name)
        exact: dict[str, float] = {}
        for how, separator in separators.items():
            with precision("fp32" if hardware else how, separator.networks.values()):
                stems = separator.separate(song.samples, song.rate)
            sdr = {stem: global_sdr(truth[stem], np.asarray(stems[stem])) for stem in stems}
            exact = exact or sdr
            print(
                f"  {how} " + "  ".join(f"{s} {v:.3f} ({v - exact[s]:+.4f})" for s, v in sdr.items()),
                flush=True,
            )


def main() -> None:
    """Measure errors on a song, or scores on a data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--song", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--ensemble", default="leaderboard_c")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--network", action="append", help="with --song: only this network; can be repeated")
    parser.add_argument("--half", action="append", choices=HALVES, help="with --dataset: only this precision")
    parser.add_argument("--hardware", action="store_true", help="with --dataset: compute in half precision")
    arguments = parser.parse_args()
    with warm_heap():
        if arguments.dataset:
            halves = arguments.half or list(HALVES)
            scores(arguments.ensemble, arguments.dataset, arguments.folder, halves, arguments.hardware)
        elif arguments.song:
            errors(arguments.ensemble, arguments.song, arguments.folder, arguments.network)
        else:
            parser.error("expected --song or --dataset")


if __name__ == "__main__":
    terminal.run(main)
