"""Sound files to float32 arrays and back: any format in, wav, flac or mp3 out, resampling.

Conventions
-----------
An array of samples has shape ``(samples, channels)``, the shape ``soundfile`` gives: float32, full
scale at -1 and 1, one or two channels. Rates are in Hz, times in seconds. Every error is an
:class:`~kmdx.errors.AudioError`. An array too long to be held in memory lies in a scratch file
(:mod:`kmdx.scratch`); reading, resampling and writing go through it a block at a time.

Readers
-------
libsndfile reads what it opens with sample-exact positions: wav, flac, Ogg Vorbis, aiff, caf, au, w64.
FFmpeg (PyAV) reads everything else, and every file of more than two channels, because it knows their
loudspeakers.
"""

import itertools
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
import soundfile as sf
import soxr

from . import scratch
from .encoding import FORMATS, check_format, encode
from .errors import AudioError, KmdxWarning
from .files import folder, partial_name
from .tags import Tags

# The first four bytes of the files that libsndfile is asked to read. It would also read mp3, with the
# same length and alignment as FFmpeg (both obey the LAME tag: no encoder delay, no padding), but of a
# damaged mp3 it returns the part before the damage without a word, where FFmpeg raises an error.
SNDFILE_MAGIC = {b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b"caff", b".snd"}

# Sizes in a wav header that mean "not known yet": FFmpeg, and SoX, writing to a pipe.
STREAMED_SIZES = {0, 0xFFFFFFFF, 0x7FFFF000}

# Before version 19, PyAV refuses a file whose tags are not UTF-8 unless told otherwise.
ANY_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

LOUDEST = 8.0  # times full scale; no recording comes near, what exceeds it was not scaled to [-1, 1]
DECODED = 2**20  # samples that libsndfile decodes at a time


@dataclass(frozen=True)
class Audio:
    """Sound in memory: `samples` float32 ``(samples, channels)`` at `rate` Hz."""

    samples: np.ndarray
    rate: int


def check(
    samples: npt.ArrayLike,
    what: str,
    rate: int | None = None,
    start: float = 0.0,
    loudest: float = math.inf,
) -> np.ndarray:
    """The samples as a contiguous float32 array ``(samples, channels)``, fit to be separated.

    Parameters
    ----------
    samples : array_like
        ``(samples,)`` or ``(samples, channels)``; floats, or int16 and int32, which are scaled to
        [-1, 1) as ``soundfile`` does.
    what : str
        What the messages call it: a file's name.
    rate, start : int, float
        Hz, and the time in seconds of the first sample, so that a message can tell a time.
    loudest : float
        Warn if a sample's absolute value is above this, with :data:`LOUDEST` for a song.

    Raises
    ------
    AudioError
        If there are fewer than two samples, no or more than two channels, NaN or infinity, or a type
        that is not sound.
    """
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
    length, channels = array.shape
    if length == 0 or channels == 0:
        raise AudioError(f"{what}: no samples in it, expected at least 2")
    if channels > 2 and channels > length:
        raise AudioError(f"{what}: shape {array.shape}, expected (samples, channels): transpose it")
    if channels > 2:
        raise AudioError(f"{what}: {channels} channels, expected 1 or 2: fold it to stereo first")
    if length == 1:
        raise AudioError(f"{what}: only one sample, too short to separate: expected at least 2")

    array = _as_float32(array)
    peak = _peak(array)
    if not math.isfinite(peak):
        finite = np.concatenate([np.isfinite(block).all(axis=1) for block in scratch.blocks(array)])
        first = int(np.argmin(finite))
        where = f"sample {first}" if rate is None else f"{start + first / rate:.3f} s"
        raise AudioError(
            f"{what}: NaN or infinity in {np.count_nonzero(~finite)} of {length} samples, the first at"
            f" {where}: export it again, or cut that part out"
        )
    if peak > loudest:
        warnings.warn(f"{what}: {_too_loud(peak)}", KmdxWarning, stacklevel=3)
    return array


def _too_loud(peak: float) -> str:
    """What may be wrong with a song of such a peak, and what to do."""
    found = f"peaks at {peak:g}, where full scale is 1, so its stems may be wrong"
    for bits in (16, 24, 32):
        full_scale = 2 ** (bits - 1)
        if full_scale / 50 < peak <= 2 * full_scale:
            return f"{found}: as {bits}-bit values stored as floats do; divide it by {full_scale}"
    return f"{found}; scale it to a peak of 1"


def read(
    path: str | os.PathLike[str],
    start: float = 0.0,
    duration: float | None = None,
    downmix: bool = False,
    stream: int = 0,
) -> Audio:
    """Read a sound file, or the sound of a video.

    An AAC file (m4a, mp4) may keep the encoder's silence at its end, less than 1024 samples.

    Parameters
    ----------
    path : path_like
        wav, flac, mp3, m4a, Ogg, a video, ... ; its content decides, not its extension.
    start, duration : float
        The part to read, in seconds; without a duration, all that follows `start`.
    downmix : bool
        Fold more than two channels to stereo by FFmpeg's matrix (ITU-R BS.775): centre and surrounds
        at -3 dB, no LFE, nothing scaled down.
    stream : int
        Which of several audio streams, as a file of stems has them.

    Raises
    ------
    AudioError
        If the file cannot be opened, is no sound, is cut short or damaged, has more than two channels
        and `downmix` is false, ends before `start`, or fails :func:`check`; or if it is long and there
        is no room for a scratch file.
    """
    path = Path(path)
    check_part(start, duration)
    try:
        if path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "pipe or a device"
            raise AudioError(f"{path}: is a {kind}, expected a sound file")
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise AudioError(f"{path}: is empty (0 bytes), expected a sound file")
            _refuse_truncated_wav(file, path)
            audio = _read_sndfile(file, path, start, duration) if stream == 0 else None
            if audio is None:
                audio = _read_ffmpeg(file, path, start, duration, downmix, stream)
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {_reason(error)}") from error
    return Audio(check(audio.samples, str(path), audio.rate, start), audio.rate)


def check_part(start: float, duration: float | None) -> None:
    """Raise :class:`AudioError` if these seconds are no part of any sound."""
    if not 0 <= start < math.inf:
        raise AudioError(f"start {start:g} s: expected 0 or more seconds")
    if duration is not None and not 0 < duration < math.inf:
        raise AudioError(f"duration {duration:g} s: expected more than 0 seconds")


def resample(samples: np.ndarray, rate_in: int, rate_out: int, length: int | None = None) -> np.ndarray:
    """The samples at another rate, float32, in time with the input (soxr VHQ).

    Parameters
    ----------
    samples : ndarray
        ``(samples, channels)``; returned as they are if the rates and the length are theirs.
    rate_in, rate_out : int
        Hz.
    length : int, optional
        Trim or zero-pad the output to this many samples: the way back to a length that was known.

    Raises
    ------
    AudioError
        If a rate is not a whole number of Hz above 0, or a long output finds no room for a scratch file.
    """
    rate_in, rate_out = _whole_rate(rate_in), _whole_rate(rate_out)
    samples = np.asarray(samples, dtype=np.float32)
    if rate_in == rate_out and length in (None, len(samples)):
        return samples
    blocks = scratch.blocks(samples) if rate_in == rate_out else _resample(samples, rate_in, rate_out)
    if length is not None:
        blocks = _fit(blocks, length, samples.shape[1])
    return scratch.join(blocks, expected=samples.nbytes / rate_in * rate_out)


def _resample(samples: np.ndarray, rate_in: int, rate_out: int) -> Iterator[np.ndarray]:
    """Blocks at another rate, the last of which may be empty: together what soxr makes of the whole."""
    stream = soxr.ResampleStream(rate_in, rate_out, samples.shape[1], quality="VHQ")
    for block in scratch.blocks(samples):
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(samples[:0], last=True)


def _fit(blocks: Iterable[np.ndarray], length: int, channels: int) -> Iterator[np.ndarray]:
    """Blocks trimmed to a length in all, and zeros if they are shorter."""
    for block in blocks:
        yield block[:length]
        length -= len(block[:length])
    yield np.zeros((length, channels), np.float32)


def write(
    path: str | os.PathLike[str],
    samples: npt.ArrayLike,
    rate: int,
    format: str = "wav16",
    tags: Tags | None = None,
) -> None:
    """Write one file; see :func:`write_all`."""
    path = Path(path)
    write_all({path: samples}, rate, format, {path: tags} if tags else {})


def write_all(
    files: Mapping[Path, npt.ArrayLike],
    rate: int,
    format: str = "wav16",
    tags: Mapping[Path, Tags] | None = None,
    before_rename: Callable[[Mapping[Path, Path]], None] | None = None,
) -> dict[Path, float]:
    """Write files together, or none of them.

    Each is written beside its place under a hidden name and forced to the disk; when all are complete
    they are renamed. After a failure, or Ctrl-C, the hidden files and the folders made for them are gone.
    All but float32 clip at full scale; nothing is rescaled. A wav too long for its 32-bit sizes is RF64.

    Parameters
    ----------
    files : mapping of Path to array_like
        Where each array ``(samples, channels)`` goes. Missing folders are made.
    rate : int
        Hz.
    format : str
        A name in :data:`FORMATS`.
    tags : mapping of Path to Tags, optional
        The tags of flac and mp3 files. Those that cannot be written are one warning and no error.
    before_rename : callable, optional
        Called when all files are complete, with the hidden name of each.

    Returns
    -------
    dict of Path to float
        The peak of each file: its largest absolute sample, before clipping.

    Raises
    ------
    AudioError
        If the format is unknown or has no such rate, an array fails :func:`check`, or writing fails.
    """
    rate = _rate_for(format, rate)
    peaks: dict[Path, float] = {}
    partials: dict[Path, Path] = {}
    replaced: list[str] = []
    untagged: list[str] = []
    try:
        with ExitStack() as folders:
            for target, samples in files.items():
                _refuse_no_file(target)
                folders.enter_context(folder(target.parent))
                partials[target] = partial_name(target)
                folders.callback(_remove, partials[target])  # after a success there is none
                array = check(samples, str(target), rate)
                left_out = encode(partials[target], array, rate, FORMATS[format], (tags or {}).get(target))
                untagged.extend([f"{target}: its tags cannot be written: {left_out}"] if left_out else [])
                peaks[target] = _peak(array)
            if before_rename is not None:
                before_rename(partials)
            for target, partial in partials.items():
                partial.replace(target)
                replaced.append(target.name)
    except (OSError, sf.SoundFileError, av.FFmpegError) as error:
        written = f"only {', '.join(replaced)} was written" if replaced else "nothing was written"
        raise AudioError(f"{_reason(error)} writing {target}; {written}") from error
    for complaint in untagged[:1]:  # mutagen would say the same of the others
        warnings.warn(complaint, KmdxWarning, stacklevel=2)
    return peaks


def check_writable(files: Iterable[Path], rate: int, format: str = "wav16") -> None:
    """Find out whether :func:`write_all` could write, before the work that would be lost.

    Raises
    ------
    AudioError
        If the format is unknown or has no such rate, or a file cannot be made in its folder.
    """
    _rate_for(format, rate)
    for target in files:
        _refuse_no_file(target)
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
    converted = scratch.empty(array.shape)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which its peak tells
        for target, block in zip(scratch.blocks(converted), scratch.blocks(array), strict=True):
            np.divide(block, full_scale, out=target, casting="same_kind")
    return converted


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _peak(array: np.ndarray) -> float:
    """The largest absolute sample; NaN or infinite if one is."""
    return float(np.max([(block.max(), -block.min()) for block in scratch.blocks(array)]))


def _refuse_no_file(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise AudioError(f"{target}: is a folder or a device, expected the name of a file to write")


def _rate_for(format: str, rate: float) -> int:
    """The rate in whole Hz, if the format can hold it."""
    whole = _whole_rate(rate)
    check_format(format, whole)
    return whole


def _whole_rate(rate: float) -> int:
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.integer | np.floating):
        raise AudioError(f"sample rate {rate!r}: expected a whole number of Hz")
    if not (rate > 0 and float(rate).is_integer()):
        raise AudioError(f"sample rate {rate} Hz: expected a whole number above 0")
    return int(rate)


def _reason(error: Exception) -> str:
    """The words of an error of the system, libsndfile or FFmpeg, without its number and file name."""
    text = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    return text[:1].lower() + text[1:].rstrip(".")


def _span(start: float, duration: float | None, rate: int) -> tuple[int, int | None]:
    """The first sample of a part and the number of samples in it, None for all that follow."""
    return round(start * rate), None if duration is None else round(duration * rate)


def _past_the_end(path: Path, start: float, length: int, rate: int) -> AudioError:
    return AudioError(f"{path}: start {start:g} s is past its end, it lasts {length / rate:.3f} s")


def _refuse_truncated_wav(file: BinaryIO, path: Path) -> None:
    """Raise if a wav's header promises more sound than the file holds; libsndfile reads what there is."""
    header = file.read(12)
    if header[:4] not in (b"RIFF", b"RF64") or header[8:] != b"WAVE":
        return
    size_64 = 0
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", header)
        if name == b"data":
            promised = size_64 if size == 0xFFFFFFFF else size
            held = path.stat().st_size - file.tell()
            if promised > held and promised not in STREAMED_SIZES:
                raise AudioError(
                    f"{path}: cut short: its header promises {promised} bytes of sound, the file holds"
                    f" {held}: copy or export it again"
                )
            return
        following = file.tell() + size + size % 2  # chunks begin at even bytes
        if name == b"ds64" and len(sizes := file.read(16)) == 16:
            size_64 = struct.unpack("<QQ", sizes)[1]  # after the size of the whole file
        file.seek(following)


def _read_sndfile(file: BinaryIO, path: Path, start: float, duration: float | None) -> Audio | None:
    """The part of a file of one or two channels that libsndfile reads well, None for another file."""
    file.seek(0)
    if file.read(4) not in SNDFILE_MAGIC:
        return None
    file.seek(0)
    try:
        sound = sf.SoundFile(file)
    except (sf.LibsndfileError, TypeError):  # TypeError: soundfile takes *.raw for samples and no header
        return None
    with sound:
        length_known = 0 < sound.frames < 2**62  # not so in a flac, or some wavs, written to a pipe
        if sound.channels > 2 or sound.subtype == "OPUS" or not length_known:
            return None
        first, count = _span(start, duration, sound.samplerate)
        if first >= sound.frames:
            raise _past_the_end(path, start, sound.frames, sound.samplerate)
        count = sound.frames - first if count is None else min(count, sound.frames - first)
        damaged = f"{path}: cut short or damaged: its header promises {sound.frames} samples"
        try:
            sound.seek(first)
            samples = scratch.join(_decode(sound, count), expected=4 * count * sound.channels)
        except sf.LibsndfileError as error:
            raise AudioError(f"{damaged}, decoding failed: {_reason(error)}") from error
        if len(samples) < count:
            raise AudioError(f"{damaged}, it holds {first + len(samples)}: copy or export it again")
        return Audio(samples, sound.samplerate)


def _decode(sound: sf.SoundFile, count: int) -> Iterator[np.ndarray]:
    """The next samples, in blocks: as many as asked for, or fewer where a file ends before its time."""
    while True:
        block = sound.read(min(count, DECODED), dtype="float32", always_2d=True)
        yield block
        count -= len(block)
        if not count or not len(block):
            return


def _read_ffmpeg(
    file: BinaryIO, path: Path, start: float, duration: float | None, downmix: bool, stream: int
) -> Audio:
    """The part of any file that FFmpeg decodes, which it does from the beginning: its seeks are not exact."""
    file.seek(0)
    try:
        options = {"protocol_whitelist": "none"}  # a playlist must not open other files or addresses
        with av.open(file, "r", options=options, **ANY_TAGS) as container:
            if not container.streams.audio:
                others = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
                raise AudioError(f"{path}: no audio stream in it (streams found: {others})")
            if not 0 <= stream < len(container.streams.audio):
                last = len(container.streams.audio) - 1
                raise AudioError(f"{path}: no audio stream {stream} in it, expected one of 0 to {last}")
            frames = container.decode(container.streams.audio[stream])
            return _join(frames, path, start, duration, downmix)
    except av.FFmpegError as error:
        raise AudioError(f"{path}: not a sound file, or a damaged one: {_reason(error)}") from error


def _join(
    frames: Iterator[av.AudioFrame], path: Path, start: float, duration: float | None, downmix: bool
) -> Audio:
    """The part of a decoded stream, as float32."""
    first_frame = next(frames, None)
    if first_frame is None:
        raise AudioError(f"{path}: no samples in it: an empty sound, or not a sound file")
    kind = (rate, layout, _) = _kind(first_frame)
    channels = first_frame.layout.nb_channels
    if channels > 2 and not downmix:
        raise AudioError(
            f"{path}: {channels} channels, expected 1 or 2: --downmix (downmix=True) folds them to stereo"
        )
    if channels > 2:
        channels, layout = 2, "stereo"
    converter = av.AudioResampler(format="flt", layout=layout)
    first, count = _span(start, duration, rate)
    end = math.inf if count is None else first + count

    position = 0  # samples decoded

    def part() -> Iterator[np.ndarray]:
        nonlocal position
        for frame in itertools.chain([first_frame], frames):
            if _kind(frame) != kind:
                raise AudioError(f"{path}: its rate or its channels change at {position / rate:.3f} s")
            for block in converter.resample(frame):
                samples = block.to_ndarray().reshape(-1, channels)  # packed: (1, samples * channels)
                if position + len(samples) > first:
                    yield samples[max(0, first - position) :]
                position += len(samples)
            if position >= end:
                return

    samples = scratch.join(part())
    if position <= first:
        raise _past_the_end(path, start, position, rate)
    return Audio(samples[:count], rate)


def _kind(frame: av.AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.layout.name, frame.format.name
