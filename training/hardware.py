"""The hardware of a training run: its devices, and the processes that read songs for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kmdx import host
from kmdx.devices import gpu_count
from training.config import Config, TrainingError


@dataclass(frozen=True)
class Hardware:
    """The requested devices and processes."""

    device: str = "auto"  # ``auto``, ``cpu`` or ``cuda``
    devices: int = 1  # number of GPUs, or of processes on the CPU
    workers: int | None = None  # processes per device that read windows; by default half the cores

    @property
    def accelerator(self) -> str:
        """``cpu`` or ``cuda``.

        Raises :class:`TrainingError` if the device is unknown, or there are not enough devices.
        """
        available = gpu_count()
        if self.device not in ("auto", "cpu", "cuda"):
            raise TrainingError(f"device {self.device!r}: expected auto, cpu or cuda")
        chosen = ("cuda" if available else "cpu") if self.device == "auto" else self.device
        if self.devices < 1:
            raise TrainingError(f"--devices {self.devices}: expected 1 or more")
        if chosen == "cuda" and self.devices > available:
            raise TrainingError(f"--devices {self.devices}: this machine has only {available} GPUs")
        return chosen

    @property
    def readers(self) -> int:
        """Processes per device that read windows; 0 to read them in the process that trains."""
        return max(1, host.usable_cores() // 2 // self.devices) if self.workers is None else self.workers

    def check(self, config: Config) -> None:
        """Check that a network can be trained on it.

        Raises :class:`TrainingError` if the devices do not exist, a batch cannot be divided among them, a
        device's share of the batch cannot be divided into groups of ``at_once``, or the precision needs a
        GPU.
        """
        accelerator = self.accelerator
        share, left = divmod(config.batch, self.devices)
        if left:
            raise TrainingError(f"batch must be a multiple of --devices ({self.devices}), not {config.batch}")
        if config.at_once != "auto" and share % min(config.at_once, share):
            raise TrainingError(
                f"the batch per device must be a multiple of at_once ({config.at_once}), not {share}"
            )
        if self.workers is not None and self.workers < 0:
            raise TrainingError(f"--workers {self.workers}: expected 0 or more")
        if accelerator == "cpu" and config.precision == "fp16":
            raise TrainingError("precision fp16 needs a GPU: use --set precision=fp32 or precision=bf16")

    def limit_threads(self) -> None:
        """On the CPU, divide torch's threads among the processes."""
        if self.accelerator == "cpu":
            host.cap_threads()
            torch.set_num_threads(max(1, torch.get_num_threads() // self.devices))
