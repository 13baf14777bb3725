"""Decode compressed stems once, so that any window can be read directly.

Uncompressed files are read in place. Others are decoded into a folder that is kept between runs: flac to wav
of the same resolution, and lossy formats and sums of several files to 32-bit wav. The file name changes when
the source files change.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import platformdirs
import soundfile as sf

from evaluator.sources import AudioSource
from kmdx import files, host
from kmdx.challenge import RATE
from training.config import TrainingError
from training.songs import Songs, TrainingSong, TrainingStem, blocks

BLOCK = 2**18  # samples decoded at a time
WIDTH = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}  # bytes of a sample; 4 in any other format


def usual_folder() -> Path:
    """The default folder for decoded stems."""
    return platformdirs.user_cache_path("kmdx") / "decoded"


def decode(
    songs: Songs, folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Songs:
    """Decode stems where necessary, so that all can be read from any position.

    Raises :class:`TrainingError` if a file is damaged, or the folder has no room for the decoded stems, which
    is checked first.

    Parameters
    ----------
    folder : Path
        Folder for decoded stems.
    on_progress : callable
        Called with the number of decoded stems, and their total.
    """
    stems = {
        stem.sources: stem
        for song in (*songs.training, *songs.validation)
        for version in song.versions
        for stem in version.values()
        if stem.parts or stem.path.suffix.lower() != ".wav"
    }
    targets = {parts: folder / _name(parts) for parts in stems}
    missing = {parts: stem for parts, stem in stems.items() if not targets[parts].is_file()}
    if missing:
        _make(folder)
        size = sum(stem.samples * stem.channels * _width(stem) for stem in missing.values())
        free = shutil.disk_usage(folder).free
        if size > free:
            raise TrainingError(
                f"{folder}: {len(missing)} decoded stems need {size / 1e9:.2f} GB, but only "
                f"{free / 1e9:.2f} GB are free; choose another folder with --decoded"
            )
        with ThreadPoolExecutor(host.usable_cores()) as pool:
            for done, _ in enumerate(
                pool.map(lambda parts: _decode(stems[parts], targets[parts]), missing), 1
            ):
                on_progress(done, len(missing))

    def readable(version: dict[str, TrainingStem]) -> dict[str, TrainingStem]:
        return {
            name: replace(stem, path=targets[stem.sources], parts=()) if stem.sources in targets else stem
            for name, stem in version.items()
        }

    def all_of(group: Sequence[TrainingSong]) -> tuple[TrainingSong, ...]:
        return tuple(
            replace(
                song,
                stems=readable(dict(song.stems)),
                variants=tuple(readable(dict(other)) for other in song.variants),
            )
            for song in group
        )

    return Songs(all_of(songs.training), all_of(songs.validation))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be made: {error.strerror}") from error


def _name(parts: Sequence[AudioSource]) -> str:
    """A file name that changes when the source files change."""
    places = []
    for part in parts:
        try:
            stat = part.path.stat()
        except OSError as error:
            raise TrainingError(f"{part.path}: cannot be read: {error.strerror}") from error
        stream = "" if part.stream is None else f" stream {part.stream}"
        places.append(f"{part.path.resolve()} {stat.st_size} {stat.st_mtime_ns}{stream}")
    return f"{hashlib.sha256(chr(10).join(places).encode()).hexdigest()[:32]}.wav"


def _width(stem: TrainingStem) -> int:
    return 4 if stem.parts else WIDTH.get(sf.info(stem.path).subtype, 4)


def _decode(stem: TrainingStem, target: Path) -> None:
    """Write a stem's wav file completely or not at all."""
    try:
        with files.atomic(target) as partial:
            if stem.parts:
                _sum(stem, partial)
            else:
                _copy(stem.path, partial)
    except (OSError, sf.SoundFileError) as error:
        raise TrainingError(f"{stem.path}: cannot be decoded into {target.parent}: {error}") from error


def _sum(stem: TrainingStem, target: Path) -> None:
    """Write the sum of a stem's parts as 32-bit floats."""
    with sf.SoundFile(target, "w", RATE, stem.channels, "FLOAT", format="WAV") as sound:
        for block in blocks(stem):
            sound.write(block)


def _copy(path: Path, target: Path) -> None:
    """Write the samples of a compressed file in their own resolution."""
    with sf.SoundFile(path) as source:
        subtype = source.subtype if source.subtype in WIDTH and source.subtype != "PCM_S8" else "FLOAT"
        with sf.SoundFile(target, "w", source.samplerate, source.channels, subtype, format="WAV") as sound:
            for block in source.blocks(BLOCK, dtype="float32"):
                sound.write(block)
            if sound.tell() != source.frames:
                raise TrainingError(f"{path}: ends after {sound.tell()} of {source.frames} samples")
