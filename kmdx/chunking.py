"""Pass a signal of any length through a network that takes a few seconds at a time.

A span of many windows is copied to the device, its windows run in batches and are combined there, and
finished samples are copied back while the next span runs, so memory does not grow with the song. The
estimates do not depend on how windows are grouped. ``advance`` is called without arguments after every
window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kmdx.devices import MAX_BATCH, Runner
from kmdx.signals import Signal
from kmdx.transfers import Background

SPAN = 2**22  # samples on the device at a time: 95 s at 44.1 kHz

TINY = 1e-12  # instead of a weight of 0

Advance = Callable[[], None]
Segment = tuple[int, Tensor, Tensor]
"""The start of a segment, its estimates ``(sources, 2, n)``, and the weights of its samples."""


def overlap_add(
    runner: Runner,
    signal: Signal,
    estimates: Sequence[Signal],
    length: int,
    stride: int,
    advance: Advance = lambda: None,
) -> None:
    """Run overlapping segments and add them with triangular weights.

    Segments start every ``stride`` samples until the start would be beyond the signal, even if an earlier
    segment has reached its end. For a network of fixed length, a short segment is extended with the song
    around it, and with zeros beyond the song; other networks process it as it is.

    Parameters
    ----------
    runner : Runner
        The network.
    signal : Signal
        ``(2, samples)``.
    estimates : sequence of Signal
        Outputs, ``(2, samples)`` for each source.
    length, stride : int
        Samples of a segment, and between the starts of two segments.
    advance : callable
        Called after each segment.
    """
    samples = signal.length
    rising = torch.arange(1, length // 2 + 1, device=runner.device)
    falling = torch.arange(length - length // 2, 0, -1, device=runner.device)
    weights = torch.cat([rising, falling]).float()
    weights /= weights.max()

    def segments(group: Sequence[int]) -> Iterator[Segment]:
        for start, estimate in _run(runner, signal, group, length, advance):
            yield start, estimate, weights[: estimate.shape[-1]]

        _release(signal)

    with Background(runner.device, estimates[0].tensor.device, most=2) as background:
        _add(segments, range(0, samples, stride), samples, length, estimates, background)


def fade_and_add(
    runner: Runner,
    signal: Signal,
    estimates: Sequence[Signal],
    chunk: int,
    stride: int,
    border: int,
    advance: Advance = lambda: None,
) -> None:
    """Run overlapping chunks, fade each in and out over a tenth of its length, and add them.

    The first chunk does not fade in, and the last does not fade out. Chunks start every ``stride`` samples
    until the start would be beyond the extended signal. The last ones are extended by reflection if they have
    more than half of a chunk, else with zeros.

    Parameters
    ----------
    runner : Runner
        The network.
    signal : Signal
        ``(2, samples)``.
    estimates : sequence of Signal
        Outputs, ``(2, samples)`` for each source.
    chunk, stride : int
        Samples of a chunk, and between the starts of two chunks.
    border : int
        Samples by which the signal is extended at both ends by reflection; fewer than it has.
    advance : callable
        Called after each chunk.
    """
    samples = signal.length + 2 * border
    starts = range(0, samples, stride)
    fade = chunk // 10
    rising = torch.linspace(0, 1, fade, device=runner.device).clamp_(min=TINY)
    middle = torch.ones(chunk, device=runner.device)

    def segments(group: Sequence[int]) -> Iterator[Segment]:
        sizes = [min(chunk, samples - start) for start in group]
        span = _reflected(signal, group[0] - border, group[-1] + sizes[-1] - border, runner.device)
        windows = [
            _fill(span[:, start - group[0] :][:, :size], chunk)
            for start, size in zip(group, sizes, strict=True)
        ]
        for start, size, estimate in zip(group, sizes, _batches(runner, windows, advance), strict=True):
            weights = middle.clone()
            if start != starts[0]:
                weights[:fade] = rising
            if start != starts[-1] or start == starts[0]:
                weights[chunk - fade :] = rising.flip(0)
            yield start, estimate[..., :size], weights[:size]
        _release(signal)

    with Background(runner.device, estimates[0].tensor.device, most=2) as background:
        _add(segments, starts, samples, chunk, estimates, background, border)


def _add(
    segments: Callable[[Sequence[int]], Iterator[Segment]],
    starts: range,
    samples: int,
    length: int,
    estimates: Sequence[Signal],
    background: Background,
    border: int = 0,
) -> None:
    """Add weighted segments, divide by the sum of their weights, and drop a border at both ends.

    ``segments`` yields those that begin at some of the ``starts``, each ``length`` samples or shorter.
    ``samples`` includes both borders.
    """
    left_over: Tensor | None = None  # from earlier segments
    for group in _groups(starts, max(1, (SPAN - length) // starts.step)):
        first, last = group[0], group[-1]
        complete = min(last + starts.step, samples)  # later segments do not change earlier samples
        sums: Tensor | None = None
        for start, estimate, weights in segments(group):
            if sums is None:
                shape = (len(estimates) + 1, 2, min(last + length, samples) - first)
                sums = estimate.new_zeros(shape)  # the weights are stored twice, once for each channel
                if left_over is not None:
                    sums[..., : left_over.shape[-1]] = left_over
            part = slice(start - first, start - first + estimate.shape[-1])
            sums[:-1, :, part] += weights * estimate
            sums[-1, :, part] += weights
        assert sums is not None
        left_over = sums[..., complete - first :].clone()
        begin, end = max(first, border), min(complete, samples - border)
        if begin < end:
            finished = sums[..., begin - first : end - first]
            background.submit(_put, finished[:-1].div_(finished[-1]), estimates, begin - border)
        background.submit(_release, *estimates)


def trim_and_join(
    runner: Runner,
    signal: Signal,
    estimates: Sequence[Signal],
    chunk: int,
    trim: int,
    advance: Advance = lambda: None,
) -> None:
    """Run adjacent chunks, drop ``trim`` samples at both ends of each, and join them.

    The signal is padded with ``trim`` zeros at its start and, at its end, with zeros up to a whole number of
    chunks plus ``trim``. If the chunks divide it evenly, one more chunk than needed runs.

    Parameters
    ----------
    runner : Runner
        The network.
    signal : Signal
        ``(2, samples)``.
    estimates : sequence of Signal
        Outputs, ``(2, samples)`` for each source.
    chunk, trim : int
        Samples of a chunk, and samples dropped at each end.
    advance : callable
        Called after each chunk.
    """
    samples = signal.length
    keep = chunk - 2 * trim
    starts = range(0, samples + 1, keep)  # one more if they divide evenly
    with Background(runner.device, estimates[0].tensor.device, most=MAX_BATCH) as background:
        for group in _groups(starts, max(1, SPAN // keep)):
            span = signal.span(group[0] - trim, group[-1] - trim + chunk, runner.device)
            windows = [span[:, start - group[0] :][:, :chunk] for start in group]
            for start, estimate in zip(group, _batches(runner, windows, advance), strict=True):
                kept = estimate[..., trim : chunk - trim][..., : max(0, samples - start)]
                background.submit(_put, kept, estimates, start)
            _release(signal)
            background.submit(_release, *estimates)


def _run(
    runner: Runner, signal: Signal, starts: Sequence[int], length: int, advance: Advance
) -> Iterator[tuple[int, Tensor]]:
    """Estimates ``(sources, 2, …)`` of segments, each extended to the length that the network needs."""
    samples = signal.length
    fixed = runner.network.length
    places = []  # for each segment: start, samples added before it, its own samples, input samples
    for start in starts:
        own = min(length, samples - start)
        missing = 0 if fixed is None else fixed - own
        places.append((start, missing // 2, own, own + missing))
    first = min(start - before for start, before, _, _ in places)
    end = max(start - before + size for start, before, _, size in places)
    span = signal.span(first, end, runner.device)
    windows = [span[:, start - before - first :][:, :size] for start, before, _, size in places]
    for (start, before, own, _), estimate in zip(places, _batches(runner, windows, advance), strict=True):
        yield start, estimate[..., before : before + own]


def _reflected(signal: Signal, first: int, end: int, device: torch.device) -> Tensor:
    """Samples ``first`` to ``end`` of a signal that is reflected at both ends, ``(2, end - first)``."""
    samples = signal.length
    before = signal.span(1, max(1, 1 - first), device).flip(-1)
    inside = signal.span(max(first, 0), max(first, 0, min(end, samples)), device)
    after = signal.span(min(2 * samples - end, samples) - 1, 2 * samples - 1 - max(first, samples), device)
    return torch.cat([before, inside, after.flip(-1)], dim=-1)


def _fill(window: Tensor, length: int) -> Tensor:
    """Extend a window by reflection if it has more than half of its length, else with zeros."""
    missing = length - window.shape[-1]
    if not missing:
        return window
    if window.shape[-1] > length // 2:
        return F.pad(window[None], (0, missing), mode="reflect")[0]
    return F.pad(window, (0, missing))


def _batches(runner: Runner, windows: Sequence[Tensor], advance: Advance) -> Iterator[Tensor]:
    """Run windows in batches of equal length, as large as the runner allows; one estimate each, in order."""
    position = 0
    while position < len(windows):
        length = windows[position].shape[-1]
        batch = []
        for window in windows[position : position + runner.size(length)]:
            if window.shape[-1] != length:
                break
            batch.append(window)
        count = len(batch)
        batch += batch[:1] * (runner.filled(count, length) - count)
        for estimate in runner(batch)[:count]:
            yield estimate
            advance()
        position += count


def _groups(starts: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(starts), size):
        yield starts[begin : begin + size]


def _put(values: Tensor, estimates: Sequence[Signal], start: int) -> None:
    """Write ``(sources, 2, n)`` into the signals of the sources."""
    for estimate, source in zip(estimates, values, strict=True):
        estimate.put(start, source)


def _release(*signals: Signal) -> None:
    for signal in signals:
        signal.release()
