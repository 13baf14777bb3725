"""How a signal of any length goes through a network that hears a few seconds at a time.

Signals are float32 ``(2, samples)``, estimates ``(sources, 2, samples)``, both on the device that
computes. ``advance`` is called after every window with nothing; it counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kmdx.networks.network import Network


def overlap_add(
    network: Network, signal: Tensor, length: int, stride: int, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Run overlapping segments and add them up under a triangular window.

    Segments start every ``stride`` samples as long as the start lies within the signal, also after
    one has reached its end. A network of fixed length hears a short segment with the song around it,
    zeros only beyond the song; any other hears it as short as it is.

    Parameters
    ----------
    network : Network
    signal : Tensor
        ``(2, samples)``.
    length, stride : int
        Samples of a segment, and between the starts of two.
    advance : callable
        Called after each segment.

    Returns
    -------
    Tensor
        ``(len(network.sources), 2, samples)``.

    Source: Demucs' ``apply_model`` with ``shifts=0, split=True`` and a transition power of 1.
    """
    samples = signal.shape[-1]
    rising = torch.arange(1, length // 2 + 1)
    falling = torch.arange(length - length // 2, 0, -1)
    window = torch.cat([rising, falling]).to(signal)
    window /= window.max()

    total = signal.new_zeros(len(network.sources), *signal.shape)
    weight = signal.new_zeros(samples)
    for start in range(0, samples, stride):
        end = min(start + length, samples)
        part = slice(start, end)
        total[..., part] += window[: end - start] * _hear(network, signal, start, end)
        weight[part] += window[: end - start]
        advance()
    return total.div_(weight)


def _hear(network: Network, signal: Tensor, start: int, end: int) -> Tensor:
    """Estimates ``(sources, 2, end − start)`` of one segment, heard at the length the network needs."""
    missing = 0 if network.length is None else network.length - (end - start)
    first = start - missing // 2
    last = end + missing - missing // 2
    context = signal[:, max(first, 0) : last]
    padded = F.pad(context, (max(-first, 0), max(last - signal.shape[-1], 0)))
    estimate = network(padded[None])[0]
    return estimate[..., start - first : end - first]


def trim_and_join(
    network: Network, signal: Tensor, chunk: int, trim: int, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Run chunks side by side, drop ``trim`` samples at both ends of each and join the rest.

    The signal gets ``trim`` zeros before it and, behind it, zeros up to a whole number of chunks and
    ``trim`` more; one chunk more than needed when it divides evenly.

    Parameters
    ----------
    network : Network
    signal : Tensor
        ``(2, samples)``.
    chunk, trim : int
        Samples of a chunk, and dropped at each of its ends.
    advance : callable
        Called after each chunk.

    Returns
    -------
    Tensor
        ``(len(network.sources), 2, samples)``.

    Source: the published submission, which has it from KUIELab-MDX-Net.
    """
    samples = signal.shape[-1]
    keep = chunk - 2 * trim
    padding = keep - samples % keep
    padded = F.pad(signal, (trim, padding + trim))
    pieces = []
    for start in range(0, samples + padding, keep):
        pieces.append(network(padded[None, :, start : start + chunk])[0, ..., trim : chunk - trim])
        advance()
    return torch.cat(pieces, dim=-1)[..., :samples]
