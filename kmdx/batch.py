"""Separate a batch of songs into folders of stems: which are missing, read, separate, write, report.

The ``kmdx separate`` command uses it; :mod:`kmdx.cluster` does the same on many GPUs and machines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape

from kmdx import (
    audio,
    devices,
    engines,
    files,
    inputs,
    listening,
    manifest,
    output_template,
    pipeline,
    precisions,
    speeds,
    tags,
    terminal,
    urls,
    weights,
)
from kmdx.ensemble import Progress
from kmdx.errors import AudioError, KmdxError, reason
from kmdx.mirror import Mirror
from kmdx.output_template import Template
from kmdx.plan import Plan
from kmdx.separator import DEFAULT_ENSEMBLE, Separator, Stems
from kmdx.song_log import SongLog
from kmdx.terminal import err
from kmdx.urls import Url

SMALLEST = "htdemucs"  # the ensemble with the smallest download
SHIPPED = "mini"  # the ensemble that needs none


@dataclass(frozen=True)
class SeparateOptions:
    """The options of ``kmdx separate``, with the same defaults."""

    ensemble: str = DEFAULT_ENSEMBLE
    device: str = "auto"
    speed: str = speeds.DEFAULT
    precision: str = "auto"
    engine: str = engines.DEFAULT
    start: float = 0.0
    duration: float | None = None
    downmix: bool = False
    format: str = "wav16"
    overwrite: bool = False
    page: bool = False


@dataclass(frozen=True)
class Job:
    """What to make of every song of a batch, and where; :class:`KmdxError` if both do not go together."""

    output: Path
    """Parent of the songs' folders."""
    plan: Plan
    stems: tuple[str, ...]
    """The stems to make, of the plan and ``accompaniment``."""
    options: SeparateOptions
    mirror: Mirror | None = None
    """Where the stems are uploaded to, if that is a URL; ``output`` is its folder."""
    template: Template | None = None
    """Paths of stem files other than ``<song>/<stem>``; ``output`` has only their records."""

    def __post_init__(self) -> None:
        if self.mirror and self.options.page:
            raise KmdxError(
                f"--page needs an output folder on this machine, not {self.mirror.url}; "
                "`kmdx page FOLDER` makes pages of a copy of the stems"
            )
        if self.template and self.options.page:
            raise KmdxError(
                "--page needs each song's stems in a folder of their own; leave out --output-template"
            )

    @property
    def target(self) -> Path | Url:
        """Parent of the songs' folders, as the user gave it."""
        if self.template:
            return self.output.parent  # of the records
        return self.mirror.url if self.mirror else self.output

    def files(self, song: inputs.InputSong) -> dict[str, str]:
        """The file name of each stem of a song."""
        extension = audio.FORMATS[self.options.format].extension
        if self.template:
            return self.template.files(song, self.stems, extension)
        return {stem: f"{stem}{extension}" for stem in self.stems}

    def check_places(self, songs: Sequence[inputs.InputSong]) -> None:
        """Raise :class:`KmdxError` if two songs or stems would be written to the same place."""
        extension = audio.FORMATS[self.options.format].extension
        if self.template:
            output_template.check(self.template, songs, self.stems, extension)
        inputs.refuse_shared_folders(songs, self.output, [f"{stem}{extension}" for stem in self.stems])

    def folder_of(self, song: inputs.InputSong) -> Path | Url:
        """The deepest folder with all stems of a song, as the user gave it."""
        if self.template:
            return output_template.folder_of(self.task(song).wanted.paths)
        return self.target / song.place

    @cached_property
    def settings(self) -> Callable[[str], manifest.StemSettings | None]:
        """The settings that each stem of the plan would be made with now, on this machine."""
        return _settings(self.plan, self.options)

    def task(self, song: inputs.InputSong) -> SongTask:
        """A song with the stems to make of it."""
        folder = self.output / song.place
        return SongTask(
            song,
            manifest.Wanted(song.path, folder, self.files(song), self.settings, self.options.overwrite),
        )

    def shown(self, result: SongResult) -> SongResult:
        """A result as the user sees it: with the URL of the stems, not the folder that they were made in."""
        if self.template:
            place = Path(str(result.folder)).relative_to(self.output).as_posix()
            return replace(result, folder=self.folder_of(inputs.InputSong(result.song, place)))
        if self.mirror is None:
            return result
        return replace(
            result,
            folder=self.mirror.at(Path(str(result.folder))),
            error=None if result.error is None else self.mirror.named(result.error),
            warnings=tuple(map(self.mirror.named, result.warnings)),
        )


class SongTask(NamedTuple):
    """A song to separate, and the stems to make of it."""

    song: inputs.InputSong
    wanted: manifest.Wanted


class SourceSong(NamedTuple):
    """A song as read, with its tags if the stems will have any, and the file it was read from."""

    source: manifest.SourceFile
    sound: audio.Audio
    tags: tags.Tags


class SongStems(NamedTuple):
    """The stems of a song, at the rate of its file."""

    source: manifest.SourceFile
    stems: Stems
    rate: int
    tags: tags.Tags

    @property
    def seconds(self) -> float:
        """Their length."""
        return len(next(iter(self.stems.values()))) / self.rate


@dataclass(frozen=True)
class SongResult:
    """What became of a song."""

    song: Path | Url
    folder: Path | Url
    """The folder of its stems."""
    stems: tuple[str, ...] = ()
    """The stems that were written; none if they were finished before, or if the song failed."""
    seconds: float = 0.0
    """Length of the separated audio."""
    error: str | None = None
    """Why it failed; None if all its stems are finished."""
    warnings: tuple[str, ...] = ()
    node: str | None = None
    """The machine that separated it, if it was done on a cluster."""


class Check(NamedTuple):
    """What is in a song's folder: the work that is left, if any, and the result if there is none."""

    task: SongTask | None
    result: SongResult


class SongWorker:
    """Separates songs of a job, each from file to file. The first song that needs networks loads them.

    Several threads may call it: they read and write at the same time, and separate in turn.
    """

    def __init__(self, job: Job) -> None:
        if job.mirror:  # this process has its own
            mirror = Mirror.of(job.mirror.url)
            job = replace(job, output=mirror.folder, mirror=mirror)
        self.job = job
        self._turn = threading.Lock()
        self._separator: Separator | None = None

    def separate(self, song: inputs.InputSong, progress: Progress) -> SongResult:
        """Separate a song, unless its stems are finished. Nothing is printed.

        Raises
        ------
        kmdx.files.Locked
            If another worker is separating it.
        """
        folder = self.job.output / song.place
        try:
            left, known = check(self.job.task(song))
            if left is None and self.job.mirror is None:  # a claim would write into a finished folder
                return self.job.shown(_with_page(known, self.job.options))
            with manifest.claimed(folder):
                if self.job.mirror:
                    self.job.mirror.pull(song.place)
                left, known = check(self.job.task(song))  # another worker may have finished it meanwhile
                result = known if left is None else self._finish(left, known, progress)
                return self.job.shown(_with_page(result, self.job.options))
        except files.Locked:
            raise
        except (KmdxError, OSError) as error:
            message = str(error) if isinstance(error, KmdxError) else f"{song.path}: {reason(error)}"
            return self.job.shown(SongResult(song.path, folder, error=message))

    def _finish(self, task: SongTask, known: SongResult, progress: Progress) -> SongResult:
        """Separate the stems that are missing."""
        read = _read(task, self.job.options)
        with self._turn:
            if self._separator is None:
                self._load()
            assert self._separator is not None
            made = _separate(task, read, self._separator, self.job.options.format, progress)
        task = SongTask(task.song, self.job.task(task.song).wanted.only(task.wanted.files))
        result = _write(task, made, self.job)
        return replace(result, warnings=(*known.warnings, *result.warnings))

    def _load(self) -> None:
        """Load the networks; pull weights that this machine lacks."""
        if weights.pull_missing(use.weight for use in self.job.plan.uses(self.job.stems).values()):
            self.job = replace(self.job)  # whose settings include the checksums of the new files
        self._separator = load_separator(self.job)


def separate(songs: Sequence[inputs.InputSong], job: Job, log: SongLog) -> int:
    """Separate songs, report each, and return how many failed.

    Songs whose stems are all finished are skipped, and only missing stems are made.

    Raises :class:`KmdxError` if an option is wrong, weights are missing, or two songs would share a folder,
    and :class:`KeyboardInterrupt` if the user stops it; this has been reported.
    """
    job.check_places(songs)
    weights.pull_from_urls(use.weight for use in job.plan.networks.values())
    todo, failed = [], 0
    for left, known in map(check, map(job.task, songs)):
        if left is None:
            log.song(job.shown(_with_page(known, job.options)))
            failed += known.error is not None
        else:
            todo.append(left)
            for warning in job.shown(known).warnings:
                terminal.warn(warning)
    log.count_finished()
    if todo:
        separator = load_separator(job)
        err.print(escape(_describe_device(separator)))
        failed += _separate_all(todo, separator, job, log)
    return failed


def _settings(loaded: Plan, options: SeparateOptions) -> Callable[[str], manifest.StemSettings | None]:
    """The settings that each stem of the plan would be made with now."""
    found = weights.find_all(use.weight for use in loaded.networks.values())
    halves = precisions.candidates(options.precision, devices.choose(options.device), options.speed)

    @cache
    def settings(stem: str) -> manifest.StemSettings | None:
        if stem not in loaded.stems and loaded.subtracted(stem) is None:
            return None
        signals = loaded.signals_of([stem])
        names = [use.weight.name for use in loaded.uses(signals).values()]
        held = {name: found[name] for name in names}
        return manifest.StemSettings(
            ensemble=loaded.name,
            plan=loaded.checksum(signals),
            weights={name: weights.file_sha256(file.path) if file else None for name, file in held.items()},
            precision=precisions.NAMES[halves[0]] if halves else "fp32",
            engine=options.engine,
            speed=options.speed,
            start=options.start,
            duration=options.duration,
            downmix=options.downmix,
            format=options.format,
        )

    return settings


def check(task: SongTask) -> Check:
    """Find out what is in a song's folder, and what is left to do."""
    path, folder = task.song.path, task.wanted.folder
    where = output_template.folder_of(task.wanted.paths)
    endings = tuple({format.extension for format in audio.FORMATS.values()})
    result = SongResult(path, folder)
    try:
        manifest.clean(folder, task.wanted.files.values())
        status = manifest.status(task.wanted, lambda name: name.endswith(endings))
    except OSError as error:
        what = f"{path}: {error.filename or folder} cannot be read: {error.strerror}"
        return Check(None, replace(result, error=what))
    except urls.UrlError as error:
        return Check(None, replace(result, error=str(error)))
    remarks = [
        f"{unknown} was not written by kmdx, or was changed since; it is renamed to "
        f"{unknown.name}.bak, unless the new stem begins with the same bytes"
        for unknown in (manifest.file_path(folder, name) for name in status.unknown)
    ]
    if status.stale:
        remarks.append(f"{where} also has files made with different settings: {'; '.join(status.stale)}")
    result = replace(result, warnings=tuple(remarks))
    if status.conflicts:
        what = (
            f"{path}: {where} has stems made with different settings ({'; '.join(status.conflicts)}); "
            "use --overwrite to replace them, or another --output to keep them"
        )
        return Check(None, replace(result, error=what))
    left = SongTask(task.song, task.wanted.only(status.missing)) if status.missing else None
    return Check(left, result)


def load_separator(job: Job) -> Separator:
    """Load the networks of a job; raises :class:`KmdxError` if that is not possible."""
    options = job.options
    try:
        return Separator(
            job.plan,
            device=options.device,
            stems=job.stems,
            speed=options.speed,
            precision=options.precision,
            engine=options.engine,
        )
    except weights.MissingWeights as error:
        size = terminal.megabytes(weights.get(SMALLEST).bytes)
        hint = f"; --ensemble {SMALLEST} needs only {size}" if options.ensemble != SMALLEST else ""
        hint += f"; --ensemble {SHIPPED} needs no download"
        raise KmdxError(f"{error}{hint}") from error


def _separate_all(tasks: list[SongTask], separator: Separator, job: Job, log: SongLog) -> int:
    """Separate songs, report each, and return how many failed."""
    failed: list[SongTask] = []
    numbers = {task.wanted.folder: number for number, task in enumerate(tasks, 1)}  # no two share a folder

    def separate(task: SongTask, song: SourceSong) -> SongStems:
        number = numbers[task.wanted.folder]
        seconds = len(song.sound.samples) / song.sound.rate
        with bars.song(task.song.place, number, seconds) as progress:
            return _separate(task, song, separator, job.options.format, progress)

    def write(task: SongTask, made: SongStems) -> None:
        log.song(job.shown(_with_page(_write(task, made, job), job.options)))

    def fail(task: SongTask, error: KmdxError) -> None:
        log.song(job.shown(SongResult(task.song.path, task.wanted.folder, error=str(error))))
        failed.append(task)

    try:
        with terminal.SongBars(len(tasks)) as bars:
            pipeline.run(tasks, partial(_read, options=job.options), separate, write, fail)
    except pipeline.Interrupted as stop:
        where = "" if stop.item is None else f" in {stop.item.song.place}"
        terminal.complain(f"stopped{where}; finished songs are kept")
        raise KeyboardInterrupt from None
    return len(failed)


def _read(task: SongTask, options: SeparateOptions) -> SourceSong:
    """Read a song."""
    path, name = task.song.path, str(task.song.path)
    try:
        with urls.local(path) as file:
            source = manifest.identify(path, file)
            sound = audio.read(file, options.start, options.duration, options.downmix, name=name)
            is_tagged = audio.FORMATS[options.format].tagged
            found = tags.read(file, name) if is_tagged else tags.Tags()
            if isinstance(path, Path) and not source.is_content_of(path):
                raise AudioError(f"{path}: changed while it was being read; run the command again")
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {reason(error)}") from error
    return SourceSong(source, sound, found)


def _separate(
    task: SongTask, song: SourceSong, separator: Separator, format: str, progress: Progress
) -> SongStems:
    """Separate a song, after checking that its stems can be written."""
    sound = song.sound
    places = [task.wanted.folder / manifest.FOLDER / "lock", *task.wanted.paths.values()]
    audio.check_writable(places, sound.rate, format)
    stems = separator.separate(
        sound.samples,
        sound.rate,
        stems=task.wanted.files,
        progress=progress,
        name=str(task.song.path),
    )
    return SongStems(song.source, stems, sound.rate, song.tags)


def _write(task: SongTask, made: SongStems, job: Job) -> SongResult:
    """Write the stems of a song, and upload them if the output is a URL."""
    if job.mirror is None:
        return _write_files(task, made, job.options.format)
    job.mirror.pull(task.song.place)
    left, known = check(task)
    if known.error:
        raise KmdxError(known.error)
    if left is None:  # another process was faster
        return known
    with job.mirror.uploading(left.wanted):
        stems = {stem: made.stems[stem] for stem in left.wanted.files}
        return _write_files(left, made._replace(stems=stems), job.options.format)


def _write_files(task: SongTask, made: SongStems, format: str) -> SongResult:
    """Write the stems of a song."""
    paths, stems = task.wanted.paths, made.stems
    with manifest.writing(task.wanted, made.source) as prepare:
        peaks = audio.write_all(
            {paths[stem]: samples for stem, samples in stems.items()},
            made.rate,
            format,
            {paths[stem]: made.tags.of_stem(stem) for stem in stems},
            prepare,
        )
    clipped = tuple(
        f"{path} is clipped: it peaks at {peak:.3f}; --format float32 avoids clipping"
        for path, peak in peaks.items()
        if peak > 1 and audio.FORMATS[format].integer
    )
    return SongResult(task.song.path, task.wanted.folder, tuple(stems), made.seconds, warnings=clipped)


def _with_page(result: SongResult, options: SeparateOptions) -> SongResult:
    """Make the listening page of a song that has not failed, if the options request it."""
    if not options.page or result.error is not None:
        return result
    try:
        listening.make(Path(str(result.folder)), listening.Song(result.song, options.start, options.duration))
    except KmdxError as error:  # the stems are finished nevertheless
        return replace(result, warnings=(*result.warnings, str(error)))
    return result


def _describe_device(separator: Separator) -> str:
    """One line: the device, the precision, and the devices that ONNX Runtime actually uses."""
    computed_in = " and ".join(dict.fromkeys(separator.precisions.values()))
    engine = "" if separator.engine == engines.DEFAULT else f", {separator.engine} engine"
    line = f"{separator.plan.name} on {separator.device} in {computed_in}{engine}"
    for name, providers in separator.providers.items():
        line += f"; {name} in ONNX Runtime on {providers[0].removesuffix('ExecutionProvider')}"
    return line
