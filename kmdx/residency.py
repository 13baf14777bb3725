"""Which networks are on the device: all that fit in a budget, the longest unused moved out first."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kmdx import memory
from kmdx.networks.network import Network
from kmdx.runner import Experience, Runner

WEIGHTS_SHARE = 0.5  # of the device's budget, for the networks' weights
SIGNALS_SHARE = 0.25  # of it, for a song's signals; the rest is for windows


class Residents:
    """An ensemble's networks, brought to a device when they are asked for.

    Parameters
    ----------
    networks : mapping of str to Network
        By the plan's names; one network may have several.
    device : torch.device
    budget : int, optional
        Bytes of the device's memory that may be used in all; by default
        :func:`kmdx.memory.device_budget` when a song begins. None where that is not known: on the CPU,
        where everything is already, and on devices that are not CUDA's, where everything stays that was
        moved in.
    """

    def __init__(
        self, networks: Mapping[str, Network], device: torch.device, budget: int | None = None
    ) -> None:
        self.networks = networks
        self.device = device
        self._moved: dict[int, Network] = {}  # on the device by its id, the longest unused first
        self._narrowed: dict[tuple[int, tuple[str, ...]], Network] = {}
        self._experience: defaultdict[tuple[int, tuple[str, ...]], Experience] = defaultdict(Experience)
        self._given = budget
        self.settle()

    def settle(self) -> None:
        """Before a song: estimate again, since the program may use more of the device by now.

        What an earlier song ran out of memory with is forgotten: it must not change this one's stems.
        """
        own = sum(map(_bytes, self._moved.values()))
        self.limit = memory.device_limit(self.device, own)
        self.budget = memory.device_budget(self.device, own) if self._given is None else self._given
        for experience in self._experience.values():
            experience.sizes.clear()

    @property
    def room(self) -> int | None:
        """Bytes for windows: what is left of the budget by weights and signals, whichever are there now."""
        if self.budget is None:
            return None
        every = {id(network): network for network in self.networks.values()}
        weights = min(sum(map(_bytes, every.values())), WEIGHTS_SHARE * self.budget)
        return int((1 - SIGNALS_SHARE) * self.budget - weights)

    def runner(self, name: str, sources: Sequence[str], longest: int | None = None) -> Runner:
        """Return a network on the device, ready to estimate these sources of its own.

        ``longest`` are the samples of the longest window; not needed of a network that takes only one length.
        """
        network = self.networks[name]
        if self.device.type != "cpu":
            self._bring(network)
        key = (id(network), tuple(sources))
        if key not in self._narrowed:
            self._narrowed[key] = network.narrow(sources)
        return Runner(
            self._narrowed[key],
            self.device,
            experience=self._experience[key],
            room=self.room,
            make_room=lambda: self._make_room(network),
            longest=longest,
        )

    def replace(self, networks: Mapping[str, Network]) -> None:
        """Have other networks from here on; those that there were are moved out, and forgotten."""
        for network in [*self._moved.values()]:
            self._send_away(network)
        self._narrowed.clear()
        self._experience.clear()
        self.networks = networks

    def _bring(self, network: Network) -> None:
        """Move a network in, and others out until the budget's share for weights is kept."""
        share = math.inf if self.budget is None else WEIGHTS_SHARE * self.budget
        known = id(network) in self._moved
        self._moved[id(network)] = self._moved.pop(id(network), network)  # now the last one used
        if known:
            return
        while len(self._moved) > 1 and sum(map(_bytes, self._moved.values())) > share:
            self._send_away(next(iter(self._moved.values())))
        try:
            self._move_in(network)
        except BaseException:  # a part of its weights may have arrived
            self._send_away(network)
            raise

    def _move_in(self, network: Network) -> None:
        """Move a network in, alone if there is no room for it beside the others."""
        try:
            return _move(network, self.device)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error) or not self._make_room(network):
                raise
        _move(network, self.device)

    def _make_room(self, kept: Network) -> bool:
        """Move out all but one network; tell whether there was one to move."""
        others = [network for network in self._moved.values() if network is not kept]
        for network in others:
            self._send_away(network)
        return bool(others)

    def _send_away(self, network: Network) -> None:
        del self._moved[id(network)]
        # Narrowed networks share its parameters, but have layers of their own on the device.
        self._narrowed = {key: other for key, other in self._narrowed.items() if key[0] != id(network)}
        _move(network, torch.device("cpu"))
        memory.empty_cache(self.device)


def _bytes(network: Any) -> int:
    """Size of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _move(network: Any, device: torch.device) -> None:
    with torch.inference_mode(False):  # else its parameters could never be moved again
        network.to(device)
