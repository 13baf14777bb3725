"""Mutated sound files: each is read, or refused with an AudioError, within limits of memory and time.

A crash of a C library would end the process of the tests. So files are read in another process, which
reports what became of each; where it dies or hangs, the file that it was given is the one to look at.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz import sounds

MEMORY = 3 * 2**30  # bytes of addresses: libraries that are loaded, and 1 GB
SECONDS = 20  # 5 on a machine that is not busy


def reader(pipe: Any, errors: str) -> None:
    """Read the files whose names come through a pipe, and send back what went wrong: "" if nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with Path(errors).open("wb", buffering=0) as stream:
        os.dup2(stream.fileno(), 2)
    from kmdx import audio
    from kmdx.errors import AudioError, KmdxWarning

    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore", KmdxWarning)
    while path := pipe.recv():
        begin = time.process_time()
        try:
            audio.read(path, downmix=True)
            problem = ""
        except AudioError as error:
            problem = "" if "\n" not in str(error) else f"a message of several lines: {error}"
        except BaseException:
            problem = traceback.format_exc()
        if not problem and (spent := time.process_time() - begin) > 5:
            problem = f"it took {spent:.1f} s"
        pipe.send(problem)


class Reader:
    """The other process, started again after a crash or a hang."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors = folder / "stderr"
        self.process: Any = None

    def read(self, data: bytes) -> str:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=reader, args=(other, str(self.errors)), daemon=True)
            self.process.start()
            other.close()
            self.pipe.send(str(self.folder))  # the modules are imported before the time is taken
            self.pipe.poll(120)
            self.pipe.recv()
        path = self.folder / "sound"
        path.write_bytes(data)
        self.pipe.send(str(path))
        try:
            problem = self.pipe.recv() if self.pipe.poll(SECONDS) else f"no answer after {SECONDS} s"
        except EOFError:
            self.process.join()
            problem = f"the process ended with {self.process.exitcode}"
        if problem:
            self.close()
        elif self.errors.stat().st_size:
            problem = f"on stderr: {self.errors.read_text(errors='replace')[:1000]}"
            self.close()
        return problem

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@pytest.fixture(scope="module")
def other_process() -> Iterator[Reader]:
    with tempfile.TemporaryDirectory() as folder:
        process = Reader(Path(folder))
        yield process
        process.close()


NAMES = [*sounds.SNDFILE, *sounds.FFMPEG]


@pytest.mark.parametrize("names", [NAMES[number::3] for number in range(3)], ids="/".join)
def test_mutated_sound_files_are_read_or_refused(other_process, names):
    originals = {name: sounds.sound(name) for name in names}
    for name, content in originals.items():
        assert (name, other_process.read(content)) == (name, "")

    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(names))
        content = data.draw(sounds.mutations(originals[name]))
        assert other_process.read(content) == ""

    check()
