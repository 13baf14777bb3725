"""kmdx.signals: signals, and arrays in files that take no memory while they are not used."""

from __future__ import annotations

import errno
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import is_scratch

from kmdx import signals
from kmdx.errors import AudioError
from kmdx.signals import Signal

MIB = 2**20
LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system has no /proc")


def filled(*shape: int) -> np.ndarray:
    """A scratch array of random samples."""
    array = signals.empty(shape, limit=0)
    array[:] = np.random.default_rng(0).standard_normal(shape, np.float32)
    return array


def resident(array: np.ndarray) -> float:
    """MiB of an array's mapping that are in this process's memory."""
    address = array.__array_interface__["data"][0]
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, dash, last = line.split(" ")[0].partition("-")
        if dash:
            inside = int(first, 16) <= address < int(last, 16)
        elif inside and first == "Rss:":
            return int(line.split()[1]) / 1024
    raise AssertionError("not mapped")


def mapped() -> int:
    return len(signals._mapped)


# Where an array is


def test_only_large_arrays_are_files(monkeypatch):
    assert not is_scratch(signals.empty((25, 10), limit=1000))
    assert is_scratch(signals.empty((25, 11), limit=1000))
    assert not is_scratch(signals.empty((25, 11)))
    monkeypatch.setattr(signals, "LIMIT", 1000)
    assert is_scratch(signals.empty((25, 11)))
    assert is_scratch(signals.join([np.zeros(250, np.float32), np.zeros(1, np.float32)]))


@pytest.mark.parametrize("limit", [0, MIB])
def test_an_array_has_the_given_shape_and_keeps_written_values(limit):
    array = signals.empty((3, 5, 2), limit=limit)
    assert array.shape == (3, 5, 2)
    assert array.dtype == np.float32
    array[:] = np.arange(30).reshape(3, 5, 2)
    signals.release(array)
    np.testing.assert_array_equal(array.ravel(), np.arange(30))


def test_empty_arrays_are_supported():
    assert signals.empty((0, 2), limit=0).shape == (0, 2)
    signals.release(np.empty((0, 2), np.float32))


def test_scratch_files_are_unnamed_and_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = []
    open_one = tempfile.TemporaryFile
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda: (folders.append(tempfile.gettempdir()), open_one())[1]
    )
    array = filled(1000)
    joined = signals.join([array, array], limit=0)
    assert folders == [str(tmp_path)] * 2
    assert list(tmp_path.iterdir()) == []
    assert array.any()
    assert joined.any()


def test_a_scratch_file_exists_until_its_last_view_is_gone():
    before = mapped()
    array = filled(1000, 2)
    view = array[10:].T
    expected = view.copy()
    del array
    assert mapped() == before + 1
    np.testing.assert_array_equal(view, expected)
    del view
    assert mapped() == before


# Releasing


@LINUX
def test_released_memory_is_no_longer_resident():
    array = filled(2, 2 * MIB)  # 8 MiB a row
    values = array.copy()
    assert resident(array) == 16
    signals.release(array)
    assert resident(array) == 0
    np.testing.assert_array_equal(array, values)
    assert resident(array) == 16


@LINUX
@pytest.mark.parametrize(
    ("view", "stays"),
    [
        (lambda array: array.T, 0),
        (lambda array: array[1], 8),
        (lambda array: array[1, ::-1], 8),
        (lambda array: array[:, : MIB // 2], 12),  # 2 MiB of each row
        (lambda array: array[:, : MIB // 2].T, 12),
        (lambda array: array[:, : MIB // 2, None], 12),
        (lambda array: array.reshape(-1, 2)[:MIB], 8),
        (lambda array: array.reshape(-1, 2)[:MIB, 1], 8),
        (lambda array: array[:1, : MIB // 4 + 1], 14),  # to the next whole MiB
        (lambda array: array.view(np.int16)[0], 8),
    ],
)
def test_a_view_releases_its_own_part(view, stays):
    array = filled(2, 2 * MIB)
    signals.release(view(array))
    assert resident(array) == stays


@LINUX
def test_a_scratch_array_can_be_released_through_torch():
    array = filled(2, 2 * MIB)
    tensor = torch.from_numpy(array)
    signals.release(tensor[1].numpy())
    assert resident(array) == 8
    before = mapped()
    del array
    assert mapped() == before, "the tensor needs it"
    signals.release(tensor.numpy())
    assert resident(tensor.numpy()) == 0
    assert tensor.any()


def test_ordinary_arrays_are_not_released():
    keep = filled(1000)
    ordinary = np.arange(100_000, dtype=np.float32)
    signals.release(ordinary)
    signals.release(ordinary[::2])
    assert not is_scratch(ordinary)
    np.testing.assert_array_equal(ordinary, np.arange(100_000))
    assert keep.any()


def test_blocks_cover_the_array_in_order():
    array = filled(1001, 2)
    parts = list(signals.blocks(array, 100))
    assert [len(part) for part in parts] == [100] * 10 + [1]
    np.testing.assert_array_equal(np.concatenate(parts), array)
    assert list(signals.blocks(array[:0])) == []


@LINUX
def test_iterating_over_blocks_needs_the_memory_of_one_block():
    array = filled(8 * MIB)  # 32 MiB
    signals.release(array)
    assert max(resident(array) for block in signals.blocks(array, 2**18) if block.any()) <= 2
    assert resident(array) <= 1


# Joining


@pytest.mark.parametrize("limit", [0, 1999, 2000, MIB])
@pytest.mark.parametrize("lengths", [[250], [100, 100, 50], [1] * 250, [0, 250, 0]])
def test_joined_blocks_equal_the_array(limit, lengths):
    whole = np.random.default_rng(0).standard_normal((250, 2)).astype(np.float32)
    ends = np.cumsum(lengths)
    joined = signals.join(
        (whole[end - length : end] for length, end in zip(lengths, ends, strict=True)), limit
    )
    np.testing.assert_array_equal(joined, whole)
    assert is_scratch(joined) == (limit < 2000)
    joined[:] = 0  # it may be written to


def test_arrays_expected_to_be_long_are_scratch_files():
    assert is_scratch(signals.join([np.zeros(10, np.float32)], 1000, expected=1001))
    assert not is_scratch(signals.join([np.zeros(10, np.float32)], 1000, expected=1000))


def test_joining_no_blocks_gives_no_samples():
    assert signals.join([]).shape == (0,)


def test_blocks_of_any_layout_are_joined():
    block = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32)
    np.testing.assert_array_equal(signals.join([block.T[::2]], limit=0), block.T[::2])


def test_an_error_in_the_iterator_of_blocks_is_raised_unchanged():
    def broken() -> Iterator[np.ndarray]:
        yield np.zeros(1000, np.float32)
        raise OSError(errno.EIO, "the disc has a scratch")

    with pytest.raises(OSError, match="the disc has a scratch"):
        signals.join(broken(), limit=0)


# No room


def refusal(action, *arguments) -> str:
    gc.collect()  # what earlier tests left behind
    before = mapped()
    with pytest.raises(AudioError) as caught:
        action(*arguments)
    assert mapped() == before
    message = str(caught.value)
    assert "\n" not in message
    assert "set TMPDIR to another folder" in message
    return message


def test_an_array_larger_than_the_disk_is_refused_immediately(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    message = refusal(signals.empty, (2**50,))
    assert f" GB are free in {tmp_path}; at least {2**52 / 1e9:.2f} GB of scratch space" in message


def test_a_full_disk_is_reported_with_the_systems_message(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    message = refusal(signals.empty, (5_000_000,), 0)
    assert message.startswith(f"no space left on device in {tmp_path}; at least 0.02 GB")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("reserves", [True, False])
def test_a_file_size_limit_is_reported(monkeypatch, reserves):
    import resource

    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert "file too large in" in refusal(signals.empty, (50_000,), 0)
        assert "file too large in" in refusal(signals.join, [np.zeros(50_000, np.float32)] * 3, 0)
        array = signals.empty((25_000,), limit=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    array[:] = 1
    assert array.all()


def test_a_missing_temporary_folder_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    assert f"no such file or directory in {tmp_path / 'nothing'}" in refusal(signals.empty, (1000,), 0)
    assert f"no such file or directory in {tmp_path / 'nothing'}" in refusal(
        signals.join, [np.zeros(1000, np.float32)], 0
    )


def test_zeros_are_written_if_the_system_cannot_reserve_space(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    array = signals.empty((100_000, 2), limit=0)
    assert not array.any()
    array[:] = 1
    assert array.all()


# Signals

CPU = torch.device("cpu")


def ramp(samples: int) -> Signal:
    return Signal(torch.arange(2.0 * samples).reshape(2, samples))


def test_samples_become_a_stereo_signal_and_samples_again():
    stereo = np.arange(10, dtype=np.float32).reshape(5, 2)
    signal = Signal.from_samples(stereo)
    assert signal.length == 5
    np.testing.assert_array_equal(signal.tensor, stereo.T)
    np.testing.assert_array_equal(signal.to_samples(2), stereo)
    np.testing.assert_array_equal(signal.to_samples(1), stereo.mean(1, keepdims=True))
    np.testing.assert_array_equal(Signal.from_samples(stereo[:, :1]).tensor, np.stack([stereo[:, 0]] * 2))


@pytest.mark.parametrize(("limit", "is_long"), [(None, False), (80, False), (79, True), (0, True)])
def test_a_signal_beyond_the_limit_is_long_and_so_are_signals_made_from_it(limit, is_long):
    signal = ramp(10).to(CPU, limit)
    assert signal.long == signal.new_empty().long == signal.new_zeros().long == is_long
    assert signals.combine(torch.Tensor.copy_, [signal]).long == is_long


def test_long_signals_are_in_files_where_they_are_large_for_the_host(monkeypatch):
    signal = ramp(10).to(CPU, 0)
    assert not is_scratch(signal.new_empty().tensor.numpy())
    monkeypatch.setattr(signals, "LIMIT", 79)
    assert is_scratch(signal.new_empty().tensor.numpy())
    assert signal.new_zeros().is_silent()


def test_a_span_has_zeros_beyond_the_signal():
    assert ramp(3).span(-2, 5, CPU).tolist() == [[0, 0, 0, 1, 2, 0, 0], [0, 0, 3, 4, 5, 0, 0]]
    assert ramp(3).span(1, 2, CPU).tolist() == [[1], [4]]


@pytest.mark.parametrize("limit", [0, None])
def test_a_signal_is_combined_from_others_in_blocks(limit, monkeypatch):
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", 7)
    monkeypatch.setattr(signals, "CACHED_BLOCK", 3)
    first, second = ramp(20).to(CPU, limit), Signal(ramp(20).tensor.flip(1)).to(CPU, limit)
    lengths = []

    def add(target, *parts):
        lengths.append(target.shape[-1])
        torch.add(*parts, out=target)

    made = signals.combine(add, [first, second])
    assert torch.equal(made.tensor, first.tensor + second.tensor)
    assert lengths == ([7, 7, 6] if limit == 0 else [3] * 6 + [2])


def test_signals_report_their_peak_silence_and_finiteness():
    signal = ramp(5)
    assert signal.is_finite()
    assert not signal.is_silent()
    assert signal.peak() == 9
    signal.put(3, torch.tensor([[-50.0], [torch.inf]]))
    assert not signal.is_finite()
    assert signal.tensor[:, 3].tolist() == [-50, torch.inf]
