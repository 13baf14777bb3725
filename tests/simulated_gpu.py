"""A GPU for tests: its streams are queues whose work is done as late, or as early, as their events allow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

GPU = torch.device("cuda", 0)
MAKERS = ("arange", "linspace", "ones")  # functions of torch that make tensors on a given device


class Gpu:
    """Replaces what ``kmdx`` uses of ``torch.cuda``. Work on the default stream is always late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_early: bool = False) -> None:
        self.is_early = is_early
        self.waits: list[str] = []  # copies for which the host had to wait
        self.pinned: list[int] = []  # samples of each pinned block
        self.can_pin = True
        self.lock = threading.RLock()
        self.default = Stream(self)
        self._local = threading.local()
        Simulated.gpu = self
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: Event(self))
        monkeypatch.setattr(torch.cuda, "stream", self._switched)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch, "empty", self._empty(torch.empty))
        for name in MAKERS:
            monkeypatch.setattr(torch, name, self._maker(getattr(torch, name)))

    @property
    def current(self) -> Stream:
        """The stream that this thread uses."""
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def _switched(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        yield
        self._local.stream = before

    def _empty(self, empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            if not pin_memory:
                return empty(*arguments, **options)
            if not self.can_pin:
                raise RuntimeError("CUDA error: out of memory")
            tensor = empty(*arguments, **options).fill_(torch.nan)
            self.pinned.append(tensor.numel())
            return tensor.as_subclass(Pinned)

        return made

    def _maker(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.as_subclass(OnGpu) if device == GPU else tensor

        return made

    def computing(self, values: Tensor, before: Callable[[], object] = lambda: None) -> Tensor:
        """A tensor that the default stream will fill with these values, after it has done ``before``."""
        tensor = torch.full_like(values, torch.nan)

        def compute() -> None:
            before()
            tensor.copy_(values)

        self.default.add(compute)
        return tensor.as_subclass(OnGpu)


class Stream:
    """Work that is done in its order."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.work: deque[Callable[[], object]] = deque()

    def add(self, work: Callable[[], object]) -> None:
        with self.gpu.lock:
            self.work.append(work)
        if self.gpu.is_early and self is not self.gpu.default:
            self.finish()

    def finish(self) -> None:
        with self.gpu.lock:
            while self.work:
                self.work.popleft()()

    def record_event(self) -> Event:
        event = Event(self.gpu)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.add(event.synchronize)


class Event:
    """A place in a stream."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.is_done = False

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.gpu.current
        self.stream.add(self._done)

    def _done(self) -> None:
        self.is_done = True

    def synchronize(self) -> None:
        with self.gpu.lock:
            while not self.is_done:
                self.stream.work.popleft()()


class Simulated(torch.Tensor):
    """Memory in which copies to or from the GPU are work of the current stream."""

    gpu: Gpu

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        between = {isinstance(each, OnGpu) for each in args if isinstance(each, Tensor)} == {True, False}
        if function is Tensor.copy_ and between:
            return _copied(args[0], args[1], function, kwargs)
        if function is Tensor.to and isinstance(args[0], Pinned) and args[1] == GPU:
            with torch._C.DisableTorchFunctionSubclass():
                made = torch.full(args[0].shape, torch.nan).as_subclass(OnGpu)
            return _copied(made, args[0], function, kwargs)
        if function is Tensor.to and isinstance(args[0], OnGpu) and args[1] == GPU:
            return args[0]
        is_set = function is Tensor.__setitem__ and not isinstance(args[0], OnGpu)
        is_read = function in (Tensor.cpu, Tensor.item, Tensor.numpy) and isinstance(args[0], OnGpu)
        if is_read or (is_set and isinstance(args[2], OnGpu)):
            cls.gpu.waits.append(function.__name__)
        if any(isinstance(each, OnGpu) for each in args):
            cls.gpu.current.finish()  # it uses the results of earlier work
        return super().__torch_function__(function, types, args, kwargs)


class OnGpu(Simulated):
    """Memory of the GPU."""

    device = GPU  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]


class Pinned(Simulated):
    """Pinned memory of the host."""


def _copied(target: Tensor, source: Tensor, function: Any, kwargs: Any) -> Tensor:
    """Copy between the GPU and the host."""
    to, values = (each.as_subclass(Tensor) for each in (target, source))
    is_pinned = isinstance(target, Pinned) or isinstance(source, Pinned)
    gpu = Simulated.gpu
    gpu.current.add(lambda: to.copy_(values))
    if not (is_pinned and kwargs.get("non_blocking")):
        gpu.waits.append(function.__name__)
        gpu.current.finish()
    return target
