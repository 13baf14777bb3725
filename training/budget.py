"""What a config needs, measured without computing anything: memory and arithmetic of one step.

The forward pass runs on tensors without content, and what autograd keeps of it is counted: each storage once,
parameters left out.
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

from kmdx import device as devices
from kmdx import host, precision
from kmdx.networks.tfc_tdf import SPECTRUM_CHANNELS, Block, TfcTdf
from training import freezing
from training.config import Config, TrainingError
from training.module import Unmixing, recompute
from training.songs import Songs

T4 = 16 * 10**9  # bytes; the driver and torch's kernels take OVERHEAD of them
OVERHEAD = 0.9e9
# Assumed: half of its float32 peak, a third of its float16 peak; it has no bfloat16.
T4_GFLOPS = {"fp32": 4e3, "fp16": 20e3, "bf16": 4e3}
SPARE = 0.9  # of what is left, for what the allocator cannot use
DTYPES = {"fp32": torch.float32, "fp16": torch.bfloat16, "bf16": torch.bfloat16}  # counted alike


class _FullNorm(nn.GroupNorm):
    """A group norm as CUDA's autocast computes it: in float32, whatever comes in. The CPU's does not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@dataclass(frozen=True)
class Budget:
    """What one step of a config needs.

    Attributes
    ----------
    parameters : int
        Of the network.
    fixed : int
        Bytes that do not grow with the batch: weights and their average, and of what is trained gradients
        and the optimizer's moments.
    window : int
        Bytes for each window: what autograd keeps, and as much again as its largest part while computing.
    forward, gflop : float
        GFLOP of one window: forward, and both ways.
    """

    parameters: int
    fixed: int
    window: int
    forward: float
    gflop: float

    def memory(self, at_once: int) -> int:
        """Bytes with so many windows at once."""
        return self.fixed + at_once * self.window

    def most(self, room: float) -> int:
        """How many windows at once fit; 0 if none do."""
        return max(0, int((room - self.fixed) // self.window))


class _Kept:
    """What autograd keeps while it is entered: bytes of each storage, those of ``own`` tensors left out."""

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.held: list[torch.UntypedStorage] = []  # else another could take a storage's place
        self.sizes: dict[int, int] = {}

    @contextmanager
    def counting(self, config: Config) -> Iterator[None]:
        """Count while computing in the config's precision."""
        half = config.precision != "fp32"
        with (
            torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor),
            torch.autocast("cpu", DTYPES[config.precision], enabled=half),
        ):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.held.append(storage)
            self.sizes[storage._cdata] = storage.nbytes()
        return tensor


def measure(config: Config) -> Budget:
    """Count what a config needs."""
    with FakeTensorMode():
        network = TfcTdf(config.network.unet(), config.source)
        if config.checkpointing:
            recompute(network)
        if config.precision != "fp32":
            for module in network.modules():
                if isinstance(module, nn.GroupNorm):
                    module.__class__ = _FullNorm
        kept = _Kept([*network.parameters(), *network.buffers()])
        sizes = freezing.freeze(network, config.freeze)
        spectrum = torch.randn(1, SPECTRUM_CHANNELS, config.network.bins, config.network.frames)
        with kept.counting(config), FlopCounterMode(display=False) as counter:
            network.unet(spectrum)
    moments = 2 if config.optimizer.kind == "adamw" else 1
    everywhere = 1 + (config.average is not None)  # numbers for each parameter
    trained = 1 + moments  # and for each one that is trained: its gradient and the optimizer's state
    again = _largest_block(config) if config.checkpointing else 0
    forward = counter.get_total_flops() / 1e9
    return Budget(
        parameters=sizes.total,
        fixed=4 * (everywhere * sizes.total + trained * sizes.trained),
        window=sum(kept.sizes.values()) + 2 * max(kept.sizes.values()) + again,
        forward=forward,
        gflop=(4 if config.checkpointing else 3) * forward,
    )


def _largest_block(config: Config) -> int:
    """Bytes that autograd keeps of the first block while it is computed again."""
    sizes = config.network
    with FakeTensorMode():
        kept = _Kept()
        block = Block(sizes.unet(), sizes.growth, sizes.bins)
        x = torch.randn(1, sizes.growth, sizes.frames, sizes.bins, requires_grad=True)
        with kept.counting(config):
            block(x)
    return sum(kept.sizes.values())


def at_once(config: Config, accelerator: str, devices: int) -> int:
    """How many windows go through the network together on one device.

    Raises
    ------
    TrainingError
        If not even one fits.
    """
    share = max(1, config.batch // devices)
    if config.at_once != "auto":
        return min(config.at_once, share)
    if accelerator != "cuda":
        return share
    free, _ = torch.cuda.mem_get_info()
    fitting = measure(config).most(SPARE * free)
    if not fitting:
        raise TrainingError(f"one window does not fit into {free / 1e9:.1f} GB: set checkpointing: true")
    return divisor(share, fitting)


def divisor(batch: int, most: int) -> int:
    """The largest part of a batch that divides it and has at most so many windows; 0 if none has."""
    return next((size for size in range(min(most, batch), 0, -1) if batch % size == 0), 0)


@dataclass(frozen=True)
class Step:
    """A real step: seconds, and bytes that the process or the GPU took at most."""

    seconds: float
    memory: int


def epoch_on_t4(config: Config, needed: Budget) -> float:
    """Seconds that an epoch would take on a T4 that computes at :data:`T4_GFLOPS`."""
    return config.epoch * config.batch * needed.gflop / T4_GFLOPS[config.precision]


def row(config: Config, needed: Budget) -> list[str]:
    """What a config needs, as cells of a table."""
    size = divisor(config.batch, needed.most(SPARE * (T4 - OVERHEAD)))
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
    """Take two steps on noise, as many windows together as :func:`at_once` gives; the second is timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = Unmixing(config, Songs((), ())).to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    size = at_once(config, device.type, 1)
    dtype = precision.DTYPES[config.precision]
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
