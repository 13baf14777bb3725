"""The songs of a data set: which it contains, which are missing, and how their folders are written."""

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
    from recipes.mini.synthesizer.song import RenderedSong

SPLITS = ("train", "test")
DESCRIPTION = "song.yaml"


@dataclass(frozen=True)
class SongSpec:
    """What identifies a song: with the same package versions, it determines every byte."""

    seed: int  # the data set's
    split: str  # one of :data:`SPLITS`
    number: int  # within the split, from 1
    seconds: float  # approximate length

    @property
    def name(self) -> str:
        """A name that is unique within the data set, across splits."""
        return f"synthetic {'test ' if self.split == 'test' else ''}{self.number:03d}"


def plan(seed: int, songs: int, test_songs: int, seconds: float) -> list[SongSpec]:
    """List the songs of a data set, of which ``test_songs`` are in ``test``, each of about ``seconds``.

    Asking for more songs does not change the first ones. Raises :class:`KmdxError` if a number is out of
    range.
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
        SongSpec(seed, split, number, seconds)
        for split, count in counts.items()
        for number in range(1, count + 1)
    ]


def missing(output: Path, songs: Sequence[SongSpec]) -> list[SongSpec]:
    """The songs that have not been rendered yet.

    Raises :class:`KmdxError` if a song's folder contains something else.
    """
    return [song for song in songs if not _exists(output, song)]


def render(
    output: Path, songs: Sequence[SongSpec], jobs: int, make: Callable[[SongSpec], RenderedSong]
) -> Iterator[SongSpec]:
    """Render songs, ``jobs`` at a time in their own processes; yields each song when its folder is written.

    ``make`` renders a song; it is a module's function, because other processes import it. After Ctrl-C, or if
    the generator is closed early, songs in progress are finished and no more started. Raises
    :class:`KmdxError` if a song cannot be rendered or written.
    """
    # Submit only as many as can run: after Ctrl-C the pool would also finish its queue.
    # Spawn: a fork would copy locks that are held by threads of libraries loaded here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_ignore_interrupts) as pool:
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
            raise KmdxError("a song's process was killed, perhaps out of memory; try fewer --jobs") from error


def write(output: Path, song: SongSpec, make: Callable[[SongSpec], RenderedSong]) -> None:
    """Render a song and write its folder, completely or not at all.

    Raises :class:`KmdxError` if it cannot be rendered or written.
    """
    target = output / song.split / song.name
    partial = target.with_name(f".{song.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
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


def _exists(output: Path, song: SongSpec) -> bool:
    """Whether the folder contains this song. It is complete, because folders are renamed into place."""
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
        expected = f"seed {song.seed} and --seconds {song.seconds:g}"
        raise KmdxError(
            f"{folder}: expected a complete song with {expected}; move it away or choose another folder"
        )
    return True


def _ignore_interrupts() -> None:
    """Let the parent process handle Ctrl-C. Programs that are run here inherit this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
