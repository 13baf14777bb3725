"""ONNX graphs run only if their inputs, outputs and memory are known in advance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from conftest import decibels, noise
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from kmdx import weights
from kmdx.errors import WeightsError
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.spectrogram import SpectrogramConfig

SPECTROGRAM = SpectrogramConfig(**tiny.TRANSFORM)
SHAPE = (4, SPECTROGRAM.bins, SPECTROGRAM.frames)
CPU = torch.device("cpu")
Constants = dict[str, Sequence[int]]


def graph(
    nodes: Sequence[NodeProto], constants: Constants | None = None, axes: Sequence[Any] = ("b", *SHAPE)
) -> ModelProto:
    """A graph from x to y, with integer constants."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("x", "y")]
    stored = [
        numpy_helper.from_array(np.array(each, np.int64), name) for name, each in (constants or {}).items()
    ]
    made = helper.make_graph(nodes, "graph", ports[:1], ports[1:], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(operation: str, *given: str, gives: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node(operation, list(given), [gives], **attributes)


def body(*nodes: NodeProto) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "uv"]
    return helper.make_graph(nodes, "body", values[:1], values[1:])


def check(model: ModelProto, folder: Path) -> None:
    onnx.save(model, folder / "a.onnx")
    weights.check_graph(folder / "a.onnx", SHAPE)


def export(network: torch.nn.Module, path: Path, axes: dict[int, str], opset: int = 17) -> None:
    torch.onnx.export(
        network, (torch.zeros(1, *SHAPE),), str(path), input_names=["x"], output_names=["y"], opset_version=opset, dynamo=False,
        dynamic_axes={"x": axes, "y": axes},
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("groups", "axes"),
    [(None, {}), (None, {0: "b", 3: "t"}), (2, {0: "b"}), (2, {0: "b", 1: "c", 2: "f", 3: "t"})],
)
def test_a_graph_with_free_axes_runs(tmp_path: Path, groups: int | None, axes: dict[int, str]) -> None:
    network = tiny.unet("vocals", groups, seed=3)
    network.forward = network.unet
    export(network, tmp_path / "a.onnx", axes)
    del network.forward
    weights.check_graph(tmp_path / "a.onnx", SHAPE)
    exported = OnnxNetwork(tmp_path / "a.onnx", SPECTROGRAM, "vocals", CPU)
    song = torch.from_numpy(noise(2 * tiny.CHUNK).T.copy()).reshape(2, 2, tiny.CHUNK)
    with torch.inference_mode():
        assert decibels(network(song), exported(song)) > 100
    if groups is None:
        ported = weights.unet(tmp_path / "a.onnx", (SPECTROGRAM.bins, SPECTROGRAM.frames))
        assert (ported.bins, ported.frames) == (SPECTROGRAM.bins, SPECTROGRAM.frames)


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.expand(x.shape[0], -1, x.shape[2], -1)


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[3]
        wide = functional.pad(x, (0, length % 2 + 3, 1, 0), mode="reflect")
        return wide[:, :, 1:, 3 : length + 3]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, bins, _ = x.shape
        rows = x.mean(3).reshape(batch, -1, 64)
        places = torch.arange(rows.shape[1])
        mask = torch.zeros(len(places), len(places)).masked_fill(places[:, None] < places, -torch.inf)
        return x + self.attention(rows, rows, rows, attn_mask=mask)[0].reshape(batch, channels, bins, 1)


class Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, bins, frames = x.shape
        left, right = x.reshape(batch, channels // 2, 2, bins, frames).unbind(2)
        half = torch.ceil(torch.as_tensor(frames) * 0.5).long()
        first = torch.cat([right, left], 1)[..., torch.arange(half)]
        return torch.cat([first, x[..., half:]], 3).view_as(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("axes", [{}, {0: "b"}, {0: "b", 1: "c", 2: "f", 3: "t"}], ids=str)
@pytest.mark.parametrize("network", [Expanded, Padded, Attending, Split])
def test_sizes_computed_inside_a_graph_from_torch_are_resolved(
    tmp_path: Path, network: type[nn.Module], axes: dict[int, str], opset: int
) -> None:
    torch.manual_seed(0)
    module = network().train()  # attention is a single operation otherwise, which exporters do not know
    export(module, tmp_path / "a.onnx", axes, opset)
    weights.check_graph(tmp_path / "a.onnx", SHAPE)
    session = OnnxNetwork(tmp_path / "a.onnx", SPECTROGRAM, "vocals", CPU)
    heard = torch.rand(1, *SHAPE)
    with torch.inference_mode():
        assert torch.allclose(session._run(heard), module(heard), atol=1e-5)


def test_sizes_may_be_computed_with_floats(tmp_path: Path) -> None:
    parts = [node("Shape", "x", gives="s"), node("Cast", "s", to=TensorProto.FLOAT, gives="f")]
    parts += [node("Cast", "f", to=TensorProto.INT64, gives="i"), node("Reshape", "x", "i")]
    check(graph(parts), tmp_path)
    huge = helper.make_tensor("k", TensorProto.FLOAT, [], [1e5])
    grown = [
        *parts[:2],
        node("Mul", "f", "k", gives="g"),
        node("Cast", "g", to=7, gives="i"),
        node("Expand", "x", "i"),
    ]
    model = graph(grown)
    model.graph.initializer.append(huge)
    with pytest.raises(ValueError, match=r"holds [\d,]+ values at once|malformed"):
        check(model, tmp_path)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([helper.make_node("Loop", ["n", "", "x"], ["y"], body=body(node("Identity", "u", gives="v")))], "control flow, the operator Loop"),
        ([helper.make_node("Scan", ["x"], ["y"], body=body(node("Identity", "u", gives="v")), num_scan_inputs=1)], "control flow, the operator Scan"),
        ([helper.make_node("If", ["x"], ["y"], then_branch=body(), else_branch=body())], "control flow, the operator If"),
        ([node("FusedConv", "x", domain="com.microsoft")], "FusedConv is an operation of com.microsoft"),
        ([node("Constant", gives="c", value=helper.make_tensor("c", TensorProto.FLOAT, [2], [1, np.nan])), node("Add", "x", "c")], "NaN or infinity"),
    ],
)  # fmt: skip
def test_graphs_that_are_not_plain_chains_are_refused(tmp_path: Path, nodes: list, reason: str) -> None:
    onnx.save(graph(nodes), tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match=reason):
        weights.load(tmp_path / "a.onnx")


def test_functions_defined_in_a_graph_are_refused(tmp_path: Path) -> None:
    model = graph([node("f", "x", domain="own")])
    opsets = [helper.make_opsetid("own", 1)]
    model.functions.append(
        helper.make_function("own", "f", ["u"], ["v"], [node("f", "u", gives="v", domain="own")], opsets)
    )
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="functions"):
        weights.load(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"float_data": [1.0, float("inf")]}, "its tensor w holds NaN or infinity"),
        ({"dims": [10**12]}, "more or fewer values than its shape"),
        ({"dims": [-2]}, "no type or shape"),
        ({"data_type": TensorProto.STRING}, "no type or shape"),
        ({"data_type": 99}, "no type or shape"),
    ],
)
def test_malformed_constants_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    model = graph([node("Add", "x", "w")])
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0]))
    for name, value in change.items():
        if isinstance(value, list):
            getattr(model.graph.initializer[0], name)[:] = value
        else:
            setattr(model.graph.initializer[0], name, value)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match=reason):
        weights.load(tmp_path / "a.onnx")


MASK = [[0, -np.inf], [0, 0]]
DISTANCES = [[-0.5, -np.inf], [-1, -0.5]]


@pytest.mark.parametrize("values", [-np.inf, np.inf, [-np.inf], MASK, DISTANCES], ids=str)
def test_a_mask_or_limit_may_be_infinite(tmp_path: Path, values: Any) -> None:
    model = graph([node("Add", "x", "w")])
    model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.float32), "w"))
    onnx.save(model, tmp_path / "a.onnx")
    weights.load(tmp_path / "a.onnx")


@pytest.mark.parametrize("values", [[1, -np.inf], [0, np.inf], [0, np.nan], np.nan, [[0.1, -np.inf], [0, 0]]])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_infinity_among_other_values_and_nan_are_refused(tmp_path: Path, values: Any, kind: type) -> None:
    model = graph([node("Add", "x", "w")])
    model.graph.initializer.append(numpy_helper.from_array(np.array(values, kind), "w"))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="its tensor w holds NaN or infinity"):
        weights.load(tmp_path / "a.onnx")


def test_nan_in_an_attribute_is_refused_and_an_infinite_limit_is_not(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("Clip", {"min": -np.inf, "max": np.inf}, True),
        ("Clip", {"min": np.nan}, False),
        ("Pad", {"value": -np.inf, "pads": [0] * 8}, True),
        ("Constant", {"value_float": -np.inf}, True),
        ("Constant", {"value_floats": [0.0, -np.inf]}, True),
        ("Constant", {"value_floats": [1.0, np.inf]}, False),
        ("Constant", {"value_float": np.nan}, False),
        ("Constant", {"value_floats": [0.0, np.nan]}, False),
        ("LeakyRelu", {"alpha": np.nan}, False),
        ("LeakyRelu", {"alpha": np.inf}, False),
        ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}, True),
    ]
    for operator, attributes, good in cases:
        onnx.save(
            graph([node(operator, *["x"] * (operator != "Constant"), **attributes)]), tmp_path / "a.onnx"
        )
        with (
            nullcontext() if good else pytest.raises(WeightsError, match=f"its operator {operator} holds NaN")
        ):
            weights.load(tmp_path / "a.onnx")


TRUE, FALSE = (numpy_helper.from_array(np.array(value), "t") for value in (True, False))


@pytest.mark.parametrize(
    "nodes",
    [
        [node("RandomNormal", shape=[1, *SHAPE])],
        [node("RandomUniform", shape=[1, *SHAPE], seed=3.0)],
        [node("RandomNormalLike", "x")],
        [node("RandomUniformLike", "x")],
        [node("Bernoulli", "x")],
        [node("Multinomial", "x", sample_size=3)],
        [node("Constant", gives="t", value=TRUE), node("Dropout", "x", "", "t")],
        [node("Constant", gives="f", value=FALSE), node("Not", "f", gives="t"), node("Dropout", "x", "", "t")],
    ],
    ids=lambda nodes: "-".join(each.op_type for each in nodes),
)  # fmt: skip
def test_a_graph_that_draws_random_numbers_is_refused(tmp_path: Path, nodes: list[NodeProto]) -> None:
    onnx.save(graph(nodes), tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="draws? random numbers"):
        weights.load(tmp_path / "a.onnx")


def test_dropout_that_is_off_is_allowed(tmp_path: Path) -> None:
    for nodes in (
        [node("Dropout", "x")],
        [node("Constant", gives="t", value=FALSE), node("Dropout", "x", "", "t")],
    ):
        onnx.save(graph(nodes), tmp_path / "a.onnx")
        weights.check_graph(tmp_path / "a.onnx", SHAPE)


END = [
    node("ReduceMax", "c", keepdims=0, gives="m"),
    node("Cast", "m", to=1, gives="r"),
    node("Mul", "x", "r"),
]
HUGE: list[tuple[list[NodeProto], Constants]] = [
    ([node("ConstantOfShape", "n", gives="c"), *END], {"n": [10**12]}),
    ([node("Expand", "x", "n")], {"n": [10**8, *SHAPE]}),
    ([node("Tile", "x", "n")], {"n": [1, 10**6, 1, 1]}),
    ([node("Range", "a", "n", "b", gives="c"), *END], {"a": 0, "n": 10**12, "b": 1}),
    ([node("Pad", "x", "n")], {"n": [0, 0, 0, 0, 0, 0, 0, 10**9]}),
    ([node("Resize", "x", "", "", "n")], {"n": [1, 4, 10**6, 10**6]}),
    ([node("ConvTranspose", "x", "w", strides=[10**6, 10**6])], {}),
    ([node("Shape", "x", gives="s"), node("Mul", "s", "n", gives="t"), node("ConstantOfShape", "t", gives="c"), *END], {"n": [10**4] * 4}),
    ([*(node("Concat", *[f"c{i}" if i else "x"] * 2, axis=0, gives=f"c{i + 1}") for i in range(62)), node("ReduceMean", "c62", axes=[0], keepdims=1)], {}),
    ([node("Shape", "x", gives="c0"), *(node("Concat", *[f"c{i}"] * 2, axis=0, gives=f"c{i + 1}") for i in range(62)), node("ReduceMax", "c62", keepdims=0, gives="n"), node("Cast", "n", to=1, gives="m"), node("Add", "x", "m")], {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "constants"),
    HUGE,
    ids=lambda value: "-".join(n.op_type for n in value[:4]) if isinstance(value, list) else "",
)
def test_a_graph_that_needs_too_much_memory_is_refused(
    tmp_path: Path, nodes: list[NodeProto], constants: Constants
) -> None:
    model = graph(nodes, constants)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [4, 1, 1, 1], [1.0] * 4))
    with pytest.raises(
        ValueError, match=r"holds [\d,]+ values at once|bad_alloc|needs more memory than the limit of \d+ MB"
    ):
        check(model, tmp_path)


LOWEST = -(2**63)
SQUARES = [node("MatMul", f"c{i}", "c", gives=f"c{i + 1}") for i in range(30)]


@pytest.mark.parametrize(
    ("nodes", "constants", "reason"),
    [
        ([node("Div", "n", "m", gives="d"), node("Cast", "d", to=1, gives="c"), node("Add", "x", "c")], {"n": [LOWEST], "m": [-1]}, "it crashes|Integer overflow"),
        ([node("ConstantOfShape", "n", gives="c"), node("Identity", "c", gives="c0"), *SQUARES, node("ReduceMax", "c30", keepdims=0, gives="m"), node("Add", "x", "m")], {"n": [3000, 3000]}, r"takes longer than the limit of \d+ s"),
        ([node("Expand", "x", "n", gives="b"), *(node("MatMul", "b" if not i else f"m{i - 1}", "w", gives=f"m{i}") for i in range(2000)), node("ReduceMean", "m1999", axes=[0], keepdims=1)], {"n": [2000, *SHAPE]}, r"needs 1\.0e\+12 multiplications|needs \S+ multiplications for one window"),
        ([node("CumSum", "x", "n")], {"n": [10**9]}, "its graph cannot be run: Fail.* running CumSum node"),
    ],
    ids=["crash", "endless", "work", "invalid"],
)  # fmt: skip
def test_a_graph_that_native_code_cannot_run_is_refused(
    tmp_path: Path, nodes: list[NodeProto], constants: Constants, reason: str
) -> None:
    model = graph(nodes, constants)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(32, dtype=np.float32), "w"))
    with pytest.raises(ValueError, match=reason):
        check(model, tmp_path)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("ReduceSum", "x", keepdims=0)], r"its outputs have the shapes \[\[\]\], not \[\[1, 4, 128, 32\]\]"),
        ([node("Transpose", "x", perm=[0, 1, 3, 2])], r"\[\[1, 4, 32, 128\]\], not"),
        ([node("NonZero", "x", gives="places"), node("Cast", "places", to=1)], "the size of places, from its operator NonZero, cannot be determined in advance"),
        ([node("Identity", "z")], "it is malformed: .*'z' is not a graph input"),
        ([node("Identity", "x", "x")], "it is malformed: "),
        ([node("GatherND", "x", "i", batch_dims=-2)], "it crashes|its graph cannot be run|it is malformed: "),
        ([node("Unheard", "x")], "it is malformed: .*Unheard"),
        ([node("MatMul", "x", "x")], "it is malformed: .*ncompatible dimensions"),
    ],
)  # fmt: skip
def test_a_graph_with_another_output_is_refused(tmp_path: Path, nodes: list[NodeProto], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(graph(nodes, {"i": [0, 0]}), tmp_path)


@pytest.mark.parametrize("axes", [["b", 4, 128, 64], [0, *SHAPE], SHAPE, ["b", 2, 128, 32]])
def test_an_input_of_another_shape_is_refused(tmp_path: Path, axes: list) -> None:
    with pytest.raises(ValueError, match="its inputs have the shapes"):
        check(graph([node("Identity", "x")], axes=axes), tmp_path)


def test_a_fixed_batch_size_is_counted(tmp_path: Path) -> None:
    check(graph([node("Identity", "x")], axes=[8, *SHAPE]), tmp_path)
    with pytest.raises(ValueError, match="values at once"):
        check(graph([node("Identity", "x")], axes=[2**40, *SHAPE]), tmp_path)


def test_the_output_of_a_graph_is_checked_when_it_runs(tmp_path: Path) -> None:
    onnx.save(graph([node("ReduceSum", "x", keepdims=0)], axes=["b", "c", "f", "t"]), tmp_path / "a.onnx")
    network = OnnxNetwork(tmp_path / "a.onnx", SPECTROGRAM, "vocals", CPU)
    with pytest.raises(
        WeightsError, match=r"a\.onnx: the graph returned the shape \[\], expected \[1, 4, 128, 32\]"
    ):
        network(torch.zeros(1, 2, tiny.CHUNK))


def test_an_error_of_onnx_runtime_without_a_message_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(graph([node("Identity", "x")]), tmp_path / "a.onnx")
    network = OnnxNetwork(tmp_path / "a.onnx", SPECTROGRAM, "vocals", CPU)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("")

    network.session = SimpleNamespace(run=fail)
    with pytest.raises(WeightsError, match=r"cannot run .*a\.onnx: RuntimeError$"):
        network(torch.zeros(1, 2, tiny.CHUNK))
    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    with pytest.raises(ValueError, match="cannot load it: RuntimeError$"):
        OnnxNetwork(tmp_path / "a.onnx", SPECTROGRAM, "vocals", CPU)
