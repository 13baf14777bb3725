"""The small ensemble's weights and scores are those of this recipe."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import shared

from kmdx import plan_file
from recipes.mini import evaluate
from training import config as configs

RECIPE = Path(__file__).parents[1]
WEIGHTS = RECIPE.parents[1] / "models" / "mini"
STEMS = ("bass", "drums", "other", "vocals")


@pytest.mark.parametrize("stem", STEMS)
def test_the_configs_describe_the_shipped_networks(stem: str) -> None:
    config = configs.load(str(RECIPE / "configs" / f"{stem}.yaml"))
    entry = yaml.safe_load((WEIGHTS / "trained.yaml").read_text("utf-8"))[f"mini_{stem}"]
    architecture = dict(entry["architecture"])
    assert architecture.pop("gflops") > 0
    assert architecture == config.network.architecture(stem)
    assert entry["title"] == config.title
    use = plan_file.load("mini").networks[stem]
    assert (use.chunking.length, use.chunking.trim) == (config.network.chunk, config.network.trim)


def test_the_weights_score_what_scores_csv_contains() -> None:
    folders = [shared("audio", "musdb18-excerpts"), shared("audio", "cc0-stems", "potassium")]
    separator, ways = evaluate.prepare()
    with (RECIPE / "scores.csv").open(encoding="utf-8", newline="") as file:
        written = {(row["song"], row["stem"], row["way"]): float(row["sdr"]) for row in csv.DictReader(file)}
    compared = 0
    for folder in (path.parent for root in folders for path in sorted(root.rglob("vocals.*"))):
        for (stem, way), sdr in evaluate.score(separator, folder, ways).items():
            assert sdr == pytest.approx(written[folder.name, stem, way], abs=0.02)
            compared += 1
    assert compared == 3 * 4 * 4


def test_every_stem_gains_8_db_except_where_the_readme_reports_less() -> None:
    with (RECIPE / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def gain(material: str, stem: str) -> float:
        mean = {
            way: np.mean(
                [
                    float(row["sdr"])
                    for row in rows
                    if (row["set"], row["stem"], row["way"]) == (material, stem, way)
                ]
            )
            for way in ("mixture", "plan")
        }
        return float(mean["plan"] - mean["mixture"])

    sets = {row["set"] for row in rows}
    assert sets == {"synthetic", "musdb18-excerpts", "potassium"}
    short = {(material, stem) for material in sets for stem in STEMS if gain(material, stem) < 8}
    # README.md reports that these miss the target.
    assert short <= {("potassium", "bass"), ("potassium", "drums")}
    assert gain("potassium", "drums") > 5.5
