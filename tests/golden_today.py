"""Reference outputs of today's networks, from ``../shared/golden-today``."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from conftest import shared
from safetensors.torch import load_file
from torch import Tensor

FOLDER = "golden-today"


class Loader(yaml.SafeLoader):
    """Reads tuples of the published configs as lists."""


Loader.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node))


@dataclass(frozen=True)
class Golden:
    """A network of Music-Source-Separation-Training: its config, weights, an input and the output."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    input: Tensor
    output: Tensor

    @property
    def sources(self) -> list[str]:
        target = self.config["training"]["target_instrument"]
        return [target] if target else self.config["training"]["instruments"]


def load(family: str, name: str) -> Golden:
    """Read one; weights that are not in a file are made by rule. Skips the test without the folder."""
    folder = shared(FOLDER, family)
    config = yaml.load((folder / f"{name}.yaml").read_text("utf-8"), Loader)
    weights = folder / f"{name}.safetensors"
    state = load_file(weights) if weights.exists() else _by_rule(folder / f"{name}.keys.json")
    with np.load(folder / f"{name}.npz") as arrays:
        return Golden(config, state, *(torch.from_numpy(arrays[key]) for key in ("input", "output")))


def _by_rule(keys: Any) -> dict[str, Tensor]:
    spec = importlib.util.spec_from_file_location("rule", shared(FOLDER, "rule.py"))
    assert spec is not None
    assert spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    state = {}
    for key, (shape, kind) in json.loads(keys.read_text("utf-8")).items():
        if not rule.left(key, kind.startswith("float")):
            state[key] = torch.from_numpy(rule.values(key, tuple(shape), rule.is_gain(key, shape)))
        elif key.endswith("freqs"):
            state[key] = 10000 ** -(torch.arange(0, 2 * shape[0], 2) / (2 * shape[0]))
        else:
            state[key] = (
                torch.ones(shape) if key.endswith("temperature") else torch.zeros(shape, dtype=torch.long)
            )
    return state
