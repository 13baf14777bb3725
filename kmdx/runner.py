"""A network that runs on as many windows at once as the device's memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kmdx import memory
from kmdx.networks.network import Network

MOST = 32  # windows at once; beyond a few a GPU is busy anyway
SPARE = 0.8  # of the room that is left, for what the next windows need beside their share


@dataclass(frozen=True)
class Experience:
    """What is known of a network's windows, by their samples; it grows as they run.

    Attributes
    ----------
    costs : dict of int to float
        Bytes that each takes.
    sizes : dict of int to int
        How many go together at most, because more did not fit.
    """

    costs: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)


class Runner:
    """One network on its device.

    The first window is run alone and its memory measured; then as many go together as there is room for.
    When memory runs out all the same, half as many go together from there on, and what failed is done
    again. On the CPU windows go one by one: two cores are busy with one, and more at once only
    leave the caches sooner.

    Parameters
    ----------
    network : Network
        On ``device`` already.
    device : torch.device
    experience : Experience, optional
        What earlier songs told of the network and these sources; this one's is added.
    budget : int, optional
        Bytes of the device's memory that may be used; None for the CPU.
    make_room : callable, optional
        Called when a single window does not fit; frees what it can and tells whether it did.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        experience: Experience | None = None,
        budget: int | None = None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.network = network
        self.device = device
        self.experience = experience or Experience()
        self.budget = budget
        self.make_room = make_room

    def size(self, length: int) -> int:
        """How many windows of so many samples to hand over at once, by the room that there is now."""
        cost = self._cost(length)
        if self.budget is None or cost is None:
            return self.experience.sizes.get(length, 1)
        room = self.budget - torch.cuda.memory_allocated(self.device)
        return max(1, min(self.experience.sizes.get(length, MOST), int(SPARE * room / cost)))

    def _cost(self, length: int) -> float | None:
        """Bytes of a window, by the measured one that is as long or the next longer; ``None`` without."""
        costs = self.experience.costs
        longer = [measured for measured in costs if measured >= length]
        return costs[min(longer)] * length / min(longer) if longer else None

    def __call__(self, windows: Sequence[Tensor] | Tensor) -> Tensor:
        """Estimate the sources of windows ``(2, T)`` on the device; ``(B, sources, 2, T)``."""
        try:
            return self._run(windows)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            if len(windows) == 1 and not self.make_room():
                raise
        # Here the error is gone, and with it the tensors that its frames held.
        memory.empty_cache(self.device)
        half = max(1, len(windows) // 2)
        if len(windows) > 1:
            self.experience.sizes[windows[0].shape[-1]] = half
        parts = [windows[begin : begin + half] for begin in range(0, len(windows), half)]
        return torch.cat([self(part) for part in parts])

    def _run(self, windows: Sequence[Tensor] | Tensor) -> Tensor:
        batch = torch.stack([*windows])
        length = batch.shape[-1]
        if self.budget is None or self._cost(length) is not None:
            return self.network(batch)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        estimates = self.network(batch)
        used = torch.cuda.max_memory_allocated(self.device) - before
        self.experience.costs[length] = max(1, used) / len(batch)
        return estimates
