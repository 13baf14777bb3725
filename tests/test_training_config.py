"""Training configs: those that come with it, and what is wrong in others."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import training_cases as cases
import yaml

from kmdx import weights
from training import config as configs
from training.config import TrainingError


@pytest.mark.parametrize("name", configs.names())
def test_the_included_configs_are_valid(name: str) -> None:
    assert configs.load(name).steps > 0


def test_the_published_configs_are_the_published_networks() -> None:
    for stem in cases.STEMS:
        config = configs.load(stem)
        published = weights.get(f"mdx_{stem}").architecture
        own = config.network.architecture(stem)
        sizes = own.keys() & published.keys() - {"type"}
        assert {key: own[key] for key in sizes} == {key: published[key] for key in sizes}
        assert config.hears == ("mixture" if stem == "vocals" else "rest")
        plan = yaml.safe_load(tiny.LEADERBOARD_C.read_text("utf-8"))
        assert plan["networks"][f"mdx_{stem}"]["trim_and_join"] == {
            "chunk": config.network.chunk,
            "trim": config.network.trim,
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "vocals"}, "test: unknown key 'stem' (did you mean 'steps'?)"),
        ({"source": "guitar"}, "source: input should be 'bass', 'drums', 'other' or 'vocals', not 'guitar'"),
        ({"steps": 0}, "steps: input should be greater than 0, not 0"),
        ({"hears": "rest"}, "with hears: rest, the input contains no vocals to estimate"),
        ({"batch": 4, "at_once": 3}, r"batch must be a multiple of at_once (3), not 4"),
        ({"loss": {"l1": 0}}, "loss: every term has the weight 0"),
        (
            {"network": {**cases.NETWORK, "norm_groups": 3}},
            "network: growth must be divisible by norm_groups: 4 and 3 do not fit",
        ),
        ({"network": {**cases.NETWORK, "bins": 60}}, "network: 1 levels need bins divisible by 16"),
        ({"data": {"gain": [6, -6]}}, "data.gain: the first value must not be above the second, not [6, -6]"),
        (
            {"loss": {"spectral": 1}, "network": {**cases.NETWORK, "trim": 3000}},
            "expected at most the 1936 samples left after trimming, not 4096",
        ),
        (
            {"validate_every": 2},
            "6 steps are 3 epochs of 2; with validate_every: 2, the last would not be validated; "
            "use a multiple of 4 steps, or another validate_every",
        ),
        (
            {"network": {**cases.NETWORK, "trim": 4000}},
            "network: two trims of 4000 samples leave nothing of a chunk of 7936",
        ),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, not -1"),
        ({"seed": 2**32}, "seed: input should be less than 4294967296"),
        (
            {"network": {**cases.NETWORK, "hop": 600}},
            "network: a hop of 600 leaves gaps between windows of 512",
        ),
        (
            {"network": {**cases.NETWORK, "hop": 512}},
            "network: a hop of 512 leaves gaps between windows of 512",
        ),
        ({"loss": {"spectral": 1, "windows": []}}, "loss.windows: tuple should have at least 1 item"),
        (
            {"loss": {"spectral": 1, "windows": [3]}},
            "loss.windows.0: input should be greater than or equal to 4",
        ),
        ({"data": {"gain": [0, float("inf")]}}, "data.gain.1: input should be a finite number, not inf"),
        ({"data": {"gain": [float("nan"), 0]}}, "data.gain.0: input should be a finite number, not nan"),
        ({"rest": {"error": [float("-inf"), 0]}}, "rest.error.0: input should be a finite number, not -inf"),
        ({"optimizer": {"rate": float("inf")}}, "optimizer.rate: input should be a finite number, not inf"),
    ],
)
def test_an_invalid_config_is_a_one_line_error(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        cases.small(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_can_be_overridden_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(cases.CONFIG), "utf-8")
    config = configs.load(str(path), {"optimizer.rate": 0.5, "steps": 9})
    assert (config.optimizer.rate, config.optimizer.warm_up, config.steps) == (0.5, 2, 9)
    assert configs.parse(yaml.safe_load(configs.dump(config)), "again") == config
    with pytest.raises(TrainingError, match="unknown config .*; available: .*vocals, or a YAML file"):
        configs.load("nothing")
