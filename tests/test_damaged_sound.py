"""Sound files that do not hold what they declare: cut, damaged, of unknown size, chained, hostile."""

import contextlib
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf

from kmdx import audio, ffmpeg, frames, ogg
from kmdx.errors import AudioError, KmdxWarning

RATE = 44100


def song(seconds=4.0, rate=RATE, channels=2):
    time = np.arange(round(seconds * rate)) / rate
    sweep = 0.3 * np.sin(2 * np.pi * (300 * time + 60 * time**2))
    noise = np.random.default_rng(0).standard_normal((len(time), channels))
    return (sweep[:, None] + 0.03 * noise).astype(np.float32)


def encode(path, codec, samples, rate=RATE, container=None, **options):
    """Write with FFmpeg; its container's options begin with two underscores."""
    muxer = {key[2:]: value for key, value in options.items() if key.startswith("__")}
    coder = {key: value for key, value in options.items() if not key.startswith("__")}
    with av.open(str(path), "w", format=container, options=muxer) as file:
        stream = file.add_stream(codec, rate, layout="stereo", options=coder)
        stream.bit_rate = 128_000
        stream.codec_context.open()
        size = stream.codec_context.frame_size or None
        resampler = av.AudioResampler(stream.codec_context.format.name, "stereo", rate, size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return path


SNDFILE = {
    "a.wav": ("WAV", "PCM_16", "FILE"),
    "float.wav": ("WAVEX", "FLOAT", "FILE"),
    "rifx.wav": ("WAV", "PCM_24", "BIG"),
    "rf64.wav": ("RF64", "PCM_16", "FILE"),
    "ulaw.wav": ("WAV", "ULAW", "FILE"),
    "a.w64": ("W64", "PCM_16", "FILE"),
    "a.aiff": ("AIFF", "PCM_16", "FILE"),
    "a.au": ("AU", "PCM_24", "FILE"),
    "a.caf": ("CAF", "PCM_16", "FILE"),
    "a.flac": ("FLAC", "PCM_16", "FILE"),
    "a.ogg": ("OGG", "VORBIS", "FILE"),
}
FFMPEG = {
    "a.mp3": ("libmp3lame", {}),
    "mp3.wav": ("libmp3lame", {}),
    "a.m4a": ("aac", {"__movflags": "faststart"}),
    "a.mka": ("flac", {}),
    "opus.webm": ("libopus", {}),
    "a.opus": ("libopus", {}),
    "flac.oga": ("flac", {"container": "ogg"}),
    "a.tta": ("tta", {}),
}
EXACT = {*SNDFILE, "a.mp3", "a.mka", "opus.webm", "a.opus", "flac.oga", "a.tta"}


def make(folder, name, seconds=4.0):
    """An undamaged file, and its rate."""
    path = folder / name
    if name in SNDFILE:
        container, subtype, endian = SNDFILE[name]
        sf.write(path, song(seconds), RATE, subtype, endian, container)
        return path, RATE
    codec, options = FFMPEG[name]
    rate = 48000 if codec == "libopus" else RATE
    return encode(path, codec, song(seconds, rate), rate, **options), rate


def read(path, *arguments, **options):
    """Samples, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = audio.read(path, *arguments, **options).samples
    return samples, [str(warning.message) for warning in caught if warning.category is KmdxWarning]


def refusal(*arguments, **options):
    with pytest.raises(AudioError) as error:
        audio.read(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def overwrite(path, at, data):
    content = bytearray(path.read_bytes())
    at = at if isinstance(at, int) else int(len(content) * at)
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*SNDFILE, *FFMPEG])
def test_an_undamaged_file_gives_no_warning_and_one_that_is_cut_is_refused(tmp_path, name):
    path, rate = make(tmp_path, name)
    samples, told = read(path, accept_holes=False)
    assert told == []
    assert 0 <= len(samples) - 4 * rate <= (0 if name in EXACT else 3500)
    for share in (0.6, 0.9):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert name in refusal(path)
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.flac", "a.mka", "a.mp3", "mp3.wav", "a.m4a"])
def test_a_hole_is_silent_and_what_follows_is_in_time(tmp_path, name):
    path, rate = make(tmp_path, name, 12.0)
    whole, _ = read(path)
    overwrite(path, 0.5, bytes(700))
    samples, told = read(path)
    assert len(samples) == len(whole)
    assert len(told) == 1
    assert "replaced with silence: at 5." in told[0] or "replaced with silence: at 6." in told[0]
    for part in (slice(2000, 5 * rate), slice(7 * rate, 11 * rate)):
        np.testing.assert_allclose(samples[part], whole[part], atol=1e-3)
    assert not samples[5 * rate : 7 * rate].all(axis=1).all()
    assert "expected a complete file" in refusal(path, accept_holes=False)


def test_zeros_inside_a_packet_that_decodes_without_an_error_are_a_hole(tmp_path):
    path, _ = make(tmp_path, "opus.webm")
    with av.open(str(path)) as file:
        packet = next(packet for packet in file.demux() if packet.pts > 2000)
        at = packet.pos + packet.size // 4
        assert packet.size > 200
    overwrite(path, at, bytes(130))
    samples, told = read(path)
    assert len(samples) == 4 * 48000
    assert "0.02 s replaced with silence: at 2.0" in told[0]


def test_zeros_inside_a_packet_of_many_channels_are_a_hole(tmp_path):
    path = tmp_path / "7.1.aac"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", RATE, layout="7.1")
        noise = 0.1 * np.random.default_rng(0).standard_normal((8, 43 * 1024)).astype(np.float32)
        for begin in range(0, noise.shape[1], 1024):
            frame = av.AudioFrame("fltp", "7.1", 1024)
            for channel in range(8):
                frame.planes[channel].update(noise[channel, begin : begin + 1024])
            frame.sample_rate, frame.pts = RATE, begin
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    whole = audio.read(path, downmix=True).samples
    overwrite(path, 0.5, bytes(300))
    assert "first at 0.5" in refusal(path, downmix=True)
    assert len(audio.read(path, 0.7, 0.2, downmix=True).samples) == round(0.2 * RATE) < len(whole)


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "flac.oga"])
def test_a_lost_page_of_a_short_song_is_refused_with_its_time(tmp_path, name):
    path, rate = make(tmp_path, name, 6.0)
    overwrite(path, 0.5, b"\xff" * 200)
    message = refusal(path)
    assert "first at 2." in message or "first at 3." in message
    assert len(read(path, 0.0, 1.0)[0]) == rate  # the hole is elsewhere
    assert len(read(path, 5.0, 0.5)[0]) == rate // 2


def test_everything_after_five_seconds_of_holes_is_refused_at_once(tmp_path):
    path, _ = make(tmp_path, "a.flac")
    content = bytearray(path.read_bytes())
    content[21:26] = bytes([content[21] | 0x0F, 255, 255, 255, 255])  # STREAMINFO's count of samples
    path.write_bytes(content)
    assert "first at 3.99" in refusal(path)


def riff(data, size, bits=16, magic=b"RIFF", ds64=None):
    form = struct.pack("<HHIIHH", 1, 2, RATE, RATE * 2 * bits // 8, 2 * bits // 8, bits)
    long = b"" if ds64 is None else b"ds64" + struct.pack("<IQQQI", 28, ds64, ds64, ds64, 0)
    head = magic + struct.pack("<I", size) + b"WAVE" + long + b"fmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", size) + data


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("size", [0, 0x7FFFE000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFF9B, 0xFFFFFFFF])
def test_a_wav_of_unknown_size_is_read_to_its_end(tmp_path, size, bits):
    data = np.random.default_rng(0).bytes(1000 * bits // 4)
    (tmp_path / "a.wav").write_bytes(riff(data, size, bits))
    samples, told = read(tmp_path / "a.wav")
    assert samples.shape == (1000, 2)
    assert told == []


@pytest.mark.parametrize("ds64", [0, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
def test_an_rf64_of_unknown_size_is_read_to_its_end(tmp_path, magic, ds64):
    (tmp_path / "a.wav").write_bytes(riff(bytes(4000), 0xFFFFFFFF, 16, magic, ds64))
    assert len(read(tmp_path / "a.wav")[0]) == 1000


def test_an_empty_wav_with_a_chunk_behind_its_data_has_no_sound(tmp_path):
    (tmp_path / "a.wav").write_bytes(riff(b"LIST" + struct.pack("<I", 4) + b"INFO", 0))
    assert "no samples" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("lost", [1, 4, 4000, 4 * RATE // 10])
def test_a_wav_a_little_shorter_than_declared_is_read_with_a_warning(tmp_path, lost):
    data = bytes(4 * 2 * RATE)
    (tmp_path / "a.wav").write_bytes(riff(data[:-lost], len(data)))
    samples, told = read(tmp_path / "a.wav")
    assert len(samples) == 2 * RATE - -(-lost // 4)
    assert "shorter than its header declares" in told[0]
    with pytest.raises(AudioError, match="cut short"):
        audio.info(tmp_path / "a.wav")


def test_a_size_that_wrapped_at_4_gib(tmp_path):
    path = tmp_path / "a.wav"
    with path.open("wb") as file:
        file.write(riff(b"", 4 * RATE))
        file.truncate(44 + 2**32 + 4 * RATE)
    samples, told = read(path, 20_000, 3)
    assert len(samples) == 3 * RATE
    assert "wrapped at 4 GiB" in told[0]


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "flac.oga"])
def test_all_links_of_a_chain_are_read(tmp_path, name):
    path, rate = make(tmp_path, name, 1.0)
    one = read(path)[0]
    path.write_bytes(3 * path.read_bytes())
    samples, told = read(path)
    assert told == []
    np.testing.assert_allclose(samples, np.concatenate([one] * 3), atol=1e-6)
    assert len(read(path, 1.5, 1.0)[0]) == rate


def test_mp3_files_that_were_joined_and_have_tags_between_them(tmp_path):
    path, rate = make(tmp_path, "a.mp3", 1.0)
    one, content = read(path)[0], path.read_bytes()
    path.write_bytes(content + b"TAG" + bytes(125) + content + b"LYRICSBEGIN" + b"la " * 500)
    samples, told = read(path, accept_holes=False)
    assert told == []
    assert (
        0 <= len(samples) - 2 * rate < 4 * 1152
    )  # what the second file's header declares as padding is sound here
    np.testing.assert_allclose(samples[: rate - 2000], one[: rate - 2000], atol=1e-3)


@pytest.mark.parametrize("form", [(22050, 2), (RATE, 1)])
def test_a_chain_whose_rate_or_channels_change_is_refused(tmp_path, form):
    rate, channels = form
    path, _ = make(tmp_path, "a.ogg", 1.0)
    sf.write(tmp_path / "b.ogg", song(1.0, rate, channels), rate)
    path.write_bytes(path.read_bytes() + (tmp_path / "b.ogg").read_bytes())
    assert "its sample rate or channels change at 1.000 s" in refusal(path)


def test_an_ogg_file_without_a_last_page_is_read_with_a_warning(tmp_path):
    path, _ = make(tmp_path, "a.opus", 4.0)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"OggS")])
    assert "no page is marked as its last" in read(path)[1][0]


@pytest.mark.parametrize("extension", ["aiff", "caf", "wav", "mp3", "m4a"])
def test_zeros_behind_a_header_are_refused_soon(tmp_path, extension):
    head = {
        "aiff": b"FORM\0\0\0\0AIFF",
        "caf": b"caff\0\1\0\0",
        "wav": b"RIFF\0\0\0\0WAVE",
        "mp3": b"ID3\4\0\0\0\0\0\0",
        "m4a": b"\0\0\0\x14ftypM4A " + bytes(8),
    }
    path = tmp_path / f"a.{extension}"
    with path.open("wb") as file:
        file.write(head[extension])
        file.truncate(20_000_000)
    refusal(path)


def test_sizes_beyond_what_c_holds_print_nothing(tmp_path):
    sf.write(tmp_path / "a.caf", song(0.1), RATE, format="CAF")
    overwrite(
        tmp_path / "a.caf", (tmp_path / "a.caf").read_bytes().index(b"data") + 4, struct.pack(">q", 2**62)
    )
    code = "import sys; from kmdx import audio; audio.read(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.caf")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr.count("Traceback") == 1  # Python's own, of the AudioError
    assert "callback" not in done.stderr
    assert "cut short or damaged" in done.stderr


def test_an_encoders_own_zeros_are_no_damage(tmp_path):
    samples = np.full((48000, 2), 0.3, np.float32)
    path = encode(tmp_path / "a.webm", "libopus", samples, 48000, b="256000")
    assert read(path, accept_holes=False)[1] == []


def test_a_damaged_first_cluster_of_a_matroska_file_is_a_hole_at_its_start(tmp_path):
    options = {"__cluster_time_limit": "50"}
    path = encode(tmp_path / "a.webm", "libopus", song(6.0, 48000), 48000, **options)
    assert read(path, accept_holes=False)[1] == []
    whole, content = read(path)[0], path.read_bytes()
    overwrite(path, content.index(b"\x1f\x43\xb6\x75"), bytes(8))
    samples, told = read(path)
    late = len(samples) - len(whole)  # timestamps are rounded to 1 ms
    assert 0 <= late <= 48
    assert "replaced with silence: at 0.000 s" in told[0]
    np.testing.assert_allclose(samples[48000 + late :], whole[48000:], atol=1e-3)


def boxes(content):
    """Where each box of an mp4 file begins, and its name."""
    position, found = 0, []
    while position < len(content):
        found.append((position, content[position + 4 : position + 8]))
        position += int.from_bytes(content[position : position + 4], "big")
    return found


@pytest.mark.parametrize("flags", ["", "+dash+global_sidx"])
def test_a_fragmented_mp4_whose_structure_is_damaged_is_no_shorter_song(tmp_path, flags):
    options = {"__movflags": "frag_keyframe+empty_moov" + flags, "__frag_duration": "200000"}
    path = encode(tmp_path / "a.mp4", "aac", song(11.0), **options)
    whole, told = read(path, accept_holes=False)
    assert told == []
    content = path.read_bytes()
    fragments = [at for at, name in boxes(content) if name == b"moof"]
    for data in (bytes(8), bytes(200), b"\0\0\0\5"):
        overwrite(path, fragments[10], data)
        if flags:  # its index leads to the fragments behind the damage
            assert len(read(path)[0]) == len(whole)
            assert "expected a complete file" in refusal(path, accept_holes=False)
        else:
            assert "damaged: found no more sound after 2." in refusal(path)
        path.write_bytes(content)
    overwrite(path, fragments[10] + 4, bytes(4))
    samples, told = read(path)
    assert len(samples) == len(whole)
    assert "for 0.209 s" in told[0]
    np.testing.assert_allclose(samples[4 * RATE :], whole[4 * RATE :], atol=0.1)
    overwrite(path, fragments[-1], bytes(200))
    assert "expected a complete file" in refusal(path, accept_holes=False)
    for behind in (bytes(1000), b"TAG" + bytes(125)):
        path.write_bytes(content + behind)
        assert read(path, accept_holes=False)[1] == []
    if flags:  # the index lists more than there is
        path.write_bytes(content[: fragments[10]])
        assert "found no more sound" in refusal(path)


BARE = {"a.mp3": "libmp3lame", "a.aac": "aac", "a.ac3": "ac3", "a.eac3": "eac3"}


def bare(folder, name, seconds=6.0, rate=RATE):
    """A file of frames that declares nothing."""
    options = {"__write_xing": "0", "__id3v2_version": "0"} if name == "a.mp3" else {}
    path = encode(folder / name, BARE[name], song(seconds, rate), rate, **options)
    return path, read(path, accept_holes=False)[0], path.read_bytes()


@pytest.mark.parametrize("name", BARE)
def test_files_of_frames_that_were_joined_and_differ_are_refused(tmp_path, name):
    _, whole, content = bare(tmp_path, name, 2.0)
    path, _, other = bare(tmp_path, name, 2.0, 48000)
    for between in (b"", b"TAG" + bytes(125)):
        path.write_bytes(content + between + other)
        assert "its sample rate or channels change at " in refusal(path)
        assert len(read(path, 0.0, 1.0)[0]) == RATE
    path.write_bytes(content[:-100] + other)
    assert "its sample rate or channels change at " in refusal(path)
    path.write_bytes(content + content)
    samples, told = read(path, accept_holes=False)
    assert told == []
    assert len(samples) == 2 * len(whole)


@pytest.mark.parametrize("name", BARE)
def test_damage_in_a_file_of_frames_is_reported_wherever_it_is(tmp_path, name):
    path, whole, content = bare(tmp_path, name)
    middle = len(content) // 2
    for removed in (100, 300, 1500):
        path.write_bytes(content[:middle] + content[middle + removed :])
        assert ": at 2.9" in (told := read(path)[1])[0] or ": at 3.0" in told[0]
    path.write_bytes(content[:-4000] + bytes(4000))
    assert "first at 5." in refusal(path)
    path.write_bytes(bytes(4) + content[4:])
    samples, told = read(path)
    assert ": at 0.000 s" in told[0]
    assert len(samples) == len(whole)
    path.write_bytes(content[:-50])
    assert "its last frame is incomplete" in " ".join(read(path)[1])
    path.write_bytes(content + bytes(3000))
    assert read(path, accept_holes=False)[1] == []


def test_bytes_before_the_first_frame_do_not_hide_what_an_mp3_declares(tmp_path):
    path, _ = make(tmp_path, "a.mp3")
    whole, _ = read(path)
    content = b"some other bytes" * 20 + path.read_bytes()
    path.write_bytes(content)
    samples, told = read(path, accept_holes=False)
    assert told == []
    np.testing.assert_array_equal(samples, whole)
    path.write_bytes(content[: len(content) * 3 // 5])
    assert "first at 2." in refusal(path)


def test_the_frames_that_an_mp3_declares_fill_its_gap(tmp_path):
    path, _ = make(tmp_path, "a.mp3", 12.0)
    whole, _ = read(path)
    content = path.read_bytes()
    path.write_bytes(content[:90_000] + content[91_500:])
    samples, told = read(path)
    assert len(samples) == len(whole)
    assert "replaced with silence: at 5." in told[0]
    np.testing.assert_allclose(samples[7 * RATE :], whole[7 * RATE :], atol=1e-3)
    path.write_bytes(content[:90_000] + bytes(50) + content[90_000:])
    assert "but no sound is missing" in read(path)[1][0]


def test_damage_in_alac_is_a_hole_in_caf_too(tmp_path):
    path = tmp_path / "a.caf"
    for blocks in (8, 100.5):  # a last block that is full, or not
        sf.write(path, song(10.0)[: round(4096 * blocks)], RATE, format="CAF", subtype="ALAC_16")
        whole, told = read(path, accept_holes=False)
        assert told == []
        assert len(whole) == round(4096 * blocks)
    overwrite(path, 0.5, bytes(200))
    samples, told = read(path)
    assert len(samples) == len(whole)
    assert "replaced with silence: at 4." in told[0]


@pytest.mark.parametrize(("container", "channels"), [("VOC", 2), ("SVX", 1)])
def test_old_formats_that_are_cut_are_refused(tmp_path, container, channels):
    path = tmp_path / f"a.{container.lower()}"
    sf.write(path, song(4.0, RATE, channels), RATE, "PCM_16", format=container)
    samples, told = read(path, accept_holes=False)
    assert told == []
    assert len(samples) == 4 * RATE
    for share in (0.6, 0.97):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert "cut short or damaged" in refusal(path)
        path.write_bytes(content)


def test_flac_files_that_were_joined_are_read_one_after_the_other(tmp_path):
    path, _ = make(tmp_path, "a.flac", 2.0)
    one, content = read(path)[0], path.read_bytes()
    path.write_bytes(3 * content)
    samples, told = read(path, accept_holes=False)
    assert told == []
    np.testing.assert_array_equal(samples, np.concatenate([one] * 3))
    np.testing.assert_array_equal(read(path, 1.5, 1.0)[0], samples[66150 : 66150 + RATE])
    path.write_bytes(content + content[: len(content) // 2])
    assert "first at 2." in refusal(path)
    sf.write(tmp_path / "b.flac", song(1.0, 48000), 48000)
    path.write_bytes(content + (tmp_path / "b.flac").read_bytes())
    assert "its sample rate or channels change at 2.000 s" in refusal(path)


# Files by name: codec, FFmpeg's container and options, and whether the file declares how long its sound is.
OTHERS = {
    "aac.flv": ("aac", "flv", {}, True),
    "mp3.flv": ("libmp3lame", "flv", {}, True),
    "a.wma": ("wmav2", "asf", {}, True),
    "mp3.asf": ("libmp3lame", "asf", {}, True),
    "pcm.asf": ("pcm_s16le", "asf", {}, True),
    "mp3.avi": ("libmp3lame", "avi", {}, True),
    "mp2.avi": ("mp2", "avi", {}, True),
    "aac.avi": ("aac", "avi", {}, True),
    "alac.caf": ("alac", "caf", {}, True),
    "alac.m4a": ("alac", "ipod", {}, True),
    "opus.mp4": ("libopus", "mp4", {}, True),
    "aac.mov": ("aac", "mov", {}, True),
    "a.wv": ("wavpack", "wv", {}, True),
    "aac.mka": ("aac", "matroska", {}, True),
    "mp3.mka": ("libmp3lame", "matroska", {}, True),
    "live.mka": ("aac", "matroska", {"__live": "1"}, False),
    "aac.ts": ("aac", "mpegts", {}, False),
    "mp3.ts": ("libmp3lame", "mpegts", {}, False),
    "ac3.m2ts": ("ac3", "mpegts", {"__mpegts_m2ts_mode": "1"}, False),
    "mp2.mpg": ("mp2", "mpeg", {}, False),
    "ac3.vob": ("ac3", "vob", {}, False),
    "delayed.mp4": (
        "aac",
        "mp4",
        {"__movflags": "frag_keyframe+delay_moov", "__frag_duration": "500000"},
        True,
    ),
}


def other(folder, name, seconds, rate=48000):
    codec, container, options, declares = OTHERS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg was built without {codec}")
    return encode(folder / name, codec, song(seconds, rate), rate, container, **options), declares


@pytest.mark.parametrize("name", OTHERS)
def test_other_containers_are_read_silently_and_a_cut_is_noticed(tmp_path, name):
    for seconds, rate in ((3.0, 48000), (2.0, 44100), (1.001, 44100), (24576 / 48000, 48000)):
        rate = 48000 if name.startswith("opus") else rate
        path, declares = other(tmp_path, name, seconds, rate)
        samples, told = read(path, accept_holes=False)
        assert told == []
        assert -2500 <= len(samples) - seconds * rate < 3500
    path, declares = other(tmp_path, name, 3.0)
    content = path.read_bytes()
    for share in (0.6, 0.95):
        path.write_bytes(content[: int(len(content) * share) // 2 * 2 + 1])
        if declares and (share < 0.9 or path.suffix != ".avi"):
            assert path.name in refusal(path)
        elif declares:  # only its index is cut
            assert read(path)[1]
        else:
            assert "incomplete" in " ".join(read(path)[1])


# Timestamps of these follow from what is declared or indexed, so that one packet may be lost.
IN_TIME = [name for name in OTHERS if not name.endswith(("mka", "wv", "caf", ".asf"))]


@pytest.mark.parametrize("name", IN_TIME)
def test_what_follows_a_hole_is_in_time_in_other_containers(tmp_path, name):
    path, _ = other(tmp_path, name, 9.0)
    whole, _ = read(path)
    overwrite(path, 0.5, bytes(200))
    samples, told = read(path)
    assert len(told) == 1
    assert ": at 4." in told[0]
    assert abs(len(samples) - len(whole)) <= 1
    after = slice(6 * 48000, 8 * 48000)
    correlation = [
        np.dot(samples[after.start + late : after.stop + late, 0], whole[after, 0]) for late in (-24, 0, 24)
    ]
    assert np.argmax(correlation) == 1
    np.testing.assert_allclose(samples[after], whole[after], atol=0.05)


@pytest.mark.parametrize("name", ["opus.webm", "mp3.mka", "aac.mka"])
def test_a_damaged_end_of_a_matroska_file_is_a_hole(tmp_path, name):
    if name in OTHERS:
        path, _ = other(tmp_path, name, 4.0)
    else:
        path, _ = make(tmp_path, name)
    whole, content = read(path)[0], path.read_bytes()
    with av.open(str(path)) as file:
        last = [packet.pos for packet in file.demux() if packet.size][-1]
    overwrite(path, last, bytes(200))
    samples, told = read(path)
    assert abs(len(samples) - len(whole)) < 1100  # the padding that the lost packet declared
    assert "replaced with silence: at 3.9" in told[0] or "replaced with silence: at 4.0" in told[0]
    path.write_bytes(content[: last + 10])
    assert "replaced with silence" in read(path)[1][0]


def test_a_fragmented_mp4_that_declares_its_duration_may_not_lack_fragments(tmp_path):
    options = {"__movflags": "frag_keyframe+empty_moov", "__frag_duration": "200000"}
    path = encode(tmp_path / "a.mp4", "aac", song(4.0), **options)
    whole, content = read(path)[0], path.read_bytes()
    fragments = [at for at, name in boxes(content) if name == b"moof"]
    declared = content.index(b"mvhd") + 20
    content = content[:declared] + struct.pack(">I", 4000) + content[declared + 4 :]
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path, accept_holes=False)[0], whole)
    for number in (len(fragments) // 2, -2):
        path.write_bytes(content[: fragments[number]])
        assert "missing, first at " in refusal(path)


def test_alac_in_caf_of_whole_blocks_has_its_holes_noticed(tmp_path):
    path = tmp_path / "a.caf"
    for count in (4096 * 100, 4096 * 100 - 1, 64000, 4096):
        sf.write(path, song(10.0)[:count], RATE, format="CAF", subtype="ALAC_16")
        assert len(read(path, accept_holes=False)[0]) == count
    sf.write(path, song(10.0)[: 4096 * 100], RATE, format="CAF", subtype="ALAC_16")
    content = path.read_bytes()
    overwrite(path, 0.5, bytes(200))
    samples, told = read(path)
    assert len(samples) == 4096 * 100
    assert "replaced with silence: at 4." in told[0]
    path.write_bytes(content[: len(content) // 2] + content[len(content) // 2 + 700 :])
    assert "cut short or damaged" in refusal(path)


HOSTILE = {
    "names.ogg": b"OggS" * 250_000,
    "names-behind-a-page.ogg": b"OggS" + bytes(23) + b"OggS" * 250_000,
    "pages.ogg": (b"OggS" + bytes(23)) * 2000,
    "tags.mp3": (b"ID3\4" + bytes(6)) * 200_000,
    "tags-behind-frames.mp3": (b"\xff\xfb\x90\0" + bytes(413)) * 5 + b"TAG" * 1_000_000,
    "lyrics.mp3": (b"\xff\xfb\x90\0" + bytes(413)) * 5 + b"LYRICSBEGIN" * 100_000,
    "frames.aac": b"\xff\xf1\x50\x80\x01\x1f\xfc\0" * 50_000,
    "not-decodable.mp3": b"\xff\xfb\x90" * 2_000_000,
    "zeros.mp3": b"\xff\xfb\x90\0" + bytes(20_000_000),
    "zeros.flv": b"FLV\1\5\0\0\0\x09" + bytes(20_000_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_of_nothing_but_headers_is_refused_after_a_bounded_search(tmp_path, name, monkeypatch):
    monkeypatch.setattr(ogg, "MAX_PAGES", 1000)
    monkeypatch.setattr(frames, "MAX_FRAMES", 20_000)
    monkeypatch.setattr(frames, "MAX_OTHERS", 500)
    monkeypatch.setattr(ffmpeg, "MAX_DAMAGED", 500)
    (tmp_path / name).write_bytes(HOSTILE[name])
    assert name in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["a.w64", "a.caf", "rf64.wav", "a.m4a", "a.wma"])
@pytest.mark.parametrize("number", [2**64 - 1, 2**62])
def test_a_position_that_no_file_has_is_read_as_nothing(tmp_path, name, number):
    path = other(tmp_path, name, 0.3)[0] if name in OTHERS else make(tmp_path, name, 0.3)[0]
    content = path.read_bytes()
    order = ">" if name in ("a.caf", "a.m4a") else "<"
    for at in range(4, 140, 4):
        path.write_bytes(content[:at] + struct.pack(order + "Q", number) + content[at + 8 :])
        with warnings.catch_warnings(), contextlib.suppress(AudioError):
            warnings.simplefilter("ignore", KmdxWarning)
            audio.read(path)


def test_only_the_damaged_packets_of_the_wanted_part_count(tmp_path):
    path, _ = make(tmp_path, "a.mka", 20.0)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size, packet.pts) for packet in file.demux() if packet.size]
    for at, size, time in packets:
        if 6000 < time < 13_000:
            content[at + 12 : at + size] = bytes(size - 12)
    path.write_bytes(content)
    assert "first at 6.0" in refusal(path)
    assert len(read(path, 15.0, 1.0)[0]) == RATE


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_asf_file_that_was_recorded_as_it_was_sent_declares_nothing(tmp_path, share):
    path, _ = other(tmp_path, "a.wma", 4.0)
    content = bytearray(path.read_bytes())
    properties = content.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    path.write_bytes(content[: int(len(content) * share)])
    assert "missing, first at " in refusal(path)
    content[properties + 88] |= 1
    path.write_bytes(content)
    assert read(path, accept_holes=False)[1] == []
    path.write_bytes(content[: int(len(content) * share)])
    assert abs(len(read(path)[0]) / 48000 - 4.0 * share) < 0.2


@pytest.mark.parametrize("name", ["a.wma", "mp2.avi", "mp2.mpg"])
def test_quiet_sound_is_no_damage(tmp_path, name):
    codec, container, options, _ = OTHERS[name]
    seconds = np.arange(2 * 48000)[:, None] / 48000
    for samples in (0 * seconds, 2**-15 * np.sin(9999 * seconds), song(2.0, 48000) * (seconds % 1 > 0.5)):
        stereo = np.repeat(samples[:, :1], 2, axis=1).astype(np.float32)
        encode(tmp_path / name, codec, stereo, 48000, container, **options)
        assert read(tmp_path / name, accept_holes=False)[1] == []


def test_zeros_in_mp2_that_decode_without_an_error_are_a_hole(tmp_path):
    path, _ = other(tmp_path, "mp2.avi", 9.0)
    with av.open(str(path)) as file:
        packet = next(packet for packet in file.demux() if packet.pts and packet.pts > 100)
    overwrite(path, packet.pos + 8 + packet.size // 2, bytes(180))
    assert "replaced with silence: at 2." in read(path)[1][0]


# Formats that libsndfile writes and FFmpeg does not read: container, codec, channels and rate.
RARE = [
    ("MAT4", "PCM_16", 2, RATE),
    ("MAT4", "DOUBLE", 1, RATE),
    ("MAT5", "PCM_16", 2, RATE),
    ("MAT5", "FLOAT", 1, RATE),
    ("MPC2K", "PCM_16", 2, RATE),
    ("HTK", "PCM_16", 1, 16000),
    ("WVE", "ALAW", 1, 8000),
    ("SDS", "PCM_16", 1, RATE),
    ("SDS", "PCM_24", 1, RATE),
    ("XI", "DPCM_16", 1, RATE),
    ("AVR", "PCM_16", 2, RATE),
    ("WAV", "G721_32", 1, 8000),
    ("WAV", "NMS_ADPCM_16", 1, 8000),
    ("AU", "G723_24", 1, 8000),
    ("AIFF", "GSM610", 1, 8000),
]


@pytest.mark.parametrize(("container", "codec", "channels", "rate"), RARE)
def test_rare_formats_are_read_as_libsndfile_does_and_a_cut_is_noticed(
    tmp_path, container, codec, channels, rate
):
    path = tmp_path / "a.bin"
    sf.write(path, song(2.013, rate, channels), rate, codec, format=container)
    expected, true_rate = sf.read(path, dtype="float32", always_2d=True)
    samples, told = read(path, accept_holes=False)
    assert told == []
    np.testing.assert_array_equal(samples, expected)
    part, _ = read(path, 1.0, 0.5)
    np.testing.assert_array_equal(part, expected[true_rate : true_rate + round(0.5 * true_rate)])
    content = path.read_bytes()
    for share in (0.6, 0.95) if container != "XI" else ():  # whose header declares nothing
        path.write_bytes(content[: int(len(content) * share)])
        assert "a.bin" in refusal(path)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("count", [0, 1000])
@pytest.mark.parametrize("name", [b"LIST", b"id3 ", b"bext"])
def test_a_chunk_behind_sound_of_unknown_size_is_not_read_as_sound(tmp_path, name, count, size):
    chunks = name + struct.pack("<I", 5) + b"INFO1\0" + name + struct.pack("<I", 4) + b"more"
    (tmp_path / "a.wav").write_bytes(riff(bytes(4 * count) + chunks, size))
    if count:
        samples, told = read(tmp_path / "a.wav", accept_holes=False)
        assert len(samples) == count
        assert told == []
    else:
        assert "no samples" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["mp3.avi", "mp2.avi", "aac.avi"])
@pytest.mark.parametrize("at", [-100, 0, 8, 1000])
def test_a_damaged_index_of_an_avi_file_is_reported(tmp_path, name, at):
    path, _ = other(tmp_path, name, 9.0)
    whole, _ = read(path)
    overwrite(path, path.read_bytes().rindex(b"idx1") + at, np.random.default_rng(1).bytes(200))
    try:
        samples, told = read(path)
    except AudioError:
        return
    assert len(told) > 0
    assert abs(len(samples) - len(whole)) < 3000


def test_an_avi_file_with_less_sound_than_its_stream_declares_is_refused(tmp_path):
    path, _ = other(tmp_path, "mp2.avi", 4.0)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"idx1")] = 0
    at = content.index(b"auds") + 28
    content[at + 4 : at + 8] = struct.pack("<I", 2 * struct.unpack_from("<I", content, at + 4)[0])
    path.write_bytes(content)
    assert "missing, first at 4." in refusal(path)


def test_a_damaged_timestamp_gives_no_absurd_duration(tmp_path):
    path = encode(tmp_path / "a.rm", "ac3", song(10.0, 48000), 48000, "rm")
    whole, content = read(path, accept_holes=False)[0], path.read_bytes()
    for share in (0.15, 0.5, 0.8):
        path.write_bytes(content)
        overwrite(path, share, b"\xff" * 200)
        samples, told = read(path)
        assert len(told) == 1
        assert abs(len(samples) - len(whole)) <= 1536
