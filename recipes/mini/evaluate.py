"""Score the small ensemble: ``python -m recipes.mini.evaluate NAME=SONGS… [-o scores.csv]``.

SONGS is a folder that contains songs at any depth, ``<song>/{bass,drums,other,vocals}.*``. The sum of the
stems is the mixture. Songs without vocals are skipped; missing and silent stems are not scored. For each
song and stem, this measures the global SDR in dB of

- ``mixture``: the mixture itself,
- ``alone``: the stem's network with the mixture as input,
- ``staged``: the stem's network at its last place in the plan, with the residual of earlier stages as input,
- ``plan``: the plan's stem,

and prints the mean over the songs of each set NAME.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from evaluator.metrics import global_sdr
from kmdx import Separator, audio, terminal
from kmdx.challenge import MIXTURE, STEMS
from kmdx.errors import KmdxError
from kmdx.nodes import Estimate
from kmdx.plan import Plan
from kmdx.terminal import out

WAYS = ("mixture", "alone", "staged", "plan")


def with_each_alone(plan: Plan) -> tuple[Plan, dict[str, dict[str, str]]]:
    """Add a node per network that takes the mixture as input; also return signal names by stem and way."""
    networks = plan.runs(plan.nodes)
    runs = {plan.networks[network].sources[0]: name for name, network in networks.items()}
    alone = {f"{name}_alone": Estimate(networks[name], MIXTURE) for name in runs.values()}
    ways = {
        stem: {"alone": f"{runs[stem]}_alone.{stem}", "staged": f"{runs[stem]}.{stem}", "plan": stem}
        for stem in STEMS
    }
    return replace(plan, nodes={**plan.nodes, **alone}), ways


def prepare() -> tuple[Separator, dict[str, dict[str, str]]]:
    """The small ensemble on the CPU in float32, and the names of its signals by stem and way."""
    separator = Separator("mini", device="cpu", precision="fp32")
    plan, ways = with_each_alone(separator.plan)
    return separator.with_plan(plan), ways


def score(
    separator: Separator, folder: Path, ways: dict[str, dict[str, str]]
) -> dict[tuple[str, str], float]:
    """Global SDR in dB of a song's stems, by stem and way."""
    stems, rate = {}, 0
    for stem in STEMS:
        files = sorted(folder.glob(f"{stem}.*"))
        if files:
            sound = audio.read(files[0])
            stems[stem], rate = sound.samples, sound.rate
    if len({samples.shape for samples in stems.values()}) > 1:
        raise KmdxError(f"{folder}: the stems differ in length or channels")
    mixture = np.sum([*stems.values()], axis=0, dtype=np.float32)
    signals = separator.signals(mixture, rate, [name for way in ways.values() for name in way.values()])
    return {
        (stem, way): global_sdr(truth, mixture if way == "mixture" else signals[ways[stem][way]])
        for stem, truth in stems.items()
        if truth.any()
        for way in WAYS
    }


def find_songs(sets: Sequence[str]) -> dict[str, list[Path]]:
    """Parse ``NAME=SONGS`` into the song folders of each set.

    Raises :class:`KmdxError` if an argument is malformed, repeats a name, or has no songs or two songs of the
    same name.
    """
    found: dict[str, list[Path]] = {}
    for text in sets:
        name, equals, root = text.partition("=")
        if not (name and equals and root) or name in found:
            raise KmdxError(f"{text}: expected NAME=SONGS, each name once")
        folders = sorted({path.parent for path in Path(root).rglob("vocals.*")})
        if not folders:
            raise KmdxError(f"{root}: no song folders with stems")
        if len({folder.name for folder in folders}) < len(folders):
            raise KmdxError(f"{root}: songs in different folders have the same name")
        found[name] = folders
    return found


def main() -> None:
    """Score every song and print a table per set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", metavar="NAME=SONGS")
    parser.add_argument("-o", "--output", type=Path, help="write all scores as CSV")
    options = parser.parse_args()
    separator, ways = prepare()
    rows = []
    for name, folders in find_songs(options.sets).items():
        scores = {folder.name: score(separator, folder, ways) for folder in folders}
        table = Table("stem", "songs", *WAYS, "plan's gain", title=name, box=None)
        for stem in STEMS:
            of_songs = [
                [song[stem, way] for way in WAYS] for song in scores.values() if (stem, "plan") in song
            ]
            if of_songs:
                means = np.mean(of_songs, axis=0)
                cells = [f"{mean:.2f}" for mean in means]
                table.add_row(stem, str(len(of_songs)), *cells, f"{means[-1] - means[0]:+.2f}")
        out.print(table)
        rows += [
            {"set": name, "song": title, "stem": stem, "way": way, "sdr": f"{sdr:.3f}"}
            for title, song in scores.items()
            for (stem, way), sdr in song.items()
        ]
    if options.output:
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    terminal.run(main)
