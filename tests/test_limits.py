"""What a container leaves of a machine's cores and memory, by the files of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kmdx import Separator, limits
from kmdx.benchmark import machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores and 256 GiB without control groups; the folder where they would be."""
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "own")
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


def test_without_control_groups_all_may_be_used(groups: Path) -> None:
    assert (limits.usable_cores(), limits.memory()) == (64, 256 * GIB)


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
def test_a_quota_of_version_2(groups: Path, limit: str, cores: int) -> None:
    write(groups, cpu_max=limit)
    assert limits.usable_cores() == cores
    assert machine.describe().cores == cores


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("250000", 3), ("-1", 64)])
def test_a_quota_of_version_1(groups: Path, quota: str, cores: int) -> None:
    write(groups / "cpu", cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")
    assert limits.usable_cores() == cores


def test_the_groups_around_a_process_bind_it_too(groups: Path) -> None:
    limits.OWN_GROUPS.write_text("4:cpu,cpuacct:/docker/12ab\n0::/outer/inner\n")
    write(groups / "outer" / "inner", cpu_max="max 100000", memory_max=str(8 * GIB))
    assert limits.usable_cores() == 64
    write(groups / "outer", cpu_max="500000 100000", memory_max="max")
    assert (limits.usable_cores(), limits.memory()) == (5, 8 * GIB)
    write(groups / "cpu" / "docker" / "12ab", cpu_cfs_quota_us="300000", cpu_cfs_period_us="100000")
    assert limits.usable_cores() == 3


@pytest.mark.parametrize(
    ("folder", "name", "limit", "expected"),
    [
        ("", "memory_max", str(4 * GIB), 4 * GIB),
        ("", "memory_max", "max", 256 * GIB),
        ("memory", "memory_limit_in_bytes", str(4 * GIB), 4 * GIB),
        ("memory", "memory_limit_in_bytes", "9223372036854771712", 256 * GIB),
    ],
)
def test_memory(groups: Path, folder: str, name: str, limit: str, expected: int) -> None:
    write(groups / folder, **{name: limit})
    assert limits.memory() == expected
    assert machine.describe().memory == expected


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
def test_threads_are_capped_by_the_quota_where_nobody_set_them(
    groups: Path,
    quota: str,
    threads: int,
    variable: str | None,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(groups, cpu_max=quota)
    for name in limits.THREADS:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "64")
    calls: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    limits.cap_threads()
    assert calls == expected


def test_a_separator_caps_threads_on_the_cpu(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(limits, "cap_threads", lambda: calls.append(None))
    Separator(small, device="cpu")
    assert len(calls) == 1
