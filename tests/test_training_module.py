"""One training step: the network's input, the gradient, the learning rate, the average."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import training_cases as cases
from torch import Tensor, nn

from kmdx.networks.tfc_tdf import TfcTdf
from training import losses, module, sampling, songs, validation
from training.config import TrainingError
from training.module import Averaging, Unmixing
from training.run import Run
from training.sampling import Example

data, fit = cases.data, cases.fit


def unmixing(vocals: nn.Module | None = None, **changes: object) -> Unmixing:
    """A module that takes steps without a trainer."""
    made = Unmixing(cases.small(**changes), songs.Songs((), ()), vocals)  # type: ignore[arg-type]
    made.log = lambda *arguments, **options: None  # type: ignore[method-assign]
    trainer = SimpleNamespace(global_step=0)
    made._trainer = trainer  # type: ignore[assignment]
    return made


def batch(seed: int = 0) -> Example:
    generator = torch.Generator().manual_seed(seed)
    return Example(*(0.1 * torch.randn(2, 2, 2, cases.CHUNK, generator=generator)))


class HalfOfIt(nn.Module):
    """Estimates half of its input as vocals."""

    sources, length = ("vocals",), cases.CHUNK

    def forward(self, wave: Tensor) -> Tensor:
        return 0.5 * wave[:, None]


def test_the_estimated_vocals_are_subtracted_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made = unmixing(HalfOfIt(), source="drums", hears="rest")
    heard: list[Tensor] = []

    def estimate(wave: Tensor) -> Tensor:
        heard.append(wave)
        return wave

    monkeypatch.setattr(made, "estimate", estimate)
    window = batch()
    made.training_step(window, 0)
    assert torch.allclose(heard[0], 0.5 * window.input)


def test_the_estimated_vocals_are_subtracted_in_validation(data: Path) -> None:
    made = unmixing(HalfOfIt(), source="drums", hears="rest")
    song = cases.found(data, made.config).validation[0]
    found = validation.estimate(made.config, made.network, made.vocals, song, torch.device("cpu"))
    mixture = np.sum([*sampling.whole(song).values()], axis=0)
    assert np.allclose(found.input, 0.5 * mixture, atol=1e-6)


def test_the_terms_of_a_step_are_averaged_over_all_its_windows(fit: Callable[..., Run]) -> None:
    run = fit(steps=10, epoch=10, batch=2, at_once=1)
    (row,) = cases.rows(run.steps)
    assert float(row["loss"]) == pytest.approx(float(row["l1"]) + 0.5 * float(row["spectral"]), rel=1e-4)


@pytest.mark.parametrize(("clip", "expected"), [(1e-3, 1e-3), (None, None), (1e6, None)])
def test_the_gradient_is_clipped_to_its_norm(clip: float | None, expected: float | None) -> None:
    made = unmixing(optimizer={"clip": clip})
    optimizer = made.configure_optimizers()["optimizer"]
    made.training_step(batch(), 0).backward()

    def norm() -> float:
        return math.sqrt(sum(float(p.grad.square().sum()) for p in made.parameters() if p.grad is not None))

    before = norm()
    assert before > 2e-3
    made.configure_gradient_clipping(optimizer)
    assert norm() == pytest.approx(expected or before, rel=1e-3)


@pytest.mark.parametrize(("kind", "of"), [("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)])
def test_the_optimizer_follows_the_config(kind: str, of: type) -> None:
    made = unmixing(optimizer={"kind": kind, "rate": 0.25, "weight_decay": 0.125})
    optimizer: torch.optim.Optimizer = made.configure_optimizers()["optimizer"]
    assert type(optimizer) is of
    (group,) = optimizer.param_groups
    assert group["initial_lr"] == 0.25
    assert group["weight_decay"] == 0.125


def test_the_rate_rises_and_falls_by_its_formula() -> None:
    made = unmixing(steps=110, epoch=11, optimizer={"warm_up": 10, "final": 0.2})
    assert [made.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [made.rate(step) for step in (10, 35, 60, 110)] == pytest.approx(
        [1.0, 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.6, 0.2]
    )
    constant = unmixing(optimizer={"warm_up": 2, "schedule": "constant"})
    assert [constant.rate(step) for step in (0, 1, 2, 6)] == [0.5, 1, 1, 1]


def test_a_run_warms_up(fit: Callable[..., Run]) -> None:
    run = fit(steps=10, epoch=10, optimizer={"rate": 0.01, "warm_up": 40})
    (row,) = cases.rows(run.steps)
    assert float(row["learning_rate"]) == pytest.approx(0.01 * 11 / 40, rel=1e-4)  # of the next step


def test_the_average_moves_by_its_formula() -> None:
    average = Averaging(0.5)._kwargs["avg_fn"]
    old, new = torch.tensor([1.0]), torch.tensor([2.0])
    assert float(average(old, new, torch.tensor(0))) == pytest.approx(1 + 0.9)
    assert float(average(old, new, torch.tensor(2))) == pytest.approx(1 + 0.75)
    assert float(average(old, new, torch.tensor(100))) == pytest.approx(1 + 0.5)


def test_a_run_keeps_an_average_in_addition_to_its_weights(fit: Callable[..., Run]) -> None:
    """Averaged over six steps, weights lag behind; without an average there is one set of them."""
    checkpoint = torch.load(fit("with", average=0.9).last, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("weight"))
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
    assert "current_model_state" not in torch.load(fit("without", average=None).last, weights_only=True)


def test_checkpointing_gives_the_same_weights(fit: Callable[..., Run]) -> None:
    network = {**cases.NETWORK, "norm_groups": None}
    plain, recomputed = (fit(str(value), checkpointing=value, network=network) for value in (False, True))
    assert cases.same(cases.state(plain), cases.state(recomputed))


def test_with_bf16_the_unet_runs_in_bf16_and_the_loss_in_float32(
    fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {"unet": set(), "loss": set()}
    unet, terms = TfcTdf.unet, losses.terms

    def noted_unet(self: TfcTdf, spectrum: Tensor) -> Tensor:
        made = unet(self, spectrum)
        if torch.is_grad_enabled():
            seen["unet"].add(made.dtype)
        return made

    def noted_terms(config: object, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        seen["loss"] |= {estimate.dtype, target.dtype}
        return terms(config, estimate, target)  # type: ignore[arg-type]

    monkeypatch.setattr(TfcTdf, "unet", noted_unet)
    monkeypatch.setattr(losses, "terms", noted_terms)
    run = fit(precision="bf16")
    assert seen == {"unet": {torch.bfloat16}, "loss": {torch.float32}}
    assert {value.dtype for value in cases.state(run).values() if value.is_floating_point()} == {
        torch.float32
    }


class Explodes(torch.autograd.Function):
    """A loss that is finite, and whose gradient is not."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def exploding(config: object, terms: dict[str, Tensor]) -> Tensor:
    return Explodes.apply(terms["l1"])


def test_a_step_whose_gradient_is_not_finite_is_skipped(
    fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {
        name: value.clone()
        for name, value in Unmixing(cases.small(), songs.Songs((), ())).state_dict().items()
    }
    monkeypatch.setattr(losses, "total", exploding)
    run = fit(steps=10, epoch=10, network={**cases.NETWORK}, average=None)
    (row,) = cases.rows(run.steps)
    assert (row["skipped"], math.isfinite(float(row["loss"]))) == ("10", True)
    assert cases.same(torch.load(run.last, weights_only=True)["state_dict"], before)
    with pytest.raises(TrainingError, match="not finite at step 1"):
        fit("stopped", nan="stop")


def scaled_steps(made: Unmixing, count: int, loss: float = 1.0, factor: float = float("inf")) -> None:
    """Steps of a real scaler of gradients, whose first weight has such a gradient."""
    optimizer = made.configure_optimizers()["optimizer"]
    scaler = torch.amp.GradScaler("cpu")
    weight = next(made.network.parameters())
    for _ in range(count):
        made._statistics = [buffer.clone() for buffer in made.network.buffers()]
        made._losses.append(torch.tensor(loss))
        made._terms.append({"l1": torch.tensor(loss)})
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        made.configure_gradient_clipping(optimizer)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("nan", ["skip", "stop"])
def test_steps_that_the_scaler_skips_are_counted(nan: str) -> None:
    made = unmixing(precision="fp16", nan=nan)
    before = next(made.network.parameters()).clone()
    scaled_steps(made, module.SCALE_SEARCH)
    assert made.skipped == module.SCALE_SEARCH
    assert torch.equal(next(made.network.parameters()), before)
    scaled_steps(made, 1, factor=1.0)
    assert (made.skipped, made._skipped_in_a_row) == (module.SCALE_SEARCH, 0)
    assert not torch.equal(next(made.network.parameters()), before)


def test_too_many_steps_that_the_scaler_skips_end_the_run() -> None:
    made = unmixing(precision="fp16", nan="stop")
    with pytest.raises(TrainingError, match="loss or gradient is not finite"):
        scaled_steps(made, module.SCALE_SEARCH + 1)
    made = unmixing(precision="fp16")
    with pytest.raises(TrainingError, match="100 consecutive steps"):
        scaled_steps(made, module.MAX_SKIPPED)
    assert made.skipped == module.MAX_SKIPPED
    with pytest.raises(TrainingError, match="loss or gradient is not finite"):
        scaled_steps(unmixing(precision="fp16", nan="stop"), 1, loss=math.nan)


@pytest.mark.parametrize("norm_groups", [None, 2])
def test_recomputed_activations_change_nothing(norm_groups: int | None) -> None:
    spectrum = torch.randn(2, 4, 128, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for recomputed in (False, True):
        network = tiny.unet("vocals", norm_groups, seed=3).train()
        if recomputed:
            module.recompute(network)
        network.unet(spectrum).square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append({**gradients, **dict(network.named_buffers())})
    assert cases.same(*results)
