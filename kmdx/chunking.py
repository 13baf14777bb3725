"""How a signal of any length goes through a network that hears a few seconds at a time.

A span of many windows is brought to the device at once, its windows run in batches and are put together
there, and what is complete goes back: memory does not grow with the song. The estimates do not depend on how
the windows were grouped. ``advance`` is called without arguments after every window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kmdx.device import Runner
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
    """Run overlapping segments and add them up under a triangular window.

    Segments start every ``stride`` samples as long as the start lies within the signal, also after
    one has reached its end. A network of fixed length hears a short segment with the song around it,
    zeros only beyond the song; any other hears it as short as it is.

    Parameters
    ----------
    runner : Runner
        The network.
    signal : Signal
        ``(2, samples)``.
    estimates : sequence of Signal
        ``(2, samples)`` for each source, to be filled.
    length, stride : int
        Samples of a segment, and between the starts of two.
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
    left_over = torch.zeros(len(estimates) + 1, 2, 0, device=runner.device)  # by the segments before
    for group in _groups(starts, max(1, (SPAN - length) // stride)):
        first, last = group[0], group[-1]
        complete = min(last + stride, samples)  # no later segment reaches what is before it
        end = min(last + length, samples)
        sums = torch.zeros(len(estimates) + 1, 2, end - first, device=runner.device)
        sums[..., : left_over.shape[-1]] = left_over
        total, weight = sums[:-1], sums[-1]  # the weights stand twice, once for each channel
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
    """Run chunks side by side, drop ``trim`` samples at both ends of each and join the rest.

    The signal gets ``trim`` zeros before it and, behind it, zeros up to a whole number of chunks and
    ``trim`` more; one chunk more than needed when it divides evenly.

    Parameters
    ----------
    runner : Runner
        The network.
    signal : Signal
        ``(2, samples)``.
    estimates : sequence of Signal
        ``(2, samples)`` for each source, to be filled.
    chunk, trim : int
        Samples of a chunk, and dropped at each of its ends.
    advance : callable
        Called after each chunk.

    Source: the published submission, which has it from KUIELab-MDX-Net.
    """
    samples = signal.length
    keep = chunk - 2 * trim
    starts = range(0, samples + 1, keep)  # one more where they divide evenly
    for group in _groups(starts, max(1, SPAN // keep)):
        heard = signal.span(group[0] - trim, group[-1] - trim + chunk, runner.device)
        windows = [heard[:, start - group[0] :][:, :chunk] for start in group]
        for start, estimate in zip(group, _batches(runner, windows, advance), strict=True):
            kept = estimate[..., trim : chunk - trim][..., : max(0, samples - start)]
            _put(kept, estimates, start)
        _release(signal, *estimates)


def _run(
    runner: Runner, signal: Signal, starts: Sequence[int], length: int, advance: Advance
) -> Iterator[tuple[int, Tensor]]:
    """Estimates ``(sources, 2, …)`` of segments, each heard at the length that the network needs."""
    samples = signal.length
    fixed = runner.network.length
    places = []  # of each segment: where it begins, what is heard before it, its own samples
    for start in starts:
        own = min(length, samples - start)
        missing = 0 if fixed is None else fixed - own
        places.append((start, missing // 2, own, own + missing))
    first = min(start - before for start, before, _, _ in places)
    end = max(start - before + heard for start, before, _, heard in places)
    span = signal.span(first, end, runner.device)
    windows = [span[:, start - before - first :][:, :heard] for start, before, _, heard in places]
    for (start, before, own, _), estimate in zip(places, _batches(runner, windows, advance), strict=True):
        yield start, estimate[..., before : before + own]


def _batches(runner: Runner, windows: Sequence[Tensor], advance: Advance) -> Iterator[Tensor]:
    """Run windows of one length together, as many as the runner takes; one estimate for each, in order."""
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
    """Write ``(sources, 2, n)`` into the signals they belong to."""
    for estimate, source in zip(estimates, values, strict=True):
        estimate.put(start, source)


def _release(*signals: Signal) -> None:
    for signal in signals:
        signal.release()
