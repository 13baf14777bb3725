"""The device that networks run on, its memory budget, and the networks in its memory.

The library has one memory budget, divided into shares for weights, signals and windows. :class:`NetworkCache`
keeps as many networks on the device as fit; :class:`Runner` runs one network on as many windows at once as
fit. This module handles all out-of-memory errors. Sizes are in bytes.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmdx import engines
from kmdx.errors import DeviceError, KmdxWarning, first_line, quoted, suggest
from kmdx.networks.network import Network

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

PART = "KMDX_GPU_PART"
"""Environment variable with the part of a card's memory that this process may use, such as 0.5."""

DEVICE_BUDGET = 11 * 2**30  # budget on most cards: a 12 GB card, minus room for its driver
LARGE_SHARE = 0.4  # budget on a card with more than 27.5 GiB, as a share of its memory: two processes fit
CARD_SHARE = 0.8  # largest budget on a smaller card, and within a stated part
FREE_SHARE = 0.9  # usable share of the memory that is free when a song begins
SMALLEST_BUDGET = 2**28  # smallest budget, however little memory is free

OUT_OF_MEMORY = (  # texts of out-of-memory errors that are plain RuntimeErrors in torch
    "allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",  # of cuBLAS and cuFFT
    "ALLOCATION_FAILED",  # of cuDNN, on the device and on the host
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle did not fit
    "valid cuDNN algorithm",  # no algorithm's workspace fitted
    "unable to find an engine",  # the same, from cuDNN's GET and FIND modes
)
WEIGHTS_SHARE = 0.5  # share of the budget for the networks' weights
SIGNALS_SHARE = 0.25  # share of the budget for a song's signals; the rest is for windows
MAX_BATCH = 32  # windows at once; a few already keep a GPU busy
HEADROOM = 0.8  # usable share of the room for windows; the rest absorbs variations
CPU_BATCH = 1  # windows at once on a CPU: one keeps two cores busy, and more would overflow the caches


def choose(name: str | torch.device) -> torch.device:
    """Return the device with this name; ``"auto"`` is CUDA if available, else the CPU.

    ``"cuda"`` becomes the current CUDA device, with its number. Warns if ``"auto"`` chooses the CPU on a
    machine with an NVIDIA driver. Raises :class:`DeviceError` if torch does not know the device, or this
    machine does not have it.
    """
    if isinstance(name, torch.device):
        name = str(name)
    if not isinstance(name, str):
        raise DeviceError(f"device {name!r}: expected a torch.device, or a name such as auto, cpu or cuda:0")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if NVIDIA_DRIVER.exists():
            warnings.warn(
                f"this machine has an NVIDIA driver, but torch {torch.__version__} cannot use CUDA; "
                "networks run on the CPU, many times slower; install torch's CUDA build",
                KmdxWarning,
                stacklevel=2,
            )
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # its message lists all device types of torch
        hint = suggest(name, ("auto", "cpu", "cuda", "cuda:0", "mps"))
        raise DeviceError(f"unknown device {quoted(name)}{hint}; use auto, cpu, cuda or cuda:N") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).split(":")[0]
        raise DeviceError(
            f"device {name!r} is not available ({reason}); use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on the CPU, torch has no class for this."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def memory_budget(device: torch.device, own: int = 0) -> int | None:
    """The library's memory budget on a GPU, in bytes; None on other devices.

    The budget follows from the card's size and the part of it that :data:`PART` states, and is halved until
    that much is free. It changes only in steps, so small changes in the card's free memory do not change the
    batch size. ``own`` bytes of the allocated memory belong to the caller. Raises :class:`DeviceError` if
    the stated part is not a number above 0 and at most 1.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    others = torch.cuda.memory_allocated(device) - own
    available = FREE_SHARE * (free + torch.cuda.memory_reserved(device) - others)
    budget = min(_allowed(total), int(CARD_SHARE * (stated_part() or 1) * total))
    while budget > max(available, SMALLEST_BUDGET):
        budget //= 2
    return budget


def memory_limit(device: torch.device, own: int = 0) -> int | None:
    """Limit on this process's GPU memory, in bytes: what the library may use, plus what other code uses.

    Raises :class:`DeviceError` as :func:`memory_budget` does.
    """
    if device.type != "cuda":
        return None
    return _allowed(torch.cuda.mem_get_info(device)[1]) + torch.cuda.memory_allocated(device) - own


def stated_part() -> float | None:
    """The part of a card's memory that :data:`PART` states; None if it is not set."""
    text = os.environ.get(PART, "")
    if not text:
        return None
    try:
        part = float(text)
    except ValueError:
        part = math.nan
    if not 0 < part <= 1:
        raise DeviceError(f"{PART} must be a number above 0 and at most 1, not {quoted(text)}")
    return part


def _allowed(total: int) -> int:
    """Bytes that the library may use on a card with ``total`` bytes."""
    part = stated_part()
    return max(DEVICE_BUDGET, int(LARGE_SHARE * total)) if part is None else int(part * total)


@contextmanager
def limited(device: torch.device, limit: int | None) -> Iterator[None]:
    """Limit torch to ``limit`` bytes of a GPU's memory, including its cache.

    Without a limit, torch's cache grows on a large GPU. At the limit, torch frees its cache. If that is not
    enough, it raises the same out-of-memory error as on a smaller GPU.
    """
    if limit is None:
        yield
        return
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # new in torch 2.8
    before = fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def gpu_count() -> int:
    """The number of CUDA devices."""
    return torch.cuda.device_count()


def gpu_properties(device: torch.device) -> Any:
    """What torch knows about a CUDA device, such as its ``name`` and ``total_memory``; None for others."""
    return torch.cuda.get_device_properties(device) if device.type == "cuda" else None


def free_memory(device: torch.device) -> int:
    """Free memory of a CUDA device, in bytes."""
    return torch.cuda.mem_get_info(device)[0]


def empty_cache(device: torch.device) -> None:
    """Free torch's cache of GPU memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """The most GPU memory that torch reserved since the last reset, in bytes, including its cache."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Restart measuring the peak of GPU memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@dataclass
class BatchProfile:
    """Measured memory use of a network's windows."""

    cost: float | None = None  # bytes per sample of a window; the same for every song
    sizes: dict[int, int] = field(default_factory=dict)
    """The largest batch size by window length in samples, if a larger batch did not fit in this song."""


class Runner:
    """One network on its device.

    On a GPU, a batch has as many windows as fit, computed from the memory that a window of silence needs. The
    batch size changes the order of sums, and so the last bits of results. It therefore depends only on the
    network and the room, not on earlier songs or on the memory that happens to be free. If memory still runs
    out, the failed batch runs again in halves, and the rest of the song uses the smaller batch size.

    Parameters
    ----------
    network : Network
        Already on ``device``.
    profile : BatchProfile, optional
        Measurements from earlier songs with this network and these sources; updated by this song.
    room : int, optional
        Bytes of the device's memory for windows; None on the CPU, where windows run one by one.
    evict : callable, optional
        Called if a single window does not fit; frees memory and returns whether it could.
    longest : int, optional
        Samples of the longest window, for a network that accepts any length.
    engine : str
        ``"compiled"`` or ``"graphs"`` if the network is compiled, which takes minutes for each shape of a
        batch. Only windows of the longest length are compiled, and only in a few batch sizes.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        profile: BatchProfile | None = None,
        room: int | None = None,
        evict: Callable[[], bool] = lambda: False,
        longest: int | None = None,
        engine: str = engines.DEFAULT,
    ) -> None:
        self.network = network
        self.device = device
        self.engine = engine
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
            self.profile.cost = self._measure_cost(self.network.length or self.longest or length)
        if self.profile.cost is None:
            return 1
        fitting = int(HEADROOM * self.room / (self.profile.cost * length))
        return max(1, min(sizes.get(length, MAX_BATCH), fitting))

    def filled(self, count: int, length: int) -> int:
        """The windows to which ``count`` of them are filled up: one of the batch sizes that are compiled."""
        if not self._is_compiled(length):
            return count
        size = max(count, self.size(length))
        while size // 2 >= count:
            size //= 2
        return size

    def _is_compiled(self, length: int) -> bool:
        return self.engine in engines.COMPILING and length == (self.longest or length)

    @torch.inference_mode()
    def _measure_cost(self, length: int) -> float | None:
        """Bytes per sample of a window, measured with silence; None if the window does not fit now."""
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
            return self._run(torch.stack([*windows]))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(windows) == 1 and not self.evict():
                raise
        # Outside the except block, the error and the tensors in its stack frames are freed.
        empty_cache(self.device)
        half = max(1, len(windows) // 2)
        if len(windows) > 1:
            self.profile.sizes[windows[0].shape[-1]] = half
        parts = [windows[begin : begin + half] for begin in range(0, len(windows), half)]
        return torch.cat([self(part) for part in parts])

    def _run(self, batch: Tensor) -> Tensor:
        if self.engine in engines.COMPILING and not self._is_compiled(batch.shape[-1]):
            return self.network.forward(batch)
        if self.engine != engines.GRAPHS:
            return self.network(batch)
        torch.compiler.cudagraph_mark_step_begin()
        return self.network(batch).clone()  # the next run of any graph overwrites the original


class NetworkCache:
    """An ensemble's networks, moved to a device when they are needed.

    Parameters
    ----------
    networks : mapping of str to Network
        By the plan's names; one network may have several names.
    budget : int, optional
        Bytes of the device's memory that may be used in total; by default :func:`memory_budget` at the
        beginning of a song. It is None on the CPU, where the networks already are, and on devices other
        than CUDA, where networks stay once moved.
    engine : str
        ``"compiled"`` or ``"graphs"`` if torch's compiler makes kernels for each network and each shape of a
        batch. All CUDA graphs share one pool of memory. It counts toward the limit, and is as large as what
        the largest graph needs, because only one runs at a time.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        device: torch.device,
        budget: int | None = None,
        engine: str = engines.DEFAULT,
    ) -> None:
        self.networks = networks
        self.device = device
        self.engine = engine
        self._moved: dict[int, Network] = {}  # networks on the device by id, the least recently used first
        self._narrowed: dict[tuple[int, tuple[str, ...]], Network] = {}
        self._profiles: defaultdict[tuple[int, tuple[str, ...]], BatchProfile] = defaultdict(BatchProfile)
        self._given = budget
        self.refresh_budget()

    def refresh_budget(self) -> None:
        """Compute the budget again before a song, because the memory in use may have changed.

        Batch sizes that were reduced for an earlier song are reset: they must not change this song's stems.
        """
        own = sum(map(_bytes, self._moved.values()))
        self.limit = memory_limit(self.device, own)
        self.budget = memory_budget(self.device, own) if self._given is None else self._given
        for profile in self._profiles.values():
            profile.sizes.clear()

    @property
    def room(self) -> int | None:
        """Bytes for windows: the budget minus the shares of weights and signals, used or not."""
        if self.budget is None:
            return None
        every = {id(network): network for network in self.networks.values()}
        weights = min(sum(map(_bytes, every.values())), WEIGHTS_SHARE * self.budget)
        return int((1 - SIGNALS_SHARE) * self.budget - weights)

    def runner(self, name: str, sources: Sequence[str], longest: int | None = None) -> Runner:
        """Return a runner for a network on the device that estimates only these of its sources.

        ``longest`` is the length of the longest window in samples; networks of fixed length do not need it.
        """
        network = self.networks[name]
        if self.device.type != "cpu":
            self._ensure_moved(network)
        key = (id(network), tuple(sources))
        if key not in self._narrowed:
            self._narrowed[key] = narrowed = network.narrow(sources)
            if self.engine in engines.COMPILING:
                narrowed.compile(**_compiler_options(self.engine))
        return Runner(
            self._narrowed[key],
            self.device,
            profile=self._profiles[key],
            room=self.room,
            evict=lambda: self._evict_others(network),
            longest=longest,
            engine=self.engine,
        )

    def replace(self, networks: Mapping[str, Network]) -> None:
        """Replace all networks; the old ones are moved off the device."""
        for network in [*self._moved.values()]:
            self._evict(network)
        self._narrowed.clear()
        self._profiles.clear()
        self.networks = networks

    def _ensure_moved(self, network: Network) -> None:
        """Move a network in, after moving others out until the weights fit into their share."""
        share = math.inf if self.budget is None else WEIGHTS_SHARE * self.budget
        known = id(network) in self._moved
        self._moved[id(network)] = self._moved.pop(id(network), network)  # now the most recently used
        if known:
            return
        while len(self._moved) > 1 and sum(map(_bytes, self._moved.values())) > share:
            self._evict(next(iter(self._moved.values())))
        try:
            self._move_in(network)
        except BaseException:  # some of its weights may be on the device
            self._evict(network)
            raise

    def _move_in(self, network: Network) -> None:
        """Move a network in; if it does not fit next to the others, move them out first."""
        try:
            return _move(network, self.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self._evict_others(network):
                raise
        _move(network, self.device)

    def _evict_others(self, kept: Network) -> bool:
        """Move out all networks but one; return whether any was moved."""
        others = [network for network in self._moved.values() if network is not kept]
        for network in others:
            self._evict(network)
        return bool(others)

    def _evict(self, network: Network) -> None:
        del self._moved[id(network)]
        # Narrowed networks share its parameters, but also have their own layers on the device.
        self._narrowed = {key: other for key, other in self._narrowed.items() if key[0] != id(network)}
        _move(network, torch.device("cpu"))
        empty_cache(self.device)


def _compiler_options(engine: str) -> dict[str, Any]:
    """Arguments of ``torch.compile``."""
    options: dict[str, Any] = {"dynamic": False}
    # Otherwise, all networks together would have the eight shapes that torch allows, and later ones would run
    # without the compiler. Older releases of torch do not have it.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    if engine == engines.GRAPHS:
        options["options"] = {"triton.cudagraphs": True}
    return options


def _bytes(network: Any) -> int:
    """Size of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _move(network: Any, device: torch.device) -> None:
    with torch.inference_mode(False):  # otherwise its parameters could not be moved again
        network.to(device)
