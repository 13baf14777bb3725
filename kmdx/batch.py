"""Separate a batch of songs into folders of stems: which are missing, read, separate, write, report.

The ``kmdx separate`` command uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape

from kmdx import audio, devices, engines, inputs, manifest, pipeline, precisions, tags, terminal, weights
from kmdx.challenge import ACCOMPANIMENT
from kmdx.errors import AudioError, KmdxError, reason
from kmdx.plan import Plan
from kmdx.separator import Separator, Stems
from kmdx.terminal import err

SMALLEST = "htdemucs"  # the ensemble with the smallest download


@dataclass(frozen=True)
class SeparateOptions:
    """The options of ``kmdx separate``."""

    ensemble: str
    device: str
    speed: str
    precision: str
    engine: str
    start: float
    duration: float | None
    downmix: bool
    format: str
    overwrite: bool


class SongTask(NamedTuple):
    """A song to separate, and the stems to make of it."""

    song: inputs.InputSong
    wanted: manifest.Wanted


class SourceSong(NamedTuple):
    """A song as read, and the file it was read from."""

    source: manifest.SourceFile
    sound: audio.Audio


class SongStems(NamedTuple):
    """The stems of a song, at the rate of its file."""

    source: manifest.SourceFile
    stems: Stems
    rate: int


def separate(
    songs: Sequence[inputs.InputSong],
    output: Path,
    loaded: Plan,
    stems: tuple[str, ...],
    options: SeparateOptions,
) -> int:
    """Separate songs into folders in ``output``, report each, and return how many failed.

    Songs whose stems are all finished are skipped, and only missing stems are made.

    Raises :class:`KmdxError` if an option is wrong, weights are missing, or two songs would share a folder,
    and :class:`KeyboardInterrupt` if the user stops it; this has been reported.
    """
    tasks = _tasks(songs, output, loaded, stems, options)
    todo, failed = _check_folders(tasks)
    if todo:
        separator = _separator(loaded, options, stems)
        err.print(escape(_describe_device(separator)))
        failed += _separate_all(todo, separator, options)
    return failed


def _settings(loaded: Plan, options: SeparateOptions) -> Callable[[str], manifest.StemSettings | None]:
    """The settings that each stem of the plan would be made with now."""
    found = weights.find_all(use.weight for use in loaded.networks.values())
    halves = precisions.candidates(options.precision, devices.choose(options.device), options.speed)

    @cache
    def settings(stem: str) -> manifest.StemSettings | None:
        if stem not in loaded.stems and stem != ACCOMPANIMENT:
            return None
        signals = loaded.signals_of([stem])
        names = [loaded.networks[name].weight.name for name in loaded.networks_used(signals)]
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


def _tasks(
    songs: Sequence[inputs.InputSong],
    output: Path,
    loaded: Plan,
    wanted: Sequence[str],
    options: SeparateOptions,
) -> list[SongTask]:
    """The songs with the stems to make of each; an error if two songs would share a folder."""
    names = {stem: f"{stem}{audio.FORMATS[options.format].extension}" for stem in wanted}
    inputs.refuse_shared_folders(songs, output, names.values())
    settings = _settings(loaded, options)
    return [
        SongTask(song, manifest.Wanted(song.path, song.folder(output), names, settings, options.overwrite))
        for song in songs
    ]


def _check_folders(tasks: list[SongTask]) -> tuple[list[SongTask], int]:
    """Report what is in the songs' folders; return the songs to separate, and how many failed."""
    endings = tuple({format.extension for format in audio.FORMATS.values()})
    todo, failed = [], 0
    for task in tasks:
        path, folder = task.song.path, task.wanted.folder
        try:
            manifest.clean(folder)
            status = manifest.status(task.wanted, lambda name: name.endswith(endings))
        except OSError as error:
            terminal.complain(f"{path}: {error.filename or folder} cannot be read: {error.strerror}")
            failed += 1
            continue
        if status.conflicts:
            terminal.complain(
                f"{path}: {folder} has stems made with different settings ({'; '.join(status.conflicts)}); "
                "use --overwrite to replace them, or another --output to keep them"
            )
            failed += 1
        elif status.missing:
            todo.append(SongTask(task.song, task.wanted.only(status.missing)))
        else:
            err.print(escape(f"{path}: already in {folder}; use --overwrite to separate it again"))
        for name in status.unknown:
            terminal.warn(
                f"{folder / name} was not written by kmdx, or was changed since; it is renamed to "
                f"{name}.bak, unless the new stem begins with the same bytes"
            )
        if status.stale:
            terminal.warn(f"{folder} also has files made with different settings: {'; '.join(status.stale)}")
    return todo, failed


def _separator(loaded: Plan, options: SeparateOptions, stems: tuple[str, ...]) -> Separator:
    """Load the networks."""
    try:
        return Separator(
            loaded,
            device=options.device,
            stems=stems,
            speed=options.speed,
            precision=options.precision,
            engine=options.engine,
        )
    except weights.MissingWeights as error:
        size = terminal.megabytes(weights.get(SMALLEST).bytes)
        hint = f"; --ensemble {SMALLEST} needs only {size}" if options.ensemble != SMALLEST else ""
        raise KmdxError(f"{error}{hint}") from error


def _separate_all(tasks: list[SongTask], separator: Separator, options: SeparateOptions) -> int:
    """Separate songs, report each, and return how many failed."""
    failed: list[SongTask] = []
    numbers = {task.wanted.folder: number for number, task in enumerate(tasks, 1)}  # no two share a folder

    def separate(task: SongTask, song: SourceSong) -> SongStems:
        number = f"[{numbers[task.wanted.folder]}/{len(tasks)}] " if len(tasks) > 1 else ""
        return _separate(task, song, separator, options.format, f"{number}{task.song.place}")

    def fail(task: SongTask, error: KmdxError) -> None:
        terminal.complain(str(error))
        failed.append(task)

    try:
        pipeline.run(
            tasks, partial(_read, options=options), separate, partial(_write, format=options.format), fail
        )
    except pipeline.Interrupted as stop:
        where = "" if stop.item is None else f" in {stop.item.song.place}"
        terminal.complain(f"stopped{where}; finished songs are kept")
        raise KeyboardInterrupt from None
    return len(failed)


def _read(task: SongTask, options: SeparateOptions) -> SourceSong:
    """Read a song."""
    path = task.song.path
    try:
        source = manifest.identify(path)
        sound = audio.read(path, options.start, options.duration, options.downmix)
        if not source.is_content_of(path):
            raise AudioError(f"{path}: changed while it was being read; run the command again")
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {reason(error)}") from error
    return SourceSong(source, sound)


def _separate(task: SongTask, song: SourceSong, separator: Separator, format: str, title: str) -> SongStems:
    """Separate a song, with a progress bar, after checking that its stems can be written."""
    sound = song.sound
    places = [task.wanted.folder / manifest.FOLDER / "lock", *task.wanted.paths.values()]
    audio.check_writable(places, sound.rate, format)
    with terminal.song_bar(title, len(sound.samples) / sound.rate) as progress:
        stems = separator.separate(
            sound.samples,
            sound.rate,
            stems=task.wanted.files,
            progress=progress,
            name=str(task.song.path),
        )
    return SongStems(song.source, stems, sound.rate)


def _write(task: SongTask, made: SongStems, format: str) -> None:
    """Write the stems of a song, and report them."""
    paths, stems = task.wanted.paths, made.stems
    song_tags = tags.read(task.song.path) if audio.FORMATS[format].tagged else tags.Tags()
    with manifest.writing(task.wanted, made.source) as prepare:
        peaks = audio.write_all(
            {paths[stem]: samples for stem, samples in stems.items()},
            made.rate,
            format,
            {paths[stem]: song_tags.of_stem(stem) for stem in stems},
            prepare,
        )
    terminal.say(f"{task.song.path} → {task.wanted.folder} ({', '.join(stems)})")
    for path, peak in peaks.items():
        if peak > 1 and audio.FORMATS[format].integer:
            terminal.warn(f"{path} is clipped: it peaks at {peak:.3f}; --format float32 avoids clipping")


def _describe_device(separator: Separator) -> str:
    """One line: the device, the precision, and the devices that ONNX Runtime actually uses."""
    computed_in = " and ".join(dict.fromkeys(separator.precisions.values()))
    engine = "" if separator.engine == engines.DEFAULT else f", {separator.engine} engine"
    line = f"{separator.plan.name} on {separator.device} in {computed_in}{engine}"
    for name, providers in separator.providers.items():
        line += f"; {name} in ONNX Runtime on {providers[0].removesuffix('ExecutionProvider')}"
    return line
