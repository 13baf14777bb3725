"""Songs to train with: their stems, found and checked before anything else happens.

Layout
------
Any that :mod:`evaluator.layouts` recognizes or a ``dataset.yaml`` describes (:mod:`evaluator.described`). A
stem without a file is silent; a ``mixture`` is not needed, since stems are summed again. Networks are trained
with the four stems of MUSDB18, so the sound of any other stem is added to ``other``: nothing of a song is
left out. The accompaniment of a song of two stems is its ``other`` for a network of vocals, and is refused
for any other network. A folder of variants has the same songs at another pitch or tempo, in the same layout.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluator import dataset, described, layouts, sources
from evaluator.layouts import SongFiles, key
from evaluator.sources import AudioSource
from kmdx.audio import Form
from kmdx.challenge import ACCOMPANIMENT, MIXTURE, RATE, STEMS
from kmdx.documents import read_yaml
from kmdx.errors import AudioError, KmdxWarning, listed
from training.config import TrainingError

IN_PLACE = (".wav", ".flac", ".ogg")
"""Endings of files that libsndfile reads a part of."""
TRAIN = "train"
VALIDATION = ("valid", "validation")
UNEVEN = 0.1  # seconds that stems of one song may differ in length without a word
MUSDB18 = Path(__file__).with_name("musdb18.yaml")


@dataclass(frozen=True)
class TrainingStem:
    """A stem's file, or what it is the sum of, with one or two channels at :data:`RATE`.

    Attributes
    ----------
    path : Path
        The file, or the first of several.
    samples, channels : int
    parts : tuple of AudioSource
        Streams or files to decode and sum; empty where ``path`` is all and can be read in part.
    """

    path: Path
    samples: int
    channels: int
    parts: tuple[AudioSource, ...] = ()

    @property
    def sources(self) -> tuple[AudioSource, ...]:
        """What it is the sum of, one file or more."""
        return self.parts or (AudioSource(self.path),)

    @property
    def form(self) -> Form:
        """Its length, rate and channels."""
        return Form(self.samples, RATE, self.channels)


@dataclass(frozen=True)
class TrainingSong:
    """A song: its stems by name, silent ones left out.

    Attributes
    ----------
    name : str
    stems : mapping of str to TrainingStem
    variants : tuple of mapping
        The same at other pitches or tempos.
    accompanied : bool
        Whether ``other`` is everything but the vocals.
    """

    name: str
    stems: Mapping[str, TrainingStem]
    variants: tuple[Mapping[str, TrainingStem], ...] = field(default=())
    accompanied: bool = False

    @property
    def samples(self) -> int:
        """Length of the longest stem."""
        return _samples(self.stems)

    @property
    def versions(self) -> tuple[Mapping[str, TrainingStem], ...]:
        """The song as it is, and its variants."""
        return (self.stems, *self.variants)


@dataclass(frozen=True)
class Songs:
    """Songs to learn from and songs to validate with, no song in both."""

    training: tuple[TrainingSong, ...]
    validation: tuple[TrainingSong, ...]


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
    found: dict[str, TrainingSong] = {}
    held: dict[str, TrainingSong] = {}
    for folder in folders:
        own, reserved = _of_folder(folder)
        for song in (*own, *reserved):
            if song.name in found or song.name in held:
                raise TrainingError(f"two songs are called {song.name!r}; one is in {folder}")
            if song.accompanied and source != "vocals":
                raise TrainingError(
                    f"{song.name} has {ACCOMPANIMENT}, which is not split into {source} and others: "
                    "leave it out, or train vocals"
                )
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
            raise TrainingError(f"no validation song matches {pattern!r}; available: {_some(found)}")
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
        replace(song, variants=tuple(version[name] for version in others if name in version))
        for name, song in found.items()
    )
    return Songs(tuple(training), tuple(held.values()))


def to_train_with(folder: Path) -> list[TrainingSong]:
    """Songs of a data set that are not set apart; raises :class:`TrainingError` if there are none."""
    own, _ = _of_folder(folder)
    if not own:
        raise TrainingError(f"{folder}: no songs to train with")
    return own


def contents(songs: Sequence[TrainingSong]) -> dict[str, list[dict[str, str]]]:
    """Lengths of the stems and sizes of their files, of each song's versions, to know them again by."""
    return {
        song.name: [
            {name: f"{stem.samples} samples, {_size(stem)} bytes" for name, stem in version.items()}
            for version in song.versions
        ]
        for song in songs
    }


def blocks(stem: TrainingStem) -> Iterator[NDArray[np.float32]]:
    """Read a stem from its beginning to its end, float32 ``(samples, channels)``.

    Raises
    ------
    TrainingError
        If a file is damaged or gone.
    """
    try:
        yield from sources.blocks(stem.sources, stem.form)
    except AudioError as error:
        raise TrainingError(str(error)) from error


def whole(stem: TrainingStem) -> NDArray[np.float32]:
    """A stem's samples, float32 ``(samples, channels)``; raises :class:`AudioError` if it cannot be read."""
    return sources.read(stem.sources, stem.form, str(stem.path))


def _size(stem: TrainingStem) -> int:
    """Bytes of a stem's files."""
    path = stem.path
    try:
        return sum(path.stat().st_size for path in {part.path for part in stem.sources})
    except OSError as error:
        raise TrainingError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _samples(stems: Mapping[str, TrainingStem]) -> int:
    return max(stem.samples for stem in stems.values())


def _long_enough(name: str, stems: Mapping[str, TrainingStem], shortest: int) -> None:
    if _samples(stems) < shortest:
        raise TrainingError(
            f"{name} is shorter than a window: {_samples(stems) / RATE:.1f} s of "
            f"{shortest / RATE:.1f} s; leave it out, or train a network with fewer frames"
        )


def _of_folder(folder: Path) -> tuple[list[TrainingSong], list[TrainingSong]]:
    """Songs of a data set to train with, and those that it sets apart."""
    if not folder.exists():
        raise TrainingError(f"{folder}: no such folder")
    if not folder.is_dir() and folder.suffix.lower() not in (".yaml", ".yml"):
        raise TrainingError(f"{folder}: not a folder")
    found = dataset.scan(folder)
    splits = {key(name): songs for name, songs in found.splits.items() if name is not None}
    reserved: list[SongFiles] = []
    if TRAIN in splits or (folder / TRAIN).is_dir():
        own = splits.get(TRAIN, [])
        reserved = [song for name in VALIDATION for song in splits.get(name, [])]
    else:
        own = found.splits.get(None, [])
        if not own and len(splits) == 1 and not splits.keys() & {*layouts.SPLITS}:
            own = next(iter(splits.values()))
    if not own and not reserved:
        place = folder / TRAIN if (folder / TRAIN).is_dir() else folder
        there = f"; found the splits {', '.join(splits)}" if splits else ""
        raise TrainingError(
            f"{place}: no songs: expected folders with {', '.join(STEMS)} in wav, flac or Ogg, "
            f"or a {described.FILE}{there}"
        )
    _warn_of_files(folder, [*own, *reserved], found.strays)
    return _songs(own), _songs(reserved)


def _warn_of_files(folder: Path, songs: Sequence[SongFiles], strays: Sequence[Path]) -> None:
    """Warn of sound files that are no stem, and of stems that become a part of ``other``."""
    unknown = [*strays, *(path for song in songs for path in song.extra)]
    if unknown:
        names = listed(
            [path.relative_to(folder) if path.is_relative_to(folder) else path for path in unknown]
        )
        warnings.warn(
            f"{folder}: sound files that are no stem, or there twice, are not used: {names}",
            KmdxWarning,
            stacklevel=2,
        )
    others = Counter(name for song in songs for name in _others(song) if name != "other")
    if others:
        counts = listed([f"{name} ({count} of {len(songs)} songs)" for name, count in others.items()])
        warnings.warn(f"{folder}: added to other: {counts}", KmdxWarning, stacklevel=2)


def _versions(folder: Path) -> dict[str, Mapping[str, TrainingStem]]:
    own, reserved = _of_folder(folder)
    return {song.name: song.stems for song in (*own, *reserved)}


def _songs(found: Sequence[SongFiles]) -> list[TrainingSong]:
    songs = []
    for files in sorted(found, key=lambda song: song.name):
        for fatal, message in files.problems:
            if fatal:
                raise TrainingError(f"{files.name}: {message}")
        stems = _stems_of(files)
        if stems:
            songs.append(TrainingSong(files.name, stems, accompanied=_is_accompanied(files)))
    return songs


def _is_accompanied(files: SongFiles) -> bool:
    """Whether a song has its accompaniment in one, and not as the three stems that it is made of."""
    return ACCOMPANIMENT in files.sources and not {"bass", "drums", "other"} <= files.sources.keys()


def _others(files: SongFiles) -> tuple[str, ...]:
    """Which of a song's stems make up ``other`` among the four."""
    if _is_accompanied(files):
        return (ACCOMPANIMENT,)
    named = {MIXTURE, ACCOMPANIMENT, "bass", "drums", "vocals"}
    return tuple(name for name in files.sources if name not in named)


def _stems(folder: Path) -> dict[str, TrainingStem]:
    """The four stems of a song's folder."""
    files = layouts.song(folder)
    return {} if files is None else _stems_of(files)


def _stems_of(files: SongFiles) -> dict[str, TrainingStem]:
    """The four stems of a song, silent ones left out."""
    kept = ("vocals",) if _is_accompanied(files) else ("bass", "drums", "vocals")
    parts = {name: files.sources[name] for name in kept if name in files.sources}
    others = tuple(part for name in _others(files) for part in files.sources[name])
    if others:
        parts["other"] = others
    stems = {name: _stem(*parts[name]) for name in STEMS if name in parts}
    silent = [name for name in STEMS if name not in stems]
    if stems and silent and not _is_accompanied(files):
        warnings.warn(f"{files.name}: no {', '.join(silent)}: taken as silent", KmdxWarning, stacklevel=2)
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


def _stem(*parts: AudioSource | Path) -> TrainingStem:
    """A stem by what it is the sum of."""
    summed = tuple(part if isinstance(part, AudioSource) else AudioSource(part) for part in parts)
    forms = [_form(part) for part in summed]
    first = summed[0]
    is_file = len(summed) == 1 and first.stream is None and first.path.suffix.lower() in IN_PLACE
    return TrainingStem(
        first.path,
        max(form.samples for form in forms),
        max(form.channels for form in forms),
        () if is_file else summed,
    )


def _form(part: AudioSource) -> Form:
    try:
        form = sources.form(part)
    except AudioError as error:
        raise TrainingError(str(error)) from error
    if form.rate != RATE:
        raise TrainingError(f"{part.path}: {form.rate} Hz, expected {RATE} Hz: resample the data set")
    if form.channels > 2:
        raise TrainingError(f"{part.path}: {form.channels} channels, expected one or two")
    return form


def _some(names: Mapping[str, TrainingSong]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
