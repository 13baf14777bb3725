"""Torch's files are read as data, within bounds, and their code never runs."""

from __future__ import annotations

import functools
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weight_cases import STATE, refused, same

from kmdx import weights


class RunsCode:
    """Unpickling it without restrictions creates a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "it ran"
    torch.save(
        {"state": STATE, "more": RunsCode(marker)}, tmp_path / "a.th", _use_new_zipfile_serialization=zipped
    )
    refused(tmp_path / "a.th", r"could run code \(it refers to \w+\.mkdir\)")
    assert not marker.exists()
    torch.load(tmp_path / "a.th", weights_only=False)
    assert marker.exists()  # it would have


def test_a_plain_pickle_that_would_run_code_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(RunsCode(marker), protocol=2))
    refused(tmp_path / "a.ckpt", "refused|damaged")
    assert not marker.exists()


def test_a_truncated_legacy_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.th", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.th").read_bytes()
    (tmp_path / "a.th").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "a.th", "damaged")


class Rebuilt:
    """Pickled, it is the call of one of torch's functions that rebuild tensors."""

    def __init__(self, function: str, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        storage, *rest = self.arguments or (None,)
        if isinstance(storage, torch.UntypedStorage):
            storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return getattr(torch._utils, self.function), (storage, *rest) if self.arguments else ()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(2, 2).to_sparse(), "is sparse"),
        (torch.ones(2, device="meta"), "is on torch's meta device"),
        (torch.ones(2).to(torch.complex64), "is of the type complex64"),
        (torch.ones(2).to(torch.float8_e5m2), "is of the type float8_e5m2"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is quantized"),
        (torch.ones(1).expand(10**12), "declares 1,000,000,000,000 values, but the file has 1 for it"),
        (torch.ones(8).as_strided((4, 4), (1, 1)), "declares 16 values, but the file has 8 for it"),
    ],
)  # fmt: skip
def test_tensors_that_no_network_has_are_refused(tmp_path: Path, tensor: Tensor, reason: str) -> None:
    torch.save({**STATE, "odd": tensor}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", f"its tensor odd {reason}")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Rebuilt("_rebuild_tensor_v2", torch.ones(2).untyped_storage(), 0, (0, 2**47, 2**47), (1, 1, 1)), "a shape that is damaged"),
        (Rebuilt("_rebuild_tensor_v2", torch.ones(2).untyped_storage(), -1, (2,), (1,)), "a shape that is damaged"),
        (Rebuilt("_rebuild_tensor_v2", torch.ones(2).untyped_storage(), 0, (2,), (1.0,)), "a shape that is damaged"),
        (Rebuilt("_rebuild_tensor_v2", torch.ones(2).untyped_storage(), 0, [2], (1,)), "a shape that is damaged"),
        (Rebuilt("_rebuild_tensor_v2", torch.ones(2).untyped_storage(), 1, (2,), (1,)), "declares 2 values"),
        (Rebuilt("_rebuild_tensor_v2"), "not a plain tensor"),
        (functools.reduce(lambda inner, _: Rebuilt("_rebuild_parameter", inner, False, {}), range(300), torch.ones(2)), "not a plain tensor"),
    ],
    ids=["overflow", "before", "fraction", "list", "beyond", "nothing", "nested"],
)  # fmt: skip
def test_impossible_tensors_are_refused(tmp_path: Path, call: Any, reason: str) -> None:
    torch.save({**STATE, "odd": call}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", f"its tensor odd .*{reason}")


def test_tensors_that_share_memory_cannot_add_up_to_more_than_the_file(tmp_path: Path) -> None:
    block = torch.ones(10_000)
    torch.save({f"part {number}": block[number:] for number in range(100)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"its tensors declare 3,9\d\d,\d+ bytes, but the file has")


@pytest.mark.parametrize("tensor", [torch.arange(6.0).reshape(2, 3).T, torch.arange(9.0)[3:], torch.ones(()), torch.ones(0, 3),
                                    torch.nn.Parameter(torch.ones(2)), torch.ones(2).bfloat16(), torch.arange(4)])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_equal_those_that_torch_reads(tmp_path: Path, tensor: Tensor, zipped: bool) -> None:
    torch.save(
        {"a": torch.ones(1).char(), "b": tensor}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    state, expected = weights.load(tmp_path / "a.pt").state, torch.load(tmp_path / "a.pt")
    assert state is not None
    assert state["b"].dtype == expected["b"].dtype
    assert torch.equal(state["b"], expected["b"])
    assert state["b"].stride() == expected["b"].stride()


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, **more: bytes) -> None:
    """Write a zip archive again, with more entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in (*entries.items(), *more.items()):
            archive.writestr(name, content)


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(100_000)}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)
    refused(path, "its entries are compressed")
    torch.save(STATE, path)
    rezipped(path)
    assert same(weights.load(path).state)
    rezipped(path, **{"a/data/0": b"another"})
    refused(path, "two entries with the name a/data/0")
    torch.save(STATE, path)
    rezipped(path, **{"a/constants.pkl": b""})
    refused(path, "TorchScript program")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "none")
    refused(path, "not one of torch's")


def test_an_archive_whose_entries_overlap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    content = path.read_bytes()
    directory = content.rindex(b"PK\x01\x02")  # of the last entry, which takes the place of the one before it
    path.write_bytes(content[: directory + 42] + bytes(4) + content[directory + 46 :])
    refused(path, "is damaged")


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",  # 64 GiB
        b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
        b"}" + b"K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",  # a key whose hash takes 2**60 steps
        b"(" * 20_000 + b"t" * 20_000 + b".",
        b"]" + b"r\xff\xff\xff\xff" + b".",  # a memo of 2**32 places
        b"cfractions\nFraction\nX\x0c\x00\x00\x001e1000000000\x85R.",
        b"}" * 500_001,
    ],
    ids=["bytearray", "tensor", "key", "nested", "memo", "fraction", "long"],
)
def test_a_pickle_that_would_need_too_much_memory_or_time_is_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + program)
    refused(path, "damaged|holds an object")


def test_a_legacy_file_that_declares_more_than_it_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(50)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K2") == 2  # elements of the storage, and of the tensor
    huge = b"\x8a\x06\x00\x00\x00\x00\x00\x10"
    path.write_bytes(content.replace(b"K2", huge, 1))
    refused(path, "its storage .* is cut off")
    path.write_bytes(content.replace(b"K2\x85", huge + b"\x85"))
    refused(path, "its tensor a declares 17,592,186,044,416 values, but the file has 50")
