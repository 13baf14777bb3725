"""Weight files are read by content, and never run."""

from __future__ import annotations

import json
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from demucs.htdemucs import HTDemucs
from onnx import TensorProto, helper
from safetensors.torch import save_file

from kmdx import weights
from kmdx.errors import WeightsError

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
    refused(tmp_path / "a.ckpt", "not a weight file: expected a .ckpt")
    (tmp_path / "a.onnx").write_text("<html>quota exceeded</html>")
    refused(tmp_path / "a.onnx", "damaged")
    refused(tmp_path, "no file")


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"state": {"a": "text"}}, {"loss": 0.1}])
def test_a_pickle_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "expected a dict of tensors|holds no state dict")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "it ran"
    torch.save(
        {"state": STATE, "more": RunsCode(marker)}, tmp_path / "a.th", _use_new_zipfile_serialization=zipped
    )
    refused(tmp_path / "a.th", r"would run code \(\w+\.mkdir\)")
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
    assert weights.load(tmp_path / "a.onnx").state is None


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
