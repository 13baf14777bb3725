"""Read sound files of any format as float32 arrays, write wav, flac and mp3 files, and resample.

Conventions
-----------
An array of samples has the shape ``(samples, channels)``, as in ``soundfile``: float32, full scale at -1
and 1, one or two channels. Rates are in Hz, times in seconds. Every error is an
:class:`~kmdx.errors.AudioError`. An array too large for memory is stored in a scratch file
(:mod:`kmdx.signals`); reading, resampling and writing process it one block at a time.

:mod:`kmdx.decoding` reads files; it describes the decoders and how damage is handled.
"""

import io
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import numpy.typing as npt
import soundfile as sf
import soxr

from . import decoding, holes, signals
from .encoding import FORMATS, check_format, encode, encode_into
from .errors import AudioError, KmdxWarning, counted
from .errors import reason as _reason
from .files import commit, folder, partial_name
from .sound_source import COPIED, Source, name_of, opened
from .tags import Tags

HEADERS = {".wav", ".w64", ".flac", ".aif", ".aiff", ".aifc", ".caf", ".ogg", ".oga"}
"""Extensions of files whose header states the exact length, unless their codec counts in blocks."""
LOUDEST = 8.0  # times full scale; no recording is as loud, so louder samples were not scaled to [-1, 1]


class Audio(NamedTuple):
    """Sound in memory: `samples` float32 ``(samples, channels)`` at `rate` Hz."""

    samples: np.ndarray
    rate: int

    def __repr__(self) -> str:
        return f"<Audio: {Form(len(self.samples), self.rate, self.samples.shape[1])}>"


def check(
    samples: npt.ArrayLike,
    what: str,
    rate: int | None = None,
    start: float = 0.0,
    loudest: float = math.inf,
) -> np.ndarray:
    """Check samples and return them as a contiguous float32 array ``(samples, channels)``.

    Raises :class:`AudioError` if there are fewer than two samples, not one or two channels, NaN or infinity,
    or the type is not one of sound.

    Parameters
    ----------
    samples : array_like
        ``(samples,)`` or ``(samples, channels)``; floats, or int16 and int32, which are scaled to
        [-1, 1) as in ``soundfile``.
    what : str
        Its name in messages, such as a file name.
    rate, start : int, float
        The rate in Hz and the time of the first sample in seconds, for times in messages.
    loudest : float
        Warn if a sample's absolute value exceeds this; for songs, use :data:`LOUDEST`.
    """
    array = _two_dimensional(samples, what)
    length, channels = array.shape
    if length == 0 or channels == 0:
        raise AudioError(f"{what}: contains no samples, expected at least 2")
    if channels > 2 and channels > length:
        raise AudioError(f"{what}: shape {array.shape}, expected (samples, channels): transpose it")
    if channels > 2:
        raise AudioError(f"{what}: {channels} channels, expected 1 or 2: mix it down to stereo first")
    if length == 1:
        raise AudioError(f"{what}: too short to separate: 1 sample, expected at least 2")

    array = _as_float32(array)
    peak = _peak(array)
    if not math.isfinite(peak):
        raise AudioError(f"{what}: {_not_finite(array, rate, start)}")
    if peak > loudest:
        warnings.warn(f"{what}: {_too_loud(peak)}", KmdxWarning, stacklevel=3)
    return array


def gather(blocks: Iterable[npt.ArrayLike], what: str) -> np.ndarray:
    """Join the blocks of a song as :func:`check` accepts them; a long song is gathered in a scratch file.

    A block may also have one sample, or none. It is copied, so its memory can be used for the next one.
    Raises :class:`AudioError` as :func:`check` does, if the number of channels changes, or if there is no
    room for the scratch file. Values are not checked.
    """

    def arrays() -> Iterator[np.ndarray]:
        channels = 0
        for block in blocks:
            array = _two_dimensional(block, what)
            channels = channels or array.shape[1]
            if array.shape[1] != channels:
                raise AudioError(
                    f"{what}: blocks of {channels} and {array.shape[1]} channels, expected the same"
                )
            converted = _as_float32(array)
            yield converted.copy() if np.may_share_memory(converted, array) else converted

    return signals.join(arrays())


def _two_dimensional(samples: npt.ArrayLike, what: str) -> np.ndarray:
    """The samples as an array ``(samples, channels)`` of a type of sound; see :func:`check`."""
    try:
        array = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"{what}: not an array of numbers: {error}") from error

    if array.dtype.kind != "f" and array.dtype not in (np.int16, np.int32):
        raise AudioError(f"{what}: samples are {array.dtype}, expected floats in [-1, 1], int16 or int32")

    if array.ndim == 1:
        array = array[:, np.newaxis]
    if array.ndim != 2:
        raise AudioError(f"{what}: shape {array.shape}, expected (samples, channels)")
    return array


def _not_finite(array: np.ndarray, rate: int | None, start: float) -> str:
    """How many samples are not finite, when the first is, and what to do."""
    finite = np.concatenate([np.isfinite(block).all(axis=1) for block in signals.blocks(array)])
    first = int(np.argmin(finite))
    where = f"sample {first}" if rate is None else f"{start + first / rate:.3f} s"
    return (
        f"NaN or infinity in {np.count_nonzero(~finite)} of {len(array)} samples, first at {where}:"
        " export it again, or cut that part out"
    )


def _too_loud(peak: float) -> str:
    """The likely cause of such a peak, and what to do."""
    found = f"peaks at {peak:g}, expected about 1; its stems may be wrong"
    for bits in (16, 24, 32):
        full_scale = 2 ** (bits - 1)
        if full_scale / 50 < peak <= 2 * full_scale:
            return f"{found}; if it contains {bits}-bit values stored as floats, divide it by {full_scale}"
    return f"{found}; scale it to a peak of 1"


def read(
    source: Source,
    start: float = 0.0,
    duration: float | None = None,
    downmix: bool = False,
    stream: int = 0,
    accept_holes: bool = True,
    name: str | None = None,
) -> Audio:
    """Read a sound file, or the sound of a video.

    The result of an AAC file (m4a, mp4) may end with up to 1023 samples of the encoder's padding.

    Raises :class:`AudioError` if the file cannot be opened, is not a sound file, has larger holes (the
    message gives the time of the first) or holes of unknown length, has more than two channels without
    `downmix`, ends before `start`, or fails :func:`check`; or if there is no room for a scratch file. If a
    URL cannot be read, it is a :class:`kmdx.urls.UrlError`.

    Parameters
    ----------
    source : str, path_like or BinaryIO
        A path, a URL, or an open binary file, which is read from its beginning and stays open. It contains
        wav, flac, mp3, m4a, Ogg, a video or others. The format is detected from the content, not from the
        extension.
    start, duration : float
        The part to read, in seconds; without a duration, to the end.
    downmix : bool
        Mix more than two channels down to stereo with FFmpeg's matrix (ITU-R BS.775): center and surrounds
        at -3 dB, without LFE and without scaling.
    stream : int
        Number of the audio stream, for files with several streams, such as stem files.
    accept_holes : bool
        Replace damaged or missing sound with silence, up to 2 % of the song and 5 s in total, and warn
        (:class:`~kmdx.errors.KmdxWarning`). Otherwise, every hole is an error.
    name : str, optional
        The song's name in messages; by default its path, or its URL without secrets.
    """
    name = name_of(source) if name is None else name
    check_part(start, duration)
    request = holes.Request(name, start, duration, downmix, stream, accept_holes)
    with ExitStack() as stack:
        try:
            file, size = stack.enter_context(opened(source))
        except AudioError as error:
            raise AudioError(f"{name}: {error}") from error
        except OSError as error:
            raise AudioError(f"{name}: cannot be read: {_reason(error)}") from error
        try:
            samples, rate = decoding.read(file, size, request)
        except OSError as error:
            raise AudioError(f"{name}: cannot be read: {_reason(error)}") from error
    return Audio(check(samples, name, rate, start), rate)


@dataclass(frozen=True)
class Form:
    """The length in samples, rate in Hz and channels of a file; equal for files to be compared or added."""

    samples: int
    rate: int
    channels: int

    def __str__(self) -> str:
        return f"{counted(self.samples, 'sample')} of {counted(self.channels, 'channel')} at {self.rate} Hz"


def info(path: Path) -> Form:
    """The form of a sound file, from its header or, if the header is not exact, by decoding it.

    Raises :class:`AudioError` if the file cannot be read, is damaged or has no samples.
    """
    if not is_exact(path):
        try:
            stat = path.stat()
        except OSError as error:
            raise AudioError(f"{path}: cannot be read: {_reason(error)}") from error
        return _decoded_form(path, stat.st_size, stat.st_mtime_ns)
    with _open(path) as sound:
        if sound.frames < 1:
            raise AudioError(f"{path}: contains no samples")
        return Form(sound.frames, sound.samplerate, sound.channels)


def is_exact(path: Path) -> bool:
    """Whether a file's header states its exact length, so that it can be read in blocks."""
    suffix = path.suffix.lower()
    if suffix not in HEADERS or suffix in (".wav", ".flac"):
        return suffix in HEADERS
    try:
        return sf.info(path).subtype not in decoding.INEXACT
    except (OSError, sf.SoundFileError, UnicodeEncodeError):
        return True  # the error is reported when the file is read


def read_together(paths: Sequence[Path], block: int) -> Iterator[list[npt.NDArray[np.float32]]]:
    """Read files of the same form in parallel, ``block`` samples at a time; their headers must be exact.

    The arrays ``(samples, channels)`` are overwritten by the next block. Raises :class:`AudioError` if a file
    cannot be read, or ends before the length in its header.
    """
    with ExitStack() as stack:
        sounds = [stack.enter_context(_open(path)) for path in paths]
        buffers = [np.empty((min(block, sound.frames), sound.channels), np.float32) for sound in sounds]
        for begin in range(0, sounds[0].frames, block):
            expected = min(block, sounds[0].frames - begin)
            parts = []
            for path, sound, buffer in zip(paths, sounds, buffers, strict=True):
                try:
                    parts.append(sound.read(out=buffer[:expected]))
                except sf.SoundFileError as error:
                    raise AudioError(f"{path}: damaged after sample {begin}: {_reason(error)}") from error
                if len(parts[-1]) < expected:
                    raise AudioError(f"{path}: ends after {begin + len(parts[-1])} of {sound.frames} samples")
            yield parts


def _open(path: Path) -> sf.SoundFile:
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    try:
        decoding.check_whole(path)
        return sf.SoundFile(path)
    except (OSError, sf.SoundFileError) as error:
        raise AudioError(f"{path}: cannot be read: {_reason(error)}") from error
    except UnicodeEncodeError as error:
        raise AudioError(f"{path}: the file name is not UTF-8: rename the file") from error


@lru_cache(maxsize=4096)
def _decoded_form(path: Path, size: int, time: int) -> Form:
    """The form of a whole file; decoded again only if its size or time changes."""
    sound = read(path, accept_holes=False)
    return Form(len(sound.samples), sound.rate, sound.samples.shape[1])


def check_part(start: float, duration: float | None) -> None:
    """Raise :class:`AudioError` if a start or duration is out of range."""
    if not 0 <= start < math.inf:
        raise AudioError(f"start {start:g} s: expected 0 or more seconds")
    if duration is not None and not 0 < duration < math.inf:
        raise AudioError(f"duration {duration:g} s: expected more than 0 seconds")


def resample(samples: np.ndarray, rate_in: int, rate_out: int, length: int | None = None) -> np.ndarray:
    """Resample to another rate, float32, without delay (soxr VHQ).

    Raises :class:`AudioError` if a rate is not a positive whole number, or there is no room for the scratch
    file of a long output.

    Parameters
    ----------
    samples : ndarray
        ``(samples, channels)``; returned unchanged if neither the rate nor the length changes.
    rate_in, rate_out : int
        Hz.
    length : int, optional
        Trim or zero-pad the output to this number of samples, to restore a known length.
    """
    rate_in, rate_out = _whole_rate(rate_in), _whole_rate(rate_out)
    samples = np.asarray(samples, dtype=np.float32)
    if rate_in == rate_out and length in (None, len(samples)):
        return samples
    blocks = signals.blocks(samples) if rate_in == rate_out else _resample(samples, rate_in, rate_out)
    if length is not None:
        blocks = _fit(blocks, length, samples.shape[1])
    return signals.join(blocks, expected=samples.nbytes / rate_in * rate_out)


def _resample(samples: np.ndarray, rate_in: int, rate_out: int) -> Iterator[np.ndarray]:
    """Blocks at another rate, the same as soxr makes of the whole; the last block may be empty."""
    stream = soxr.ResampleStream(rate_in, rate_out, samples.shape[1], quality="VHQ")
    for block in signals.blocks(samples):
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(samples[:0], last=True)


def _fit(blocks: Iterable[np.ndarray], length: int, channels: int) -> Iterator[np.ndarray]:
    """Blocks trimmed or zero-padded to a total length."""
    for block in blocks:
        yield block[:length]
        length -= len(block[:length])
    yield np.zeros((length, channels), np.float32)


def write(
    target: str | os.PathLike[str] | BinaryIO,
    samples: npt.ArrayLike,
    rate: int,
    format: str = "wav16",
    tags: Tags | None = None,
) -> None:
    """Write one file; see :func:`write_all`.

    To an open binary file, which need not be seekable, nothing is written before all is encoded.
    """
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        write_all({path: samples}, rate, format, {path: tags} if tags else {})
        return
    if not hasattr(target, "write") or isinstance(target, io.TextIOBase):
        raise AudioError(f"expected a path or a file open in binary mode, found {type(target).__name__}")
    name = name_of(target)
    rate = _rate_for(format, rate)
    array = check(samples, name, rate)
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            left_out = encode_into(file, array, rate, FORMATS[format], tags)
            file.seek(0)
            shutil.copyfileobj(file, target, COPIED)
    except (OSError, sf.SoundFileError, av.FFmpegError) as error:
        raise AudioError(f"{_reason(error)} writing {name}") from error
    if left_out:
        warnings.warn(f"{name}: its tags cannot be written: {left_out}", KmdxWarning, stacklevel=2)


def write_all(
    files: Mapping[Path, npt.ArrayLike],
    rate: int,
    format: str = "wav16",
    tags: Mapping[Path, Tags] | None = None,
    before_rename: Callable[[Mapping[Path, Path]], None] | None = None,
) -> dict[Path, float]:
    """Write all files or none.

    Each file is written under a hidden name in its folder and flushed to disk. When all are complete, they
    are renamed. After a failure or Ctrl-C, the hidden files and new folders are removed. All formats except
    float32 clip at full scale; nothing is rescaled. A wav file too long for 32-bit sizes becomes RF64. Raises
    :class:`AudioError` if the format is unknown or does not support the rate, an array fails :func:`check`,
    or a write fails.

    Parameters
    ----------
    files : mapping of Path to array_like
        Arrays ``(samples, channels)`` by path. Missing folders are made.
    rate : int
        Hz.
    format : str
        A name in :data:`FORMATS`.
    tags : mapping of Path to Tags, optional
        The tags of flac and mp3 files. Tags that cannot be written cause one warning, not an error.
    before_rename : callable, optional
        Called with the hidden name of each file when all files are complete.

    Returns
    -------
    dict of Path to float
        The peak of each file: its largest absolute sample, before clipping.
    """
    rate = _rate_for(format, rate)
    peaks: dict[Path, float] = {}
    partials: dict[Path, Path] = {}
    replaced: list[str] = []
    untagged: list[str] = []
    try:
        with ExitStack() as cleanup:
            for target, samples in files.items():
                partials[target] = _hidden(target, cleanup)
                array = check(samples, str(target), rate)
                left_out = encode(partials[target], array, rate, FORMATS[format], (tags or {}).get(target))
                untagged.extend([f"{target}: its tags cannot be written: {left_out}"] if left_out else [])
                peaks[target] = _peak(array)
            if before_rename is not None:
                before_rename(partials)
            for target, partial in partials.items():
                commit(partial, target)
                replaced.append(target.name)
    except (OSError, sf.SoundFileError, av.FFmpegError) as error:
        written = f"only {', '.join(replaced)} was written" if replaced else "nothing was written"
        raise AudioError(f"{_reason(error)} writing {target}; {written}") from error
    for complaint in untagged[:1]:  # the others have the same problem
        warnings.warn(complaint, KmdxWarning, stacklevel=2)
    return peaks


def _hidden(target: Path, cleanup: ExitStack) -> Path:
    """The hidden name of a file in its folder, which is made; after a failure, ``cleanup`` removes both."""
    _check_is_file(target)
    cleanup.enter_context(folder(target.parent))
    partial = partial_name(target)
    cleanup.callback(_remove, partial)  # after success, it no longer exists
    return partial


def check_writable(files: Iterable[Path], rate: int, format: str) -> None:
    """Check in advance that :func:`write_all` can write, so that no work is lost.

    Raises :class:`AudioError` if the format is unknown or does not support the rate, or a file cannot be made
    in its folder.
    """
    _rate_for(format, rate)
    for target in files:
        _check_is_file(target)
        place = next(parent for parent in target.absolute().parents if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise AudioError(f"{_reason(error)} writing {target}; nothing was written") from error


def _as_float32(array: np.ndarray) -> np.ndarray:
    """A contiguous float32 array, integers scaled to [-1, 1); the array itself if it is one."""
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    full_scale = np.float32(1 if array.dtype.kind == "f" else np.iinfo(array.dtype).max + 1)
    converted = signals.empty(array.shape)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which `check` reports
        for target, block in zip(signals.blocks(converted), signals.blocks(array), strict=True):
            np.divide(block, full_scale, out=target, casting="same_kind")
    return converted


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _peak(array: np.ndarray) -> float:
    """The largest absolute sample; NaN or infinite if any sample is."""
    return float(np.max([(block.max(), -block.min()) for block in signals.blocks(array)]))


def _check_is_file(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise AudioError(f"{target}: cannot be written: it is a folder or a device; choose another name")


def _rate_for(format: str, rate: float) -> int:
    """The rate in whole Hz, if the format supports it."""
    whole = _whole_rate(rate)
    check_format(format, whole)
    return whole


def _whole_rate(rate: float) -> int:
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.integer | np.floating):
        raise AudioError(f"sample rate {rate!r}: expected a whole number of Hz")
    if not (rate > 0 and float(rate).is_integer()):
        raise AudioError(f"sample rate {rate} Hz: expected a whole number above 0")
    return int(rate)
