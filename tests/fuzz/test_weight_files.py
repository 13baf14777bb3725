"""Weight files with damage and surprises of every kind: each is loaded, or refused in one line."""

from __future__ import annotations

import inspect
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from demucs.htdemucs import HTDemucs
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto
from safetensors.torch import save_file
from torch import Tensor

from kmdx import plan_file
from kmdx.build import load_for_inference
from kmdx.errors import KmdxError
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig
from kmdx.plan import NetworkUse

MEMORY = 500_000_000  # bytes that all these files together may cost
SIZES = {"layers": 3, "convolutions": 1, "growth": 2, "norm_groups": None, "bottleneck": 8}
UNET = {"type": "tfc_tdf", "sources": ["vocals"], **tiny.TRANSFORM, **SIZES}
GRAPH = {"type": "onnx", "sources": ["vocals"], **tiny.TRANSFORM}
KWARGS = {
    "sources": tiny.SOURCES,
    "channels": 8,
    "bottom_channels": 16,
    "t_layers": 1,
    "t_heads": 2,
    "depth": 2,
    "segment": 0.5,
}
DEMUCS = {"type": "htdemucs", **KWARGS}
TRIMMED = {"trim_and_join": {"chunk": tiny.CHUNK, "trim": 109}}
SUFFIXES = {
    "zip.pt": UNET,
    "legacy.pt": UNET,
    "u.safetensors": UNET,
    "u.onnx": GRAPH,
    "d.th": DEMUCS,
    "d.safetensors": DEMUCS,
}

BYTES = st.sampled_from(
    [
        b"",
        b"\0",
        b"\xff",
        b"\xff" * 4,
        b"\xff" * 8,
        b"\0\0\0\x80",
        b"{",
        b"[" * 2000,
        b"PK\x03\x04",
        b"\x80\x02",
    ]
)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), BYTES | st.binary(max_size=12)), max_size=6)
NUMBERS = st.integers(-(2**65), 2**65) | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**62, 10**11])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.just({"_type": "fraction", "numerator": 1}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
OPTIONS = list(inspect.signature(HTDemucs).parameters)
WRAPPERS = ["state", "state_dict", "model", "model_state_dict", "ema", "net"]
PREFIXES = ["module.", "model.", "_orig_mod.", "encoder."]
EXTRA = ["klass", "args", "kwargs", "training_args", "model", "epoch", "__quantized"]
HARMLESS = ["double", "half", "parameter"]
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "int": lambda t: t.int(), "bool": lambda t: t > 0, "complex": lambda t: t.to(torch.complex64), "double": lambda t: t.double(),
    "half": lambda t: t.half(), "float8": lambda t: t.to(torch.float8_e4m3fn), "sparse": lambda t: t.to_sparse(), "meta": lambda t: t.to("meta"),
    "NaN": lambda t: t * float("nan"), "infinite": lambda t: t + float("inf"), "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "expanded": lambda t: t.flatten()[:1].expand(10**12), "transposed": lambda t: t.T if t.ndim == 2 else t.clone(), "empty": lambda t: t.flatten()[:0],
    "text": lambda t: "text", "parameter": lambda t: torch.nn.Parameter(t.float()), "scalar": lambda t: t.sum(),
}  # fmt: skip


class Files:
    """A good file of each kind, and how to load it; the file of each is written again for each example."""

    def __init__(self, folder: Path) -> None:
        self.uses = {name: use_of(folder, name, architecture) for name, architecture in SUFFIXES.items()}
        torch.manual_seed(0)
        unet = TfcTdf(TfcTdfConfig(SpectrogramConfig(**tiny.TRANSFORM), **SIZES), "vocals").eval()
        state = {name: tensor.half() for name, tensor in HTDemucs(**KWARGS).state_dict().items()}
        torch.save(unet.state_dict(), folder / "zip.pt")
        wrapped = {"state_dict": unet.state_dict()}
        torch.save(wrapped, folder / "legacy.pt", _use_new_zipfile_serialization=False)
        save_file(
            {f"module.{name}": each for name, each in unet.state_dict().items()}, folder / "u.safetensors"
        )
        tiny.export(unet, folder / "u.onnx")
        torch.save({"klass": HTDemucs, "args": (), "kwargs": KWARGS, "state": state}, folder / "d.th")
        metadata = {"klass": "demucs.htdemucs.HTDemucs", "kwargs": json.dumps(KWARGS)}
        save_file(state, folder / "d.safetensors", metadata)
        self.whole = {name: (folder / name).read_bytes() for name in SUFFIXES}

    def path(self, name: str) -> Path:
        path = self.uses[name].weight.path
        assert path is not None
        return path

    def loads(self, name: str) -> bool:
        """Whether a file is loaded; if it is not, it must be for a reason that fits on one line."""
        try:
            load_for_inference(self.uses[name], 44100, torch.device("cpu"))
        except KmdxError as error:
            message = str(error)
        else:
            return True
        assert str(self.path(name)) in message
        assert len(message.splitlines()) == 1
        assert len(message) < 1000
        return False


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    made = Files(tmp_path_factory.mktemp("files"))
    before = peak_memory()
    yield made
    assert peak_memory() - before < MEMORY


def use_of(folder: Path, name: str, architecture: dict[str, Any]) -> NetworkUse:
    window = {"overlap_add": {"overlap": 0.25}} if architecture is DEMUCS else TRIMMED
    plan = {
        "networks": {"n": {"weights": {"file": name, "architecture": architecture}, **window}},
        "signals": {"S": {"network": "n", "hears": "mixture"}},
        "stems": {"vocals": {"sum": {"S.vocals": 1}}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(plan), "utf-8")
    return plan_file.load(folder / f"{name}.yaml").networks["n"]


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Some bytes replaced by others, here and there."""
    for place, removed, inserted in edits:
        start = int(place * len(content))
        content = content[:start] + inserted + content[start + removed :]
    return content


@pytest.mark.parametrize("name", SUFFIXES)
def test_the_files_as_they_are_load(files: Files, name: str) -> None:
    files.path(name).write_bytes(files.whole[name])
    assert files.loads(name)


@given(name=st.sampled_from(list(SUFFIXES)), edits=EDITS, part=st.just(1.0) | st.floats(0, 1))
def test_damaged_bytes(files: Files, name: str, edits: list[tuple[float, int, bytes]], part: float) -> None:
    content = edited(files.whole[name], edits)
    files.path(name).write_bytes(content[: int(part * len(content))])
    files.loads(name)


@given(
    name=st.sampled_from(["zip.pt", "legacy.pt"]),
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=3),
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=3),
    changes=st.dictionaries(st.integers(0, 30), st.sampled_from(list(CHANGES)), max_size=2),
    extra=st.dictionaries(st.sampled_from(EXTRA), JSON, max_size=2),
)
def test_torch_files_of_unusual_content(
    files: Files,
    name: str,
    wrappers: list[str],
    prefixes: list[str],
    changes: dict[int, str],
    extra: dict[str, Any],
) -> None:
    files.path("zip.pt").write_bytes(files.whole["zip.pt"])
    state: dict[str, Any] = torch.load(files.path("zip.pt"), weights_only=True)
    for number, change in changes.items():
        key = list(state)[number]
        state[key] = CHANGES[change](state[key])
    content: dict[str, Any] = {"".join(prefixes) + key: value for key, value in state.items()}
    for wrapper in wrappers:
        content = {wrapper: content}
    torch.save({**content, **extra}, files.path(name), _use_new_zipfile_serialization=name == "zip.pt")
    known = not {"ema", "net"}.intersection(wrappers) and "encoder." not in prefixes
    harmless = all(change in HARMLESS for change in changes.values()) and not extra
    assert files.loads(name) or not (known and harmless)


@given(
    options=st.dictionaries(st.sampled_from(OPTIONS), JSON, max_size=3), args=JSON, raw=st.none() | st.text()
)
def test_arguments_of_every_kind(files: Files, options: dict[str, Any], args: Any, raw: str | None) -> None:
    state = safetensors.torch.load(files.whole["d.safetensors"])
    kwargs = json.dumps({**KWARGS, **options}) if raw is None else raw
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "kwargs": kwargs, "args": json.dumps(args)}
    save_file(state, files.path("d.safetensors"), metadata)
    files.loads("d.safetensors")


@settings(max_examples=settings.default.max_examples // 2)  # each starts a process
@given(data=st.data())
def test_graphs_of_every_kind(files: Files, data: st.DataObject) -> None:
    model = onnx.load_model_from_string(files.whole["u.onnx"])
    for _ in range(data.draw(st.integers(1, 3))):
        change_graph(model, data.draw)
    files.path("u.onnx").write_bytes(model.SerializeToString())
    files.loads("u.onnx")


def change_graph(model: ModelProto, draw: Callable[[Any], Any]) -> None:
    """Change one thing in a graph."""
    graph = model.graph
    node = graph.node[draw(st.integers(0, len(graph.node) - 1))]
    tensor = graph.initializer[draw(st.integers(0, len(graph.initializer) - 1))]
    sizes = st.lists(st.sampled_from([0, 1, 2, 4, 128, 2**31, 2**62, 10**12, -1]), max_size=5)
    what = draw(
        st.sampled_from(
            ["operation", "attribute", "wire", "shape", "type", "values", "input", "gone", "new", "opset"]
        )
    )
    if what == "operation":
        node.op_type = draw(st.sampled_from(OPERATIONS))
    elif what == "attribute":
        for attribute in node.attribute:
            attribute.ints[:] = draw(sizes)
            attribute.i = draw(st.integers(-(2**63), 2**63 - 1))
    elif what == "wire" and len(node.input):
        node.input[0] = draw(
            st.sampled_from([tensor.name, node.output[0], "nothing", "", *graph.node[0].output])
        )
    elif what == "shape":
        tensor.dims[:] = draw(sizes)
    elif what == "type":
        tensor.data_type = draw(st.integers(0, 25))
    elif what == "values":
        tensor.raw_data = draw(st.binary(max_size=16)) * draw(st.integers(1, 4))
    elif what == "input":
        shape = graph.input[0].type.tensor_type.shape
        shape.dim[draw(st.integers(0, 3))].dim_value = draw(st.integers(-1, 2**62))
    elif what == "gone":
        graph.node.remove(node)
    elif what == "opset":
        model.opset_import[0].version = draw(st.integers(0, 30))
    else:
        grow(graph, draw, node)


OPERATIONS = ["Identity", "ConstantOfShape", "Expand", "Tile", "Range", "Shape", "Concat", "Gather", "Slice", "Pad", "Resize", "Loop", "If",
              "Reshape", "Transpose", "MatMul", "Gemm", "Conv", "ConvTranspose", "Softmax", "LSTM", "Einsum", "NonZero", "TopK", "Unknown", "RandomNormal", "OneHot"]  # fmt: skip


def grow(graph: Any, draw: Callable[[Any], Any], node: Any) -> None:
    """Insert a node that enlarges its input."""
    sizes = draw(
        st.lists(st.sampled_from([1, 2, 4, 128, 1000, 10**6, 10**12, 2**62]), min_size=1, max_size=5)
    )
    graph.initializer.append(onnx.helper.make_tensor("sizes", TensorProto.INT64, [len(sizes)], sizes))
    operation = draw(
        st.sampled_from(
            ["Expand", "Tile", "ConstantOfShape", "Reshape", "Range", "Concat", "RandomNormalLike"]
        )
    )
    given = {"ConstantOfShape": ["sizes"], "Range": ["sizes"] * 3, "Concat": [node.output[0]] * 5}.get(
        operation, [node.output[0], "sizes"]
    )
    made = onnx.helper.make_node(operation, given, ["grown"])
    if operation == "Concat":
        made.attribute.append(onnx.helper.make_attribute("axis", 0))
    graph.node.append(made)
