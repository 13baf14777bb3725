"""Weight files are recognized by content, and their code never runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor
from weight_cases import METADATA, STATE, package, refused, same

from kmdx import errors, weights
from kmdx.networks.state import load_strictly

SHARED = Path(__file__).parents[2] / "shared" / "weights"


def onnx_graph() -> bytes:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")]
    constant = helper.make_tensor("constant", TensorProto.FLOAT, [1000], [0.0] * 1000)
    node = helper.make_node("Identity", ["input"], ["output"])
    graph = helper.make_graph([node], "graph", ports[:1], ports[1:], [constant])
    return helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize("name", ["a.ckpt", "a.th", "wrong.safetensors"])
def test_the_authors_checkpoints_may_contain_more_than_the_state(tmp_path: Path, name: str) -> None:
    torch.save({"state": STATE, "epoch": 3, "best": {"loss": 0.1}}, tmp_path / name)
    checkpoint = weights.load(tmp_path / name)
    assert same(checkpoint.state)
    assert (checkpoint.klass, checkpoint.kwargs, checkpoint.tuned_for) == (None, {}, None)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bare_state_dict_is_read(tmp_path: Path, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert same(weights.load(tmp_path / "a.pt").state)


def test_a_package_from_meta_is_read(tmp_path: Path) -> None:
    torch.save(package(), tmp_path / "a.th")
    checkpoint = weights.load(str(tmp_path / "a.th"))
    assert same(checkpoint.state)
    assert checkpoint.state["linear.weight"].dtype == torch.float16  # type: ignore[index]
    assert checkpoint.klass == "htdemucs"
    assert checkpoint.kwargs == {"sources": ["drums", "bass"], "segment": Fraction(39, 5), "depth": 4}
    assert checkpoint.tuned_for == "bass"


def test_safetensors_from_the_hub_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", METADATA)
    checkpoint = weights.load(tmp_path / "a.safetensors")
    assert same(checkpoint.state)
    assert checkpoint.klass == "htdemucs"
    assert checkpoint.kwargs == {"sources": ["drums", "bass"], "segment": Fraction(39, 5), "depth": 4}


def test_safetensors_without_metadata_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    checkpoint = weights.load(tmp_path / "a.safetensors")
    assert (checkpoint.klass, checkpoint.kwargs) == (None, {})


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_network_of_53_stems_is_read_despite_its_many_tensors(tmp_path: Path, name: str) -> None:
    state = {f"mask.{index}": torch.ones(1) for index in range(13_600)}
    (torch.save if name == "a.ckpt" else save_file)(state, tmp_path / name)
    read = weights.load(tmp_path / name).state
    assert read is not None
    assert len(read) == 13_600


def test_an_onnx_graph_stays_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(onnx_graph())
    assert weights.load(tmp_path / "a.onnx").state is None


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    refused(tmp_path / "a.th", "missing")


def test_an_empty_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.th").touch()
    refused(tmp_path / "a.th", "empty")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".th", ".safetensors", ".onnx"])
def test_a_truncated_file_is_reported(tmp_path: Path, suffix: str, part: float) -> None:
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


def test_a_file_of_another_type_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("<html>quota exceeded</html>")
    refused(tmp_path / "a.ckpt", "is a web page, not a weight file")
    (tmp_path / "a.ckpt").write_text("quota exceeded")
    refused(tmp_path / "a.ckpt", "not a weight file: expected a .ckpt")
    (tmp_path / "a.onnx").write_text("<html>quota exceeded</html>")
    refused(tmp_path / "a.onnx", "damaged")
    refused(tmp_path, "is not a file")


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"state": {"a": "text"}}, {"loss": 0.1}])
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "expected a dict of tensors|holds no state dict")


def test_other_content_next_to_the_weights_is_ignored(tmp_path: Path) -> None:
    scores = collections.defaultdict(list, best=[1.0])
    more = {"args": argparse.Namespace(lr=1), "path": tmp_path, "when": datetime.datetime(2026, 1, 1)}
    content = {"state_dict": STATE, "scores": scores, "recent": collections.deque([1, 2]), **more}
    torch.save(content, tmp_path / "a.pt")
    assert weights.load(tmp_path / "a.pt").state.keys() == STATE.keys()


def test_a_web_page_is_reported_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("\n<!DOCTYPE html><html>Sign in</html>")
    refused(tmp_path / "a.pt", "is a web page, not a weight file")


def test_metadata_that_names_another_class_is_refused_and_nothing_imported(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", {**METADATA, "klass": "antigravity.Geohash"})
    refused(tmp_path / "a.safetensors", r"asks for the class antigravity\.Geohash")

    assert "antigravity" not in sys.modules


def test_a_quantized_state_is_refused(tmp_path: Path) -> None:
    torch.save({"state": {"__quantized": True, "quantized": []}}, tmp_path / "a.th")
    refused(tmp_path / "a.th", "quantized")
    save_file(STATE, tmp_path / "a.safetensors", {**METADATA, "structure": "{}"})
    refused(tmp_path / "a.safetensors", "quantized")


def test_external_data_of_an_onnx_file_is_not_read(tmp_path: Path) -> None:
    """External data of a graph is not read, because its location is not trusted."""
    model = onnx.load_model_from_string(onnx_graph())
    constant = model.graph.initializer[0]
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="/nowhere/at/all")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "a.onnx", "its tensor constant is in another file")


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
def test_the_state_dict_is_found_in_training_checkpoints(tmp_path: Path, content: Any, zipped: bool) -> None:
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
def test_the_key_of_the_state_dict_is_named(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", reason)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".th", ".safetensors", ".onnx"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_a_git_lfs_pointer_is_reported_as_one(tmp_path: Path, suffix: str, end: str) -> None:
    lines = ("version https://git-lfs.github.com/spec/v1", "oid sha256:" + 64 * "0", "size 83000000", "")
    (tmp_path / f"a{suffix}").write_bytes(end.join(lines).encode())
    refused(tmp_path / f"a{suffix}", "is a Git LFS pointer, .* run `git lfs pull`")


@pytest.mark.parametrize("suffix", [".pt", ".legacy.pt", ".safetensors"])
@pytest.mark.parametrize(
    "value", [torch.tensor(float("nan")), torch.tensor(-float("inf")).half(), torch.tensor(1e39).double()]
)
def test_nan_and_infinity_are_refused(tmp_path: Path, suffix: str, value: Tensor) -> None:
    state = {**STATE, "b.weight": torch.cat([torch.ones(20, dtype=value.dtype), value[None]])}
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    refused(path, r"its tensor b\.weight holds NaN or infinity")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"args": "[1, 2, 3]", "kwargs": "[1, 2]"}, "not a list and a dict"),
        ({"args": "5"}, "not a list and a dict"),
        ({"args": "null"}, "not a list and a dict"),
        ({"args": json.dumps(list(range(100)))}, "not those of HTDemucs"),
        ({"kwargs": "[" * 100_000}, "nested too deeply"),
        ({"kwargs": "{"}, "not JSON"),
        ({"kwargs": '{"segment": {"_type": "fraction", "numerator": 1, "denominator": 0}}'}, "a fraction without"),
        ({"kwargs": '{"segment": {"_type": "fraction", "numerator": "1", "denominator": 2}}'}, "a fraction without"),
        ({"kwargs": '{"a": 1' + " " * 2**20 + "}"}, "more than"),
    ],
)  # fmt: skip
def test_malformed_arguments_are_refused(tmp_path: Path, metadata: dict[str, str], reason: str) -> None:
    save_file(STATE, tmp_path / "a.safetensors", {"klass": METADATA["klass"], **metadata})
    refused(tmp_path / "a.safetensors", reason)


@pytest.mark.parametrize("fraction", [("1/0",), ("1e99999999",), (1, 0), (1.5,), ()])
def test_a_malformed_fraction_in_a_pickle_is_refused(tmp_path: Path, fraction: Any) -> None:
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
def test_a_network_does_not_change_when_its_file_is_overwritten(tmp_path: Path, kind: str) -> None:
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


def test_an_error_without_a_message_is_reported_by_its_class() -> None:
    assert errors.first_line(RuntimeError(" \n")) == "RuntimeError"
    assert errors.first_line(RuntimeError("\n one\ntwo")) == "one"
    assert errors.reason(ValueError("Two\nlines.")) == "two"
