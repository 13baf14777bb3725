"""Threads, cancellation, asyncio, forked and spawned processes, streams and memory."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import separator_cases
import soundfile
import torch
from conftest import noise

from kmdx import Separator, ensemble, precisions, signals
from kmdx.errors import AudioError, KmdxError, PlanError

pytestmark = pytest.mark.slow

separator = separator_cases.separator
FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")


def printed(*arguments: object) -> str:
    """What a Python process with these arguments prints."""
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def vocals(separator: Separator, seed: int) -> np.ndarray:
    return separator.separate(noise(20_000, seed=seed), 44100, stems=["vocals"])["vocals"]


class Overlaps:
    """Counts the threads inside ``ensemble.run``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside, self.most = 0, 0
        run = ensemble.run

        def counted(*arguments: object) -> dict:
            self.inside += 1
            self.most = max(self.most, self.inside)
            try:
                return run(*arguments)  # type: ignore[arg-type]
            finally:
                self.inside -= 1

        monkeypatch.setattr(ensemble, "run", counted)


@pytest.mark.parametrize("count", [1, 2])
def test_threads_take_turns_and_get_the_stems_that_one_thread_gets(
    small: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    separators = [Separator(small, device="cpu", stems=["vocals"], precision="fp32") for _ in range(count)]
    expected = [vocals(separators[0], seed) for seed in range(6)]
    overlaps = Overlaps(monkeypatch)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda seed: vocals(separators[seed % count], seed), range(6)))
    assert all(map(np.array_equal, found, expected))
    assert overlaps.most == 1


def test_threads_may_load_separators_at_the_same_time(small: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: Separator(small, device="cpu", stems=["vocals"]), range(4)))
    expected = vocals(made[0], 0)
    assert all(np.array_equal(vocals(each, 0), expected) for each in made)


def test_threads_on_two_devices_restore_torchs_settings_when_the_last_one_ends() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    first, second = precisions.exact(), precisions.exact()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (cudnn.allow_tf32, cudnn.deterministic) == (False, True), "the second is still computing"
    second.__exit__(None, None, None)
    assert (cudnn.allow_tf32, cudnn.deterministic) == before
    assert before != (False, True)


def test_a_callback_may_separate_another_song(separator: Separator) -> None:
    expected, other = vocals(separator, 0), vocals(separator, 1)
    inner: list[np.ndarray] = []

    def progress(done: float, total: float) -> None:
        if done and not inner:
            inner.append(vocals(separator, 1))

    song = noise(20_000, seed=0)
    found = separator.separate(song, 44100, stems=["vocals"], progress=progress)["vocals"]
    assert np.array_equal(found, expected)
    assert np.array_equal(inner[0], other)


class Cancelled(Exception):
    """What a callback raises."""


@pytest.mark.parametrize("after", [0.0, 0.3])
@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt, KmdxError])
def test_an_exception_of_the_callback_ends_the_song_and_the_separator_still_works(
    separator: Separator, error: type[BaseException], after: float
) -> None:
    expected, raised = vocals(separator, 0), error("enough")
    seen: list[float] = []

    def progress(done: float, total: float) -> None:
        seen.append(done)
        if done >= after:
            raise raised

    allows_tf32 = torch.backends.cudnn.allow_tf32
    with pytest.raises(error) as caught:
        separator.separate(noise(100_000), 44100, progress=progress)
    assert caught.value is raised
    assert [done >= after for done in seen] == [False] * (len(seen) - 1) + [True], "nothing ran after it"
    assert torch.backends.cudnn.allow_tf32 == allows_tf32
    assert np.array_equal(vocals(separator, 0), expected)


def test_ctrl_c_ends_the_song_and_the_separator_still_works(separator: Separator) -> None:
    expected = vocals(separator, 0)

    def progress(done: float, total: float) -> None:
        if done:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        separator.separate(noise(100_000), 44100, progress=progress)
    assert np.array_equal(vocals(separator, 0), expected)


def test_a_song_that_waits_for_its_turn_can_be_cancelled_before_its_first_window(
    separator: Separator, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, stop = threading.Event(), threading.Event()

    def first(done: float, total: float) -> None:
        if done:
            started.set()
            assert stop.wait(60)

    def second(done: float, total: float) -> None:
        assert stop.is_set(), "it began before the other song was finished"
        raise Cancelled

    song = noise(10_000)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(separator.separate, song, 44100, progress=first)
        assert started.wait(60)
        overlaps = Overlaps(monkeypatch)
        waiting = pool.submit(separator.separate, song, 44100, progress=second)
        stop.set()
        assert running.result()
        with pytest.raises(Cancelled):
            waiting.result()
    assert overlaps.most == 0


def test_a_task_of_asyncio_is_cancelled_with_its_thread(separator: Separator) -> None:
    """The recipe in docs/api.md."""
    ended: list[BaseException] = []
    steps = threading.Semaphore(0)

    async def separate(song: np.ndarray) -> dict[str, np.ndarray]:
        stop = threading.Event()

        def progress(done: float, total: float) -> None:
            steps.release()
            if done:
                assert stop.wait(60)
                raise Cancelled

        def work() -> dict[str, np.ndarray]:
            try:
                return separator.separate(song, 44100, progress=progress)
            except Cancelled as error:
                ended.append(error)
                raise

        try:
            return await asyncio.to_thread(work)
        finally:
            stop.set()

    async def main() -> None:
        task = asyncio.create_task(separate(noise(100_000)))
        for _ in range(2):
            await asyncio.to_thread(steps.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())  # waits for the thread
    assert len(ended) == 1
    assert vocals(separator, 0).shape == (20_000, 2)


FORKED = """
import os, sys
import numpy as np, torch
from kmdx import Separator

def separate(separator):
    return separator.separate(song, 44100)["vocals"]

torch.set_num_threads(int(sys.argv[2]))
song = np.random.default_rng(0).standard_normal((30_000, 2))
separator = Separator(sys.argv[1], device="cpu", stems=["vocals"])
expected = separate(separator)
for use in (lambda: separate(separator), lambda: Separator(sys.argv[1], device="cpu")):
    child = os.fork()
    if not child:
        try:
            use()
            print("worked", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
assert np.array_equal(separate(separator), expected), "the parent is not affected"
"""


@FORK
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_gets_an_error_that_names_spawn_if_torch_had_threads(
    small: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lines = printed("-c", FORKED, small, threads).splitlines()
    assert len(lines) == 2
    for line in lines:
        if threads == 1:
            assert line == "worked"
        else:
            assert re.match(r"DeviceError: process \d+ was forked from process \d+, .*'spawn'", line)


POOL = """
import concurrent.futures, multiprocessing, sys, threading
import numpy as np
from kmdx import DeviceError, Separator

song = np.random.default_rng(0).standard_normal((30_000, 2))

def separate(separator):
    return separator.separate(song, 44100)["vocals"]

if __name__ == "__main__":
    separator = Separator(sys.argv[1], device="cpu", stems=["vocals"])
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(separate, separator).result()
    assert np.array_equal(found, separate(separator))
    print("equal")
"""


def test_a_separator_works_in_a_spawned_process(small: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(POOL, "utf-8")
    assert printed(script, small) == "equal\n"


def in_blocks(song: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    """Blocks of these sizes, in turn, in memory that is used again for the next block."""
    begin, buffer = 0, np.empty((max(sizes), song.shape[1]), song.dtype)
    while begin < len(song):
        for size in sizes:
            part = buffer[: len(song[begin : begin + size])]
            part[:] = song[begin : begin + size]
            yield part
            begin += size


@pytest.mark.parametrize("limit", [1000, signals.LIMIT])  # in scratch files, and in memory
@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 1)])
def test_a_stream_of_blocks_gives_the_stems_of_the_whole_song(
    separator: Separator, rate: int, channels: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = noise(30_001, channels)
    expected = separator.separate(song, rate)
    monkeypatch.setattr(signals, "LIMIT", limit)
    parts = list(separator.stream(in_blocks(song, [999, 1, 0, 4000]), rate, block=7000))
    assert [len(part.stems["vocals"]) for part in parts] == [7000] * 4 + [2001]
    assert {part.rate for part in parts} == {rate}
    for stem, whole in expected.items():
        assert np.array_equal(np.concatenate([part.stems[stem] for part in parts]), whole)


@pytest.mark.parametrize("song", [noise(3000), noise(3000, 1)[:, 0], torch.from_numpy(noise(3000))], ids=type)
def test_a_stream_of_an_array_is_that_of_one_block(
    separator: Separator, song: np.ndarray | torch.Tensor
) -> None:
    (part,) = separator.stream(song, 44100)
    expected = separator.separate(np.asarray(song), 44100)
    assert all(np.array_equal(part.stems[stem], whole) for stem, whole in expected.items())


def test_a_stream_of_a_file_has_its_rate_and_only_the_stems_asked_for(
    separator: Separator, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "song.wav", noise(20_000), 32_000, subtype="FLOAT")
    expected, _ = separator.separate_file(tmp_path / "song.wav")
    for source in (tmp_path / "song.wav", io.BytesIO((tmp_path / "song.wav").read_bytes())):
        (part,) = separator.stream(source, stems=["bass"])
        assert part.rate == 32_000
        assert list(part.stems) == ["bass"]
        assert np.array_equal(part.stems["bass"], expected["bass"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda separator: separator.stream([noise(100)]), AudioError, "blocks need a rate in Hz"),
        (lambda separator: separator.stream("a.wav", 44100), AudioError, "a.wav: .* a file states its own rate"),
        (lambda separator: separator.stream([noise(9)], 44100, block=0), AudioError, "blocks of 0 samples"),
        (lambda separator: separator.stream([noise(9)], 44100, stems=["horn"]), PlanError, "unknown stem 'horn'"),
        (lambda separator: next(separator.stream([], 44100)), AudioError, "no samples"),
        (lambda separator: next(separator.stream([noise(9), noise(9, 1)], 44100)), AudioError, "blocks of 2 and 1"),
        (lambda separator: next(separator.stream([noise(9), [[np.nan] * 2]], 44100)), AudioError, "NaN"),
        (lambda separator: next(separator.stream([noise(9), "x"], 44100)), AudioError, "samples are"),
    ],
)  # fmt: skip
def test_wrong_streams_are_one_line_errors(
    separator: Separator, make: Callable[[Separator], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(separator)


def test_closing_a_stream_frees_its_scratch_files(
    separator: Separator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "LIMIT", 1000)
    gc.collect()
    before = len(signals._mapped)
    stream = separator.stream([noise(20_000)], 44100, block=1000)
    kept = next(stream).stems["vocals"]
    assert len(signals._mapped) > before
    stream.close()
    gc.collect()
    assert len(signals._mapped) == before
    assert kept.shape == (1000, 2), "a block is the caller's own"


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from kmdx import Separator, chunking, signals
from kmdx.networks.demucs import DemucsNetwork

def memory(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

signals.LIMIT, chunking.SPAN = 1_000_000, 200_000
DemucsNetwork.forward = lambda network, batch: batch[:, None].repeat(1, len(network.sources), 1, 1)  # takes no time
separator = Separator(sys.argv[1], device="cpu", stems=["vocals", "drums", "bass", "other"])
count = int(sys.argv[2])
random = np.random.default_rng(0)
list(separator.stream([0.1 * random.standard_normal((90_000, 2)) for _ in range(4)], 48_000))
before = memory("VmRSS")
song = (0.1 * random.standard_normal((48_000, 2)) for _ in range(count))
samples = sum(len(part.stems["vocals"]) for part in separator.stream(song, 48_000))
assert samples == 48_000 * count
print(5 * 8 * samples / 1e6, memory("VmHWM") - before)
"""


@PROC
def test_a_stream_takes_little_memory_however_long_the_song_is(small: Path) -> None:
    used = []
    for seconds in (60, 240):
        size, more = map(float, printed("-c", MEMORY, small, seconds).split())
        used.append(more)
    assert size > 450, "MB of the song and its stems"
    assert max(used) < 100


def test_a_deleted_separator_frees_its_networks_at_once(small: Path) -> None:
    separator = Separator(small, device="cpu", stems=["vocals"])
    vocals(separator, 0)
    networks = [
        weakref.ref(parameter) for each in separator.networks.values() for parameter in each.parameters()
    ]
    gc.collect()
    gc.disable()
    try:
        del separator
        assert not any(reference() is not None for reference in networks)
    finally:
        gc.enable()
