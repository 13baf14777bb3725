"""A network that runs on as many windows at once as the device's memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kmdx import memory
from kmdx.networks.network import Network

MOST = 32  # windows at once; beyond a few a GPU is busy anyway
SPARE = 0.8  # of the room for windows, for what the next ones need beside their share
CPU_BATCH = 1  # windows at once on the CPU: two cores are busy with one, more leave the caches earlier


@dataclass
class Experience:
    """What is known of a network's windows.

    Attributes
    ----------
    cost : float or None
        Bytes for each sample of a window; the same for every song.
    sizes : dict of int to int
        How many windows of so many samples go together at most, because more did not fit in this song.
    """

    cost: float | None = None
    sizes: dict[int, int] = field(default_factory=dict)


class Runner:
    """One network on its device.

    On a GPU as many windows go together as there is room for, by the memory that a window of silence took.
    That number follows from the network and the room alone, because sums over a batch of another size are
    in another order: neither the songs before nor what is free at the moment change it. When memory runs
    out all the same, half as many go together for the rest of the song, and what failed is done again.

    Parameters
    ----------
    network : Network
        On ``device`` already.
    device : torch.device
    experience : Experience, optional
        What earlier songs told of the network and these sources; this one's is added.
    room : int, optional
        Bytes of the device's memory for windows; None for the CPU, where they go one by one.
    make_room : callable, optional
        Called when a single window does not fit; frees what it can and tells whether it did.
    longest : int, optional
        Samples of the longest window, for a network that takes any length.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        experience: Experience | None = None,
        room: int | None = None,
        make_room: Callable[[], bool] = lambda: False,
        longest: int | None = None,
    ) -> None:
        self.network = network
        self.device = device
        self.experience = experience or Experience()
        self.room = room
        self.make_room = make_room
        self.longest = longest

    def size(self, length: int) -> int:
        """How many windows of so many samples to hand over at once."""
        sizes = self.experience.sizes
        if self.room is None:
            return sizes.get(length, CPU_BATCH)
        if self.experience.cost is None:
            self.experience.cost = self._measured(self.network.length or self.longest or length)
        if self.experience.cost is None:
            return 1
        fitting = int(SPARE * self.room / (self.experience.cost * length))
        return max(1, min(sizes.get(length, MOST), fitting))

    @torch.inference_mode()
    def _measured(self, length: int) -> float | None:
        """Bytes that each sample of a window takes, by a window of silence; None if it does not fit now."""
        silence = torch.zeros(1, 2, length, device=self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self(silence)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            return None
        return max(1, torch.cuda.max_memory_allocated(self.device) - before) / length

    def __call__(self, windows: Sequence[Tensor] | Tensor) -> Tensor:
        """Estimate the sources of windows ``(2, T)`` on the device; ``(B, sources, 2, T)``."""
        try:
            return self.network(torch.stack([*windows]))
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
