"""Songs with their true stems: found, checked, and handed out as wav files.

Layouts
-------
MUSDB18-HQ has a folder for each song, ``DATA/test/<song>/mixture.wav`` with ``bass drums other vocals``
beside it; flac will do, and so will song folders with no split above them, or one song's folder.
MUSDB18 has a file for each song, ``DATA/test/<song>.stem.mp4``, with five streams of AAC: its stems are
lossy, and scores against them are not those against the originals.

References
----------
Rafii et al. 2017, "The MUSDB18 corpus for music separation", and its uncompressed version, MUSDB18-HQ.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import av
import numpy as np

from evaluator.sounds import Form, form_of, read_together
from kmdx import audio, ffmpeg
from kmdx.errors import AudioError, KmdxError

STEMS = ("bass", "drums", "other", "vocals")
MIXTURE = "mixture"
STREAMS = (MIXTURE, "drums", "bass", "other", "vocals")
"""Order of the streams in a MUSDB18 file."""

RATE = 44100  # Hz
CHANNELS = 2
MUSDB_SONGS = 50  # in MUSDB18-HQ's test set
KNOWN_SUMS = {"PR - Oh No"}
"""Songs of MUSDB18-HQ whose stems are known not to sum to the mixture."""

SOUNDS = (".wav", ".flac")
STEM_FILE = ".stem.mp4"

ROUNDING = 3 / 32768
"""RMS that a mixture may differ by from its stems' sum: five 16-bit files, each rounded and dithered."""
BLOCK = 4 * RATE  # samples read at a time


@dataclass(frozen=True)
class Track:
    """A song of a data set.

    Attributes
    ----------
    name : str
        Its folder's name, or its file's without ``.stem.mp4``.
    files : mapping of str to Path
        File of the mixture and of each stem that there is; of a MUSDB18 file the same for all.
    split : str or None
        Folder of a split that it lies in, such as ``test``.
    extra : tuple of Path
        Sound files beside them that are none of the five.
    lossy : bool
        Whether the stems are AAC.
    rate, samples, channels : int
        From the mixture's header; 0 where it cannot be read, which :func:`check` reports.
    """

    name: str
    files: Mapping[str, Path]
    split: str | None
    extra: tuple[Path, ...]
    lossy: bool
    rate: int
    samples: int
    channels: int

    @property
    def stems(self) -> tuple[str, ...]:
        """What it has besides the mixture."""
        return tuple(stem for stem in STEMS if stem in self.files)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples / self.rate if self.rate else 0.0


@dataclass(frozen=True)
class Problem:
    """Something about the data that the user should know."""

    track: str | None
    """The song's name; ``None`` where it is about the whole set."""
    fatal: bool
    """Whether the song cannot be scored."""
    message: str

    def __str__(self) -> str:
        return self.message if self.track is None else f"{self.track}: {self.message}"


def find_tracks(data: Path, split: str | None = "test", tracks: str | None = None) -> list[Track]:
    """Find the songs of a data set, in the order of their names.

    Parameters
    ----------
    data : Path
        The data set, one of its splits, one song's folder, or one MUSDB18 file.
    split : str, optional
        Take the songs of this folder in ``data`` where it is there; ``None`` takes those of all folders.
    tracks : str, optional
        A song's name, or a pattern of names such as ``"A*"``.

    Raises
    ------
    KmdxError
        If there are none; says what was expected and what is there.
    """
    try:
        found = _find(data, split)
        if not found:
            raise KmdxError(
                f"{data}: no songs; expected {split or '<split>'}/<song>/{MIXTURE}.wav with "
                f"{', '.join(STEMS)} beside it (wav or flac), or <song>{STEM_FILE}; found {_listing(data)}"
            )
    except OSError as error:
        raise KmdxError(f"{error.filename}: cannot be read: {error.strerror}") from error
    found.sort(key=lambda track: track.name)
    if tracks is None:
        return found
    chosen = [track for track in found if track.name == tracks or fnmatchcase(track.name, tracks)]
    if not chosen:
        raise KmdxError(
            f"{data}: none of its {len(found)} songs is named {tracks!r}; the first is {found[0].name!r}"
        )
    return chosen


def check(tracks: Sequence[Track], content: bool = True) -> list[Problem]:
    """Check songs: names and headers of all, then the samples of those that passed.

    Parameters
    ----------
    tracks : sequence of Track
    content : bool
        Read every sample of wav and flac files, in blocks: stems must sum to their mixture, and no
        mixture may occur twice. AAC never sums exactly, so MUSDB18 files are only compared as files.
    """
    problems = []
    if len(tracks) != MUSDB_SONGS:
        count = f"{len(tracks)} song{'s' if len(tracks) != 1 else ''}"
        problems.append(Problem(None, False, f"{count}, where MUSDB18-HQ's test set has {MUSDB_SONGS}"))
    lossy = sum(track.lossy for track in tracks)
    if lossy:
        problems.append(
            Problem(
                None, False, f"{lossy} of {len(tracks)} songs are lossy (AAC): scores are not MUSDB18-HQ's"
            )
        )

    names: dict[str, Track] = {}
    for track in tracks:
        other = names.setdefault(track.name, track)
        if other is not track:
            places = " and ".join(str(next(iter(song.files.values()))) for song in (other, track))
            problems.append(Problem(track.name, True, f"two songs have this name: {places}"))
    for track in tracks:
        problems += _check_headers(track)
    if content:
        fatal = {problem.track for problem in problems if problem.fatal}
        problems += _check_content([track for track in tracks if track.name not in fatal])
    return problems


def fingerprint(track: Track) -> str:
    """The sha256 in hexadecimal over a song's files, whatever it is called and wherever it lies.

    Raises
    ------
    AudioError
        If a file cannot be read.
    """
    digest = hashlib.sha256()
    files = {path: name for name, path in track.files.items()}  # a MUSDB18 file once
    for path, name in sorted(files.items(), key=lambda item: item[1]):
        digest.update(f"{name} {path.suffix.lower()} {_file_digest(path)}\n".encode())
    return digest.hexdigest()


def read(track: Track, stem: str) -> audio.Audio:
    """Read a stem, or the mixture, whole.

    Raises
    ------
    AudioError
        If it cannot be read.
    """
    stream = STREAMS.index(stem) if track.lossy else 0
    return audio.read(track.files[stem], stream=stream, accept_holes=False)


def as_wav(track: Track, stem: str, folder: Path) -> Path:
    """Give a stem, or the mixture, as a wav file.

    Returns
    -------
    Path
        The song's own file if it is wav; else ``folder/<stem>.wav``, float32, written anew, whole or
        not at all.

    Raises
    ------
    AudioError
        If it cannot be read or written.
    """
    path = track.files[stem]
    if path.suffix.lower() == ".wav":
        return path
    sound = read(track, stem)
    target = folder / f"{stem}.wav"
    audio.write(target, sound.samples, sound.rate, "float32")
    return target


def _find(data: Path, split: str | None) -> list[Track]:
    track = _track(data, None)
    if track is not None:
        return [track]
    if split is not None and (data / split).is_dir():
        return list(_songs(data / split, split))
    songs = list(_songs(data, None))
    if split is None:
        songs += [song for folder in _shown(data) if folder.is_dir() for song in _songs(folder, folder.name)]
    return songs


def _songs(folder: Path, split: str | None) -> Iterator[Track]:
    for path in _shown(folder):
        track = _track(path, split)
        if track is not None:
            yield track


def _track(path: Path, split: str | None) -> Track | None:
    """The song that a folder or file is, if it is one."""
    if path.is_dir():
        name = path.resolve().name  # also of "."
        files, extra = _sounds(path)
    else:
        name = path.name.removesuffix(STEM_FILE)
        files, extra = (dict.fromkeys(STREAMS, path) if path.name.endswith(STEM_FILE) else {}), []
    if not files:
        return None
    lossy = path.is_file()
    try:
        form = _form(files[MIXTURE], MIXTURE, lossy)
    except (AudioError, KeyError):
        form = Form(0, 0, 0)
    return Track(name, files, split, tuple(extra), lossy, form.rate, form.samples, form.channels)


def _sounds(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """A folder's files by what they are, wav before flac, and the sound files left over."""
    files: dict[str, Path] = {}
    extra = []
    sounds = [path for path in _shown(folder) if path.suffix.lower() in SOUNDS]
    for path in sorted(sounds, key=lambda path: SOUNDS.index(path.suffix.lower())):
        if path.stem in STREAMS and path.stem not in files:
            files[path.stem] = path
        else:
            extra.append(path)
    return files, extra


def _shown(folder: Path) -> list[Path]:
    """What lies in a folder, without hidden files such as macOS puts beside others."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _listing(data: Path) -> str:
    if data.is_file():
        return "a file"
    names = [path.name for path in _shown(data)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "an empty folder"


def _form(path: Path, name: str, lossy: bool) -> Form:
    """What the header says of the mixture or a stem."""
    if not lossy:
        return form_of(path)
    try:
        with av.open(str(path), **ffmpeg.ANY_TAGS) as container:
            streams = container.streams.audio
            if len(streams) < len(STREAMS):
                raise AudioError(
                    f"{path}: {len(streams)} audio streams, expected {len(STREAMS)}: {', '.join(STREAMS)}"
                )
            stream = streams[STREAMS.index(name)]
            seconds = (stream.duration or 0) * (stream.time_base or 0)
            return Form(round(seconds * stream.rate), stream.rate, stream.channels)
    except (av.FFmpegError, OSError) as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from error


def _check_headers(track: Track) -> Iterator[Problem]:
    if track.extra:
        names = ", ".join(path.name for path in track.extra)
        yield Problem(track.name, False, f"not used, as it is none of the five or there twice: {names}")
    missing = [name for name in (MIXTURE, *STEMS) if name not in track.files]
    if missing:
        yield Problem(track.name, True, f"no {', '.join(missing)} (wav or flac) among its files")

    forms = {}
    for name, path in track.files.items():
        try:
            forms[name] = _form(path, name, track.lossy)
        except AudioError as error:
            yield Problem(track.name, True, str(error))
    for name, form in forms.items():
        if (form.rate, form.channels) != (RATE, CHANNELS):
            found = f"{form.channels} channels at {form.rate} Hz"
            yield Problem(track.name, True, f"{name} has {found}, expected {CHANNELS} at {RATE} Hz")
    if len({form.samples for form in forms.values()}) > 1:
        lengths = ", ".join(f"{name} {form.samples}" for name, form in forms.items())
        yield Problem(track.name, True, f"lengths differ: {lengths} samples")


def _check_content(tracks: Sequence[Track]) -> list[Problem]:
    """Compare stems with mixtures, and mixtures of one length with each other."""
    lengths = defaultdict(list)
    for track in tracks:
        lengths[track.samples, track.lossy].append(track)
    suspects = [track for group in lengths.values() if len(group) > 1 for track in group]
    # Reading and arithmetic both leave the interpreter to other threads.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [problem for problem in pool.map(_check_sum, tracks) if problem is not None]
        digests = list(pool.map(_mixture_digest, suspects))

    first: dict[str, Track] = {}
    for track, digest in zip(suspects, digests, strict=True):
        other = first.setdefault(digest, track)
        if other is not track:
            problems.append(Problem(track.name, False, f"has the same mixture as {other.name}"))
    return problems


def _check_sum(track: Track) -> Problem | None:
    """Whether the stems sum to the mixture, both within full scale."""
    if track.lossy:
        return None
    energy = difference = 0.0
    try:
        for mixture, *stems in read_together([track.files[name] for name in (MIXTURE, *STEMS)], BLOCK):
            energy += float(np.square(mixture).sum(dtype=np.float64))
            total = stems[0]
            for stem in stems[1:]:
                total += stem
            error = np.clip(total, -1, 1, out=total)
            error -= np.clip(mixture, -1, 1, out=mixture)
            difference += float(np.square(error, out=error).sum(dtype=np.float64))
    except AudioError as error:
        return Problem(track.name, True, str(error))
    if not math.isfinite(energy + difference):
        return Problem(track.name, True, "NaN or infinity in its samples")
    if difference <= ROUNDING**2 * track.samples * track.channels:
        return None
    known = " (known of MUSDB18-HQ)" if track.name in KNOWN_SUMS else ""
    level = (
        f"the difference lies {10 * math.log10(energy / difference):.1f} dB below it"
        if energy
        else "it is silent"
    )
    return Problem(track.name, False, f"the stems do not sum to the mixture: {level}{known}")


def _mixture_digest(track: Track) -> str:
    """The same for equal mixtures, be they wav or flac; of a MUSDB18 file, for equal files."""
    path = track.files[MIXTURE]
    if track.lossy:
        return _file_digest(path)
    digest = hashlib.sha256()
    try:
        for (mixture,) in read_together([path], BLOCK):
            digest.update(mixture.data)
    except AudioError:
        return str(path)  # like no other; that it is damaged is told with its sum
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
