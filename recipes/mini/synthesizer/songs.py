"""A data set's songs: which there are, which are still to be made, and their folders."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from kmdx import audio
from kmdx.challenge import MIXTURE, RATE, STEMS
from kmdx.documents import read_yaml
from kmdx.errors import DocumentError, KmdxError

if TYPE_CHECKING:
    from recipes.mini.synthesizer.song import Record

SPLITS = ("train", "test")
DESCRIPTION = "song.yaml"


@dataclass(frozen=True)
class Song:
    """What a song is made from: with the same packages, its every byte.

    Attributes
    ----------
    seed : int
        The data set's.
    split : str
        One of :data:`SPLITS`.
    number : int
        From 1, in its split.
    seconds : float
        About how long it is.
    """

    seed: int
    split: str
    number: int
    seconds: float

    @property
    def name(self) -> str:
        """The same for no two songs of a data set, in whichever split they are."""
        return f"synthetic {'test ' if self.split == 'test' else ''}{self.number:03d}"


def plan(seed: int, songs: int, test_songs: int, seconds: float) -> list[Song]:
    """The songs of a data set; more songs leave those that there are as they are.

    Parameters
    ----------
    seed : int
    songs, test_songs : int
        In all, and of them in ``test``.
    seconds : float
        About how long each is.

    Raises
    ------
    KmdxError
        If there are no songs, or more in ``test`` than in all, or they are too short for a phrase.
    """
    if songs < 1:
        raise KmdxError(f"--songs {songs}: expected 1 or more")
    if not 0 <= test_songs <= songs:
        raise KmdxError(f"--test-songs {test_songs}: expected 0 to {songs}, the number of all songs")
    if not 8 <= seconds <= 600:
        raise KmdxError(f"--seconds {seconds:g}: expected 8 to 600")
    if seed < 0:
        raise KmdxError(f"--seed {seed}: expected 0 or more")
    counts = {"train": songs - test_songs, "test": test_songs}
    return [
        Song(seed, split, number, seconds)
        for split, count in counts.items()
        for number in range(1, count + 1)
    ]


def missing(output: Path, songs: Sequence[Song]) -> list[Song]:
    """Those of the songs that are not there yet.

    Raises
    ------
    KmdxError
        If a folder of a song's name holds something else.
    """
    return [song for song in songs if not _is_there(output, song)]


def render(output: Path, songs: Sequence[Song], jobs: int, make: Callable[[Song], Record]) -> Iterator[Song]:
    """Make songs in parallel, each in a process of one thread; gives each when its folder is there.

    When it is closed early, or Ctrl-C comes, songs begun are finished and no more are begun.

    Parameters
    ----------
    output : Path
    songs : sequence of Song
    jobs : int
        Songs made at a time.
    make : callable
        Makes a song; a function of a module, as processes import it.

    Raises
    ------
    KmdxError
        If a song cannot be made or written.
    """
    # No more are submitted than run, as the pool would also finish what it has queued.
    # Spawned: a fork would copy the threads' locks of libraries that are loaded here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_finish_what_is_begun) as pool:
        remaining = iter(songs)
        running = {pool.submit(write, output, song, make): song for song in islice(remaining, jobs)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    song = running.pop(future)
                    future.result()
                    for following in islice(remaining, 1):
                        running[pool.submit(write, output, following, make)] = following
                    yield song
        except BrokenProcessPool as error:
            raise KmdxError("a song's process was killed: out of memory? Try fewer --jobs") from error


def write(output: Path, song: Song, make: Callable[[Song], Record]) -> None:
    """Make a song and write its folder, whole or not at all.

    Raises
    ------
    KmdxError
        If it cannot be made or written.
    """
    target = output / song.split / song.name
    partial = target.with_name(f".{song.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        try:
            record = make(song)
            sounds = {**record.stems, MIXTURE: record.mixture}
            audio.write_all({partial / f"{name}.wav": sound for name, sound in sounds.items()}, RATE)
            content = {**asdict(song), **record.description}
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            (partial / DESCRIPTION).write_text(text, encoding="utf-8")
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise KmdxError(f"{error.filename or target}: {error.strerror}") from error


def _is_there(output: Path, song: Song) -> bool:
    """Whether a song's folder holds this song; as folders are renamed into place, it is whole."""
    folder = output / song.split / song.name
    if not folder.exists():
        return False
    files = [folder / f"{name}.wav" for name in (MIXTURE, *STEMS)]
    try:
        content = read_yaml(folder / DESCRIPTION)
    except DocumentError:
        content = None
    found = {key: content.get(key) for key in asdict(song)} if isinstance(content, dict) else {}
    if found != asdict(song) or not all(file.is_file() for file in files):
        expected = f"seed {song.seed}, about {song.seconds:g} s"
        raise KmdxError(f"{folder}: is not this song ({expected}); move it away, or choose another folder")
    return True


def _finish_what_is_begun() -> None:
    """Leave Ctrl-C to the process that hands out the songs; programs run here inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
