"""Decode sound files to float32, a block at a time, with silence in place of what is damaged or missing.

Decoders
--------
libsndfile decodes what it counts exactly: PCM, float, µ-law, A-law, FLAC and its rarer codecs. FFmpeg
(PyAV) decodes the rest, and every file of more than two channels, because it knows their loudspeakers.

Holes
-----
A hole is a time for which the file has no sound, although the sound around it, or the length that the file
declares, shows that there was some: damaged packets, lost pages, a missing end. Holes are compared with
:data:`MAX_HOLES` and :data:`MAX_SHARE`; beyond them the file is refused.
"""

from __future__ import annotations

import bisect
import math
import re
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile as sf

from . import containers, scratch
from .containers import Part
from .errors import AudioError, KmdxWarning, reason

MAX_HOLES = 5.0  # seconds of a song that may be missing
MAX_SHARE = 0.02  # of a song that may be missing
SHORT_WAV = 0.1  # seconds: a wav that is shorter than declared by no more is only a little shorter
PAUSE = 0.5  # seconds: a gap in timestamps without damage; speech encoders leave out silence

DECODED = 2**20  # samples that libsndfile decodes at a time
SMALL_STEP, LARGE_STEP = 2**10, 2**12  # samples: towards and across a damaged place of a flac file
OPENING_CALLS = 50_000  # FFmpeg's reads, of 32 KiB each, and seeks until it has opened a file
PACKET_CALLS = 4000  # and until it has found the next packet
LONGEST_FRAME = 2**14  # samples
BLOCK_HEADER = 64  # bytes between two blocks of a Matroska file that are not lost

# libsndfile counts the samples of these by whole blocks, from a mean bit rate, or in the first link only.
INEXACT = {"MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III", "GSM610", "OPUS"}
SNDFILE = {"wav", "chunks", "flac", "vorbis"}

# Codecs in whose packets a long run of zeros means nothing, or damage.
ENTROPY_CODED = {"opus", "vorbis", "aac", "mp3", "mp3float"}
ZEROS, ZEROS_KEPT = re.compile(rb"\0{96,}"), 32  # a decoder reads ahead, from both ends of a packet

MAX_TRIALS = 500  # packets of a file; where there are more, its encoder leaves zeros

# Codecs with checksums, which FFmpeg compares only when asked to.
CHECKED = {"flac", "tta", "wavpack", "ac3", "eac3"}

# FFmpeg's names of containers that declare the length of a stream, and by how many seconds the sound may
# fall short of it in an undamaged file.
DECLARING = {
    "flac": 0.0, "tta": 0.0, "wv": 0.0, "ape": 0.0, "nistsphere": 0.0, "mov": 0.002, "asf": 0.25,
}  # fmt: skip

# Before version 19, PyAV refuses a file whose tags are not UTF-8 unless told otherwise.
ANY_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclass(frozen=True)
class Request:
    """What is to be read of which file; see :func:`kmdx.audio.read`."""

    path: Path
    start: float = 0.0
    duration: float | None = None
    downmix: bool = False
    stream: int = 0
    accept_holes: bool = True


def read(file: BinaryIO, size: int, request: Request) -> tuple[np.ndarray, int]:
    """Decode the wanted part of a file.

    Parameters
    ----------
    file : BinaryIO
        The file, opened for reading.
    size : int
        Its bytes.
    request : Request

    Returns
    -------
    samples : ndarray
        Float32 ``(samples, channels)``.
    rate : int
        Hz.

    Raises
    ------
    AudioError
        See :func:`kmdx.audio.read`.
    OSError
        If the file cannot be read.
    """
    song = _Song(request)
    try:
        parts = containers.inspect(file, size)
    except AudioError as error:
        raise AudioError(f"{request.path}: {error}") from error
    sound = _open_sndfile(parts[0], request) if len(parts) == 1 else None
    if sound is not None:
        with sound:
            wanted = min(sound.frames, song.end(sound.samplerate))
            blocks = _decode_sndfile(song, parts[0], sound)
            samples = scratch.join(blocks, expected=4 * sound.channels * wanted)
    else:
        samples = scratch.join(_decode_parts(song, parts))
    for part in parts:
        part.view.raise_failure()
    song.finish()
    return samples, song.rate


def check_whole(path: Path) -> None:
    """Find out whether a file holds all the sound that its header declares, without decoding it.

    Raises
    ------
    AudioError
        If it was cut short, or its header does not tell how long it is.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        try:
            parts = containers.inspect(file, path.stat().st_size)
        except AudioError as error:
            raise AudioError(f"{path}: {error}") from error
    for part in parts:
        if part.share < 1 or part.missing or part.cut or part.mute:
            raise AudioError(f"{path}: cut short or damaged: copy or export it again")
        if part.notes:
            raise AudioError(f"{path}: {part.notes[0]}: copy or export it again")


class _Song:
    """Where the decoded blocks go: the wanted part of the song, and its holes.

    Positions are samples from the beginning of the song, whatever part of it is wanted.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.rate = 0
        self.position = 0
        self.declared = 0  # length of the song, if it is known
        self.shape = 0
        self.holes: list[range] = []
        self.damaged: list[int] = []  # positions at which something was damaged, and nothing is missing
        self.notes: list[str] = []

    @property
    def path(self) -> Path:
        return self.request.path

    @property
    def first(self) -> int:
        """The first wanted sample."""
        return round(self.request.start * self.rate)

    def end(self, rate: int | None = None) -> float:
        """The sample after the last wanted one; infinite without a duration."""
        rate = rate or self.rate
        if self.request.duration is None:
            return math.inf
        return round(self.request.start * rate) + round(self.request.duration * rate)

    @property
    def complete(self) -> bool:
        """Whether all that is wanted was decoded."""
        return self.position >= self.end()

    def seconds(self, position: float) -> float:
        return position / self.rate

    def add(self, block: np.ndarray) -> Iterator[np.ndarray]:
        """The wanted samples of the next block."""
        begin = min(max(0, self.first - self.position), len(block))
        end = min(max(begin, self.end() - self.position), len(block))
        self.position += len(block)
        if begin < end:
            yield block[begin : int(end)]

    def silence(self, count: int, channels: int, is_hole: bool = True) -> Iterator[np.ndarray]:
        """Silence of the next `count` samples, which are missing.

        Raises
        ------
        AudioError
            If too much is missing.
        """
        wanted = range(max(self.position, self.first), int(min(self.position + count, self.end())))
        self.position += count
        if is_hole and wanted:
            if self.holes and self.holes[-1].stop == wanted.start:
                wanted_hole = range(self.holes.pop().start, wanted.stop)
            else:
                wanted_hole = wanted
            self.holes.append(wanted_hole)
            if not self.request.accept_holes or sum(map(len, self.holes)) > MAX_HOLES * self.rate:
                raise self._too_damaged()
        for begin in range(0, len(wanted), scratch.BLOCK):
            yield np.zeros((min(scratch.BLOCK, len(wanted) - begin), channels), np.float32)

    def mark(self) -> None:
        """Something is damaged here, and nothing is missing."""
        if self.first <= self.position <= self.end():
            self.damaged.append(self.position)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        """Warn of what was damaged.

        Raises
        ------
        AudioError
            If too much is missing, or the song ended before its wanted part.
        """
        length = max(self.position, self.declared)
        if self.position <= self.first and self.end() > self.first:
            start = self.request.start
            raise AudioError(
                f"{self.path}: start {start:g} s is past its end, it lasts {self.seconds(length):.3f} s"
            )
        if sum(map(len, self.holes)) > MAX_SHARE * length:
            raise self._too_damaged()
        if not self.request.accept_holes and (self.damaged or self.notes):
            found = self.notes[0] if self.notes else f"damaged at {_time(self.seconds(self.damaged[0]))}"
            raise AudioError(f"{self.path}: {found}: copy or export it again")
        for text in [*self._damages(), *self.notes]:
            warnings.warn(f"{self.path}: {text}", KmdxWarning, stacklevel=2)

    def _damages(self) -> Iterator[str]:
        if self.holes:
            total = self.seconds(sum(map(len, self.holes)))
            places = [
                f"at {_time(self.seconds(hole.start))} for {self.seconds(len(hole)):.3g} s"
                for hole in self.holes[:5]
            ]
            more = f" and {len(self.holes) - 5} more" if len(self.holes) > 5 else ""
            yield f"damaged or incomplete, {total:.3g} s of it replaced by silence: {', '.join(places)}{more}"
        if self.damaged:
            places = [_time(self.seconds(position)) for position in self.damaged[:5]]
            more = f" and {len(self.damaged) - 5} more" if len(self.damaged) > 5 else ""
            yield f"damaged at {', '.join(places)}{more}, though no sound is missing"

    def _too_damaged(self) -> AudioError:
        total = self.seconds(sum(map(len, self.holes)))
        first = _time(self.seconds(self.holes[0].start))
        limit = (
            f"at most {MAX_SHARE:.0%} and {MAX_HOLES:g} s may be missing"
            if self.request.accept_holes
            else "none may be missing here"
        )
        return AudioError(
            f"{self.path}: cut short or damaged: at least {total:.3g} s of sound are missing, the first at"
            f" {first}; {limit}: copy or export it again, or read a part that is whole"
        )


def _time(seconds: float) -> str:
    minutes = f" ({int(seconds) // 60}:{int(seconds) % 60:02d})" if seconds >= 60 else ""
    return f"{seconds:.3f} s{minutes}"


def _open_sndfile(part: Part, request: Request) -> sf.SoundFile | None:
    """The file in libsndfile, if that reads it exactly."""
    if part.family not in SNDFILE or request.stream:
        return None
    part.view.seek(0)
    part.view.calls_left = math.inf
    try:
        sound = sf.SoundFile(part.view)
    except sf.LibsndfileError:
        return None
    length_known = 0 < sound.frames < 2**62  # not so in a flac that was written to a pipe
    if sound.channels > 2 or sound.subtype in INEXACT or not length_known:
        sound.close()
        return None
    return sound


def _decode_sndfile(song: _Song, part: Part, sound: sf.SoundFile) -> Iterator[np.ndarray]:
    song.rate = sound.samplerate
    song.notes += part.notes
    held = sound.frames
    song.declared = held if part.share == 1 else max(held + 1, round(held / part.share))
    if song.first >= song.declared:
        song.position = song.declared
        return
    song.position = min(song.first, held)
    last = int(min(song.end(), held))
    yield from _flac(song, part, sound, last) if part.family == "flac" else _pcm(song, sound, last)
    if song.complete or song.position >= song.declared:
        return
    missing = song.declared - song.position
    if part.family == "wav" and missing <= SHORT_WAV * song.rate:
        song.note(f"{missing / song.rate:.3g} s shorter than its header declares ({missing} samples)")
        song.declared = song.position
    else:
        yield from song.silence(missing, sound.channels)


def _pcm(song: _Song, sound: sf.SoundFile, last: int) -> Iterator[np.ndarray]:
    """The samples up to the last, or fewer where a file ends before its time."""
    try:
        sound.seek(song.position)
        while song.position < last:
            block = sound.read(min(last - song.position, DECODED), dtype="float32", always_2d=True)
            yield from song.add(block)
            if not len(block):
                return
    except sf.LibsndfileError as error:
        raise AudioError(f"{song.path}: damaged, decoding failed: {reason(error)}") from error


def _flac(song: _Song, part: Part, sound: sf.SoundFile, last: int) -> Iterator[np.ndarray]:
    """The samples of a flac file. libsndfile stops at a damaged frame: it is opened again behind it."""
    channels, step = sound.channels, DECODED
    across = LARGE_STEP * max(1, round(song.rate / 48_000))
    reader = _sought(part, song.position, sound)
    while song.position < last:
        block = None if reader is None else _block(reader, min(last - song.position, step))
        if block is not None:
            yield from song.add(block)
            continue
        if reader is not None and step == DECODED:  # once more, in small steps up to the damaged frame
            step = SMALL_STEP
        else:
            yield from song.silence(min(across, last - song.position), channels)
            step = DECODED
        reader = _sought(part, song.position)


def _block(sound: sf.SoundFile, count: int) -> np.ndarray | None:
    """The next samples; None if they are damaged, or missing."""
    try:
        block = sound.read(count, dtype="float32", always_2d=True)
    except sf.LibsndfileError:
        return None
    return block if len(block) else None


def _sought(part: Part, position: int, sound: sf.SoundFile | None = None) -> sf.SoundFile | None:
    """The file in libsndfile, at a position; None if the samples there are damaged."""
    try:
        if sound is None:
            part.view.seek(0)
            sound = sf.SoundFile(part.view)
        sound.seek(position)
    except sf.LibsndfileError:
        return None
    return sound


def _decode_parts(song: _Song, parts: list[Part]) -> Iterator[np.ndarray]:
    """The wanted samples of a file of several parts, or of one that FFmpeg decodes."""
    channels = 0
    for part in parts:
        sound = _open_sndfile(part, song.request)
        if sound is not None:
            with sound:
                if not channels:
                    song.rate, channels = sound.samplerate, sound.channels
                if (song.rate, channels) != (sound.samplerate, sound.channels):
                    raise _changed(song)
                yield from _next_sndfile(song, sound)
        else:
            channels = yield from _decode_ffmpeg(song, part, channels)
        if song.complete:
            return


def _next_sndfile(song: _Song, sound: sf.SoundFile) -> Iterator[np.ndarray]:
    """The samples of one of several parts, which follows what was decoded."""
    try:
        while len(block := sound.read(DECODED, dtype="float32", always_2d=True)):
            yield from song.add(block)
    except sf.LibsndfileError as error:
        raise AudioError(f"{song.path}: damaged, decoding failed: {reason(error)}") from error


def _changed(song: _Song) -> AudioError:
    return AudioError(
        f"{song.path}: its rate or its channels change at {_time(song.seconds(song.position))}: convert it to"
        " one rate, or cut it into several files"
    )


def _decode_ffmpeg(song: _Song, part: Part, channels: int) -> Generator[np.ndarray, None, int]:
    """The wanted samples of a part that FFmpeg decodes, from its beginning: FFmpeg's seeks are not exact.

    It returns how many channels there are, which must be those that came before.
    """
    try:
        with _open_ffmpeg(part.view, song.path) as container:
            decoder = _Decoder(song, part, container, _stream(container, song))
            for block in decoder.blocks():
                if channels not in (0, decoder.channels):
                    raise _changed(song)
                yield block
    except av.FFmpegError as error:
        raise AudioError(f"{song.path}: not a sound file, or a damaged one: {reason(error)}") from error
    return decoder.channels


def _open_ffmpeg(view: containers.View, path: Path) -> Any:
    view.seek(0)
    view.name = str(path)  # some formats are known by their names only
    view.calls_left = OPENING_CALLS
    options = {"protocol_whitelist": "none"}  # a playlist must not open other files or addresses
    return av.open(view, "r", options=options, **ANY_TAGS)


def _stream(container: Any, song: _Song) -> Any:
    """The wanted audio stream."""
    streams, wanted = container.streams.audio, song.request.stream
    if not streams:
        others = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise AudioError(f"{song.path}: no audio stream in it (streams found: {others})")
    if not 0 <= wanted < len(streams):
        raise AudioError(
            f"{song.path}: no audio stream {wanted} in it, expected one of 0 to {len(streams) - 1}"
        )
    if streams[wanted].codec_context is None:
        raise AudioError(f"{song.path}: its sound is of a kind that FFmpeg does not know, or it is damaged")
    return streams[wanted]


@dataclass(frozen=True)
class _Form:
    """What must not change within a song."""

    rate: int
    layout: str
    format: str
    channels: int


class _Decoder:
    """Decodes one part of a file, and finds its holes by the timestamps of what was decoded."""

    def __init__(self, song: _Song, part: Part, container: Any, stream: Any) -> None:
        self.song, self.part, self.container, self.stream = song, part, container, stream
        self.form: _Form | None = None
        self.tick = float(stream.time_base * (stream.rate or 1))  # samples: how exact timestamps are
        self.frame_tick = self.tick  # of frames' timestamps
        self.converter: Any = None
        self.channels = 0
        self.expected: float | None = None  # timestamp of the next frame, in samples
        self.usual = 0  # samples of a frame
        self.error: Exception | None = None  # of a packet or of the container
        self.broken = False  # the container could not be read to its end
        self.damaged = 0.0  # samples in packets that could not be decoded since the last good one
        self.lost_bytes = False  # bytes were passed over since the last good packet
        self.covered = 0  # position in the file up to which there were packets
        self.first_packet: float | None = None  # timestamp, in samples
        self.left = math.inf  # samples up to the declared end, beyond which there is padding
        self.decoded = 0
        self.trials = 0  # packets that were decoded twice
        if stream.codec_context.name in CHECKED:
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        self.mute = [span.start for span in part.mute]

    def blocks(self) -> Iterator[np.ndarray]:
        """The wanted samples of this part, and silence for its holes."""
        song = self.song
        song.notes += self.part.notes
        for frame in self._frames():
            if self.form is None:
                self._begin(frame)
            if self._form_of(frame) != self.form:
                raise _changed(song)
            yield from self._gap(frame)
            if self._is_muted(frame):
                self.left -= frame.samples
                yield from song.silence(frame.samples, self.channels)
            else:
                yield from self._sound(frame)
            if song.complete:
                return
        if self.converter is None:
            why = f": {reason(self.error)}" if self.error else ": an empty sound, or not a sound file"
            raise AudioError(f"{song.path}: no samples in it{why}") from self.error
        yield from self._end()

    def _frames(self) -> Iterator[Any]:
        """Frames of the stream; packets that cannot be decoded leave a gap."""
        before: deque[bytes] = deque(maxlen=2)
        packet, following = None, next(packets := self._packets(), None)
        while following is not None:
            packet, following = following, next(packets, None)
            try:
                if self._is_zeroed(packet, before, following):
                    raise av.InvalidDataError(0, "zeros in a packet")
                frames = packet.decode()
                if self._is_too_short(packet, frames, following):
                    raise av.InvalidDataError(0, "a packet of another length")
            except av.FFmpegError as error:
                self.error = error
                if packet.size:
                    self.damaged += self._samples(packet.duration) if packet.duration else self.usual or 1
                continue
            finally:
                before.append(bytes(packet))
            yield from frames

    def _packets(self) -> Iterator[Any]:
        """Packets of the stream, up to the end or to the first that cannot be read."""
        everything = self.part.family == "matroska"
        view = self.part.view
        view.calls_left = PACKET_CALLS
        try:
            for packet in self.container.demux() if everything else self.container.demux(self.stream):
                view.calls_left = PACKET_CALLS
                if everything:
                    self._cover(packet)
                if packet.stream.index == self.stream.index:
                    if self.first_packet is None and packet.pts is not None:
                        self.first_packet = self._samples(packet.pts)
                    yield packet
        except av.FFmpegError as error:
            self.error, self.broken = error, True

    def _is_zeroed(self, packet: Any, before: Iterable[bytes], following: Any) -> bool:
        """Whether a part of a packet was overwritten with zeros, as where a download or a disk left a hole.

        Such a packet may be decoded without an error, to noise. An encoder, too, leaves zeros where it has
        nothing to say; but then the decoder ignores them, and it makes no difference what is there.
        """
        if self.stream.codec_context.name not in ENTROPY_CODED or self.trials > MAX_TRIALS:
            return False
        data = bytes(packet)
        found = ZEROS.search(data.rstrip(b"\0"))
        if found is None:
            return False
        begin, end = found.start() + ZEROS_KEPT, found.end() - ZEROS_KEPT
        changed = data[:begin] + b"\xff" * (end - begin) + data[end:]
        after = b"" if following is None else bytes(following)
        self.trials += 1
        return not np.array_equal(self._trial([*before, data, after]), self._trial([*before, changed, after]))

    def _is_too_short(self, packet: Any, frames: list[Any], following: Any) -> bool:
        """Whether an Opus packet in the middle of a stream lost its first byte, which gives its length."""
        if self.stream.codec_context.name != "opus" or not packet.duration or self.expected is None:
            return False
        is_last = following is None or not following.size
        decoded = sum(frame.samples for frame in frames)
        return not is_last and decoded < self._samples(packet.duration) - 2 * self.tick

    def _trial(self, packets: list[bytes]) -> np.ndarray:
        """What a new decoder makes of packets; those that cannot be decoded are left out."""
        context = av.CodecContext.create(self.stream.codec_context.name, "r")
        context.extradata = self.stream.codec_context.extradata
        decoded = [np.zeros(0, np.float32)]
        for data in packets:
            with suppress(av.FFmpegError):
                decoded += [frame.to_ndarray().ravel() for frame in context.decode(av.Packet(data))]
        return np.concatenate(decoded)

    def _cover(self, packet: Any) -> None:
        """Notice bytes between the packets of all streams that belong to none of them."""
        if packet.pos is None or packet.pos < 0 or not packet.size:
            return
        if self.covered and packet.pos > self.covered + BLOCK_HEADER:
            self.lost_bytes = True
        self.covered = max(self.covered, packet.pos + packet.size, self.covered + packet.size)

    def _samples(self, ticks: float) -> float:
        return ticks * self.tick

    def _begin(self, frame: Any) -> None:
        """Get ready for frames like this first one."""
        song = self.song
        self.form = self._form_of(frame)
        if song.rate not in (0, self.form.rate):
            raise _changed(song)
        song.rate = self.form.rate
        self.frame_tick = float(frame.time_base * song.rate)
        layout = self.form.layout
        if self.form.channels > 2 and not song.request.downmix:
            raise AudioError(
                f"{song.path}: {self.form.channels} channels, expected 1 or 2: --downmix (downmix=True) folds"
                " them to stereo"
            )
        self.channels = min(self.form.channels, 2)
        self.converter = av.AudioResampler(
            format="flt", layout="stereo" if self.form.channels > 2 else layout
        )

    @staticmethod
    def _form_of(frame: Any) -> _Form:
        return _Form(frame.sample_rate, frame.layout.name, frame.format.name, frame.layout.nb_channels)

    def _gap(self, frame: Any) -> Iterator[np.ndarray]:
        """Silence for what is missing before a frame."""
        at = None if frame.pts is None else frame.pts * self.frame_tick
        if self.expected is None:
            missing = self._missing_lead(at)
            end = self._declared_end() if self.part.family == "ogg" else None
            if self.part.is_counted and self.stream.duration:
                self.left = self._samples(self.stream.duration)
            if end is not None:  # FFmpeg does not drop the padding of a stream that has only one page
                is_excerpt = at is not None and at > LONGEST_FRAME and not missing
                self.left = end - (at if is_excerpt and at is not None else 0)
        else:
            missing = self.damaged if at is None else at - self.expected
        usual = max(self.usual, frame.samples)
        explained = bool(self.damaged or self.lost_bytes)
        if missing > max(2 * self.tick, (0.25 if self.damaged else 0.75) * usual):
            yield from self._hole(missing, usual, explained)
        elif self.damaged:
            self.song.mark()
        self.damaged, self.lost_bytes = 0.0, False
        self.expected = (self.expected or 0.0) + frame.samples if at is None else at + frame.samples
        self.usual = usual
        self.decoded += frame.samples

    def _missing_lead(self, at: float | None) -> float:
        """Samples missing before the first frame; a stream may well begin later than at 0."""
        number = self.song.request.stream
        if at is not None and at > 0 and number < len(self.part.lead) and self.part.lead[number]:
            return at
        if self.damaged and at is not None and self.first_packet is not None:
            return at - max(self.first_packet, 0.0)
        return self.damaged

    def _hole(self, missing: float, usual: int, explained: bool) -> Iterator[np.ndarray]:
        song = self.song
        packets = round(missing / usual)
        if self.tick > 1 and abs(missing - packets * usual) <= 2 * self.tick:
            missing = packets * usual  # timestamps are rounded, packets are not
        if self.part.family == "mp4" and not explained:
            return  # its table of samples is complete: the gap is an edit
        is_pause = self.part.family == "matroska" and not explained and missing <= PAUSE * song.rate
        self.left -= round(missing)
        yield from song.silence(round(missing), self.channels, is_hole=not is_pause)

    def _sound(self, frame: Any) -> Iterator[np.ndarray]:
        for block in self.converter.resample(frame):
            samples = block.to_ndarray().reshape(-1, self.channels)  # packed: (1, samples * channels)
            samples = samples[: int(min(self.left, len(samples)))]
            self.left -= len(samples)
            yield from self.song.add(samples)

    def _is_muted(self, frame: Any) -> bool:
        """Whether a frame was put in the place of a damaged one."""
        if not self.mute or frame.pts is None:
            return False
        at = round(frame.pts * self.frame_tick)
        number = bisect.bisect_right(self.mute, at) - 1
        return number >= 0 and at in self.part.mute[number]

    def _end(self) -> Iterator[np.ndarray]:
        """Silence for what is missing at the end."""
        song = self.song
        missing = max(self._missing_end(), self.damaged)
        if missing >= 1:
            yield from song.silence(round(missing), self.channels)
        elif self.part.view.calls_left < 0:
            raise AudioError(
                f"{song.path}: damaged after {_time(song.seconds(song.position))}: no more sound found"
            )
        elif self.broken:
            raise AudioError(
                f"{song.path}: damaged after {_time(song.seconds(song.position))}: {reason(self.error)}"  # type: ignore[arg-type]
            ) from self.error
        elif self.part.cut and self._declared_end() is None:
            raise AudioError(
                f"{song.path}: cut short: it ends in the middle of its sound, at"
                f" {_time(song.seconds(song.position))}: copy or export it again"
            )
        elif self.part.cut:
            song.note("the file is cut short, though its sound is complete")

    def _missing_end(self) -> float:
        if self.part.missing:
            return min(float(self.part.missing), self.left)
        if self.part.share < 1:
            return max(1.0, self.decoded / self.part.share - self.decoded)
        end = self._declared_end()
        if end is None or self.expected is None:
            return 0.0
        missing = end - self.expected
        return missing if missing > self._tolerance() else 0.0

    def _declared_end(self) -> float | None:
        """The timestamp at which the stream ends, in samples, if the file declares it."""
        family, name = self.part.family, self.container.format.name.split(",")[0]
        if family == "matroska":
            tag = self.stream.metadata.get("DURATION", "")
            if re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", tag):
                hours, minutes, seconds = tag.split(":")
                return (3600 * int(hours) + 60 * int(minutes) + float(seconds)) * self.stream.rate
            only = len(self.container.streams) == 1  # the duration is that of the longest stream
            end = self.part.ends[0] if only or self.part.cut else None
        elif self.part.ends:
            number = self.song.request.stream
            end = self.part.ends[number] if number < len(self.part.ends) else None
        elif name in DECLARING and self.stream.duration:
            end = (self.stream.start_time or 0) + self.stream.duration
        else:
            end = None
        return None if end is None or not math.isfinite(end) else self._samples(end)

    def _tolerance(self) -> float:
        """Samples by which an undamaged stream may be shorter than declared."""
        if self.part.family == "matroska":  # its durations include the encoder's delay and padding
            return 2 * self.usual + 2 * self.tick
        name = self.container.format.name.split(",")[0]
        return max(DECLARING.get(name, 0.0) * self.stream.rate, 2 * self.tick)
