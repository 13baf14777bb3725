"""Find and check the stems of training songs before a run starts.

Layout
------
Any layout that :mod:`evaluator.layouts` recognizes or a ``dataset.yaml`` describes
(:mod:`evaluator.described`). A stem without a file is silent. A ``mixture`` is not needed, because it is
computed from the stems. Networks are trained with the four stems of MUSDB18; all other stems of a song are
added to ``other``. For a vocals network, the accompaniment of a song with two stems is its ``other``; other
networks refuse such a song. A folder of variants has the same songs at another pitch or tempo, in the same
layout.
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
from evaluator.layouts import SongFiles
from evaluator.sources import AudioSource
from kmdx.audio import Form
from kmdx.challenge import ACCOMPANIMENT, MIXTURE, RATE, STEMS
from kmdx.documents import read_yaml
from kmdx.errors import AudioError, KmdxWarning, listed
from kmdx.file_names import key
from training.config import TrainingError

IN_PLACE = (".wav", ".flac", ".ogg")
"""Extensions of files that libsndfile can read in part."""
TRAIN = "train"
VALIDATION = ("valid", "validation")
UNEVEN = 0.1  # seconds by which stems of a song may differ in length without a warning
MUSDB18 = Path(__file__).with_name("musdb18.yaml")


@dataclass(frozen=True)
class TrainingStem:
    """The file of a stem, or the files whose sum it is, with one or two channels at :data:`RATE`."""

    path: Path  # the file, or the first of several
    samples: int
    channels: int
    parts: tuple[AudioSource, ...] = ()
    """Streams or files to decode and add; empty if ``path`` is the only file and can be read in part."""

    @property
    def sources(self) -> tuple[AudioSource, ...]:
        """The files or streams whose sum it is."""
        return self.parts or (AudioSource(self.path),)

    @property
    def form(self) -> Form:
        """Its length, rate and channels."""
        return Form(self.samples, RATE, self.channels)


@dataclass(frozen=True)
class TrainingSong:
    """A song: its stems by name, without silent ones."""

    name: str
    stems: Mapping[str, TrainingStem]
    variants: tuple[Mapping[str, TrainingStem], ...] = field(default=())
    """The same stems at other pitches or tempos."""
    accompanied: bool = False  # whether ``other`` is everything except the vocals

    @property
    def samples(self) -> int:
        """Length of the longest stem."""
        return _samples(self.stems)

    @property
    def versions(self) -> tuple[Mapping[str, TrainingStem], ...]:
        """The original song and its variants."""
        return (self.stems, *self.variants)


@dataclass(frozen=True)
class Songs:
    """Training songs and validation songs, without overlap."""

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

    Raises :class:`TrainingError` if a folder is missing or has no songs, a stem cannot be read or has another
    rate, a song or a variant is too short, or there are no training songs or no validation songs.

    Parameters
    ----------
    folders : sequence of Path
        Data sets; of those with splits, the split ``train`` is used.
    source : str
        The stem to estimate; at least one training song and one validation song must have it.
    shortest : int
        Smallest length of a song in samples: one window.
    validation : sequence of str
        Names or patterns of validation songs, in addition to those in a split ``valid`` or ``validation``.
        Without either, the fourteen validation songs of MUSDB18 are used.
    variants : sequence of Path
        Folders of variants.
    """
    training, held = _collect(folders, source)
    _hold_out(training, held, validation)
    where = ", ".join(map(str, folders))
    if not held:
        raise TrainingError(
            f"no validation songs in {where}: put some into {folders[0] / VALIDATION[0]}, "
            "or name them with --validation"
        )
    if not training:
        raise TrainingError(f"no training songs in {where}: all of them are validation songs")
    for kind, songs in (("training", training), ("validation", held)):
        for song in songs.values():
            _check_length(song.name, song.stems, shortest)
        if not any(source in song.stems for song in songs.values()):
            raise TrainingError(f"none of {len(songs)} {kind} songs has {source}: {listed(songs, most=3)}")
    return Songs(_with_variants(training, variants, shortest), tuple(held.values()))


def _collect(folders: Sequence[Path], source: str) -> tuple[dict[str, TrainingSong], dict[str, TrainingSong]]:
    """The training songs and the validation songs of data sets, by name."""
    found: dict[str, TrainingSong] = {}
    held: dict[str, TrainingSong] = {}
    for folder in folders:
        own, reserved = _of_folder(folder)
        for song in (*own, *reserved):
            if song.name in found or song.name in held:
                raise TrainingError(f"two songs have the name {song.name!r}; one is in {folder}; rename it")
            if song.accompanied and source != "vocals":
                raise TrainingError(
                    f"{song.name} has {ACCOMPANIMENT} instead of a separate stem {source}: "
                    "leave the song out, or train vocals"
                )
        found.update({song.name: song for song in own})
        held.update({song.name: song for song in reserved})
    return found, held


def _hold_out(
    training: dict[str, TrainingSong], held: dict[str, TrainingSong], validation: Sequence[str]
) -> None:
    """Move the songs that match names or patterns of validation songs from ``training`` to ``held``."""
    patterns = list(validation)
    if not patterns and not held:
        patterns = [name for name in read_yaml(MUSDB18)["validation"] if name in training]
    for pattern in patterns:
        matching = [name for name in training if name == pattern] or [
            name for name in training if fnmatchcase(name, pattern)
        ]
        if not matching and not any(name == pattern or fnmatchcase(name, pattern) for name in held):
            raise TrainingError(
                f"no validation song matches {pattern!r}; available: {listed(training, most=3)}"
            )
        held.update({name: training.pop(name) for name in matching})


def _with_variants(
    songs: Mapping[str, TrainingSong], variants: Sequence[Path], shortest: int
) -> tuple[TrainingSong, ...]:
    """Training songs with their variants in folders of variants."""
    others = [_versions(folder) for folder in variants]
    for folder, version in zip(variants, others, strict=True):
        if not version.keys() & songs.keys():
            raise TrainingError(
                f"{folder}: no variants of training songs: expected songs with the same names"
            )
        for name in version.keys() & songs.keys():
            _check_length(f"{name} in {folder}", version[name], shortest)
    return tuple(
        replace(song, variants=tuple(version[name] for version in others if name in version))
        for name, song in songs.items()
    )


def to_train_with(folder: Path) -> list[TrainingSong]:
    """Training songs of a data set; raises :class:`TrainingError` if there are none."""
    own, _ = _of_folder(folder)
    if not own:
        raise TrainingError(f"{folder}: no training songs")
    return own


def contents(songs: Sequence[TrainingSong]) -> dict[str, list[dict[str, str]]]:
    """The lengths of stems and sizes of their files for all versions of each song, to detect changes."""
    return {
        song.name: [
            {name: f"{stem.samples} samples, {_size(stem)} bytes" for name, stem in version.items()}
            for version in song.versions
        ]
        for song in songs
    }


def blocks(stem: TrainingStem) -> Iterator[NDArray[np.float32]]:
    """Read a whole stem in blocks, float32 ``(samples, channels)``.

    Raises :class:`TrainingError` if a file is damaged or missing.
    """
    try:
        yield from sources.blocks(stem.sources, stem.form)
    except AudioError as error:
        raise TrainingError(str(error)) from error


def whole(stem: TrainingStem) -> NDArray[np.float32]:
    """A stem's samples, float32 ``(samples, channels)``; raises :class:`AudioError` if it cannot be read."""
    return sources.read(stem.sources, stem.form, str(stem.path))


def _size(stem: TrainingStem) -> int:
    """Total size of a stem's files in bytes."""
    path = stem.path
    try:
        return sum(path.stat().st_size for path in {part.path for part in stem.sources})
    except OSError as error:
        raise TrainingError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _samples(stems: Mapping[str, TrainingStem]) -> int:
    return max(stem.samples for stem in stems.values())


def _check_length(name: str, stems: Mapping[str, TrainingStem], shortest: int) -> None:
    if _samples(stems) < shortest:
        raise TrainingError(
            f"{name} is shorter than a window: {_samples(stems) / RATE:.1f} s, expected at least "
            f"{shortest / RATE:.1f} s; leave it out, or train a network with fewer frames"
        )


def _of_folder(folder: Path) -> tuple[list[TrainingSong], list[TrainingSong]]:
    """The training songs and the validation songs of a data set."""
    if not folder.exists():
        raise TrainingError(f"{folder}: no such folder")
    if not folder.is_dir() and folder.suffix.lower() not in (".yaml", ".yml"):
        raise TrainingError(f"{folder}: expected a folder or a .yaml file")
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
        found_splits = f"; found the splits {', '.join(splits)}" if splits else ""
        raise TrainingError(
            f"{place}: no songs: expected folders with {', '.join(STEMS)} in wav, flac or Ogg, "
            f"or a {described.FILE}{found_splits}"
        )
    _warn_of_files(folder, [*own, *reserved], found.strays)
    return _songs(own), _songs(reserved)


def _warn_of_files(folder: Path, songs: Sequence[SongFiles], strays: Sequence[Path]) -> None:
    """Warn about sound files that are not used, and about stems that are added to ``other``."""
    unknown = [*strays, *(path for song in songs for path in song.extra)]
    if unknown:
        names = listed(
            [path.relative_to(folder) if path.is_relative_to(folder) else path for path in unknown]
        )
        warnings.warn(
            f"{folder}: ignoring sound files that are not stems, or are duplicates: {names}",
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
        stems = _stems(files)
        if stems:
            songs.append(TrainingSong(files.name, stems, accompanied=_is_accompanied(files)))
    return songs


def _is_accompanied(files: SongFiles) -> bool:
    """Whether a song has its accompaniment in one stem instead of three."""
    return ACCOMPANIMENT in files.sources and not {"bass", "drums", "other"} <= files.sources.keys()


def _others(files: SongFiles) -> tuple[str, ...]:
    """The stems of a song that make up ``other``."""
    if _is_accompanied(files):
        return (ACCOMPANIMENT,)
    named = {MIXTURE, ACCOMPANIMENT, "bass", "drums", "vocals"}
    return tuple(name for name in files.sources if name not in named)


def _stems(files: SongFiles) -> dict[str, TrainingStem]:
    """The four stems of a song, without silent ones."""
    kept = ("vocals",) if _is_accompanied(files) else ("bass", "drums", "vocals")
    parts = {name: files.sources[name] for name in kept if name in files.sources}
    others = tuple(part for name in _others(files) for part in files.sources[name])
    if others:
        parts["other"] = others
    stems = {name: _stem(*parts[name]) for name in STEMS if name in parts}
    silent = [name for name in STEMS if name not in stems]
    if stems and silent and not _is_accompanied(files):
        warnings.warn(f"{files.name}: no {', '.join(silent)}: treated as silent", KmdxWarning, stacklevel=2)
    longest = max(stems.values(), key=lambda stem: stem.samples, default=None)
    for stem in stems.values():
        if longest is not None and longest.samples - stem.samples > UNEVEN * RATE:
            warnings.warn(
                f"{stem.path}: shorter ({stem.samples / RATE:.1f} s) than {longest.path.name} "
                f"({longest.samples / RATE:.1f} s), perhaps cut short; treated as silent after its end",
                KmdxWarning,
                stacklevel=2,
            )
    return stems


def _stem(*parts: AudioSource | Path) -> TrainingStem:
    """A stem that is the sum of some files or streams."""
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
        raise TrainingError(f"{part.path}: {form.channels} channels, expected 1 or 2: mix it down to stereo")
    return form
