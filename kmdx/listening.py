"""Pages to listen to the stems of a song: each is one HTML file that needs no server, network or other file.

Conventions
-----------
A page contains a song's stems, and the song itself if it is known, as mp3 with a variable bit rate. Each
track is divided into segments of :data:`SEGMENT` seconds, encoded with :data:`MARGIN` seconds more on both
sides, between which the player fades. The browser decodes only the segments around the position, so a page
takes as little memory for an hour as for a minute, and all tracks start at the same sample. Waveforms and
spectrograms are computed here, not in the browser. ``player/player.js`` is the player; wavesurfer.js draws
the waveforms.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from kmdx import audio, encoding, files, host, inputs, manifest, spectrograms, urls
from kmdx.challenge import MIXTURE, WITHOUT, WITHOUT_VOCALS
from kmdx.errors import AudioError, KmdxError, counted
from kmdx.file_names import natural
from kmdx.urls import Url

PAGE = "listen.html"
"""The name of a song's page, in the folder of its stems."""
INDEX = "index.html"
"""The name of the page that lists the songs of a folder."""

SEGMENT = 6  # seconds
MARGIN = 0.1  # seconds; longer than the start that an mp3 encoder distorts
COMPRESSION, MORE_COMPRESSION = 0.4, 0.8  # of `encoding.mp3`: about 140 and 85 kbit/s
LONG = 2 * 3600  # seconds of all tracks together; longer pages use MORE_COMPRESSION
LONGEST = 8 * 3600  # seconds of all tracks together, about 400 MB: browsers cannot open much larger pages
TOLERANCE = 1.0  # seconds by which the lengths of a song's tracks may differ
PEAKS = 1000  # values of a waveform

PLAYER = Path(__file__).with_name("player")
SCRIPTS = (
    "wavesurfer/wavesurfer.min.js",
    "wavesurfer/regions.min.js",
    "wavesurfer/timeline.min.js",
    "player.js",
)
GENERATOR = "kmdx-net listening page"
"""The pages' generator, by which this module recognizes its own pages."""

ORDER = ("vocals", "drums", "bass", "guitar", "piano", "other")


@dataclass(frozen=True)
class Song:
    """The song that stems were made from, or the part of it from ``start`` seconds on."""

    path: Path | Url
    start: float = 0.0
    duration: float | None = None


@dataclass(frozen=True)
class _Plan:
    """What a page is made of."""

    folder: Path
    stems: Mapping[str, Path]
    song: Song | None
    title: str

    @property
    def fingerprint(self) -> str:
        """A text that changes if a page would."""
        paths: list[Path | Url] = [*self.stems.values()]
        facts: list[Any] = [version("kmdx-net"), self.title, *self.stems]
        if self.song is not None:
            paths.append(self.song.path)
            facts += [str(self.song.path), self.song.start, self.song.duration]
        for path in paths:
            stat = path.stat()
            facts += [stat.st_size, stat.st_mtime_ns]
        for each in (*SCRIPTS, "player.css", "page.css", "theme.css"):
            facts.append(_asset(each))
        return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()


def make(folder: Path, song: Song | None = None, title: str | None = None) -> Path:
    """Write the page of the stems in a folder, unless it is up to date; return its path.

    Parameters
    ----------
    folder : Path
        A folder with a song's stems.
    song : Song, optional
        The song. By default it is the one in the stems' records, if it is unchanged, or the file
        ``mixture.*`` in the folder; without either, the page has only the stems.
    title : str, optional
        By default the folder's name.

    Raises
    ------
    KmdxError
        If the folder has no stems, they belong to several songs or are too long, a file cannot be read, or
        the page cannot be written or would replace a file that is not a page of this module.
    """
    page = folder / PAGE
    try:
        stems = stems_in(folder)
        if not stems:
            raise KmdxError(f"{folder}: no stems: expected sound files")
        plan = _Plan(folder, stems, song or _song_of(folder), title or _title(folder))
        fingerprint = plan.fingerprint
        if not _is_own(page, fingerprint):
            if page.exists() and not _is_own(page):
                raise KmdxError(f"{page} is not a listening page of kmdx: rename it, then repeat the command")
            with files.atomic(page) as partial, partial.open("w", encoding="utf-8", errors="replace") as file:
                _write(plan, fingerprint, file)
    except OSError as error:
        name = error.filename or page
        raise KmdxError(f"{name}: {error.strerror or error}; no page of {folder} was written") from error
    return page


def make_all(folder: Path, on_page: Callable[[Path], None], on_error: Callable[[str], None]) -> None:
    """Write the pages of all folders of stems in and below a folder, and an index if it has several.

    Parameters
    ----------
    on_page, on_error : callable
        Called with the path of each page, and with the reason why a folder has none.
    """
    unreadable: list[OSError] = []
    found = [*_folders_with_stems(folder, unreadable)]
    for error in unreadable:
        on_error(f"{error.filename or folder}: {error.strerror or error}")
    if not found and not unreadable:
        on_error(f"{folder}: no stems in or below this folder: expected sound files")
    for each in found:
        try:
            on_page(make(each))
        except KmdxError as problem:
            on_error(str(problem))
    try:
        if index := write_index(folder):
            on_page(index)
    except KmdxError as problem:
        on_error(str(problem))


def write_index(folder: Path) -> Path | None:
    """Write the page that lists the pages below a folder, if there are several; return its path.

    Raises
    ------
    KmdxError
        If it cannot be written or would replace a file that is not a page of this module.
    """
    index = folder / INDEX
    found = (page for page in folder.rglob(PAGE) if page.parent != folder and _is_own(page))
    pages = sorted(found, key=lambda page: [natural(part) for part in page.parent.parts])
    if len(pages) < 2:
        return None
    if index.exists() and not _is_own(index):
        raise KmdxError(f"{index} is not an index of listening pages: rename it to get one")
    try:
        files.write_text(index, _index(folder, pages).encode("utf-8", "replace").decode())
    except OSError as error:
        raise KmdxError(f"{index} cannot be written: {error.strerror or error}") from error
    return index


def stems_in(folder: Path) -> dict[str, Path]:
    """The stems in a folder by name; of a stem in several formats, wav or flac rather than mp3.

    Raises :class:`OSError` if the folder cannot be read.
    """
    found = _sounds(folder)
    found.pop(MIXTURE, None)
    rank = {name: number for number, name in enumerate(ORDER)}

    def order(name: str) -> tuple[bool, int, Any]:
        return _left_out(name) is not None, rank.get(name, len(ORDER)), natural(name)

    return {name: found[name] for name in sorted(found, key=order)}


def _sounds(folder: Path) -> dict[str, Path]:
    """The sound files in a folder by name; if several have one name, wav or flac rather than mp3."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix.lower() in inputs.COMPRESSED, path)):
        is_sound = path.suffix.lower() in inputs.EXTENSIONS and not path.name.startswith(".")
        if is_sound and path.is_file():
            found.setdefault(path.stem, path)
    return found


def _left_out(name: str) -> str | None:
    """The stem that a sum of all others leaves out; None for a stem that is not a sum."""
    if name in WITHOUT_VOCALS:
        return "vocals"
    return name.removeprefix(WITHOUT) if name.startswith(WITHOUT) else None


def _is_repeated(name: str, parts: Collection[str]) -> bool:
    """Whether a stem is a sum of parts that are on the page, too; it is then muted at first."""
    left_out = _left_out(name)
    return left_out is not None and any(part != left_out for part in parts)


def script_json(data: Any) -> str:
    """JSON that is safe inside a script element: it cannot end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def style() -> str:
    """The style of the player, and the colors it uses."""
    return _asset("theme.css") + _asset("player.css")


def script() -> str:
    """The script of the player, with the library that it uses and the library's license."""
    license = _asset("wavesurfer/LICENSE")
    return f"/*! wavesurfer.js\n{license}*/\n" + "\n".join(map(_asset, SCRIPTS))


@cache
def _asset(name: str) -> str:
    return (PLAYER / name).read_text(encoding="utf-8")


def _folders_with_stems(folder: Path, unreadable: list[OSError]) -> Iterator[Path]:
    """The folders in and below a folder, itself included, that have sound files.

    The errors of folders that cannot be read are added to ``unreadable``.
    """
    try:
        has_stems = bool(stems_in(folder))
        entries = sorted(folder.iterdir(), key=lambda entry: natural(entry.name))
    except OSError as error:
        unreadable.append(error)
        return
    if has_stems:
        yield folder
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            yield from _folders_with_stems(entry, unreadable)


def _song_of(folder: Path) -> Song | None:
    """The song that a folder's stems were made from, if it is still there."""
    record = manifest.any_record(folder)
    if record is not None:
        path = urls.parse(record.song.path)
        if isinstance(path, Path) and path.is_file() and record.song.is_content_of(path):
            return Song(path, record.settings.start, record.settings.duration)
    mixture = _sounds(folder).get(MIXTURE)
    return None if mixture is None else Song(mixture)


def _is_own(page: Path, text: str = GENERATOR) -> bool:
    """Whether a file is a page of this module, or has a text at its beginning."""
    try:
        with page.open("rb") as file:
            return text.encode() in file.read(2000)
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- a song's page


@dataclass
class _Writer:
    """Writes the tracks of a page: their sound at once, and what describes them in `data` at the end."""

    file: TextIO
    folder: Path
    tracks: int  # how many there will be
    first: str = ""  # file name of the first track
    rate: int = 0  # Hz
    length: int = 0  # samples of each track
    compression: float = COMPRESSION
    described: list[dict[str, Any]] = field(default_factory=list)
    spectrograms: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, source: str, sound: audio.Audio, **facts: Any) -> None:
        """Add a track; the first decides the rate and the length of all.

        Raises :class:`AudioError` if its length is not that of the others, or the page would be too long.
        """
        if not self.described:
            self._begin(source, sound)
        samples = self._fitted(source, sound)
        number = len(self.described)
        names = [f"track{number}-{index}" for index in range(self._segments())]
        with ThreadPoolExecutor(min(4, host.usable_cores())) as workers:
            encoded = workers.map(lambda index: self._encoded(samples, index), range(len(names)))
            for segment, data in zip(names, encoded, strict=True):
                text = base64.b64encode(data).decode()
                self.file.write(f'<script type="text/plain" id="{segment}">{text}</script>\n')
        self.spectrograms.append(spectrograms.spectrogram(audio.Audio(samples, self.rate)))
        segments = [f"#{segment}" for segment in names]
        self.described.append({**facts, "peaks": _peaks(samples), "segments": segments})

    @property
    def data(self) -> dict[str, Any]:
        """The data of the player."""
        loudest = max(float(power.max()) for power in self.spectrograms)
        for track, power in zip(self.described, self.spectrograms, strict=True):
            png = spectrograms.png(spectrograms.levels(power, loudest))
            track["picture"] = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return {
            "duration": self.length / self.rate,
            "rate": self.rate,
            "segment": SEGMENT,
            "margin": round(MARGIN * self.rate) / self.rate,
            "sides": {"a": "Stems", "b": "Original"},
            "tracks": self.described,
        }

    def _begin(self, name: str, sound: audio.Audio) -> None:
        self.first, self.rate = name, _rate(sound.rate)
        encoding.check_format("mp3", self.rate)
        self.length = math.ceil(len(sound.samples) * self.rate / sound.rate)
        total = self.tracks * self.length / self.rate  # seconds
        if total > LONGEST:
            raise AudioError(
                f"{self.folder}: no page: {counted(self.tracks, 'track')} of {_minutes(total / self.tracks)} "
                f"are {_minutes(total)} of sound, and a page holds at most {_minutes(LONGEST)}"
            )
        self.compression = COMPRESSION if total <= LONG else MORE_COMPRESSION

    def _fitted(self, name: str, sound: audio.Audio) -> NDArray[np.float32]:
        """The samples at the page's rate and length."""
        seconds, expected = len(sound.samples) / sound.rate, self.length / self.rate
        if abs(seconds - expected) > TOLERANCE:
            raise AudioError(
                f"{self.folder}: no page: {self.first} lasts {expected:.1f} s and {name} {seconds:.1f} s; "
                "expected the stems of one song"
            )
        return audio.resample(sound.samples, sound.rate, self.rate, self.length)

    def _segments(self) -> int:
        return math.ceil(self.length / (SEGMENT * self.rate))

    def _encoded(self, samples: NDArray[np.float32], index: int) -> bytes:
        """A segment with its margins, which are silent before the song and after it."""
        margin, step = round(MARGIN * self.rate), SEGMENT * self.rate
        begin, end = index * step - margin, min((index + 1) * step, self.length) + margin
        part = samples[max(0, begin) : end]
        part = np.pad(part, ((max(0, -begin), max(0, end - self.length)), (0, 0)))
        return encoding.mp3(part, self.rate, self.compression)


def _write(plan: _Plan, fingerprint: str, file: TextIO) -> None:
    writer = _Writer(file, plan.folder, len(plan.stems) + (plan.song is not None))
    file.write(_head(plan.title, fingerprint))
    file.write('<main id="player"><p class="note">Loading …</p></main>\n')
    file.write('<noscript><p class="note">The player needs JavaScript.</p></noscript>\n')
    parts = {name for name in plan.stems if _left_out(name) is None}
    for name, path in plan.stems.items():
        sound = audio.read(path, downmix=True)
        writer.add(path.name, sound, name=name, muted=_is_repeated(name, parts))
    if plan.song is not None:
        with ExitStack() as stack:
            path = stack.enter_context(urls.local(plan.song.path))
            sound = audio.read(path, plan.song.start, plan.song.duration, True, name=str(plan.song.path))
        writer.add(str(plan.song.path), sound, name="Original", key="", side="b", mark="song")
    if writer.compression == MORE_COMPRESSION:
        file.write(
            '<p class="note">Long song: the sound on this page has a lower quality than the stems.</p>\n'
        )
    file.write(f'<script type="application/json" id="data">{script_json(writer.data)}</script>\n')
    file.write(f"<script>\n{script()}\n</script>\n<script>\n{_START}</script>\n</body>\n</html>\n")


_START = """\
const find = (id) => document.getElementById(id);
const player = kmdxPlayer(find("player"), JSON.parse(find("data").textContent));
"""


def _head(title: str, fingerprint: str, note: str = "") -> str:
    """The beginning of a page, up to its heading."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="{GENERATOR}">
<meta name="fingerprint" content="{fingerprint}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{style()}{_asset("page.css")}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{note}"""


def _index(folder: Path, pages: Sequence[Path]) -> str:
    """The text of an index."""
    lines = []
    for page in pages:
        place = page.relative_to(folder)
        address = quote(place.as_posix().encode("utf-8", "surrogateescape"))
        lines.append(f'<li><a href="{address}">{html.escape(" / ".join(place.parent.parts))}</a></li>\n')
    note = f'<p class="note">{counted(len(pages), "song")}</p>\n'
    head = _head(_title(folder), "", note)
    return f'{head}<main><ul class="songs">\n{"".join(lines)}</ul></main>\n</body>\n</html>\n'


def _title(folder: Path) -> str:
    """The name of a folder, also if its path is ``..``."""
    return Path(os.path.abspath(folder)).name or str(folder)  # noqa: PTH100 - resolve() would follow links


def _rate(rate: int) -> int:
    """The rate of an mp3 for sound of a rate, in Hz: the same, or the lowest above it, or the highest."""
    if rate > encoding.MP3_RATES[-1]:
        return 44100 if rate % 11025 == 0 else 48000
    return next(each for each in encoding.MP3_RATES if each >= rate)


def _peaks(samples: NDArray[np.float32]) -> list[float]:
    """The largest absolute sample of each of :data:`PEAKS` equal parts."""
    edges = np.linspace(0, len(samples), min(PEAKS, len(samples)) + 1).astype(int)
    parts = (samples[begin:end] for begin, end in itertools.pairwise(edges))
    return [round(min(float(max(part.max(), -part.min())), 9.0), 3) for part in parts]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"
