"""Train a TFC-TDF U-Net with lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from kmdx.networks.network import Network
from kmdx.networks.tfc_tdf import Block, TfcTdf
from training import freezing, losses, sampling, validation
from training.config import Config, TrainingError
from training.sampling import Example, Windows
from training.songs import Songs
from training.starting import Start

MAX_SKIPPED = 100  # consecutive steps with a loss or gradient that is not finite; then the run stops
SCALE_SEARCH = 20  # consecutive steps that fp16 may need to lower its scale from 2^16, if nan is "stop"


class Unmixing(lightning.LightningModule):
    """Trains a network to estimate one source.

    Raises :class:`TrainingError` if the config freezes the whole network, or a part that does not exist.

    Parameters
    ----------
    vocals : Network, optional
        A network whose estimate is subtracted from the trained network's input.
    at_once : int
        Windows in one forward pass.
    workers : int
        Processes that read windows.
    start : Start, optional
        Weights to start from instead of random ones.
    """

    def __init__(
        self,
        config: Config,
        songs: Songs,
        vocals: Network | None = None,
        at_once: int = 1,
        workers: int = 0,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config
        self.songs = songs
        self.at_once = at_once
        self.workers = workers
        self.network = TfcTdf(config.network.unet(), config.source)
        self._moments = start.moments if start is not None else {}
        if start is not None:
            self.network.load(start.state)
        self.parameters_trained = freezing.freeze(self.network, config.freeze)
        if config.checkpointing:
            recompute(self.network)
        self.unet: Callable[[Tensor], Tensor] = self.network.unet
        self._vocals = (vocals,)  # in a tuple, so that it is not registered as a submodule
        self._statistics: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._terms: list[dict[str, Tensor]] = []
        self.skipped = 0
        self._skipped_in_a_row = 0

    @property
    def vocals(self) -> Network | None:
        """The network whose estimate is subtracted from the trained network's input."""
        return self._vocals[0]

    def train(self, mode: bool = True) -> Unmixing:
        """Set the mode; frozen modules stay in inference mode."""
        super().train(mode)
        freezing.hold_statistics(self.network)
        return self

    def estimate(self, windows: Tensor) -> Tensor:
        """Estimate the source in windows ``(B, 2, T)``; transforms are always in float32."""
        spectrogram = self.network.spectrogram
        with torch.autocast(windows.device.type, enabled=False):
            spectrum = spectrogram(windows.float())
        estimate = self.unet(spectrum)
        with torch.autocast(windows.device.type, enabled=False):
            wave: Tensor = spectrogram.inverse(estimate.float())
        return wave

    def training_step(self, batch: Example, index: int) -> Tensor:
        """The loss of the windows, computed over the samples that remain after trimming."""
        if not self._losses:
            self._statistics = [buffer.clone() for buffer in self.network.buffers()]
        windows, target = batch
        if self.vocals is not None:
            with torch.no_grad(), torch.autocast(windows.device.type, enabled=False):
                windows = windows - self.vocals(windows)[:, 0]
        trim = self.config.network.trim
        kept = slice(trim, target.shape[-1] - trim)
        estimate = self.estimate(windows)[..., kept]
        with torch.autocast(windows.device.type, enabled=False):
            terms = losses.terms(self.config.loss, estimate, target[..., kept])
            loss = losses.total(self.config.loss, terms)
        self._losses.append(loss.detach())
        self._terms.append({name: value.detach() for name, value in terms.items()})
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm; skip a step whose loss or gradient is not finite, or stop."""
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip or math.inf)
        loss = torch.stack(self._losses).mean()
        means = {name: torch.stack([terms[name] for terms in self._terms]).mean() for name in self._terms[0]}
        self._losses.clear()
        self._terms.clear()
        for name, value in {"loss": loss, "gradient": norm, **means}.items():
            self.log(name, value, on_step=True, on_epoch=False)
        if loss.isfinite() and norm.isfinite():
            self._skipped_in_a_row = 0
            return
        step = self.trainer.global_step + 1
        self._skipped_in_a_row += 1
        scaling = self.config.precision == "fp16" and bool(loss.isfinite())  # the next step has a lower scale
        if self.config.nan == "stop" and not (scaling and self._skipped_in_a_row <= SCALE_SEARCH):
            raise TrainingError(
                f"the loss or gradient is not finite at step {step}: lower optimizer.rate or set "
                "optimizer.clip; the last checkpoint is intact"
            )
        self.skipped += 1
        if self._skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(
                f"{MAX_SKIPPED} consecutive steps up to step {step} were not finite: lower optimizer.rate or "
                "set optimizer.clip"
            )
        for buffer, before in zip(self.network.buffers(), self._statistics, strict=True):
            buffer.copy_(before)
        optimizer.zero_grad()  # skips the step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the number of skipped steps."""
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the number of skipped steps, and continue the incomplete last epoch of an extended run."""
        self.skipped = checkpoint["skipped"]
        done = checkpoint["global_step"]
        if done % self.config.epoch and done < self.config.steps:
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update({name: count - 1 for name, count in counts.items()})

    def on_train_start(self) -> None:
        """Set the learning rate, which changes if the run is extended."""
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * self.rate(schedule.last_epoch)

    def configure_optimizers(self) -> Any:
        """The optimizer and its learning rate schedule."""
        chosen = self.config.optimizer
        kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[chosen.kind]
        trained = {
            name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad
        }
        optimizer = kind(trained.values(), lr=chosen.rate, weight_decay=chosen.weight_decay)
        for name in trained.keys() & self._moments.keys():
            optimizer.state[trained[name]] = {
                key: value.clone().to(trained[name].device if value.ndim else "cpu")
                for key, value in self._moments[name].items()
            }
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The learning rate at a step, relative to the config's."""
        chosen = self.config.optimizer
        if step < chosen.warm_up:
            return (step + 1) / chosen.warm_up
        if chosen.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - chosen.warm_up) / max(1, self.config.steps - chosen.warm_up))
        return chosen.final + (1 - chosen.final) * (1 + math.cos(math.pi * progress)) / 2

    def train_dataloader(self) -> DataLoader:
        """The windows of the next epoch."""
        trainer = self.trainer
        return sampling.loader(
            self.config,
            Windows(self.config, self.songs.training),
            trainer.global_step,
            self.at_once,
            self.workers,
            trainer.global_rank,
            trainer.world_size,
        )

    def val_dataloader(self) -> DataLoader:
        """The indices of the validation songs of this process."""
        songs = range(len(self.songs.validation))
        own = [[number] for number in songs[self.trainer.global_rank :: self.trainer.world_size]]
        return DataLoader(own or [[]], batch_size=None)  # type: ignore[arg-type]

    def on_validation_epoch_start(self) -> None:
        """Clear the scores."""
        self.scores: dict[str, float] = {}

    def validation_step(self, numbers: list[int], index: int) -> None:
        """Score whole songs."""
        for number in numbers:
            song = self.songs.validation[int(number)]
            score = validation.score(self.config, self.network, self.vocals, song, self.device)
            if score is not None:
                self.scores[song.name] = score

    def on_validation_epoch_end(self) -> None:
        """Collect the scores of all processes."""
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.scores)
            self.scores = {name: score for part in gathered for name, score in part.items()}
        if not self.scores:
            raise TrainingError(f"{self.config.source} is silent in all validation songs")
        wrong = sorted(name for name, score in self.scores.items() if not math.isfinite(score))
        if wrong:
            raise TrainingError(
                f"the score of {', '.join(wrong)} is not finite at step {self.trainer.global_step}: "
                "check the stems, or lower optimizer.rate; the last checkpoint is intact"
            )
        self.log("sdr", sum(self.scores.values()) / len(self.scores), rank_zero_only=False)

    def on_fit_start(self) -> None:
        """Move the vocals network to the device, and compile the trained network if requested."""
        if self.config.compile:  # not earlier, because a compiled function cannot be copied for the average
            self.unet = torch.compile(self.network.unet)
        if isinstance(self.vocals, nn.Module):
            self.vocals.to(self.device)


def recompute(network: TfcTdf) -> None:
    """Make a network's blocks save only their inputs, and recompute the activations in the backward pass."""
    for module in network.modules():
        if isinstance(module, Block):
            module.__class__ = RecomputedBlock


class RecomputedBlock(Block):
    """A block that saves only its input, and recomputes its activations in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`Block`."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False, context_fn=self._contexts)
        return result

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_untouched(self)


@contextmanager
def _statistics_untouched(block: nn.Module) -> Iterator[None]:
    """Prevent batch norms from updating their statistics twice."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    counts = [norm.get_buffer("num_batches_tracked") for norm in norms]
    before = [(norm.momentum, count.clone()) for norm, count in zip(norms, counts, strict=True)]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, count, (momentum, known) in zip(norms, counts, before, strict=True):
            norm.momentum = momentum
            count.copy_(known)


class Averaging(WeightAveraging):
    """Exponential moving average of weights and statistics; its decay rises to the config's value."""

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            share = min(decay, (1 + int(count)) / (10 + int(count)))
            moved = averaged + (1 - share) * (current - averaged)
            return torch.where(current == averaged, averaged, moved.to(averaged.dtype))  # -0.0 stays -0.0

        super().__init__(avg_fn=average)
