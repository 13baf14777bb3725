"""What is exported from a run, in float16 too, and under whose name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import training_cases as cases
from conftest import decibels

from kmdx import Separator, weights
from kmdx.networks.tfc_tdf import TfcTdf
from training import command, export, sampling, trainer
from training.config import TrainingError
from training.run import Run

data, fit = cases.data, cases.fit


def test_half_precision_rounds_both_files_identically(fit: Callable[..., Run], tmp_path: Path) -> None:
    run = fit(steps=4)
    made = export.write_weights(run, "mine", tmp_path, half=True)
    stored = torch.load(made.state, weights_only=True)
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    network = TfcTdf(run.config().network.unet(), "vocals")
    network.load({name: value.float() for name, value in stored.items()})
    network.eval()
    assert export.compare(network, made.graph) < 1e-6 < export.compare(trainer.trained(run), made.graph)
    whole = torch.load(export.write_weights(run, "whole", tmp_path).state, weights_only=True)
    assert {value.dtype for value in whole.values() if value.is_floating_point()} == {torch.float32}


def test_an_exported_file_is_recorded_with_its_checksum(fit: Callable[..., Run], tmp_path: Path) -> None:
    made = export.write_weights(fit(steps=2), "mine", tmp_path)
    weight = weights.trained(tmp_path)["mine"]
    assert weight.sha256 == weights.file_sha256(made.state)
    assert weight.bytes == made.state.stat().st_size
    assert [status.ok for status in weights.verify(tmp_path, [weight])] == [True]
    made.state.write_bytes(made.state.read_bytes()[:-1])
    assert [status.ok for status in weights.verify(tmp_path, [weight])] == [False]


def test_a_weight_too_large_for_float16_is_named(
    fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(steps=2)
    network = trainer.trained(run)
    name = next(iter(dict(network.named_parameters())))
    network.get_parameter(name).data.fill_(1e6)
    monkeypatch.setattr(trainer, "trained", lambda *_: network)
    with pytest.raises(TrainingError, match=f"{name} exceeds the range of float16: leave out --half"):
        export.write_weights(run, "mine", tmp_path / "models", half=True)


@pytest.mark.parametrize("difference", [float("nan"), 1e-3])
def test_a_graph_that_differs_is_not_exported(
    difference: float, fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "compare", lambda network, graph: difference)
    with pytest.raises(TrainingError, match="the exported graph differs from the network"):
        export.write_weights(fit(steps=2), "mine", tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())


def test_a_name_is_replaced_only_by_the_same_run(fit: Callable[..., Run], tmp_path: Path) -> None:
    models = tmp_path / "models"
    first, second = fit("first", steps=2), fit("second", steps=2, seed=1)
    export.write_weights(first, "mine", models)
    before = export.write_weights(first, "mine", models).state.read_bytes()
    with pytest.raises(
        TrainingError, match="name 'mine': a weight from another run has this name in .*; add --replace"
    ):
        export.write_weights(second, "mine", models)
    assert (models / "mine.pt").read_bytes() == before
    export.write_weights(second, "mine", models, replace=True)
    with pytest.raises(TrainingError, match="a weight from another run"):
        export.write_weights(first, "mine", models)


def test_exporting_reports_the_step_and_score(
    fit: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = fit()
    scores = {int(row["step"]): float(row["sdr"]) for row in cases.rows(run.validation)}
    step = max(scores, key=lambda step: scores[step])
    arguments = ["training", "export", str(run.folder), "--models", str(tmp_path / "models")]
    monkeypatch.setattr(sys, "argv", arguments)
    for steps, end in ((6, "is complete"), (8, "is not complete yet")):
        run.config_file.write_text(
            run.config_file.read_text("utf-8").replace("steps: 6", f"steps: {steps}"), "utf-8"
        )
        with pytest.raises(SystemExit) as caught:
            command.main()
        assert not caught.value.code
        assert (
            f"weights of step {step}, SDR {scores[step]:.3f} dB; the run {end}\n" in capsys.readouterr().out
        )
    run.best.unlink()
    checkpoint, score = run.checkpoint()
    assert (checkpoint["global_step"], score) == (6, None)


def test_a_later_checkpoint_does_not_change_what_was_exported(
    fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit()
    step = torch.load(run.best, weights_only=True)["global_step"]
    expected, compare = trainer.trained(run).state_dict(), export.compare

    def slow(network: TfcTdf, graph: Path) -> float:
        later = torch.load(run.best, weights_only=True)
        torch.save({**later, "global_step": 99, "state_dict": {}}, tmp_path / "later")
        (tmp_path / "later").replace(run.best)
        return compare(network, graph)

    monkeypatch.setattr(export, "compare", slow)
    made = export.write_weights(run, "mine", tmp_path / "models")
    assert made.step == step
    state = torch.load(made.state, weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("norm_groups", [None, 2, 4])
def test_an_exported_network_separates_as_before(
    norm_groups: int | None,
    fit: Callable[..., Run],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tmp_path / "models"
    run = fit(network={**cases.NETWORK, "norm_groups": norm_groups}, steps=8)
    made = export.write_weights(run, "mine", models)
    assert made.difference < 1e-4
    stored = torch.load(made.state, weights_only=True)
    assert stored["window"].shape == (512,)
    assert stored["freq_pad"].shape == (1, 4, 193, 32)

    monkeypatch.setenv("KMDX_MODELS", str(models))
    assert weights.get("mine").title == "A small network"
    text = """
    networks:
      state: {weights: mine, trim_and_join: {chunk: 7936, trim: 256}}
      graph:
        weights: {file: models/mine.onnx, architecture: {type: onnx, sources: [vocals], n_fft: 512, hop: 256, bins: 64, frames: 32}}
        trim_and_join: {chunk: 7936, trim: 256}
    signals:
      S: {network: state, hears: mixture}
      G: {network: graph, hears: mixture}
    stems:
      vocals: {sum: {S.vocals: 1}}
      other: {sum: {G.vocals: 1}}
    """
    plan = tmp_path / "plan.yaml"
    plan.write_text(text, "utf-8")
    mixture = sum(sampling.whole(cases.found(data, run.config()).validation[0]).values())
    stems = Separator(plan, device="cpu", precision="fp32").separate(mixture.T, 44100)
    network = trainer.trained(run)
    with torch.inference_mode():
        first = network(torch.from_numpy(np.pad(mixture, ((0, 0), (256, 0)))[:, : cases.CHUNK])[None])[
            0, 0, :, 256:-256
        ]
    assert decibels(first.numpy().T, stems["vocals"][: cases.CHUNK - 512]) > 90
    assert decibels(stems["vocals"], stems["other"]) > 80


def test_invalid_names_are_refused_for_export(fit: Callable[..., Run], tmp_path: Path) -> None:
    run = fit(steps=2)
    with pytest.raises(TrainingError, match="expected only lower-case letters"):
        export.write_weights(run, "My Net", tmp_path)
    with pytest.raises(TrainingError, match="a known weight has this name"):
        export.write_weights(run, "mdx_vocals", tmp_path)
    with pytest.raises(TrainingError, match="not a training run"):
        Run.existing(tmp_path)
