"""The memory and the time that a step needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import training_cases as cases
import yaml

from kmdx.networks.tfc_tdf import TfcTdf
from training import budget, command
from training import config as configs


@pytest.mark.parametrize("norm_groups", [None, 2])
def test_the_budget_counts_what_autograd_keeps(norm_groups: int | None) -> None:
    config = cases.small(network={**cases.NETWORK, "norm_groups": norm_groups}, average=None)
    needed = budget.measure(config)
    network = TfcTdf(config.network.unet(), "vocals")
    kept: dict[int, int] = {}
    own = {
        parameter.untyped_storage().data_ptr() for parameter in (*network.parameters(), *network.buffers())
    }
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.unet(torch.randn(1, 4, 64, 32))
    assert needed.window - 2 * max(kept.values()) == sum(kept.values())
    assert needed.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert needed.fixed == 4 * 4 * needed.parameters


def test_checkpointing_needs_less_memory() -> None:
    plain, recomputed = (budget.measure(cases.small(checkpointing=value)) for value in (False, True))
    assert recomputed.window < plain.window
    assert recomputed.gflop == pytest.approx(plain.gflop * 4 / 3)


@pytest.mark.parametrize("stem", cases.STEMS)
def test_published_networks_train_on_a_t4_as_documented(stem: str) -> None:
    config = configs.load(stem)
    needed = budget.measure(config)
    assert needed.most(budget.HEADROOM * (budget.T4 - budget.OVERHEAD)) >= 1
    manual = (cases.ROOT / "docs" / "training.md").read_text("utf-8")
    assert f"| `{stem}` | {' | '.join(budget.row(config, needed))} |" in manual


def test_the_command_prints_a_table_of_budgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(cases.CONFIG), "utf-8")
    monkeypatch.setattr(sys, "argv", ["training", "budget", str(path), "--measure"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert not caught.value.code
    table = capsys.readouterr().out
    assert "2 of 2" in table
    config = configs.load("drums")
    needed = budget.measure(config)
    minutes = 1000 * 8 * needed.gflop / 20e3 / 60
    assert budget.epoch_on_t4(config, needed) / 60 == pytest.approx(minutes)
    assert 10 < minutes < 20
