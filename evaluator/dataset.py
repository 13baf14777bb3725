"""Finds, checks and reads songs with their true stems.

:mod:`evaluator.layouts` recognizes common layouts. :mod:`evaluator.described` reads a YAML file that
describes any other layout. A stem is one file, one stream of a file, or the sum of several files. If a song
has no mixture, the sum of its stems is used. Songs are scored at their own sample rate, in mono or stereo.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluator import described, layouts, mixture_check, sources
from evaluator.layouts import SPLITS, STEM_FILE, Scan, SongFiles
from evaluator.mixture_check import KNOWN_SUMS
from evaluator.sources import BLOCK, AudioSource
from kmdx import audio
from kmdx.audio import Form
from kmdx.challenge import ACCOMPANIMENT, MIXTURE, RATE, STEMS
from kmdx.errors import LISTED, AudioError, KmdxError, counted, listed, quoted, shown, suggest
from kmdx.file_names import key

__all__ = [
    "EVERY_SPLIT",
    "KNOWN_SUMS",
    "MUSDB_SONGS",
    "Problem",
    "Track",
    "as_wav",
    "blocks",
    "check",
    "find_tracks",
    "fingerprint",
    "grouped",
    "read",
    "scan",
]

MUSDB_SONGS = 50  # in MUSDB18-HQ's test set
EXAMPLES = 3  # songs that the line of a shared problem names, at most
EVERY_SPLIT = "all"
"""Used as a split: the songs of all splits."""


@dataclass(frozen=True)
class Track:
    """A song of a data set."""

    name: str  # its folder's name, its file's without ``.stem.mp4``, or its artist and title
    sources: Mapping[str, tuple[AudioSource, ...]]
    """The sources of each stem, and of the mixture if the song has one."""
    split: str | None  # its split, such as ``test``
    extra: tuple[Path, ...]  # sound files in its folder that are not stems
    lossy: bool  # whether a stem is in a lossy format
    rate: int
    samples: int
    channels: int
    """``rate``, ``samples`` and ``channels``: from the headers of its files; 0 if they cannot be read, which
    :func:`check` reports."""
    layout: SongFiles | None = None  # further properties from its layout
    strays: tuple[Path, ...] = ()
    """Sound files of the data set that belong to no song; the same for every track."""

    @property
    def duration(self) -> float:
        """Duration in seconds."""
        return self.samples / self.rate if self.rate else 0.0

    @property
    def form(self) -> Form:
        """Length, rate and channels of the mixture and of each stem."""
        return Form(self.samples, self.rate, self.channels)

    @property
    def stems(self) -> tuple[str, ...]:
        """The song's stems, without the mixture."""
        return tuple(name for name in self.sources if name != MIXTURE)

    @property
    def available(self) -> tuple[str, ...]:
        """Stems that :func:`read` can read: :attr:`stems`, and the accompaniment as a sum."""
        derived = ACCOMPANIMENT not in self.sources and "vocals" in self.sources and len(self.stems) > 1
        return (*self.stems, ACCOMPANIMENT) if derived else self.stems

    @property
    def summands(self) -> tuple[str, ...]:
        """Stems that sum to the mixture; none is part of another."""
        if ACCOMPANIMENT not in self.sources:
            return self.stems
        if set(STEMS) - {"vocals"} <= self.sources.keys():
            return tuple(name for name in self.stems if name != ACCOMPANIMENT)
        return tuple(name for name in self.stems if name in (ACCOMPANIMENT, "vocals"))

    @property
    def files(self) -> dict[str, Path]:
        """The files of those stems (and the mixture) that are a single file each."""
        return {name: parts[0].path for name, parts in self.sources.items() if self.is_one_file(name)}

    @property
    def paths(self) -> tuple[Path, ...]:
        """All its files, without duplicates."""
        return tuple(dict.fromkeys(part.path for parts in self.sources.values() for part in parts))

    def sources_of(self, stem: str) -> tuple[AudioSource, ...]:
        """The sources that sum to a stem or the mixture.

        Raises
        ------
        KmdxError
            If the song does not have this stem.
        """
        if stem in self.sources:
            return self.sources[stem]
        if stem == MIXTURE:
            names = self.summands
        elif stem in self.available:
            names = tuple(name for name in self.summands if name != "vocals")
        else:
            known = ", ".join(self.available) or "none"
            hint = suggest(stem, self.available)
            raise KmdxError(f"{self.name}: no stem {quoted(stem)}{hint}; available: {known}")
        return tuple(part for name in names for part in self.sources[name])

    def is_one_file(self, stem: str) -> bool:
        """Whether a stem or the mixture is a single file."""
        return [part.stream for part in self.sources.get(stem, ())] == [None]


@dataclass(frozen=True)
class Problem:
    """A problem of the data that the user should know about."""

    track: str | None
    """The song's name; ``None`` for a problem of the whole data set."""
    fatal: bool
    """Whether the song cannot be scored."""
    message: str
    """The problem, in the same words for every song that has it."""
    detail: str = ""
    """What differs from song to song, such as the names of files."""

    @property
    def text(self) -> str:
        """The message with its detail."""
        return f"{self.message}: {self.detail}" if self.detail else self.message

    def __str__(self) -> str:
        return self.text if self.track is None else f"{self.track}: {self.text}"


def grouped(problems: Iterable[Problem]) -> list[str]:
    """One line for each problem; songs with the same problem share a line."""
    groups: dict[tuple[bool, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.track is None, problem.message), []).append(problem)
    return [str(group[0]) if len(group) == 1 else _summary(group) for group in groups.values()]


def _summary(group: Sequence[Problem]) -> str:
    songs = [f"{shown(each.track)} ({each.detail})" if each.detail else shown(each.track) for each in group]
    more = f" and {len(songs) - EXAMPLES} more" if len(songs) > EXAMPLES else ""
    return f"{counted(len(songs), 'song')}: {group[0].message}: {', '.join(songs[:EXAMPLES])}{more}"


def scan(data: Path) -> Scan:
    """Find the songs of a data set in any layout.

    Raises
    ------
    KmdxError
        If the data set cannot be read, or its ``dataset.yaml`` is invalid.
    """
    try:
        description = described.file_of(data)
        return layouts.scan(data) if description is None else described.scan(described.load(description))
    except OSError as error:
        raise layouts.refuse_unreadable(error) from error


def find_tracks(data: Path, split: str | None = None, tracks: str | None = None) -> list[Track]:
    """Find the songs of a data set, sorted by name.

    Parameters
    ----------
    data : Path
        The data set, one of its splits, one song's folder, one MUSDB18 file, or a ``dataset.yaml``.
    split : str, optional
        Return the songs of this split; :data:`EVERY_SPLIT` returns all songs. ``None`` returns the songs of
        ``test`` if it exists, else those that are in no split.
    tracks : str, optional
        A song's name, or a pattern of names such as ``"A*"``.

    Raises
    ------
    KmdxError
        If there are no songs or the split does not exist. The message gives what was expected and found.
    """
    found = scan(data)
    if not found.splits:
        raise KmdxError(_nothing(data, found))
    chosen = _of_split(data, found, split)
    songs = [_track(song, part, found.strays) for part, group in chosen.items() for song in group]
    songs.sort(key=lambda track: track.name)
    if tracks is None:
        return songs
    pattern = key(tracks)
    exact = [track for track in songs if key(track.name) == pattern]
    matching = exact or [track for track in songs if fnmatchcase(key(track.name), pattern)]
    if not matching:
        count = counted(len(songs), "song")
        raise KmdxError(f"{data}: none of {count} is named {tracks!r}; the first is {songs[0].name!r}")
    return matching


def check(tracks: Sequence[Track], content: bool = True, accept_incomplete: bool = False) -> list[Problem]:
    """Check songs: first all names and headers, then the samples of songs that passed.

    Parameters
    ----------
    tracks : sequence of Track
    content : bool
        Whether to read every sample, in blocks. Stems must sum to their mixture, and no mixture may occur
        twice. The stems of MUSDB18's AAC files never sum exactly, so their sum is not checked.
    accept_incomplete : bool
        Whether songs with missing stems can be scored; otherwise a missing stem is fatal.
    """
    problems = [*_check_set(tracks), *_check_names(tracks)]
    for track in tracks:
        problems += _check_headers(track)
    if content:
        fatal = {problem.track for problem in problems if problem.fatal}
        checked = [track for track in tracks if track.name not in fatal]
        problems += [Problem(*found) for found in mixture_check.check(checked, accept_incomplete)]
    return problems


def fingerprint(track: Track) -> str:
    """The sha256 of a song's files in hexadecimal; independent of the song's name and folder.

    Raises
    ------
    AudioError
        If a file cannot be read.
    """
    names: dict[Path, str] = {}  # contains a MUSDB18 file only once
    for name, parts in track.sources.items():
        names.update({part.path: name for part in parts})
    digest = hashlib.sha256()
    lines = [(name, path.suffix.lower(), mixture_check.file_digest(path)) for path, name in names.items()]
    for line in sorted(lines):
        digest.update(f"{' '.join(line)}\n".encode())
    return digest.hexdigest()


def read(track: Track, stem: str) -> audio.Audio:
    """Read a whole stem or the whole mixture.

    Parameters
    ----------
    track : Track
    stem : str
        One of :attr:`Track.available`, or the mixture.

    Raises
    ------
    AudioError
        If it cannot be read.
    KmdxError
        If the song does not have this stem.
    """
    parts = track.sources_of(stem)
    return audio.Audio(sources.read(parts, track.form, f"{track.name}: {stem}"), track.rate)


def blocks(track: Track, stem: str, size: int = BLOCK) -> Iterator[NDArray[np.float32]]:
    """Read a stem or the mixture in blocks of ``size`` samples: float32 ``(samples, channels)``.

    Each block overwrites the previous one. The errors are those of :func:`read`.
    """
    return sources.blocks(track.sources_of(stem), track.form, size)


def as_wav(track: Track, stem: str, folder: Path) -> Path:
    """Return a wav file of a stem or the mixture; write it if the song has none.

    Returns
    -------
    Path
        The song's own file if it is wav; else ``folder/<stem>.wav`` in float32, written atomically.

    Raises
    ------
    AudioError
        If it cannot be read or written.
    KmdxError
        If the song does not have this stem.
    """
    first, *others = track.sources_of(stem)
    multitrack = track.layout is not None and track.layout.multitrack
    is_wav = not others and first.stream is None and first.path.suffix.lower() == ".wav"
    if is_wav and (not multitrack or sources.form(first) == track.form):
        return first.path
    sound = read(track, stem)
    target = folder / f"{stem}.wav"
    audio.write(target, sound.samples, sound.rate, "float32")
    return target


def _of_split(data: Path, found: Scan, split: str | None) -> dict[str | None, list[SongFiles]]:
    """The requested songs by split."""
    named = [name for name in found.splits if name is not None]
    same = [name for name in named if key(name) == key(split or "test")]
    if same:
        best = split if split in same else same[0]
        return {best: found.splits[best]}
    if split == EVERY_SPLIT:
        return dict(found.splits)
    if split is not None:
        if not named and key(layouts.folder_name(data)) == key(split):  # DATA is that split
            return dict(found.splits)
    else:
        if None in found.splits:
            return {None: found.splits[None]}
        if len(named) == 1 and key(named[0]) not in SPLITS:  # a folder around the songs
            return {None: found.splits[named[0]]}
    splits = [f"{name} ({counted(len(found.splits[name]), 'song')})" for name in sorted(named)]
    if None in found.splits:
        splits.insert(0, f"{counted(len(found.splits[None]), 'song')} in no split")
    advice = f"name one of them with --split, or use --split {EVERY_SPLIT}" if named else "leave out --split"
    raise KmdxError(f"{data}: no split {split or 'test'!r}; found {listed(splits)}; {advice}")


def _track(song: SongFiles, split: str | None, strays: tuple[Path, ...]) -> Track:
    """A song with the form of its mixture, or else of its stems."""
    parts = [part for each in song.sources.values() for part in each]
    lossy = any(part.stream is not None or sources.is_lossy(part.path) for part in parts)
    form = Form(0, 0, 0)
    first = song.sources.get(MIXTURE) or next(iter(song.sources.values()), ())
    try:
        if song.multitrack:
            forms = [sources.form(part) for part in parts]
            longest, channels = max(form.samples for form in forms), max(form.channels for form in forms)
            form = Form(longest, forms[0].rate, channels)
        elif first:
            form = sources.form(first[0])
    except (AudioError, ValueError):
        pass
    return Track(
        song.name,
        song.sources,
        split,
        song.extra,
        lossy,
        form.rate,
        form.samples,
        form.channels,
        song,
        strays,
    )


def _nothing(data: Path, found: Scan) -> str:
    """Why a data set has no songs."""
    description = described.file_of(data)
    if description is not None:
        return f"{description}: no songs found: no file matches the pattern of a stem; check the patterns"
    if data.is_file():
        return f"{data}: not a data set; expected a folder, a file <song>{STEM_FILE} or a {described.FILE}"
    sounds = layouts.sounds_below(data)
    if sounds:
        examples = listed([path.relative_to(data).as_posix() for path in sounds], most=3)
        return (
            f"{data}: no songs found: no sound file has the name of a stem ({', '.join(STEMS)}, …); found "
            f"{examples}; describe which files belong to which stem in {data / described.FILE}"
        )
    names = [path.name for path in layouts.entries(data)]
    content = listed(names, most=3) or "an empty folder"
    return (
        f"{data}: no songs found; expected <split>/<song>/{MIXTURE}.wav with {', '.join(STEMS)} or other "
        f"stems next to it, <song>{STEM_FILE}, or a {described.FILE}; found {content}"
    )


def _check_set(tracks: Sequence[Track]) -> Iterator[Problem]:
    """Check the data set as a whole."""
    count = counted(len(tracks), "song")
    is_musdb = all(
        set(track.stems) == set(STEMS)
        and track.rate in (0, RATE)
        and not (track.layout is not None and track.layout.multitrack)
        for track in tracks
    )
    if is_musdb and len(tracks) != MUSDB_SONGS:
        yield Problem(None, False, f"the data set has {count}, but MUSDB18-HQ's test set has {MUSDB_SONGS}")
    lossy = [track for track in tracks if track.lossy]
    if lossy:
        paths = {path for track in lossy for path in track.paths}
        endings = sorted({path.suffix.lower()[1:] for path in paths if sources.is_lossy(path)})
        streams = any(part.stream is not None for track in lossy for part in track.sources_of(MIXTURE))
        kind = "AAC" if streams else ", ".join(endings)
        be = "is" if len(tracks) == 1 else "are"
        scores = "scores on MUSDB18-HQ" if streams else "scores against uncompressed stems"
        message = f"{len(lossy)} of {count} {be} lossy ({kind}): scores differ from {scores}"
        yield Problem(None, False, message)
    without = [track for track in tracks if MIXTURE not in track.sources and track.stems]
    if without:
        have = (
            "has no mixture: the sum of its stems is"
            if len(tracks) == 1
            else ("have no mixture: the sum of their stems is")
        )
        which = "" if len(without) == len(tracks) else f": {listed([track.name for track in without])}"
        yield Problem(None, False, f"{len(without)} of {count} {have} used{which}")
    numbers = Counter(stem for track in tracks for stem in track.stems)
    some = [f"{stem} ({number})" for stem, number in numbers.items() if number < len(tracks)]
    if some:
        yield Problem(None, False, f"not all of {count} have these stems: {listed(some)}")
    declared = dict.fromkeys(
        stem for track in tracks if track.layout for stem in track.layout.declared if stem not in numbers
    )
    if declared:
        yield Problem(None, False, f"no file of any song matches {listed(declared)}")
    strays = dict.fromkeys(path for track in tracks for path in track.strays)
    if strays:
        places = [f"{path.parent.name}/{path.name}" for path in strays]
        yield Problem(None, False, f"not used, because they belong to no song: {listed(places)}")


def _check_names(tracks: Sequence[Track]) -> Iterator[Problem]:
    names: dict[str, Track] = {}
    for track in tracks:
        other = names.setdefault(track.name, track)
        if other is not track:
            places = " and ".join(str(song.paths[0]) for song in (other, track) if song.paths)
            yield Problem(track.name, True, f"two songs have this name: {places}")


def _check_headers(track: Track) -> Iterator[Problem]:
    for fatal, message in track.layout.problems if track.layout is not None else ():
        yield Problem(track.name, fatal, message)
    if track.extra:
        names = listed([_below(path, track) for path in track.extra])
        yield Problem(track.name, False, "not used, because they are not stems or are duplicates", names)
    if not track.stems:
        yield Problem(track.name, True, f"none of its files is a stem; expected {', '.join(STEMS)} or others")

    forms: list[tuple[str, Form]] = []
    streams = max((part.stream or 0 for parts in track.sources.values() for part in parts), default=0)
    for name, parts in track.sources.items():
        for part in parts:
            try:
                label = name if len(parts) == 1 else f"{name}/{part.path.name}"
                forms.append((label, sources.form(part)))
            except AudioError as error:
                yield Problem(track.name, True, str(error))
                if streams:  # the others are in the same file
                    return
    yield from _check_forms(track, forms)


def _check_forms(track: Track, forms: Sequence[tuple[str, Form]]) -> Iterator[Problem]:
    """Check that files have the same rate, channels and length, as far as the layout requires it."""
    multitrack = track.layout is not None and track.layout.multitrack
    for name, form in forms:
        if form.channels > 2:
            yield Problem(track.name, True, f"{name} has {form.channels} channels, expected 1 or 2")
    usual = Counter((form.rate, form.channels) for _, form in forms).most_common(1)
    for name, form in forms:
        rate, channels = usual[0][0]
        if form.rate != rate or (form.channels != channels and not multitrack):
            found = f"{counted(form.channels, 'channel')} at {form.rate} Hz"
            expected = f"{channels} at {rate} Hz like its other files"
            yield Problem(track.name, True, f"{name} has {found}, expected {expected}")
    lengths = [form.samples for _, form in forms]
    if not lengths or min(lengths) == max(lengths):
        return
    most = 0.0 if track.layout is None else track.layout.uneven
    if max(lengths) - min(lengths) <= most * usual[0][0][0]:
        shorter = [f"{name} by {max(lengths) - form.samples}" for name, form in forms]
        ends = listed([text for text, length in zip(shorter, lengths, strict=True) if length < max(lengths)])
        detail = f"{ends} of {max(lengths)} samples"
        yield Problem(track.name, False, "short files are padded with silence", detail)
    else:
        each = [f"{name} {form.samples}" for name, form in forms]
        if len(each) > LISTED:  # show only the shortest and the longest
            forms = sorted(forms, key=lambda item: item[1].samples)
            each = [f"{name} {form.samples}" for name, form in (forms[0], forms[-1])]
        yield Problem(track.name, True, f"lengths differ: {listed(each)} samples")


def _below(path: Path, track: Track) -> str:
    """A file's path in its song's folder."""
    place = track.layout.place if track.layout is not None else path.parent
    return path.relative_to(place).as_posix() if path.is_relative_to(place) else path.name
