"""Finds existing stems of a data set's songs: which file is which stem of which song?

Layout
------
Any of these, in any format that :mod:`kmdx.audio` reads. They may be inside other folders, such as those of a
split or a model. Names are compared without case and in the same Unicode normal form::

    <song>/<stem>.wav
    <song>/<song>_<stem>.wav
    <song>_<stem>.wav, <song> - <stem>.wav, <song> (<stem>).wav
    <stem>/<song>.wav

Stems have the names in :data:`evaluator.layouts.NAMES`; ``no_vocals`` and ``instrumental``, for example, are
the accompaniment. If the accompaniment is requested and has no file, it is the sum of all estimates except
the vocals, provided that they include bass, drums and other. A song of MoisesDB may also have the name of its
folder.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluator import layouts, sources
from evaluator.dataset import Problem, Track
from evaluator.layouts import parts_of_accompaniment, safe_name, stem_named
from evaluator.sources import AudioSource
from kmdx import audio
from kmdx.challenge import ACCOMPANIMENT, MIXTURE
from kmdx.errors import AudioError, KmdxError, counted, listed, shown
from kmdx.file_names import key
from kmdx.files import sha256 as file_sha256

DEPTH = 5  # levels of folders that are searched
TAIL = 1152  # samples by which a lossy file may be longer than its song: one mp3 frame
SEPARATORS = " _-.()[]"


@dataclass(frozen=True)
class Estimates:
    """A folder's files by song and stem."""

    folder: Path
    files: Mapping[str, Mapping[str, tuple[Path, ...]]]
    """The files of each song and stem; several files are summed."""
    unknown: tuple[Path, ...]  # sound files that are not a requested stem, nor another stem of a song
    lossy: int  # number of files in a lossy format

    def digest(self) -> str:
        """The sha256 over the names and contents of all used files.

        Raises
        ------
        AudioError
            If a file cannot be read.
        """
        digest = hashlib.sha256()
        for song, stems in sorted(self.files.items()):
            for stem, paths in sorted(stems.items()):
                for path in paths:
                    try:
                        digest.update(
                            f"{song}\0{stem}\0{file_sha256(path)}\n".encode("utf-8", "surrogateescape")
                        )
                    except OSError as error:
                        raise AudioError(f"{path}: cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def problems(self) -> list[Problem]:
        """Unknown and lossy files."""
        found = []
        if self.unknown:
            names = listed([path.relative_to(self.folder).as_posix() for path in self.unknown])
            message = f"{self.folder}: not used, because they are not scored stems of these songs: {names}"
            found.append(Problem(None, False, message))
        if self.lossy:
            total = len({path for stems in self.files.values() for paths in stems.values() for path in paths})
            found.append(Problem(None, False, f"{self.folder}: {self.lossy} of {total} files are lossy"))
        return found


def find(folder: Path, tracks: Sequence[Track], stems: Sequence[str] | None = None) -> Estimates:
    """Find the estimates of songs in a folder.

    Parameters
    ----------
    folder : Path
    tracks : sequence of Track
    stems : sequence of str, optional
        The requested stems; by default all stems of each song. ``accompaniment`` can be requested if a song
        has other stems besides the vocals.

    Raises
    ------
    KmdxError
        If the folder cannot be read or has no stem of any song, or if two files are the same stem.
    """
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise KmdxError(f"{folder}: {what}; expected a folder of estimates, <song>/<stem>.wav")
    try:
        sounds = layouts.sounds_below(folder, DEPTH)
    except OSError as error:
        raise layouts.refuse_unreadable(error) from error
    search = _Search(tracks, stems)
    matches: dict[tuple[str, str], list[Path]] = defaultdict(list)
    unknown = []
    for path in sounds:
        match = search.match(path.relative_to(folder))
        if match is None:
            unknown.append(path)
        else:
            matches[match[0].name, match[1]].append(path)
    files: dict[str, dict[str, tuple[Path, ...]]] = {}
    for track in tracks:
        own = {stem: paths for (name, stem), paths in matches.items() if name == track.name}
        files[track.name] = chosen = _chosen(folder, track, own, _wanted(track, stems))
        known = {*track.stems, *chosen, MIXTURE}
        unknown += [path for stem, paths in own.items() if stem not in known for path in paths]
    if not any(files.values()):
        raise KmdxError(_nothing(folder, tracks, sounds))
    used = {path for each in files.values() for paths in each.values() for path in paths}
    lossy = sum(map(sources.is_lossy, used))
    return Estimates(folder, files, tuple(sorted(unknown)), lossy)


def as_wav(estimates: Estimates, track: Track, stem: str, folder: Path) -> Path:
    """Return an estimate as a wav file with its song's rate, channels and length.

    Returns
    -------
    Path
        The file itself if it is such a wav file; else ``folder/<stem>.wav`` in float32, written atomically.
        Up to :data:`TAIL` samples after the song's end are cut off from lossy files.

    Raises
    ------
    KmdxError
        If there is no estimate, it cannot be read, or its rate, channels or length differ from the song's.
    """
    paths = estimates.files.get(track.name, {}).get(stem)
    if not paths:
        raise KmdxError(f"{track.name}: no {stem} in {estimates.folder}")
    return sum_as_wav(paths, track, folder / f"{stem}.wav")


def sum_as_wav(paths: Sequence[Path], track: Track, target: Path) -> Path:
    """Return the sum of a song's files as a wav file; a single suitable wav file is returned unchanged.

    Raises
    ------
    KmdxError
        If a file cannot be read, or its rate, channels or length differ from the song's.
    """
    whole = [_checked(path, track) for path in paths]
    if len(paths) == 1 and whole == [True] and paths[0].suffix.lower() == ".wav":
        return paths[0]
    total = np.zeros((track.samples, track.channels), np.float64)
    for path in paths:
        total += audio.read(path, accept_holes=False).samples[: track.samples]
    audio.write(target, total.astype(np.float32), track.rate, "float32")
    return target


class _Search:
    """Finds songs and stems by the names of files and folders."""

    def __init__(self, tracks: Sequence[Track], stems: Sequence[str] | None) -> None:
        self.songs: dict[str, list[Track]] = defaultdict(list)
        for track in tracks:
            for name in {key(track.name), key(f"{track.name}.stem"), key(safe_name(track.name))}:
                self.songs[name].append(track)
        aliases: dict[str, list[Track]] = defaultdict(list)
        for track in tracks:
            for alias in {*map(key, track.layout.aliases if track.layout is not None else ())}:
                aliases[alias].append(track)
        for alias, named in aliases.items():
            if len(named) == 1 and alias not in self.songs:
                self.songs[alias] = named
        self.longest_first = sorted(self.songs, key=len, reverse=True)
        every = {stem for track in tracks for stem in track.stems}
        self.stems = {key(stem): stem for stem in (*every, *(stems or ()))}

    def match(self, relative: Path) -> tuple[Track, str] | None:
        """The song and the stem (or mixture) of a file, from its path; None if unknown."""
        base, folders = key(relative.stem), [*map(key, relative.parts[:-1])]
        for folder in reversed(folders):
            if folder in self.songs:
                name = folder if base.startswith(folder) and base != folder else ""
                stem = self.stem(base) or self.stem(base[len(name) :].strip(SEPARATORS))
                if stem is not None:
                    return self.track(folder, relative), stem
        if base in self.songs:
            for folder in reversed(folders):
                stem = self.stem(folder)
                if stem is not None:
                    return self.track(base, relative), stem
        for song in self.longest_first:
            if base.startswith(song):
                stem = self.stem(base[len(song) :].strip(SEPARATORS))
                if stem is not None:
                    return self.track(song, relative), stem
        return None

    def stem(self, name: str) -> str | None:
        return self.stems.get(name) or stem_named(name)

    def track(self, song: str, relative: Path) -> Track:
        """The song of that name; if two names differ only in case, the exact match."""
        named = self.songs[song]
        exact = [track for track in named if track.name in str(relative)]
        return (exact or named)[0]


def _wanted(track: Track, stems: Sequence[str] | None) -> tuple[str, ...]:
    if stems is None:
        return track.stems
    return tuple(stem for stem in stems if stem in track.available)


def _chosen(
    folder: Path, track: Track, own: Mapping[str, list[Path]], wanted: Sequence[str]
) -> dict[str, tuple[Path, ...]]:
    """The files of a song's stems."""
    chosen: dict[str, tuple[Path, ...]] = {}
    for stem in wanted:
        if stem in own:
            chosen[stem] = (_only(folder, track, stem, own[stem]),)
    if ACCOMPANIMENT in wanted and ACCOMPANIMENT not in own and (parts := parts_of_accompaniment(own)):
        chosen[ACCOMPANIMENT] = tuple(_only(folder, track, stem, own[stem]) for stem in parts)
    return chosen


def _only(folder: Path, track: Track, stem: str, paths: Sequence[Path]) -> Path:
    """The file of a stem; if there are several, the one in the folder of the song's split."""
    if len(paths) > 1 and track.split is not None:
        split = key(track.split)
        inside = [path for path in paths if split in map(key, path.relative_to(folder).parts[:-1])]
        paths = inside or paths
    if len(paths) > 1:
        raise KmdxError(
            f"{paths[0]} and {paths[1]} are both {stem} of {shown(track.name)}; remove one, or name a folder "
            "that contains only one of them"
        )
    return paths[0]


def _checked(path: Path, track: Track) -> bool:
    """Check a file's form; return whether its length is exactly the song's."""
    form = sources.form(AudioSource(path))
    if form.rate != track.rate:
        raise KmdxError(f"{path}: {form.rate} Hz, but the song has {track.rate} Hz; resample the file")
    if form.channels != track.channels:
        raise KmdxError(f"{path}: channels: {form.channels}, expected {track.channels} as in the song")
    tail = TAIL if sources.is_lossy(path) else 0
    if not track.samples <= form.samples <= track.samples + tail:
        raise KmdxError(f"{path}: {form.samples} samples, expected {track.samples}, the length of the song")
    return form.samples == track.samples


def _nothing(folder: Path, tracks: Sequence[Track], sounds: Sequence[Path]) -> str:
    """The message that no file is a stem of any song."""
    names = [path.relative_to(folder).as_posix() for path in sounds[:3]]
    found = f"found {', '.join(map(shown, names))}" if names else "found no sound files"
    count = counted(len(tracks), "song")
    first = tracks[0].name if tracks else "<song>"
    return f"{folder}: no stems of {count}; expected {shown(f'{first}/vocals.wav')} and others; {found}"
