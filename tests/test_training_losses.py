"""A loss is one entry in a table, and logged values appear automatically."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_cases as cases
from torch import Tensor

from training import config as configs
from training import losses, run_report
from training.config import Config, Loss, TrainingError
from training.logs import CsvTable
from training.losses import LOSSES, Term
from training.module import Unmixing
from training.run import Run

data, fit = cases.data, cases.fit


def cubic(estimate: Tensor, target: Tensor, config: Loss) -> Tensor:
    return (estimate - target).abs().pow(3).mean()


def test_one_entry_puts_a_loss_into_config_steps_and_page(
    fit: Callable[..., Run], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "cubic", Term("mean cubed difference", cubic))
    assert "cubic: 0.0" in configs.dump(cases.small())
    run = fit(steps=10, epoch=10, loss={"cubic": 2, "l1": 1})
    assert "cubic: 2.0" in run.config_file.read_text("utf-8")
    (row,) = cases.rows(run.steps)
    assert float(row["loss"]) == pytest.approx(float(row["l1"]) + 2 * float(row["cubic"]), rel=1e-4)
    text = run_report.write(run, cases.found(data, run.config())).read_text("utf-8")
    assert "<figcaption>mean cubed difference</figcaption>" in text
    alone = fit("alone", steps=10, epoch=10, loss={"cubic": 1, "l1": 0})
    (row,) = cases.rows(alone.steps)
    assert (row["l1"], row["cubic"]) == ("", row["loss"])


def test_what_the_module_logs_is_a_column_and_a_curve(
    fit: Callable[..., Run], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, end = Unmixing.configure_gradient_clipping, Unmixing.on_validation_epoch_end

    def more_of_a_step(self: Unmixing, *arguments: Any, **options: Any) -> None:
        self.log("weight_norm", next(self.network.parameters()).norm(), on_step=True, on_epoch=False)
        clip(self, *arguments, **options)

    def more_of_a_validation(self: Unmixing) -> None:
        self.log("worst_song", min(self.scores.values()))
        end(self)

    monkeypatch.setattr(Unmixing, "configure_gradient_clipping", more_of_a_step)
    monkeypatch.setattr(Unmixing, "on_validation_epoch_end", more_of_a_validation)
    run = fit(steps=20, epoch=10)
    rows = cases.rows(run.steps)
    assert all(float(row["weight_norm"]) > 0 for row in rows)
    assert not {"sdr", "worst_song"} & rows[1].keys(), "a score of a validation is none of a step"
    for row in cases.rows(run.validation):
        scores = [float(each["sdr"]) for each in cases.rows(run.validation) if each["step"] == row["step"]]
        assert float(row["worst_song"]) == pytest.approx(min(scores), rel=1e-5)
    text = run_report.write(run, cases.found(data, run.config())).read_text("utf-8")
    assert "<figcaption>weight norm</figcaption>" in text


def test_a_run_resumed_with_another_column_keeps_its_rows(
    fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(steps=10, epoch=10)
    monkeypatch.setitem(LOSSES, "cubic", Term("mean cubed difference", cubic))
    first, second = cases.rows(fit(steps=20, epoch=10).steps)
    assert (first["step"], first["cubic"], second["step"]) == ("10", "", "20")
    assert float(first["l1"]) > 0


def test_a_later_column_is_empty_in_earlier_rows(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "x.csv", ("step", "loss"), 0)
    table.add({"step": 1, "loss": 0.5})
    table.add({"step": 2, "loss": 0.25, "new": 3})
    table.add({"step": 3, "loss": 0.125})
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = [[row["step"], row["loss"], row["new"]] for row in csv.DictReader(file)]
    assert rows == [["1", "0.5", ""], ["2", "0.25", "3"], ["3", "0.125", ""]]
    later = CsvTable(tmp_path / "x.csv", ("step",), 2)
    assert later.columns == ["step", "loss", "new"]
    with (tmp_path / "x.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"l3": 1}, "loss: unknown term 'l3'; available: mse, l1, spectral, windows"),
        ({"l1": -1}, "loss.l1: input should be greater than or equal to 0, not -1"),
        ({"l1": "much"}, "loss.l1: input should be a valid number"),
    ],
)
def test_an_invalid_loss_is_a_one_line_error(given: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        cases.small(loss=given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_term_with_windows_needs_signals_at_least_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "cubic", Term("mean cubed difference", cubic, uses_windows=True))
    network = {**cases.NETWORK, "trim": 3000}
    assert isinstance(cases.small(network=network, loss={"l1": 1}), Config)
    with pytest.raises(
        TrainingError, match="expected at most the 1936 samples left after trimming, not 4096"
    ):
        cases.small(network=network, loss={"cubic": 1})


def test_a_term_without_a_weight_is_not_computed() -> None:
    signal = torch.ones(1, 2, 5000)
    assert losses.terms(Loss(l1=0, mse=1), signal, signal).keys() == {"mse"}


def test_every_loss_matches_its_formula() -> None:
    torch.manual_seed(0)
    target = torch.randn(2, 2, 8000)
    config = Loss(mse=1, l1=1, spectral=1)
    perfect = losses.terms(config, target, target)
    assert {name: float(value) for name, value in perfect.items()} == {"mse": 0, "l1": 0, "spectral": 0}
    error = torch.randn_like(target)
    found_terms = losses.terms(config, target + error, target)
    assert float(found_terms["mse"]) == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert float(found_terms["l1"]) == pytest.approx(float(error.abs().mean()), rel=1e-5)
    twice = losses.terms(config, target + 2 * error, target)
    assert float(twice["spectral"]) == pytest.approx(2 * float(found_terms["spectral"]), rel=1e-4)
    weighted = Loss(mse=2, l1=0, spectral=3)
    total = losses.total(weighted, losses.terms(weighted, target + error, target))
    assert float(total) == pytest.approx(
        2 * float(found_terms["mse"]) + 3 * float(found_terms["spectral"]), rel=1e-5
    )
