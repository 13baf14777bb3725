"""Copies between a GPU and the host through pinned memory, so that neither waits for the other.

To copy ordinary host memory, the host waits until the GPU has done all earlier work. A copy of pinned memory
is work of a stream like any other, so this module waits for events before memory is read or used again. If no
memory can be pinned, ordinary memory takes its place. On other devices, copies are plain ones.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A float32 copy of a tensor on a device, or the tensor itself if it is one."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, torch.float32)
    # torch does not use the pinned memory for anything else before the copy is finished.
    return _pinned(tensor.shape).copy_(tensor).to(device, non_blocking=True)


def host_blocks(tensor: Tensor, step: int) -> Iterator[Tensor]:
    """Blocks of a tensor ``(channels, samples)`` in host memory, each valid until the next is requested.

    While the caller uses a block of a GPU's tensor, the next one is copied on the current stream. Two blocks
    of ``step`` samples are pinned, which torch keeps for later calls.
    """
    parts = tensor.split(step, dim=-1)
    if tensor.device.type != "cuda":
        yield from (part.cpu() for part in parts)
        return
    buffers = itertools.cycle([_pinned((parts[0].numel(),)) for _ in parts[:2]])
    copied: deque[tuple[Tensor, torch.cuda.Event]] = deque()
    for part, buffer in zip(parts, buffers, strict=False):
        block = buffer[: part.numel()].view(part.shape)
        for target, channel in zip(block, part, strict=True):  # together, they would need memory of the GPU
            target.copy_(channel, non_blocking=True)
        copied.append((block, _recorded()))
        if len(copied) == 2:
            yield _finished(*copied.popleft())
    yield _finished(*copied.popleft())


class Background:
    """Runs functions that copy results to the host, in a thread and on a CUDA stream of its own.

    The host can start the next kernels, and the GPU compute them, while earlier results are copied. If the
    results are not on a GPU, or remain there, functions run at once. The context ends when all functions have
    finished, and raises the error of the first that failed.

    Parameters
    ----------
    source, target : torch.device
        Where the results are, and where they go.
    most : int, optional
        Functions that may be unfinished when the next one is submitted. The memory of their arguments is not
        used again before they have finished.
    """

    def __init__(self, source: torch.device, target: torch.device, most: int | None = None) -> None:
        self._source = source
        self._most = most
        self._unfinished: deque[Future[Any]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if source.type == "cuda" and target.type == "cpu":
            self._thread = ThreadPoolExecutor(1)
            self._stream = torch.cuda.Stream(source)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        self._thread.shutdown(cancel_futures=kind is not None)
        while self._unfinished and kind is None:
            self._unfinished.popleft().result()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function after all work that the current stream has been given so far.

        It must not change tensors of the GPU, and nothing else may change its arguments from now on.
        """
        if self._thread is None:
            done: Future[Result] = Future()
            done.set_result(function(*arguments))
            return done
        while self._most is not None and len(self._unfinished) >= self._most:
            self._unfinished.popleft().result()
        computed = torch.cuda.current_stream(self._source).record_event()
        self._unfinished.append(future := self._thread.submit(self._run, computed, function, arguments))
        return future

    @torch.inference_mode()
    def _run(
        self, computed: torch.cuda.Event, function: Callable[..., Result], arguments: Sequence[Any]
    ) -> Result:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            return function(*arguments)


def _pinned(shape: Sequence[int]) -> Tensor:
    """Uninitialized float32 host memory, pinned if the system allows it."""
    try:
        return torch.empty(shape, pin_memory=True)
    except RuntimeError:
        return torch.empty(shape)


def _recorded() -> torch.cuda.Event:
    """An event that follows the work of the current stream; the host sleeps while it waits for it."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


def _finished(block: Tensor, event: torch.cuda.Event) -> Tensor:
    """A block, when its copy has finished."""
    event.synchronize()
    return block
