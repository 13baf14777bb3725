"""Weight files are read by content, and never run."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import json
import os
import pickle
import warnings
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from demucs.htdemucs import HTDemucs
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor

from kmdx import errors, weights
from kmdx.errors import WeightsError
from kmdx.networks.state import load_strictly

SHARED = Path(__file__).parents[2] / "shared" / "weights"
STATE = {"linear.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}
METADATA = {
    "klass": "demucs.htdemucs.HTDemucs",
    "args": '[["drums", "bass"]]',
    "kwargs": json.dumps({"segment": {"_type": "fraction", "numerator": 39, "denominator": 5}, "depth": 4}),
}


def package(**more: Any) -> dict[str, Any]:
    """A package as Meta publishes them."""
    return {
        "klass": HTDemucs,
        "args": (["drums", "bass"],),
        "kwargs": {"segment": Fraction(39, 5), "depth": 4},
        "state": {name: tensor.half() for name, tensor in STATE.items()},
        "training_args": {"weights": [0, 1, 0, 0], "dset": {"name": "musdb"}},
        **more,
    }


def onnx_graph() -> bytes:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")]
    constant = helper.make_tensor("constant", TensorProto.FLOAT, [1000], [0.0] * 1000)
    node = helper.make_node("Identity", ["input"], ["output"])
    graph = helper.make_graph([node], "graph", ports[:1], ports[1:], [constant])
    return helper.make_model(graph).SerializeToString()


class RunsCode:
    """Unpickled freely, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def same(state: dict[str, torch.Tensor] | None) -> bool:
    return state is not None and all(torch.equal(state[name].float(), STATE[name].float()) for name in STATE)


@pytest.mark.parametrize("name", ["a.ckpt", "a.th", "wrong.safetensors"])
def test_the_authors_checkpoints_may_hold_more_than_the_state(tmp_path: Path, name: str) -> None:
    torch.save({"state": STATE, "epoch": 3, "best": {"loss": 0.1}}, tmp_path / name)
    checkpoint = weights.load(tmp_path / name)
    assert same(checkpoint.state)
    assert (checkpoint.klass, checkpoint.kwargs, checkpoint.tuned_for) == (None, {}, None)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bare_state_dict(tmp_path: Path, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert same(weights.load(tmp_path / "a.pt").state)


def test_a_package_of_metas(tmp_path: Path) -> None:
    torch.save(package(), tmp_path / "a.th")
    checkpoint = weights.load(str(tmp_path / "a.th"))
    assert same(checkpoint.state)
    assert checkpoint.state["linear.weight"].dtype == torch.float16  # type: ignore[index]
    assert checkpoint.klass == "htdemucs"
    assert checkpoint.kwargs == {"sources": ["drums", "bass"], "segment": Fraction(39, 5), "depth": 4}
    assert checkpoint.tuned_for == "bass"


def test_the_hubs_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", METADATA)
    checkpoint = weights.load(tmp_path / "a.safetensors")
    assert same(checkpoint.state)
    assert checkpoint.klass == "htdemucs"
    assert checkpoint.kwargs == {"sources": ["drums", "bass"], "segment": Fraction(39, 5), "depth": 4}


def test_safetensors_without_metadata(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    checkpoint = weights.load(tmp_path / "a.safetensors")
    assert (checkpoint.klass, checkpoint.kwargs) == (None, {})


def test_an_onnx_graph_stays_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(onnx_graph())
    assert weights.load(tmp_path / "a.onnx").state is None


def refused(path: Path, reason: str) -> None:
    with pytest.raises(WeightsError, match=reason) as caught:
        weights.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "a.th", "missing")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.th").touch()
    refused(tmp_path / "a.th", "empty")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".th", ".safetensors", ".onnx"])
def test_a_file_that_was_cut_off(tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".th":
        torch.save(package(), path)
    elif suffix == ".safetensors":
        save_file(STATE, path, METADATA)
    else:
        path.write_bytes(onnx_graph())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    refused(path, "damaged")


def test_a_legacy_pickle_that_was_cut_off(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.th", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.th").read_bytes()
    (tmp_path / "a.th").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "a.th", "damaged")


def test_a_file_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("<html>quota exceeded</html>")
    refused(tmp_path / "a.ckpt", "is a web page, not a weight file")
    (tmp_path / "a.ckpt").write_text("quota exceeded")
    refused(tmp_path / "a.ckpt", "not a weight file: expected a .ckpt")
    (tmp_path / "a.onnx").write_text("<html>quota exceeded</html>")
    refused(tmp_path / "a.onnx", "damaged")
    refused(tmp_path, "no file")


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"state": {"a": "text"}}, {"loss": 0.1}])
def test_a_pickle_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "expected a dict of tensors|holds no state dict")


def test_what_trainers_put_next_to_the_weights_is_passed_over(tmp_path: Path) -> None:
    scores = collections.defaultdict(list, best=[1.0])
    more = {"args": argparse.Namespace(lr=1), "path": tmp_path, "when": datetime.datetime(2026, 1, 1)}
    content = {"state_dict": STATE, "scores": scores, "recent": collections.deque([1, 2]), **more}
    torch.save(content, tmp_path / "a.pt")
    assert weights.load(tmp_path / "a.pt").state.keys() == STATE.keys()


def test_a_web_page_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("\n<!DOCTYPE html><html>Sign in</html>")
    refused(tmp_path / "a.pt", "is a web page, not a weight file")


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


def test_metadata_that_names_another_class_is_refused_and_nothing_imported(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", {**METADATA, "klass": "antigravity.Geohash"})
    refused(tmp_path / "a.safetensors", r"asks for the class antigravity\.Geohash")
    import sys

    assert "antigravity" not in sys.modules


def test_a_quantized_state_is_refused(tmp_path: Path) -> None:
    torch.save({"state": {"__quantized": True, "quantized": []}}, tmp_path / "a.th")
    refused(tmp_path / "a.th", "quantized")
    save_file(STATE, tmp_path / "a.safetensors", {**METADATA, "structure": "{}"})
    refused(tmp_path / "a.safetensors", "quantized")


def test_an_onnx_file_is_not_followed_elsewhere(tmp_path: Path) -> None:
    """External data of a graph is not read: its location is the file's word."""
    model = onnx.load_model_from_string(onnx_graph())
    constant = model.graph.initializer[0]
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="/nowhere/at/all")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "a.onnx", "its tensor constant is in another file")


class Rebuilt:
    """Pickled, it is the call of one of torch's functions that rebuild tensors."""

    def __init__(self, function: str, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        storage, *rest = self.arguments or (None,)
        if isinstance(storage, torch.UntypedStorage):
            storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return getattr(torch._utils, self.function), (storage, *rest) if self.arguments else ()


COPY = {name: tensor * 1.01 for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": STATE, "epoch": 5, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]},
        {"model": STATE, "ema": COPY, "best": torch.tensor(0.5)},
        {"ema": COPY, "model_state_dict": STATE, "model": {"name": "unet", "channels": 48}},
        {"state_dict_ema": COPY, "state": {"model": STATE}},
        {"epoch": 3, "score": np.float64(9.5), "model": dict(STATE)},
    ],
    ids=lambda content: "-".join(content),
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_state_dict_is_found_among_what_trainers_save(tmp_path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    state = weights.load(tmp_path / "a.pt").state
    assert state is not None
    assert torch.equal(state["linear.weight"], STATE["linear.weight"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"net": STATE}, "its tensors under net: expected them at the top, or under state, state_dict"),
        ({"checkpoint": {"generator": STATE, "epoch": 1}}, "its tensors under checkpoint.generator"),
        ({"ema": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, "under ema and optimizer"),
        ({"model": STATE, "state_dict": COPY}, "state dicts under state_dict and model"),
        ({**STATE, "epoch": 3}, "epoch is of the type int"),
    ],
)
def test_what_the_state_dict_is_under_is_named(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", reason)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".th", ".safetensors", ".onnx"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, suffix: str, end: str) -> None:
    lines = ("version https://git-lfs.github.com/spec/v1", "oid sha256:" + 64 * "0", "size 83000000", "")
    (tmp_path / f"a{suffix}").write_bytes(end.join(lines).encode())
    refused(tmp_path / f"a{suffix}", "is a Git LFS pointer, .* run `git lfs pull`")


@pytest.mark.parametrize("suffix", [".pt", ".legacy.pt", ".safetensors"])
@pytest.mark.parametrize(
    "value", [torch.tensor(float("nan")), torch.tensor(-float("inf")).half(), torch.tensor(1e39).double()]
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, suffix: str, value: Tensor) -> None:
    state = {**STATE, "b.weight": torch.cat([torch.ones(20, dtype=value.dtype), value[None]])}
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    refused(path, r"its tensor b\.weight holds NaN or infinity")


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
def test_tensors_that_cannot_be_are_refused(tmp_path: Path, call: Any, reason: str) -> None:
    torch.save({**STATE, "odd": call}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", f"its tensor odd .*{reason}")


def test_tensors_that_share_memory_cannot_add_up_to_more_than_the_file(tmp_path: Path) -> None:
    block = torch.ones(10_000)
    torch.save({f"part {number}": block[number:] for number in range(100)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"its tensors declare 3,9\d\d,\d+ bytes, and the file has")


@pytest.mark.parametrize("tensor", [torch.arange(6.0).reshape(2, 3).T, torch.arange(9.0)[3:], torch.ones(()), torch.ones(0, 3),
                                    torch.nn.Parameter(torch.ones(2)), torch.ones(2).bfloat16(), torch.arange(4)])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_are_those_that_torch_reads(tmp_path: Path, tensor: Tensor, zipped: bool) -> None:
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
def test_a_pickle_that_would_take_all_memory_or_time_does_not(tmp_path: Path, program: bytes) -> None:
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


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"args": "[1, 2, 3]", "kwargs": "[1, 2]"}, "not a list and a dict"),
        ({"args": "5"}, "not a list and a dict"),
        ({"args": "null"}, "not a list and a dict"),
        ({"args": json.dumps(list(range(100)))}, "not those of HTDemucs"),
        ({"kwargs": "[" * 100_000}, "nested too deeply"),
        ({"kwargs": "{"}, "no JSON"),
        ({"kwargs": '{"segment": {"_type": "fraction", "numerator": 1, "denominator": 0}}'}, "a fraction without"),
        ({"kwargs": '{"segment": {"_type": "fraction", "numerator": "1", "denominator": 2}}'}, "a fraction without"),
        ({"kwargs": '{"a": 1' + " " * 2**20 + "}"}, "more than"),
    ],
)  # fmt: skip
def test_arguments_that_are_none_are_refused(tmp_path: Path, metadata: dict[str, str], reason: str) -> None:
    save_file(STATE, tmp_path / "a.safetensors", {"klass": METADATA["klass"], **metadata})
    refused(tmp_path / "a.safetensors", reason)


@pytest.mark.parametrize("fraction", [("1/0",), ("1e99999999",), (1, 0), (1.5,), ()])
def test_a_fraction_of_a_pickle_that_is_none_is_refused(tmp_path: Path, fraction: Any) -> None:
    torch.save(package(kwargs={"segment": FractionOf(fraction)}), tmp_path / "a.th")
    refused(tmp_path / "a.th", r"a fractions\.Fraction without a value")


class FractionOf(Fraction):
    """Pickled, it is a ``Fraction`` of anything."""

    def __new__(cls, _: Any) -> Any:
        return super().__new__(cls, 1, 2)

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return Fraction, self.arguments


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes((10**12).to_bytes(8, "little") + content[8:])
    refused(tmp_path / "a.safetensors", "a header of 1,000,000,000,000 bytes")


def test_the_real_htdemucs_has_the_registrys_tensors() -> None:
    path = SHARED / "955717e8.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    checkpoint = weights.load(path)
    assert checkpoint.state is not None
    assert weights.state_sha256(checkpoint.state) == weights.get("htdemucs").state_sha256
    assert checkpoint.klass == "htdemucs"
    assert checkpoint.kwargs["segment"] == Fraction(39, 5)
    npm = next(source for source in weights.get("htdemucs").sources if source.kind == "npm")
    stated = {**npm.kwargs, "segment": Fraction(39, 5)}  # type: ignore[attr-defined]
    assert checkpoint.kwargs == stated


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_network_stays_as_it_is_when_its_file_is_written_anew(tmp_path: Path, kind: str) -> None:
    network, path = torch.nn.Linear(200, 300), tmp_path / "a.pt"
    if kind == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    loaded = torch.nn.Linear(200, 300)
    state = weights.load(path).state
    assert state is not None
    load_strictly(loaded, state)
    with path.open("r+b") as file:
        file.write(b"\x55" * path.stat().st_size)
    assert torch.equal(loaded.weight, network.weight)
    assert torch.equal(loaded.bias, network.bias)


def test_an_error_without_a_message_is_called_by_its_class() -> None:
    assert errors.first_line(RuntimeError(" \n")) == "RuntimeError"
    assert errors.first_line(RuntimeError("\n one\ntwo")) == "one"
    assert errors.reason(ValueError("Two\nlines.")) == "two"
