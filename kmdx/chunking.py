"""Pass a signal of any length through a network that takes a few seconds at a time.

A span of many windows is copied to the device, its windows run in batches and are combined there, and
finished samples are copied back, so memory does not grow with the song. The estimates do not depend on how
windows are grouped. ``advance`` is called without arguments after every window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kmdx.devices import Runner
from kmdx.signals import Signal

SPAN = 2**22  # samples on the device at a time: 95 s at 44.1 kHz

Advance = Callable[[], None]


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

    Source: Demucs' ``apply_model`` with ``shifts=0, split=True`` and a transition power of 1.
    """
    samples = signal.length
    rising = torch.arange(1, length // 2 + 1)
    falling = torch.arange(length - length // 2, 0, -1)
    window = torch.cat([rising, falling]).to(runner.device, torch.float32)
    window /= window.max()

    starts = range(0, samples, stride)
    left_over = torch.zeros(len(estimates) + 1, 2, 0, device=runner.device)  # from earlier segments
    for group in _groups(starts, max(1, (SPAN - length) // stride)):
        first, last = group[0], group[-1]
        complete = min(last + stride, samples)  # later segments do not change earlier samples
        end = min(last + length, samples)
        sums = torch.zeros(len(estimates) + 1, 2, end - first, device=runner.device)
        sums[..., : left_over.shape[-1]] = left_over
        total, weight = sums[:-1], sums[-1]  # the weights are stored twice, once for each channel
        for start, estimate in _run(runner, signal, group, length, advance):
            part = slice(start - first, start - first + estimate.shape[-1])
            total[..., part] += window[: estimate.shape[-1]] * estimate
            weight[:, part] += window[: estimate.shape[-1]]
        done = complete - first
        left_over = sums[..., done:].clone()
        _put(total[..., :done].div_(weight[:, :done]), estimates, first)
        _release(signal, *estimates)


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

    Source: the published submission, which follows KUIELab-MDX-Net.
    """
    samples = signal.length
    keep = chunk - 2 * trim
    starts = range(0, samples + 1, keep)  # one more if they divide evenly
    for group in _groups(starts, max(1, SPAN // keep)):
        span = signal.span(group[0] - trim, group[-1] - trim + chunk, runner.device)
        windows = [span[:, start - group[0] :][:, :chunk] for start in group]
        for start, estimate in zip(group, _batches(runner, windows, advance), strict=True):
            kept = estimate[..., trim : chunk - trim][..., : max(0, samples - start)]
            _put(kept, estimates, start)
        _release(signal, *estimates)


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
        for estimate in runner(batch):
            yield estimate
            advance()
        position += len(batch)


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
