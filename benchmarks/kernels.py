"""Compare the project's kernels with torch's: ``python -m benchmarks.kernels [--json FOLDER]``.

This times layers of leaderboard C's networks in both ways alternately, with one thread and with all. It
prints the speed of the project's kernels relative to torch's, and the resulting entry of
``kmdx/kernels.yaml``. Since these kernels use private operations of torch, one is enabled only if its layers
together are at least 1.1 times as fast, both with one thread and with all. Run this on an idle machine; the
load is printed with the result.

    python -m benchmarks.kernels [--rounds 9] [--json benchmarks/results/kernels]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from kmdx import benchmark, files, host, terminal
from kmdx.host import warm_heap
from kmdx.networks import attention, convolution, product

MIN_SPEEDUP = 1.1  # required to enable a kernel
CONVOLUTIONS = {  # channels, frames and bins of a U-Net's levels
    "MDX-Net, level 1": (48, 256, 3072),
    "MDX-Net, level 2": (96, 128, 1536),
    "MDX-Net, level 3": (144, 64, 768),
    "MDX-Net, level 4": (192, 32, 384),
    "MDX-Net, level 5": (240, 16, 192),
    "MDX-Net for bass, level 1": (40, 256, 2048),
}
PRODUCTS = {  # rows, columns in, columns out
    "HTDemucs, query, key and value": (2688, 512, 1536),
    "HTDemucs, wider": (2688, 512, 2048),
    "HTDemucs, narrower": (2688, 2048, 512),
    "HTDemucs, time branch": (1344, 512, 2048),
    "HTDemucs, transposed convolution": (1536, 384, 2688),
    "MDX-Net, narrower": (12288, 3072, 384),
    "MDX-Net, wider": (12288, 384, 3072),
}
ATTENTION = {"frequency branch": (2688, 2688), "time branch": (1344, 1344), "across": (2688, 1344)}


class Case(NamedTuple):
    """A layer that can be computed in both ways."""

    name: str
    ours: Callable[[], Tensor]
    torchs: Callable[[], Tensor]


def winograd() -> Iterator[Case]:
    """3×3 convolutions."""
    for name, (channels, frames, bins) in CONVOLUTIONS.items():
        image, weight = torch.randn(1, channels, frames, bins), torch.randn(channels, channels, 3, 3)
        given = image, weight, torch.randn(channels)
        yield Case(
            name,
            partial(torch._nnpack_spatial_convolution, *given, padding=1),
            partial(F.conv2d, *given, padding=1),
        )


def products() -> Iterator[Case]:
    """Matrix products."""
    for name, (rows, before, after) in PRODUCTS.items():
        given = torch.randn(rows, before), torch.randn(after, before)
        yield Case(name, partial(product._onednn, *given), partial(F.linear, *given))


def attentions(dtype: torch.dtype) -> Iterator[Case]:
    """Attention of eight heads."""
    for name, (queries, keys) in ATTENTION.items():
        query, (key, value) = torch.randn(1, 8, queries, 64), torch.randn(2, 1, 8, keys, 64)
        given = query.to(dtype), key.to(dtype), value.to(dtype)
        yield Case(
            name,
            partial(attention.attend_in_blocks, *given),
            partial(F.scaled_dot_product_attention, *given),
        )


def measure(case: Case, rounds: int) -> tuple[float, float]:
    """The shortest seconds of each way, from some alternating rounds."""
    ours: list[float] = []
    torchs: list[float] = []
    for number in range(rounds + 1):
        for way, times in ((case.ours, ours), (case.torchs, torchs)):
            began = time.perf_counter()
            way()
            if number:  # the first round is a warm-up
                times.append(time.perf_counter() - began)
    return min(ours), min(torchs)


def compare(cases: Iterator[Case], threads: list[int], rounds: int) -> dict[str, Any]:
    """Ratios of torch's time to the kernel's, by layer and number of threads, and whether it is faster."""
    layers: dict[str, dict[str, Any]] = {}
    totals = {count: [0.0, 0.0] for count in threads}
    for case in cases:
        for count in threads:
            torch.set_num_threads(count)
            ours, torchs = measure(case, rounds)
            totals[count][0] += ours
            totals[count][1] += torchs
            layers.setdefault(case.name, {})[f"{count} threads"] = {
                "kernel_ms": round(1e3 * ours, 2),
                "torch_ms": round(1e3 * torchs, 2),
                "ratio": round(torchs / ours, 2),
            }
    ratios = {f"{count} threads": round(torchs / ours, 2) for count, (ours, torchs) in totals.items()}
    return {"pays": min(ratios.values()) >= MIN_SPEEDUP, "ratio": ratios, "layers": layers}


@torch.inference_mode()
def measure_all(threads: list[int], rounds: int) -> dict[str, Any]:
    """Measure all kernels of this build of torch; attention uses the faster products."""
    found: dict[str, Any] = {}
    if convolution.winograd_works():
        found["winograd"] = compare(winograd(), threads, rounds)
    if product.onednn_works():
        found["products"] = compare(products(), threads, rounds)
    pays = found.get("products", {}).get("pays", False)
    with mock.patch.object(product, "onednn_is_used", return_value=pays):
        for dtype, name in attention.PRECISIONS.items():
            found[f"attention {name}"] = compare(attentions(dtype), threads, rounds)
    return found


def entry(found: dict[str, Any]) -> dict[str, Any]:
    """The entry of the table for these measurements."""
    here = host.processor()
    facts = {"architecture": here.architecture, "vendor": here.vendor, "family": here.family}
    return {
        "name": host.cpu_name(),
        **{key: value for key, value in facts.items() if value is not None},
        "features": sorted(here.features & {"avx2", "avx512_f", "avx512_bf16", "amx_bf16"}),
        "products": found.get("products", {}).get("pays", False),
        "winograd": found.get("winograd", {}).get("pays", False),
        "attention": [name for name in attention.PRECISIONS.values() if found[f"attention {name}"]["pays"]],
        "measured": f"torch {torch.__version__}, {datetime.now(timezone.utc):%Y-%m-%d}",
    }


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each way; the shortest counts")
    parser.add_argument("--json", type=Path, help="also write a report into this folder")
    arguments = parser.parse_args()
    benchmark.check_place(arguments.json, is_folder=True)
    threads = sorted({1, host.usable_cores()})
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with warm_heap():
        found = measure_all(threads, arguments.rounds)
    for kernel, result in found.items():
        ratios = ", ".join(f"{ratio:.2f} × with {count}" for count, ratio in result["ratio"].items())
        print(f"{kernel}: {ratios}; {'enabled' if result['pays'] else 'not enabled'}")
        for layer, counts in result["layers"].items():
            print(f"  {layer:34}" + "  ".join(f"{value['ratio']:5.2f} ×" for value in counts.values()))
    print(f"load of the machine at the start: {before}")
    print(yaml.safe_dump([entry(found)], sort_keys=False))
    if arguments.json:
        here = benchmark.describe()
        report = {"machine": vars(here), "load": before, "rounds": arguments.rounds, "kernels": found}
        file = arguments.json / (re.sub(r"[^a-z0-9]+", "-", here.name.lower()).strip("-") + ".json")
        files.write_text(file, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    terminal.run(main)
