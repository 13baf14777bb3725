"""Measure what shifts, test-time augmentation and overlap gain and cost.

    python -m benchmarks.augmentation --dataset FOLDER... [--seconds 20] [--weights htdemucs]

Separates the first seconds of songs in MUSDB18-HQ's layout by one network that estimates all stems from the
mixture, and prints the change of each stem's global SDR against an overlap of 0.25 in one pass, as the mean
over the songs. The cost is processor time, divided by that of the one pass of the same song.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from evaluator import dataset
from evaluator.metrics import global_sdr
from kmdx import Separator, plan_file, terminal
from kmdx.challenge import MIXTURE, STEMS
from kmdx.plan import Plan
from kmdx.windows import OverlapAdd

PLAN = """
networks: {{net: {{weights: {weights}, overlap_add: {{overlap: 0.25}}}}}}
signals: {{x: {{normalize: mixture}}, E: {{network: net, hears: x}}}}
stems: {{{stems}}}
"""


def with_overlap(plan: Plan, overlap: float) -> Plan:
    """The plan with another overlap of its network."""
    use = plan.networks["net"]
    assert isinstance(use.chunking, OverlapAdd)
    return replace(plan, networks={"net": replace(use, chunking=replace(use.chunking, overlap=overlap))})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--weights", default="htdemucs")
    options = parser.parse_args()
    stems = ", ".join(f"{stem}: {{sum: {{E.{stem}: 1}}, denormalize: x}}" for stem in STEMS)
    plan = plan_file.parse(PLAN.format(weights=options.weights, stems=stems), "one")
    settings = {
        "1 pass, overlap 0.25": plan,
        "overlap 0.5": with_overlap(plan, 0.5),
        "overlap 0.75": with_overlap(plan, 0.75),
        "2 shifts": plan.augmented(shifts=2),
        "4 shifts": plan.augmented(shifts=4),
        "tta": plan.augmented(tta=True),
        "tta, 2 shifts": plan.augmented(shifts=2, tta=True),
    }
    separators = {
        name: Separator(variant, device="cpu", precision="fp32") for name, variant in settings.items()
    }
    scores: dict[str, list[list[float]]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    for track in [track for place in options.dataset for track in dataset.find_tracks(place)]:
        count = int(options.seconds * track.form.rate)
        mixture = dataset.read(track, MIXTURE).samples[:count]
        truth = {stem: dataset.read(track, stem).samples[:count] for stem in track.stems}
        terminal.out.print(track.name, markup=False)
        for name, separator in separators.items():
            began = time.process_time()
            made = separator.separate(mixture, track.form.rate)
            costs[name].append(time.process_time() - began)
            scores[name].append(
                [global_sdr(truth[stem], made[stem]) if stem in truth else np.nan for stem in STEMS]
            )
    first = next(iter(settings))
    table = Table("setting", *STEMS, "mean", "cost", box=None, pad_edge=False)
    for name in settings:
        gain = np.array(scores[name]) - (0 if name == first else np.array(scores[first]))
        cost = np.median(np.array(costs[name]) / np.array(costs[first]))
        form = ".2f" if name == first else "+.3f"
        values = [*np.nanmean(gain, 0), np.nanmean(gain)]
        table.add_row(name, *(format(value, form) for value in values), f"{cost:.2f}")
    terminal.out.print(table)


if __name__ == "__main__":
    terminal.run(main)
