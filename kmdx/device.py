"""The device that networks run on: which it is, its memory, and what is in that memory.

One place decides what fits: a budget for the whole library, of which weights, signals and windows have their
shares. :class:`NetworkCache` keeps the networks that fit, :class:`Runner` runs one on as many windows at once
as fit. Only here are errors of memory handled; sizes are in bytes.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmdx.errors import DeviceError, KmdxWarning, first_line
from kmdx.networks.network import Network

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

DEVICE_BUDGET = 11 * 2**30  # of a GPU's memory at most: a 12 GB card, and room for its driver
CARD_SHARE = 0.8  # of a smaller card's memory
FREE_SHARE = 0.9  # of what is free when a song begins
SMALLEST_BUDGET = 2**28  # bytes that are tried whatever is free

OUT_OF_MEMORY = (  # what torch's other errors of memory say
    "allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",  # of cuBLAS and cuFFT
    "ALLOCATION_FAILED",  # of cuDNN, on the device and on the host
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle did not fit
    "valid cuDNN algorithm",  # no algorithm's workspace fitted
    "unable to find an engine",  # the same, of GET and FIND; rarely there really is none
)
WEIGHTS_SHARE = 0.5  # of the device's budget, for the networks' weights
SIGNALS_SHARE = 0.25  # of it, for a song's signals; the rest is for windows
MAX_BATCH = 32  # windows at once; beyond a few a GPU is busy anyway
HEADROOM = 0.8  # of the room for windows, for what the next ones need beside their share
CPU_BATCH = 1  # windows at once on the CPU: two cores are busy with one, more leave the caches earlier


def choose(name: str) -> torch.device:
    """Return the device of that name; ``"auto"`` is CUDA where there is one, else the CPU.

    A CUDA device without a number is the current one, and gets its number. Warns where ``"auto"`` comes
    to the CPU of a machine with an NVIDIA driver.

    Raises
    ------
    DeviceError
        If torch knows no such device or this machine does not have it.
    """
    if not isinstance(name, str):
        raise DeviceError(f"device {name!r}: expected a name such as auto, cpu or cuda:0")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if NVIDIA_DRIVER.exists():
            warnings.warn(
                f"this machine has an NVIDIA driver, but torch {torch.__version__} cannot use CUDA: all "
                "runs on the CPU, many times slower; install torch's CUDA build",
                KmdxWarning,
                stacklevel=2,
            )
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # lists every kind of device that torch has ever had
        raise DeviceError(f"no device {name!r} here; use auto, cpu, cuda or cuda:N") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).split(":")[0]
        raise DeviceError(f"no device {name!r} here ({reason}); use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Tell errors of memory from others; on the CPU torch has no class for them."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def memory_budget(device: torch.device, own: int = 0) -> int | None:
    """Bytes of a GPU's memory for the library; None elsewhere.

    It is :data:`DEVICE_BUDGET` or a share of a smaller card, halved until it is free. So what else is on the
    card changes it in steps, and the few megabytes that always come and go do not change which windows are
    computed together. ``own`` bytes of what is allocated are the caller's.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    others = torch.cuda.memory_allocated(device) - own
    available = FREE_SHARE * (free + torch.cuda.memory_reserved(device) - others)
    budget = min(DEVICE_BUDGET, int(CARD_SHARE * total))
    while budget > max(available, SMALLEST_BUDGET):
        budget //= 2
    return budget


def memory_limit(device: torch.device, own: int = 0) -> int | None:
    """Bytes of a GPU's memory beyond which nothing may go: :data:`DEVICE_BUDGET`, beside what others use."""
    return DEVICE_BUDGET + torch.cuda.memory_allocated(device) - own if device.type == "cuda" else None


@contextmanager
def limited(device: torch.device, limit: int | None) -> Iterator[None]:
    """Let torch take at most ``limit`` bytes of a GPU's memory, including what it keeps for later.

    Without, it would keep ever more pieces of what was freed on a large GPU. At the limit it gives back what
    it keeps, and where that does not suffice raises the error of memory that it would on a smaller GPU.
    """
    if limit is None:
        yield
        return
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # torch before 2.8
    before = tell(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def empty_cache(device: torch.device) -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that torch held at most since the last reset, unused blocks included."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Measure the peak of a GPU's memory from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@dataclass
class BatchProfile:
    """What is known of a network's windows.

    Attributes
    ----------
    cost : float or None
        Bytes for each sample of a window; the same for every song.
    sizes : dict of int to int
        The largest batch for each window length in samples, where a larger one did not fit in this song.
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
    profile : BatchProfile, optional
        What earlier songs told of the network and these sources; this one's is added.
    room : int, optional
        Bytes of the device's memory for windows; None for the CPU, where they go one by one.
    evict : callable, optional
        Called when a single window does not fit; frees what it can and tells whether it did.
    longest : int, optional
        Samples of the longest window, for a network that takes any length.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        profile: BatchProfile | None = None,
        room: int | None = None,
        evict: Callable[[], bool] = lambda: False,
        longest: int | None = None,
    ) -> None:
        self.network = network
        self.device = device
        self.profile = profile or BatchProfile()
        self.room = room
        self.evict = evict
        self.longest = longest

    def size(self, length: int) -> int:
        """The batch size for windows of ``length`` samples."""
        sizes = self.profile.sizes
        if self.room is None:
            return sizes.get(length, CPU_BATCH)
        if self.profile.cost is None:
            self.profile.cost = self._measured(self.network.length or self.longest or length)
        if self.profile.cost is None:
            return 1
        fitting = int(HEADROOM * self.room / (self.profile.cost * length))
        return max(1, min(sizes.get(length, MAX_BATCH), fitting))

    @torch.inference_mode()
    def _measured(self, length: int) -> float | None:
        """Bytes that each sample of a window takes, by a window of silence; None if it does not fit now."""
        silence = torch.zeros(1, 2, length, device=self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self(silence)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return max(1, torch.cuda.max_memory_allocated(self.device) - before) / length

    def __call__(self, windows: Sequence[Tensor] | Tensor) -> Tensor:
        """Estimate the sources of windows ``(2, T)`` on the device; ``(B, sources, 2, T)``."""
        try:
            return self.network(torch.stack([*windows]))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(windows) == 1 and not self.evict():
                raise
        # Here the error is gone, and with it the tensors that its frames held.
        empty_cache(self.device)
        half = max(1, len(windows) // 2)
        if len(windows) > 1:
            self.profile.sizes[windows[0].shape[-1]] = half
        parts = [windows[begin : begin + half] for begin in range(0, len(windows), half)]
        return torch.cat([self(part) for part in parts])


class NetworkCache:
    """An ensemble's networks, brought to a device when they are asked for.

    Parameters
    ----------
    networks : mapping of str to Network
        By the plan's names; one network may have several.
    device : torch.device
    budget : int, optional
        Bytes of the device's memory that may be used in all; by default
        :func:`memory_budget` when a song begins. None where that is not known: on the CPU,
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
        self._profiles: defaultdict[tuple[int, tuple[str, ...]], BatchProfile] = defaultdict(BatchProfile)
        self._given = budget
        self.refresh_budget()

    def refresh_budget(self) -> None:
        """Before a song: estimate again, since the program may use more of the device by now.

        What an earlier song ran out of memory with is forgotten: it must not change this one's stems.
        """
        own = sum(map(_bytes, self._moved.values()))
        self.limit = memory_limit(self.device, own)
        self.budget = memory_budget(self.device, own) if self._given is None else self._given
        for profile in self._profiles.values():
            profile.sizes.clear()

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
            profile=self._profiles[key],
            room=self.room,
            evict=lambda: self._evict_others(network),
            longest=longest,
        )

    def replace(self, networks: Mapping[str, Network]) -> None:
        """Have other networks from here on; those that there were are moved out, and forgotten."""
        for network in [*self._moved.values()]:
            self._evict(network)
        self._narrowed.clear()
        self._profiles.clear()
        self.networks = networks

    def _bring(self, network: Network) -> None:
        """Move a network in, and others out until the budget's share for weights is kept."""
        share = math.inf if self.budget is None else WEIGHTS_SHARE * self.budget
        known = id(network) in self._moved
        self._moved[id(network)] = self._moved.pop(id(network), network)  # now the last one used
        if known:
            return
        while len(self._moved) > 1 and sum(map(_bytes, self._moved.values())) > share:
            self._evict(next(iter(self._moved.values())))
        try:
            self._move_in(network)
        except BaseException:  # a part of its weights may have arrived
            self._evict(network)
            raise

    def _move_in(self, network: Network) -> None:
        """Move a network in, alone if there is no room for it beside the others."""
        try:
            return _move(network, self.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self._evict_others(network):
                raise
        _move(network, self.device)

    def _evict_others(self, kept: Network) -> bool:
        """Move out all but one network; tell whether there was one to move."""
        others = [network for network in self._moved.values() if network is not kept]
        for network in others:
            self._evict(network)
        return bool(others)

    def _evict(self, network: Network) -> None:
        del self._moved[id(network)]
        # Narrowed networks share its parameters, but have layers of their own on the device.
        self._narrowed = {key: other for key, other in self._narrowed.items() if key[0] != id(network)}
        _move(network, torch.device("cpu"))
        empty_cache(self.device)


def _bytes(network: Any) -> int:
    """Size of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _move(network: Any, device: torch.device) -> None:
    with torch.inference_mode(False):  # else its parameters could never be moved again
        network.to(device)
