"""Resources in a container, a heap that keeps its blocks, memory peaks, and processor facts."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kmdx import Separator, benchmark, host
from kmdx.networks import kernels

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores and 256 GiB without control groups; the folder where they would be."""
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 256 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)
    return tmp_path / "groups"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        group, _, rest = name.partition("_")
        (folder / f"{group}.{rest}").write_text(text + "\n")


def test_without_control_groups_all_cores_and_memory_are_usable(groups: Path) -> None:
    assert (host.usable_cores(), host.memory()) == (64, 256 * GIB)


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", 64),
        ("9900000 100000", 64),
        ("", 64),
    ],
)
def test_a_cgroup_v2_quota_limits_the_cores(groups: Path, limit: str, cores: int) -> None:
    write(groups, cpu_max=limit)
    assert host.usable_cores() == cores
    assert benchmark.describe().cores == cores


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("250000", 3), ("-1", 64)])
def test_a_cgroup_v1_quota_limits_the_cores(groups: Path, quota: str, cores: int) -> None:
    write(groups / "cpu", cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")
    assert host.usable_cores() == cores


def test_limits_of_parent_control_groups_apply_too(groups: Path) -> None:
    host.OWN_GROUPS.write_text("4:cpu,cpuacct:/docker/12ab\n0::/outer/inner\n")
    write(groups / "outer" / "inner", cpu_max="max 100000", memory_max=str(8 * GIB))
    assert host.usable_cores() == 64
    write(groups / "outer", cpu_max="500000 100000", memory_max="max")
    assert (host.usable_cores(), host.memory()) == (5, 8 * GIB)
    write(groups / "cpu" / "docker" / "12ab", cpu_cfs_quota_us="300000", cpu_cfs_period_us="100000")
    assert host.usable_cores() == 3


@pytest.mark.parametrize(
    ("folder", "name", "limit", "expected"),
    [
        ("", "memory_max", str(4 * GIB), 4 * GIB),
        ("", "memory_max", "max", 256 * GIB),
        ("memory", "memory_limit_in_bytes", str(4 * GIB), 4 * GIB),
        ("memory", "memory_limit_in_bytes", "9223372036854771712", 256 * GIB),
    ],
)
def test_control_groups_limit_the_memory(
    groups: Path, folder: str, name: str, limit: str, expected: int
) -> None:
    write(groups / folder, **{name: limit})
    assert host.memory() == expected
    assert benchmark.describe().memory == expected


@pytest.mark.parametrize(
    ("quota", "threads", "variable", "expected"),
    [
        ("200000 100000", 64, None, [2]),
        ("200000 100000", 32, None, [2]),  # one for each physical core
        ("200000 100000", 6, None, []),  # torch.set_num_threads
        ("200000 100000", 1, None, []),
        ("200000 100000", 64, "OMP_NUM_THREADS", []),
        ("200000 100000", 64, "MKL_NUM_THREADS", []),
        ("max 100000", 64, None, []),
        ("6400000 100000", 64, None, []),
    ],
)
def test_threads_are_capped_by_the_quota_unless_the_user_set_them(
    groups: Path,
    quota: str,
    threads: int,
    variable: str | None,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(groups, cpu_max=quota)
    for name in host.THREADS:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "64")
    calls: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    host.cap_threads()
    assert calls == expected


def test_a_separator_caps_threads_on_the_cpu(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(host, "cap_threads", lambda: calls.append(None))
    Separator(small, device="cpu")
    assert len(calls) == 1


# The heap


class Libc:
    """Records the settings passed to malloc."""

    def __init__(self) -> None:
        self.options: dict[int, int] = {}
        self.trims: list[dict[int, int]] = []

    def gnu_get_libc_version(self) -> bytes:
        return b"2.36"

    def mallopt(self, option: int, value: int) -> int:
        self.options[option] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trims.append(dict(self.options))
        return 1


KEPT = {-1: 2**31 - 1, -3: 2**31 - 1}  # trim and mmap thresholds
DEFAULT = {
    host.M_MMAP_THRESHOLD: 32 * 2**20,
    host.M_TRIM_THRESHOLD: 64 * 2**20,
}  # what malloc adapts itself to


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_the_heap_keeps_its_blocks_only_temporarily(
    error: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)

    def work() -> None:
        with host.warm_heap():
            assert libc.options == KEPT
            assert not libc.trims
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)) as caught:
            work()
        assert caught.value is error
    assert libc.options == DEFAULT
    assert libc.trims == [DEFAULT], "given back once, when blocks are no longer kept"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_other_c_libraries_are_not_configured(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    musl = SimpleNamespace(malloc_trim=calls.append, mallopt=lambda *_: calls.append(_))
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "linux":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: musl)
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("there is none"))
    with host.warm_heap():
        pass
    assert not calls
    with pytest.raises(RuntimeError, match="passed on"), host.warm_heap():
        raise RuntimeError("passed on")


MALLOC = """
import ctypes
from kmdx import host

libc = host._glibc()
if libc is None or not libc.mallopt(host.M_MMAP_THRESHOLD, host.NO_THRESHOLD):
    raise SystemExit("no glibc, or one that takes no such threshold")
libc.mallopt(host.M_MMAP_THRESHOLD, 128 * 1024)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]

def is_mapping(size):
    block = libc.malloc(size)
    # A bit before the block shows whether the system was asked for fresh pages.
    before = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    libc.free(block)
    return bool(before & 2)

print(is_mapping(2**26))
with host.warm_heap():
    print(is_mapping(2**26))
print(is_mapping(2**26), is_mapping(2**24))
"""


def test_glibc_accepts_the_heap_settings() -> None:
    """Runs in its own process: after a memory error, malloc permanently avoids the heap."""
    run = subprocess.run([sys.executable, "-c", MALLOC], capture_output=True, text=True)
    if "no glibc" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.stdout.split() == ["True", "False", "True", "False"], run.stderr


# The peak of memory


def test_peak_memory_is_measured_since_the_last_reset() -> None:
    """The block is a separate mapping, because what malloc returns, and when, depends on earlier work."""
    if not host.reset_peak_memory():
        pytest.skip("this system does not let a process reset its peak")
    before = host.peak_memory()
    with mmap.mmap(-1, 2**28) as block:
        for _ in range(2**8):
            block.write(bytes(2**20))
        during = host.peak_memory()
    assert host.reset_peak_memory()
    after = host.peak_memory()
    assert before
    assert during
    assert after
    assert during - before > 0.9 * 2**28
    assert after < during - 2**27


def test_a_process_that_does_not_exist_has_no_peak() -> None:
    assert host.peak_memory(0) is None
    assert not host.reset_peak_memory(0)


# Facts about the processor

CPUINFO = """processor	: 0
vendor_id	: {}
cpu family	: {}
model name	: a name: with a colon
"""


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "described", "system", "expected"),
    [
        ("x86_64", ("AuthenticAMD", "25"), "", "linux", ("x86_64", "amd", 25)),
        ("x86_64", ("GenuineIntel", "6"), "", "linux", ("x86_64", "intel", 6)),
        ("x86_64", ("HygonGenuine", "24"), "", "linux", ("x86_64", "amd", 24)),
        ("x86_64", ("Shanghai", "7"), "", "linux", ("x86_64", None, 7)),
        ("aarch64", None, "", "linux", ("arm64", None, None)),
        (
            "AMD64",
            None,
            "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD",
            "win32",
            ("x86_64", "amd", 26),
        ),
        (
            "AMD64",
            None,
            "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel",
            "win32",
            ("x86_64", "intel", 6),
        ),
        ("AMD64", None, "", "win32", ("x86_64", None, None)),
        ("x86_64", None, "i386", "darwin", ("x86_64", "intel", None)),
        ("arm64", None, "arm", "darwin", ("arm64", None, None)),
        ("", None, "", "linux", ("", None, None)),
    ],
)
def test_the_processor_is_described_on_every_system(
    machine: str,
    cpuinfo: tuple[str, str] | None,
    described: str,
    system: str,
    expected: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(CPUINFO.format(*cpuinfo))
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "processor", lambda: described)
    monkeypatch.setattr(sys, "platform", system)
    found = host.processor()
    assert (found.architecture, found.vendor, found.family) == expected
    kernels.choose(found)


def test_the_first_field_with_a_name_is_used(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format("x", "1") + CPUINFO.format("y", "2"))
    assert host.field(tmp_path / "cpuinfo", "vendor_id") == "x"
    assert host.field(tmp_path / "cpuinfo", "model name") == "a name: with a colon"
    assert host.field(tmp_path / "cpuinfo", "cpu") is None
    assert host.field(tmp_path / "nothing", "vendor_id") is None
