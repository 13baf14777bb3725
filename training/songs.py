"""Songs to train with: stems in folders, found and checked before anything else happens.

Layout
------
``DATA/<split>/<song>/<stem>.wav`` as in MUSDB18-HQ, or ``DATA/<song>/<stem>.wav``; flac and Ogg will do. A
stem without a file is silent; a ``mixture`` is not needed, since stems are summed anew. A folder of variants
holds the same songs at another pitch or tempo, in the same layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from evaluator.dataset import STEMS
from evaluator.sounds import Form, form_of
from kmdx.documents import read_yaml
from kmdx.errors import AudioError, KmdxWarning
from training.config import TrainingError

RATE = 44100  # Hz
SOUNDS = (".wav", ".flac", ".ogg")
TRAIN = "train"
VALIDATION = ("valid", "validation")
UNEVEN = 0.1  # seconds that stems of one song may differ in length without a word
MUSDB18 = Path(__file__).with_name("musdb18.yaml")


@dataclass(frozen=True)
class Stem:
    """A stem's file, with one or two channels at :data:`RATE`."""

    path: Path
    samples: int
    channels: int


@dataclass(frozen=True)
class Song:
    """A song: its stems by name, silent ones left out.

    Attributes
    ----------
    name : str
    stems : mapping of str to Stem
    variants : tuple of mapping
        The same at other pitches or tempos.
    """

    name: str
    stems: Mapping[str, Stem]
    variants: tuple[Mapping[str, Stem], ...] = field(default=())

    @property
    def samples(self) -> int:
        """Length of the longest stem."""
        return _samples(self.stems)

    @property
    def versions(self) -> tuple[Mapping[str, Stem], ...]:
        """The song as it is, and its variants."""
        return (self.stems, *self.variants)


@dataclass(frozen=True)
class Songs:
    """Songs to learn from and songs to validate with, no song in both."""

    training: tuple[Song, ...]
    validation: tuple[Song, ...]


def find(
    folders: Sequence[Path],
    source: str,
    shortest: int,
    validation: Sequence[str] = (),
    variants: Sequence[Path] = (),
) -> Songs:
    """Find songs and check them.

    Parameters
    ----------
    folders : sequence of Path
        Data sets; of each the split ``train`` where it has splits.
    source : str
        The stem that is to be estimated: at least one song of either kind must have it.
    shortest : int
        Samples that a song must have: one window.
    validation : sequence of str
        Names, or patterns of names, of songs to validate with, beside those in a split ``valid`` or
        ``validation``. Without either, MUSDB18's own fourteen.
    variants : sequence of Path
        Folders of variants.

    Raises
    ------
    TrainingError
        If a folder is missing or holds no songs, a stem cannot be read or has another rate, a song or a
        variant of one is too short, or there is nothing to train or to validate with.
    """
    found: dict[str, Song] = {}
    held: dict[str, Song] = {}
    for folder in folders:
        own, reserved = _of_folder(folder)
        for song in (*own, *reserved):
            if song.name in found or song.name in held:
                raise TrainingError(f"two songs are called {song.name!r}; one is in {folder}")
        found.update({song.name: song for song in own})
        held.update({song.name: song for song in reserved})

    patterns = list(validation)
    if not patterns and not held:
        patterns = [name for name in read_yaml(MUSDB18)["validation"] if name in found]
    for pattern in patterns:
        matching = [name for name in found if name == pattern] or [
            name for name in found if fnmatchcase(name, pattern)
        ]
        if not matching and not any(name == pattern or fnmatchcase(name, pattern) for name in held):
            raise TrainingError(f"no song to validate with is called {pattern!r}; there are {_some(found)}")
        held.update({name: found.pop(name) for name in matching})

    where = ", ".join(map(str, folders))
    if not held:
        raise TrainingError(
            f"no songs to validate with in {where}: put some into {folders[0] / VALIDATION[0]}, "
            "or name them with --validation"
        )
    if not found:
        raise TrainingError(f"no songs to train with in {where}: all of them are validated with")
    for what, songs in (("to train with", found), ("to validate with", held)):
        for song in songs.values():
            _long_enough(song.name, song.stems, shortest)
        if not any(source in song.stems for song in songs.values()):
            raise TrainingError(f"none of {len(songs)} songs {what} has {source}: {_some(songs)}")
    others = [_versions(folder) for folder in variants]
    for folder, version in zip(variants, others, strict=True):
        if not version.keys() & found.keys():
            raise TrainingError(f"{folder}: no variant of a song to train with: names must be the songs' own")
        for name in version.keys() & found.keys():
            _long_enough(f"{name} in {folder}", version[name], shortest)
    training = (
        Song(song.name, song.stems, tuple(version[name] for version in others if name in version))
        for name, song in found.items()
    )
    return Songs(tuple(training), tuple(held.values()))


def to_train_with(folder: Path) -> list[Song]:
    """Songs of a data set that are not set apart; raises :class:`TrainingError` if there are none."""
    own, _ = _of_folder(folder)
    if not own:
        raise TrainingError(f"{folder}: no songs to train with")
    return own


def contents(songs: Sequence[Song]) -> dict[str, list[dict[str, str]]]:
    """Lengths of the stems and sizes of their files, of each song's versions, to know them again by."""
    return {
        song.name: [
            {name: f"{stem.samples} samples, {_size(stem.path)} bytes" for name, stem in version.items()}
            for version in song.versions
        ]
        for song in songs
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror}") from error


def _samples(stems: Mapping[str, Stem]) -> int:
    return max(stem.samples for stem in stems.values())


def _long_enough(name: str, stems: Mapping[str, Stem], shortest: int) -> None:
    if _samples(stems) < shortest:
        raise TrainingError(
            f"{name} is shorter than a window: {_samples(stems) / RATE:.1f} s of "
            f"{shortest / RATE:.1f} s; leave it out, or train a network with fewer frames"
        )


def _of_folder(folder: Path) -> tuple[list[Song], list[Song]]:
    """Songs of a data set to train with, and those that it sets apart."""
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: not a folder")
    split = (folder / TRAIN).is_dir()
    own = _songs(folder / TRAIN if split else folder)
    reserved = [song for name in VALIDATION for song in _songs(folder / name)] if split else []
    if not own and not reserved:
        place = folder / TRAIN if split else folder
        raise TrainingError(
            f"{place}: no songs: expected folders with {', '.join(STEMS)} in wav, flac or Ogg"
        )
    return own, reserved


def _versions(folder: Path) -> dict[str, Mapping[str, Stem]]:
    own, reserved = _of_folder(folder)
    return {song.name: song.stems for song in (*own, *reserved)}


def _songs(folder: Path) -> list[Song]:
    if not folder.is_dir():
        return []
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    songs = [Song(path.name, _stems(path)) for path in folders]
    return [song for song in songs if song.stems]


def _stems(folder: Path) -> dict[str, Stem]:
    stems = {}
    for name in STEMS:
        files = [path for ending in SOUNDS if (path := folder / f"{name}{ending}").is_file()]
        if files:
            stems[name] = _stem(files[0])
    silent = [name for name in STEMS if name not in stems]
    if stems and silent:
        warnings.warn(f"{folder.name}: no {', '.join(silent)}: taken as silent", KmdxWarning, stacklevel=2)
    longest = max(stems.values(), key=lambda stem: stem.samples, default=None)
    for stem in stems.values():
        if longest is not None and longest.samples - stem.samples > UNEVEN * RATE:
            warnings.warn(
                f"{stem.path}: {stem.samples / RATE:.1f} s, where {longest.path.name} has "
                f"{longest.samples / RATE:.1f} s: cut off? taken as silent from there on",
                KmdxWarning,
                stacklevel=2,
            )
    return stems


def _stem(path: Path) -> Stem:
    try:
        form: Form = form_of(path)
    except AudioError as error:
        raise TrainingError(str(error)) from error
    if form.rate != RATE:
        raise TrainingError(f"{path}: {form.rate} Hz, expected {RATE} Hz: resample the data set")
    if form.channels > 2:
        raise TrainingError(f"{path}: {form.channels} channels, expected one or two")
    return Stem(path, form.samples, form.channels)


def _some(names: Mapping[str, Song]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
