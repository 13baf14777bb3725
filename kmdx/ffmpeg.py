"""Decode with FFmpeg (PyAV), and find holes from timestamps.

A damaged or missing packet leaves a gap between timestamps. Gaps also occur without damage (edits, pauses,
rounding), and some damage decodes without an error. This module distinguishes these cases.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from .errors import AudioError, reason
from .holes import MAX_HOLES, DecodedSong, changed, time_text
from .parts import Part, View

PAUSE = 0.5  # seconds: longest gap in timestamps without damage; speech encoders omit silence
OPENING_CALLS = 50_000  # limit on FFmpeg's reads, of 32 KiB each, and seeks to open a file
PACKET_CALLS = 4000  # the same to find the next packet
MAX_OPENING = 2**26  # limit on bytes read to open a file: longer than any cover or index
MAX_PACKET = 2**25  # limit on bytes read for a packet of sound, if the file has no video
MAX_DAMAGED = 10_000  # limit on packets that cannot be decoded: minutes of sound
LONGEST_FRAME = 2**14  # samples
BLOCK_HEADER = 64  # bytes allowed between two blocks of a Matroska file

# Codecs in whose packets a long run of zeros has no meaning, or is damage.
ENTROPY_CODED = {"opus", "vorbis", "aac", "mp3", "mp3float", "mp2", "mp2float", "wmav1", "wmav2"}
ZEROS, ZEROS_KEPT = re.compile(rb"\0{96,}"), 32  # a decoder reads ahead, from both ends of a packet
LONGER = 0.25  # seconds that an undamaged asf file may declare beyond its sound
LONG_TAIL = 0.5  # seconds: if no stream comes this close to the declared end, the file is cut short
MAX_TRIALS = 500  # packets of a file; if more have zeros, its encoder writes them

# Codecs in which the first byte of a packet gives its length.
SELF_TIMED = {"opus", "amrnb", "amrwb", "libopencore_amrnb", "libopencore_amrwb"}

FRAMES = {"mp3", "adts", "ac3"}  # families whose timestamps FFmpeg estimates

# Codecs with checksums, which FFmpeg verifies only on request.
CHECKED = {"flac", "tta", "wavpack", "ac3", "eac3"}

# FFmpeg's names of containers that declare the length of a stream, and the seconds by which the sound of an
# undamaged file may be shorter.
DECLARING = {
    "flac": 0.0, "tta": 0.0, "wv": 0.0, "ape": 0.0, "nistsphere": 0.0, "mov": 0.002,
    "avi": 0.25, "rm": 0.25, "flv": 0.02,
}  # fmt: skip

# Before version 19, PyAV by default refuses a file whose tags are not UTF-8.
ANY_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


def decode(song: DecodedSong, part: Part, channels: int) -> Generator[np.ndarray, None, int]:
    """The requested samples of a part, decoded from its beginning because FFmpeg's seeks are not exact.

    Returns the number of channels, which must be that of the earlier parts.
    """
    try:
        with _open_ffmpeg(part.view, song.name) as container:
            decoder = _Decoder(song, part, container, _stream(container, song))
            for block in decoder.blocks():
                if channels not in (0, decoder.channels):
                    raise changed(song)
                yield block
    except av.FFmpegError as error:
        raise AudioError(f"{song.name}: not a sound file, or a damaged one: {reason(error)}") from error
    return decoder.channels


def _open_ffmpeg(view: View, name: str) -> Any:
    view.seek(0)
    view.name = name  # some formats are recognized only by the file name
    view.limit(OPENING_CALLS, MAX_OPENING)
    options = {"protocol_whitelist": "none"}  # a playlist must not open other files or addresses
    return av.open(view, "r", options=options, **ANY_TAGS)


def _stream(container: Any, song: DecodedSong) -> Any:
    """The requested audio stream."""
    streams, wanted = container.streams.audio, song.request.stream
    if not streams:
        others = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise AudioError(f"{song.name}: contains no audio stream (streams found: {others})")
    if not 0 <= wanted < len(streams):
        raise AudioError(f"{song.name}: no audio stream {wanted}, expected one of 0 to {len(streams) - 1}")
    if streams[wanted].codec_context is None:
        raise AudioError(f"{song.name}: FFmpeg does not support its codec, or the file is damaged")
    return streams[wanted]


@dataclass(frozen=True)
class _Form:
    """Properties that must not change within a song."""

    rate: int
    layout: str
    format: str
    channels: int


class _Decoder:
    """Decodes one part of a file, and finds its holes from the timestamps of the decoded frames."""

    def __init__(self, song: DecodedSong, part: Part, container: Any, stream: Any) -> None:
        self.song, self.part, self.container, self.stream = song, part, container, stream
        self.form: _Form | None = None
        self.tick = float(stream.time_base * (stream.rate or 1))  # samples: resolution of timestamps
        self.frame_tick = self.tick  # resolution of frames' timestamps
        self.converter: Any = None
        self.channels = 0
        self.expected: float | None = None  # timestamp of the next frame, in samples
        self.usual = self.last_frame = 0  # samples of a frame
        self.error: Exception | None = None  # of a packet or of the container
        self.broken = False  # the container could not be read to its end
        self.excess = 0.0  # samples of the next frame that belong before its timestamp
        self.overlaps = False  # the next packet begins before the last one ends
        self.last = -math.inf  # end of the last packet of any stream, in seconds
        self.damaged = 0.0  # samples in packets that could not be decoded since the last good one
        self.damaged_packets = 0  # total number
        self.lost_bytes = False  # bytes were skipped since the last good packet
        self.covered = part.begin  # position in the file up to which packets were found
        self.first_packet: float | None = None  # timestamp, in samples
        self.left = math.inf  # samples up to the declared end; padding follows
        self.decoded = 0
        self.trials = 0  # number of packets that were decoded twice
        if stream.codec_context.name in CHECKED:
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        self.mute = [span.start for span in part.mute]
        self.marks = deque(part.marks)

    def blocks(self) -> Iterator[np.ndarray]:
        """The requested samples of this part, and silence for its holes."""
        song = self.song
        song.notes += self.part.notes
        for frame in self._frames():
            if self.form is None:
                self._begin(frame)
            if self._form_of(frame) != self.form:
                raise changed(song)
            yield from self._gap(frame)
            while self.marks and frame.pts is not None and frame.pts * self.frame_tick >= self.marks[0] - 1:
                self.marks.popleft()
                song.mark()
            if self._is_muted(frame):
                self.left -= frame.samples
                yield from song.silence(frame.samples, self.channels)
            else:
                yield from self._sound(frame)
            if song.complete:
                return
        if self.converter is None:
            why = f": {reason(self.error)}" if self.error else ": it is empty, or not a sound file"
            raise AudioError(f"{song.name}: contains no samples{why}") from self.error
        yield from self._end()

    def _frames(self) -> Iterator[Any]:
        """The frames of the stream; packets that cannot be decoded leave a gap."""
        before: deque[bytes] = deque(maxlen=2)
        nothing = (None, False)
        packet, (following, lost_bytes) = None, next(packets := self._packets(), nothing)
        while following is not None:
            self.lost_bytes = self.lost_bytes or lost_bytes
            packet, (following, lost_bytes) = following, next(packets, nothing)
            try:
                if self._is_zeroed(packet, before, following):
                    raise av.InvalidDataError(0, "zeros in a packet")
                frames = packet.decode()
                if self._has_another_length(packet, frames, following):
                    raise av.InvalidDataError(0, "a packet of another length")
                self.excess = self._excess(packet, frames)
                self.overlaps = self._overlaps(packet, following)
            except av.FFmpegError as error:
                self.error = error
                if packet.size:
                    self.damaged += self._samples(packet.duration) if packet.duration else self.usual or 1
                    self._check_damaged()
                continue
            finally:
                before.append(bytes(packet))
            yield from frames

    def _check_damaged(self) -> None:
        """Stop early if a file has no more sound."""
        self.damaged_packets += 1
        if self.channels:
            self.song.check_missing(round(self.damaged))
        if self.damaged_packets > MAX_DAMAGED:
            raise AudioError(
                f"{self.song.name}: damaged: more than {MAX_DAMAGED} of its packets cannot be decoded:"
                f" {reason(self.error)}: copy or export it again"  # type: ignore[arg-type]
            )

    def _packets(self) -> Iterator[tuple[Any, bool]]:
        """The packets of the stream up to the end, or up to the first that cannot be read.

        Each comes with whether bytes before it were skipped.
        """
        lost_bytes = False
        everything = self._declared_duration() is not None or self.part.family == "matroska"
        view = self.part.view
        limit = MAX_PACKET if len(self.container.streams) == 1 else math.inf
        view.limit(PACKET_CALLS, limit)
        try:
            for packet in self.container.demux() if everything else self.container.demux(self.stream):
                view.limit(PACKET_CALLS, limit)
                if packet.pts is not None:
                    ended = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self.last = max(self.last, ended)
                if self.part.family == "matroska":
                    lost_bytes = self._skips_bytes(packet) or lost_bytes
                if packet.stream.index == self.stream.index:
                    if self.first_packet is None and packet.pts is not None:
                        self.first_packet = self._samples(packet.pts)
                    yield packet, lost_bytes
                    lost_bytes = False
        except av.FFmpegError as error:
            self.error, self.broken = error, True

    def _is_zeroed(self, packet: Any, before: Iterable[bytes], following: Any) -> bool:
        """Whether part of a packet was overwritten with zeros, for example by a faulty download or disk.

        Such a packet may decode to noise without an error. Encoders also write zeros as padding, but decoders
        ignore padding: replacing those zeros does not change the decoded sound.
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
        return not np.array_equal(
            self._decode_separately([*before, data, after]),
            self._decode_separately([*before, changed, after]),
        )

    def _has_another_length(self, packet: Any, frames: list[Any], following: Any) -> bool:
        """Whether a packet in the middle of a stream lost its first byte, which gives its length."""
        name = self.stream.codec_context.name
        if name not in SELF_TIMED or not packet.duration or self.expected is None:
            return False
        is_last = following is None or not following.size
        longer = sum(frame.samples for frame in frames) - self._samples(packet.duration)
        return not is_last and (longer < -2 * self.tick or (name != "opus" and longer > 2 * self.tick))

    def _excess(self, packet: Any, frames: list[Any]) -> float:
        """Samples from before a damaged packet that an Opus decoder had buffered."""
        if self.stream.codec_context.name != "opus" or not packet.duration or not self.damaged:
            return 0.0
        return max(0.0, sum(frame.samples for frame in frames) - self._samples(packet.duration))

    def _overlaps(self, packet: Any, following: Any) -> bool:
        """Whether a packet's timestamp is too late: the packet would overlap the next one."""
        if following is None or packet.pts is None or following.pts is None or not packet.duration:
            return False
        late = self._samples(packet.pts + packet.duration - following.pts)
        return 2 * self.tick < late < 2 * self._samples(packet.duration)

    def _decode_separately(self, packets: list[bytes]) -> np.ndarray:
        """The output of a new decoder for some packets; those that cannot be decoded are skipped.

        A damaged packet may declare dozens of channels. PyAV reads beyond the planes of a frame with eight or
        more channels, so frames are packed first.
        """
        context = av.CodecContext.create(self.stream.codec_context.name, "r")
        context.extradata = self.stream.codec_context.extradata
        decoded: list[np.ndarray] = [np.zeros(0, np.float32)]
        for data in packets:
            with suppress(av.FFmpegError):
                for frame in context.decode(av.Packet(data)):
                    packed = av.AudioResampler("flt").resample(frame)
                    decoded += [block.to_ndarray().ravel() for block in packed]
        return np.concatenate(decoded)

    def _skips_bytes(self, packet: Any) -> bool:
        """Whether bytes between the last packet of any stream and this one belong to no packet."""
        if packet.pos is None or packet.pos < 0 or not packet.size:
            return False
        lost_bytes = bool(self.covered and packet.pos > self.covered + BLOCK_HEADER)
        self.covered = max(self.covered, packet.pos + packet.size, self.covered + packet.size)
        return lost_bytes

    def _samples(self, ticks: float) -> float:
        return ticks * self.tick

    def _begin(self, frame: Any) -> None:
        """Set up for frames of the same form as this first one."""
        song = self.song
        self.form = self._form_of(frame)
        if song.rate not in (0, self.form.rate):
            raise changed(song)
        song.rate = self.form.rate
        self.frame_tick = float(frame.time_base * song.rate)
        layout = self.form.layout
        if self.form.channels > 2 and not song.request.downmix:
            raise AudioError(
                f"{song.name}: {self.form.channels} channels, expected 1 or 2: mix them down to stereo with"
                " --downmix (downmix=True)"
            )
        self.channels = min(self.form.channels, 2)
        self.converter = av.AudioResampler(
            format="flt", layout="stereo" if self.form.channels > 2 else layout
        )

    @staticmethod
    def _form_of(frame: Any) -> _Form:
        return _Form(frame.sample_rate, frame.layout.name, frame.format.name, frame.layout.nb_channels)

    def _gap(self, frame: Any) -> Iterator[np.ndarray]:
        """Silence for missing sound before a frame."""
        at = None if frame.pts is None else frame.pts * self.frame_tick - self.excess
        self.excess = 0.0
        if at is not None and self._is_absurd(at):
            at = None
        if self.overlaps and self.expected is not None and not self.damaged and not self.lost_bytes:
            at = self.expected
        if self.expected is None:
            missing = self._missing_lead(at)
            end = self._declared_end() if self.part.family == "ogg" else None
            if self.part.is_counted and self.stream.duration:
                self.left = self._samples(self.stream.duration)
            if end is not None:  # FFmpeg does not remove the padding of a stream with only one page
                is_excerpt = at is not None and at > LONGEST_FRAME and not missing
                self.left = end - (at if is_excerpt and at is not None else 0)
        else:
            missing = self.damaged if at is None else at - self.expected
        usual = max(self.usual, frame.samples)
        explained = bool(self.damaged or self.lost_bytes)
        # Timestamps that are counted in packets are exact.
        slack = 2 * self.tick if self.tick < usual or not self.damaged else 0.5 * self.tick
        if missing > max(slack, (0.25 if self.damaged else 0.75) * usual):
            yield from self._hole(missing, usual, explained)
        elif self.damaged:
            self.song.mark()
        self.damaged, self.lost_bytes = 0.0, False
        self.expected = (self.expected or 0.0) + frame.samples if at is None else at + frame.samples
        self.usual, self.last_frame = usual, frame.samples
        self.decoded += frame.samples

    def _is_absurd(self, at: float) -> bool:
        """Whether a timestamp is damaged: it is far beyond the declared end."""
        if self.expected is None or at - self.expected < MAX_HOLES * self.song.rate:
            return False
        end = self._declared_end()
        return end is not None and at > end + MAX_HOLES * self.song.rate

    def _missing_lead(self, at: float | None) -> float:
        """Samples missing before the first frame; an undamaged stream may also begin later than 0."""
        number = self.song.request.stream
        is_damaged = self.lost_bytes or (number < len(self.part.lead) and self.part.lead[number])
        if at is not None and at > 0 and is_damaged:
            return at
        if self.damaged and at is not None and self.first_packet is not None:
            return at - max(self.first_packet, 0.0)
        return self.damaged

    def _hole(self, missing: float, usual: int, explained: bool) -> Iterator[np.ndarray]:
        song = self.song
        packets = round(missing / usual)
        is_rounded = self.tick > 1 or 1 / self.tick % 1 > 1e-6
        is_counted = self.part.family in FRAMES
        if is_counted or (is_rounded and abs(missing - packets * usual) <= 2 * self.tick):
            missing = packets * usual  # timestamps are rounded, but packets have a fixed length
        if self.part.family == "mp4" and not explained:
            return  # its table of samples is complete, so the gap is an edit
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
        """Whether a frame replaces a damaged one."""
        if not self.mute or frame.pts is None:
            return False
        at = round(frame.pts * self.frame_tick)
        number = bisect.bisect_right(self.mute, at) - 1
        return number >= 0 and at in self.part.mute[number]

    def _end(self) -> Iterator[np.ndarray]:
        """Silence for missing sound at the end."""
        song = self.song
        missing = self._missing_end() or self.damaged
        if self.part.stops or (missing < 1 and self.part.view.calls_left < 0):
            raise AudioError(
                f"{song.name}: damaged: found no more sound after {time_text(song.seconds(song.position))}:"
                " copy or export it again"
            )
        if missing >= 1:
            yield from song.silence(round(missing), self.channels)
        elif self.broken:
            raise AudioError(
                f"{song.name}: damaged after {time_text(song.seconds(song.position))}: {reason(self.error)}"  # type: ignore[arg-type]
            ) from self.error
        elif self.part.cut and self._declared_end() is None:
            raise AudioError(
                f"{song.name}: cut short: its sound stops at"
                f" {time_text(song.seconds(song.position))}: copy or export it again"
            )
        elif self.part.cut:
            song.note("the file is cut short, but its sound is complete")

    def _missing_end(self) -> float:
        if self.part.missing:
            return min(float(self.part.missing), self.left)
        if self.part.share < 1 and not self.part.ends:
            return max(1.0, self.decoded / self.part.share - self.decoded)
        end = self._declared_end()
        if end is None or self.expected is None:
            return 0.0
        missing = end - self.expected
        return max(1.0, missing - self._delay()) if missing > self._tolerance() else 0.0

    def _declared_end(self) -> float | None:
        """The end of the stream as a timestamp in samples; None if the file does not declare it."""
        name = self.container.format.name.split(",")[0]
        number = self.song.request.stream
        if (declared := self._declared_duration()) is not None:
            only = len(self.container.streams) == 1  # the duration is that of the longest stream
            tag = self.stream.metadata.get("DURATION", "")
            if self.part.family == "matroska" and re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", tag):
                hours, minutes, seconds = tag.split(":")
                declared, only = 3600 * int(hours) + 60 * int(minutes) + float(seconds), True
            is_cut = self.part.cut or self.last < declared - LONG_TAIL
            end = declared * self.stream.rate if only or is_cut else None
        elif self.part.ends:
            end = self.part.ends[number] if number < len(self.part.ends) else None
            scale = self.stream.rate if self.part.family == "avi" else self.tick
            end = None if end is None else end * scale
        elif name in DECLARING and self.stream.duration:
            end = self._samples((self.stream.start_time or 0) + self.stream.duration)
        else:
            end = None
        return None if end is None or not math.isfinite(end) else end

    def _declared_duration(self) -> float | None:
        """The declared duration of the longest stream, in seconds."""
        if self.container.format.name == "flv":
            return self.container.duration / 1e6 if self.container.duration else None
        return self.part.duration

    def _tolerance(self) -> float:
        """Samples by which an undamaged stream may be shorter than declared."""
        if self.part.family == "matroska":  # durations include the delay, and maybe padding
            is_trimmed = self.last_frame < self.usual
            return (2 * self.usual if is_trimmed else self._delay()) + 2 * self.tick
        if self.part.family == "fragments" and not self.part.notes:
            return 2 * self.usual + 2 * self.tick
        if self.part.family == "asf" and not self.part.cut:
            return LONGER * self.stream.rate
        name = self.container.format.name.split(",")[0]
        return max(DECLARING.get(name, 0.0) * self.stream.rate, 2 * self.tick)

    def _delay(self) -> float:
        """The encoder's delay in samples, which a Matroska file's durations include."""
        number = self.song.request.stream
        return self.part.delays[number] * self.stream.rate if number < len(self.part.delays) else 0.0
