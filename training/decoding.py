"""Compressed stems decoded once, so that any window can be read without what comes before it.

Uncompressed files are read in place. Others are decoded into a folder that is kept between runs: wav of the
same resolution for flac, of 32 bits for lossy formats, under a name that changes with the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import platformdirs
import soundfile as sf

from training.config import TrainingError
from training.songs import Song, Songs, Stem

BLOCK = 2**18  # samples decoded at a time
WIDTH = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}  # bytes of a sample; 4 in any other format


def usual_folder() -> Path:
    """Where decoded stems lie if nothing else is said."""
    return platformdirs.user_cache_path("kmdx") / "decoded"


def decode(songs: Songs, folder: Path, tell: Callable[[int, int], None] = lambda done, total: None) -> Songs:
    """Make every stem one that can be read from any place.

    Parameters
    ----------
    songs : Songs
    folder : Path
        Where decoded stems lie.
    tell : callable
        Called with how many are decoded, and of how many.

    Raises
    ------
    TrainingError
        If a file is damaged, or the folder cannot hold what is decoded; it is looked at before.
    """
    stems = {
        stem.path: stem
        for song in (*songs.training, *songs.validation)
        for version in song.versions
        for stem in version.values()
        if stem.path.suffix.lower() != ".wav"
    }
    targets = {path: folder / _name(path) for path in stems}
    missing = {path: stem for path, stem in stems.items() if not targets[path].is_file()}
    if missing:
        _make(folder)
        size = sum(stem.samples * stem.channels * _width(path) for path, stem in missing.items())
        free = shutil.disk_usage(folder).free
        if size > free:
            raise TrainingError(
                f"{folder}: {size / 1e9:.2f} GB are needed for {len(missing)} decoded stems, and "
                f"{free / 1e9:.2f} GB are free; name another folder with --decoded"
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(lambda path: _decode(path, targets[path]), missing), 1):
                tell(done, len(missing))

    def readable(version: dict[str, Stem]) -> dict[str, Stem]:
        return {name: replace(stem, path=targets.get(stem.path, stem.path)) for name, stem in version.items()}

    def all_of(group: Sequence[Song]) -> tuple[Song, ...]:
        return tuple(
            Song(
                song.name, readable(dict(song.stems)), tuple(readable(dict(other)) for other in song.variants)
            )
            for song in group
        )

    return Songs(all_of(songs.training), all_of(songs.validation))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be made: {error.strerror}") from error


def _name(path: Path) -> str:
    stat = path.stat()
    place = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.wav"


def _width(path: Path) -> int:
    return WIDTH.get(sf.info(path).subtype, 4)


def _decode(path: Path, target: Path) -> None:
    """Write the wav beside its name, then give it its name."""
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        with sf.SoundFile(path) as source:
            subtype = source.subtype if source.subtype in WIDTH and source.subtype != "PCM_S8" else "FLOAT"
            with sf.SoundFile(
                partial, "w", source.samplerate, source.channels, subtype, format="WAV"
            ) as sound:
                for block in source.blocks(BLOCK, dtype="float32"):
                    sound.write(block)
                if sound.tell() != source.frames:
                    raise TrainingError(f"{path}: ends after {sound.tell()} of {source.frames} samples")
        partial.replace(target)
    except (OSError, sf.SoundFileError) as error:
        raise TrainingError(f"{path}: cannot be decoded into {target.parent}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
