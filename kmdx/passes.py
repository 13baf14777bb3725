"""Variants of a song whose estimates are averaged: rotated, with swapped channels, or with inverted polarity.

Source: ``bigshifts`` and test-time augmentation of ZFTurbo's Music-Source-Separation-Training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kmdx.signals import Signal


@dataclass(frozen=True)
class Variant:
    """A variant of a stereo signal."""

    shift: int = 0  # samples by which it is rotated to the right
    is_swapped: bool = False
    is_inverted: bool = False
    """``is_swapped`` and ``is_inverted``: whether its channels are swapped, and its polarity inverted."""

    def of(self, signal: Signal) -> Signal:
        """Make this variant of a signal; the signal itself if nothing changes."""
        if self == Variant():
            return signal
        made = signal.new_empty()
        shift = self.shift % signal.length
        start = shift
        for block in signal.blocks():
            part = block.flip(0) if self.is_swapped else block
            part = -part if self.is_inverted else part
            room = max(0, signal.length - start)  # what is beyond the end comes first
            made.put(start, part[:, :room])
            made.put(max(0, start - signal.length), part[:, room:])
            start += part.shape[-1]
            made.release()
        return made

    def undone(self, signal: Signal) -> Signal:
        """The signal of which ``signal`` is this variant."""
        return replace(self, shift=-self.shift).of(signal)


def variants(samples: int, shifts: int, tta: bool) -> Iterator[Variant]:
    """All variants of a signal of this length; the first is the signal itself."""
    for index in range(shifts):
        shift = index * (samples // shifts)
        yield Variant(shift)
        if tta:
            yield Variant(shift, is_swapped=True)
            yield Variant(shift, is_inverted=True)
