"""Estimate the memory and arithmetic of one training step without running it.

The forward pass runs on fake tensors. The tensors that autograd saves are counted: each storage once, without
parameters.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kmdx import devices, host, precisions
from kmdx.devices import free_memory
from kmdx.networks.tfc_tdf import SPECTRUM_CHANNELS, Block, TfcTdf
from training import freezing
from training.config import Config, TrainingError
from training.module import Unmixing, recompute
from training.songs import Songs

T4 = 16 * 10**9  # bytes, of which the driver and torch's kernels take OVERHEAD
OVERHEAD = 0.9e9
# Assumed: half of its float32 peak, a third of its float16 peak; it has no bfloat16.
T4_GFLOPS = {"fp32": 4e3, "fp16": 20e3, "bf16": 4e3}
HEADROOM = 0.9  # usable share of the remaining memory; the allocator cannot use all of it
DTYPES = {"fp32": torch.float32, "fp16": torch.bfloat16, "bf16": torch.bfloat16}  # equal sizes


class _FullNorm(nn.GroupNorm):
    """A group norm that always computes in float32, as under CUDA's autocast, but not under the CPU's."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@dataclass(frozen=True)
class Budget:
    """The memory and arithmetic of one step."""

    parameters: int  # number of parameters of the network
    fixed: int
    """Bytes that do not depend on the batch: weights, their average, and the gradients and optimizer's
    moments of trained parameters."""
    window: int
    """Bytes per window: the tensors that autograd saves, plus temporary memory for the largest of them."""
    forward: float
    gflop: float
    """``forward`` and ``gflop``: GFLOP per window: of the forward pass, and of forward and backward pass."""

    def memory(self, at_once: int) -> int:
        """Bytes needed for a number of windows at once."""
        return self.fixed + at_once * self.window

    def most(self, room: float) -> int:
        """The number of windows that fit at once; 0 if none fits."""
        return max(0, int((room - self.fixed) // self.window))


class _SavedTensors:
    """Counts the storages that autograd saves, in bytes, except those of ``own`` tensors."""

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.held: list[torch.UntypedStorage] = []  # keeps them alive, so that no address is reused
        self.sizes: dict[int, int] = {}

    @contextmanager
    def counting(self, config: Config) -> Iterator[None]:
        """Count while computing in the config's precision."""
        half = config.precision != "fp32"
        with (
            torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor),
            torch.autocast("cpu", DTYPES[config.precision], enabled=half),
        ):
            yield

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.held.append(storage)
            self.sizes[storage._cdata] = storage.nbytes()
        return tensor


def measure(config: Config) -> Budget:
    """Estimate the memory and arithmetic of a config."""
    with FakeTensorMode():
        network = TfcTdf(config.network.unet(), config.source)
        if config.checkpointing:
            recompute(network)
        if config.precision != "fp32":
            for module in network.modules():
                if isinstance(module, nn.GroupNorm):
                    module.__class__ = _FullNorm
        saved = _SavedTensors([*network.parameters(), *network.buffers()])
        sizes = freezing.freeze(network, config.freeze)
        spectrum = torch.randn(1, SPECTRUM_CHANNELS, config.network.bins, config.network.frames)
        with saved.counting(config), FlopCounterMode(display=False) as counter:
            network.unet(spectrum)
    moments = 2 if config.optimizer.kind == "adamw" else 1
    everywhere = 1 + (config.average is not None)  # numbers per parameter: weight and average
    trained = 1 + moments  # more numbers per trained parameter: gradient and optimizer's state
    again = _largest_block(config) if config.checkpointing else 0
    forward = counter.get_total_flops() / 1e9
    return Budget(
        parameters=sizes.total,
        fixed=4 * (everywhere * sizes.total + trained * sizes.trained),
        window=sum(saved.sizes.values()) + 2 * max(saved.sizes.values()) + again,
        forward=forward,
        gflop=(4 if config.checkpointing else 3) * forward,
    )


def _largest_block(config: Config) -> int:
    """Bytes that autograd saves for the first block while it is recomputed."""
    sizes = config.network
    with FakeTensorMode():
        saved = _SavedTensors()
        block = Block(sizes.unet(), sizes.growth, sizes.bins)
        x = torch.randn(1, sizes.growth, sizes.frames, sizes.bins, requires_grad=True)
        with saved.counting(config):
            block(x)
    return sum(saved.sizes.values())


def at_once(config: Config, accelerator: str, devices: int) -> int:
    """The number of windows that go through the network together on one device.

    Raises :class:`TrainingError` if not even one window fits.
    """
    share = max(1, config.batch // devices)
    if config.at_once != "auto":
        return min(config.at_once, share)
    if accelerator != "cuda":
        return share
    free = free_memory(torch.device("cuda"))
    fitting = measure(config).most(HEADROOM * free)
    if not fitting:
        raise TrainingError(f"one window does not fit into {free / 1e9:.1f} GB: set checkpointing: true")
    return divisor(share, fitting)


def divisor(batch: int, most: int) -> int:
    """The largest divisor of a batch that is at most ``most``; 0 if there is none."""
    return next((size for size in range(min(most, batch), 0, -1) if batch % size == 0), 0)


@dataclass(frozen=True)
class Step:
    """A measured step: its seconds, and the peak memory of the process or the GPU in bytes."""

    seconds: float
    memory: int


def epoch_on_t4(config: Config, needed: Budget) -> float:
    """Estimated seconds of an epoch on a T4, at :data:`T4_GFLOPS`."""
    return config.epoch * config.batch * needed.gflop / T4_GFLOPS[config.precision]


def row(config: Config, needed: Budget) -> list[str]:
    """The budget of a config as cells of a table."""
    size = divisor(config.batch, needed.most(HEADROOM * (T4 - OVERHEAD)))
    return [
        f"{needed.parameters / 1e6:.2f} M",
        f"{needed.gflop * config.batch:.0f}",
        f"{needed.fixed / 1e9:.2f} GB",
        f"{needed.window / 1e9:.2f} GB",
        f"{size} of {config.batch}",
        f"{(needed.memory(size) + OVERHEAD) / 1e9:.1f} GB" if size else "does not fit",
        f"{epoch_on_t4(config, needed) / 60:.1f}",
    ]


def step(config: Config) -> Step:
    """Run two steps on noise with the batch size from :func:`at_once`, and time the second."""
    device = devices.choose("auto")
    module = Unmixing(config, Songs((), ())).to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    size = at_once(config, device.type, 1)
    dtype = precisions.DTYPES[config.precision]
    noise = torch.randn(size, 2, config.network.chunk, device=device) * 0.1
    host.reset_peak_memory()
    devices.reset_peak_memory(device)
    for _ in range(2):
        devices.synchronize(device)
        began = time.perf_counter()
        for _ in range(config.batch // size):
            with torch.autocast(device.type, dtype, enabled=config.precision != "fp32"):
                estimate = module.estimate(noise)
            (estimate - noise).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        devices.synchronize(device)
        seconds = time.perf_counter() - began
    return Step(seconds, devices.peak_memory(device) or host.peak_memory() or 0)
