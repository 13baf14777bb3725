"""Separate an hour of stereo on the CPU and print time, memory and errors: ``python -m benchmarks.hour``.

The songs, concatenated and repeated, become one file of an hour. ``kmdx separate`` separates it with the
htdemucs plan at ``--speed fast``, from file to file; the peak of resident memory is printed. The stems are
then compared with pieces of the hour that are short enough for memory and are separated on their own. A piece
has the hour's level and starts where a window of the hour starts. Its margins are not compared, because they
lack windows of the hour. Everything runs in one process, so that it uses the same kernels.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import torch
from numpy.typing import NDArray

from benchmarks import length
from kmdx import Separator, synthetic, terminal
from kmdx.challenge import RATE
from kmdx.errors import KmdxError
from kmdx.nodes import Node, Normalize, Sum
from kmdx.plan import Plan
from kmdx.windows import OverlapAdd

BLOCK = 2**20  # samples of a file to read at a time
WINDOWS = 16  # windows of a piece
OPTIONS = ("--speed", "fast", "--format", "float32")


class Piece(NamedTuple):
    """A part of a song to separate, and the part of it to compare with the whole, in samples."""

    begin: int
    end: int
    first: int
    last: int


def write(path: Path, songs: Sequence[Path], samples: int) -> None:
    """Write a number of stereo samples: repeated songs, or a synthetic song."""
    with sf.SoundFile(path, "w", RATE, 2, "PCM_16") as file:
        for block in _blocks(songs, samples):
            file.write(block[: samples - file.tell()])


def _blocks(songs: Sequence[Path], samples: int) -> itertools.chain[NDArray[np.float32]]:
    """Blocks of the repeated songs with a total of at least ``samples``."""
    if not songs:
        return itertools.chain(synthetic.phrases(samples / RATE, RATE))
    read = []
    for song in songs:
        block, rate = sf.read(song, dtype="float32", always_2d=True)
        if (rate, block.shape[1]) != (RATE, 2) or not len(block):
            raise KmdxError(f"{song}: expected 2 channels at {RATE} Hz, not {block.shape[1]} at {rate} Hz")
        read.append(block)
    times = -(-samples // sum(map(len, read)))
    return itertools.chain.from_iterable(itertools.repeat(read, times))


def level(song: Path) -> tuple[float, float]:
    """Mean and standard deviation of a file's mono sum, in float64."""
    with sf.SoundFile(song) as file:
        count = len(file)
        mono = [block.mean(1) for block in file.blocks(BLOCK, dtype="float32", always_2d=True)]
    mean = sum(float(block.sum(dtype=np.float64)) for block in mono) / count
    squares = sum(float(np.square(block.astype(np.float64) - mean).sum()) for block in mono)
    return mean, (squares / (count - 1)) ** 0.5


def pieces(plan: Plan, samples: int) -> list[Piece]:
    """Three pieces of a song: its beginning, its middle and its end."""
    (chunking,) = {use.chunking for use in plan.networks.values()}
    if not isinstance(chunking, OverlapAdd):
        raise KmdxError(f"{plan.name}: expected networks with overlap_add")
    # At most: each network loses one window at the ends of its input.
    margin = len(plan.runs(plan.nodes)) * chunking.length
    stride, windows = chunking.stride, chunking.windows(samples)
    found = []
    for begin, end in (
        (0, WINDOWS * stride),
        (windows // 2 * stride, (windows // 2 + WINDOWS) * stride),
        (max(0, windows - WINDOWS) * stride, samples),
    ):
        end = min(end, samples)
        first, last = begin + margin if begin else 0, end if end == samples else end - margin
        if first < last:
            found.append(Piece(begin, end, first, last))
    return found


def without_levels(plan: Plan) -> Plan:
    """The same plan for input that is already normalized, without normalizing and denormalizing."""

    def flat(node: Node) -> Node:
        match node:
            case Normalize(signal):
                return Sum({signal: 1.0})
            case Sum(terms, _):
                return Sum(terms)
        return node

    return replace(plan, nodes={name: flat(node) for name, node in plan.nodes.items()})


def compare(song: Path, output: Path, separator: Separator) -> dict[str, float]:
    """The largest difference between samples of a song's stems and those of its pieces, by stem.

    Raises :class:`KmdxError` if the song is too short for any piece, or its plan does not use overlapping
    windows.
    """
    mean, std = level(song)
    samples = sf.info(song).frames
    alone = separator.with_plan(without_levels(separator.plan))
    found = pieces(separator.plan, samples)
    if not found:
        raise KmdxError(f"{samples / RATE:g} s are too short to compare pieces")
    largest = dict.fromkeys(separator.stems, 0.0)
    for piece in found:
        normalized = (torch.from_numpy(_read(song, piece.begin, piece.end)) - mean) / std
        for stem, estimate in alone.separate(normalized.numpy(), RATE).items():
            inner = torch.from_numpy(estimate[piece.first - piece.begin : piece.last - piece.begin])
            whole = _read(output / song.stem / f"{stem}.wav", piece.first, piece.last)
            difference = np.abs(inner.mul_(std).add_(mean).numpy() - whole).max()
            largest[stem] = max(largest[stem], float(difference))
        part = " to ".join(f"{place / RATE:.1f}" for place in (piece.first, piece.last))
        print(f"{part} s: the largest differences so far are {largest}", flush=True)
    return largest


def _read(path: Path, begin: int, end: int) -> NDArray[np.float32]:
    samples: NDArray[np.float32] = sf.read(path, start=begin, stop=end, dtype="float32", always_2d=True)[0]
    return samples


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("songs", nargs="*", type=Path, metavar="SONG", help="stereo files at 44.1 kHz")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ensemble", default="htdemucs", help="a plan whose networks all use overlap_add")
    parser.add_argument("--folder", type=Path, help="folder of the weight files")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        os.environ["KMDX_MODELS"] = str(options.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        song = folder / "song.wav"
        write(song, options.songs, round(60 * options.minutes * RATE))
        seconds, peak = length.separate(song, folder, options.ensemble, *OPTIONS)
        print(
            f"{options.minutes:g} min in {seconds:.0f} s, {seconds / 60 / options.minutes:.3f} × its length, "
            f"{peak / 1e9:.2f} GB at most",
            flush=True,
        )
        compare(song, folder, Separator(options.ensemble, device="cpu", speed="fast"))


if __name__ == "__main__":
    terminal.run(main)
