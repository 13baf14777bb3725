"""ONNX graphs that can be run without surprises, whoever wrote them.

ONNX Runtime runs loops without end, reads other files that a graph names, and allocates whatever a graph
asks for, some of it while it opens the graph. So a graph is checked before the runtime sees it: it must be
a plain chain of standard operations, its constants must be in the file and hold numbers, and the size of
all that it computes must be known beforehand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kmdx.errors import shown
from kmdx.weights.pickled import Refused

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

STANDARD_DOMAINS = ("", "ai.onnx")
_MAX_NODES = 10_000  # the largest separation networks have about 3,000
_MAX_VALUES = (
    1 << 29
)  # held at once while it runs: 2 GiB in float32; the largest published graph needs 2**27.5
_MAX_SIZES = 1024  # values of a constant that other nodes may read as sizes


def read(path: Path) -> ModelProto:
    """Read a graph and check its nodes and constants; nothing is run, and no other file is opened.

    Raises
    ------
    Refused
        If it has control flow, functions or operations of its own, or a constant that is elsewhere,
        damaged, NaN or infinite.
    ValueError
        If the file is no graph.
    OSError
        If it cannot be read.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError("it cannot be read as an ONNX graph") from error
    graph = model.graph
    if not (graph.node and graph.input and graph.output):
        raise ValueError("it holds no ONNX graph")
    if len(graph.node) > _MAX_NODES:
        raise Refused(f"is refused: its graph has {len(graph.node):,} nodes, more than {_MAX_NODES:,}")
    if len(model.functions) or len(graph.sparse_initializer):
        raise Refused("is refused: its graph has functions or sparse tensors of its own")
    for node in graph.node:
        _check_node(node)
    for tensor in _tensors(graph):
        _check_tensor(tensor)
    return model


def check_sizes(model: ModelProto, shape: Sequence[int]) -> None:
    """Check that a graph makes a spectrogram out of a spectrogram, and that what it computes is not huge.

    Parameters
    ----------
    model : ModelProto
        As :func:`read` gives it.
    shape : sequence of int
        Channels, bins and frames of the spectrogram. Axes of the graph's input may be of any size instead,
        and so may its batch, which comes first.

    Raises
    ------
    ValueError
        If its input or output has another shape, or what it computes is too large or of unknown size.
    """
    given = _input(model.graph, shape)
    skeleton = _skeleton(model, given)
    _inferred(skeleton, data_prop=False)  # where sizes of sizes explode, they must not be followed
    known = _inferred(skeleton, data_prop=True)
    _check_held(skeleton.graph, given.name, known)
    outputs = [known.get(value.name) for value in skeleton.graph.output]
    if outputs != [_shape(given)]:
        raise ValueError(f"its outputs have the shapes {outputs}, not [{_shape(given)}]")


def _input(graph: GraphProto, shape: Sequence[int]) -> ValueInfoProto:
    """The one input of a graph, with this shape in place of free axes and 1 in place of a free batch."""
    from onnx import TensorProto, helper

    stored = {tensor.name for tensor in graph.initializer}  # older files list them as inputs, too
    inputs = [value for value in graph.input if value.name not in stored]
    shapes = [_shape(value) for value in inputs]
    match shapes:
        case [[batch, *axes]] if len(axes) == len(shape):
            fits = all(own in (None, wanted) for own, wanted in zip(axes, shape, strict=True))
            if fits and inputs[0].type.tensor_type.elem_type == TensorProto.FLOAT and batch != 0:
                return helper.make_tensor_value_info(inputs[0].name, TensorProto.FLOAT, [batch or 1, *shape])
    raise ValueError(f"its inputs have the shapes {shapes}, not [{['batch', *shape]}] in float32")


def _skeleton(model: ModelProto, given: ValueInfoProto) -> ModelProto:
    """The graph for one shape of its input, without large constants and without what it says of its sizes."""
    from onnx import helper

    inputs, small, nodes = [given], [], []
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > _MAX_SIZES:
            inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            small.append(tensor)
    for node in model.graph.node:
        value = next((attribute.t for attribute in node.attribute if attribute.HasField("t")), None)
        if node.op_type == "Constant" and value is not None and math.prod(value.dims) > _MAX_SIZES:
            inputs += [
                helper.make_tensor_value_info(name, value.data_type, value.dims) for name in node.output
            ]
        else:
            nodes.append(node)
    outputs = [helper.make_empty_tensor_value_info(value.name) for value in model.graph.output]
    graph = helper.make_graph(nodes, "skeleton", inputs, outputs, small)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _inferred(skeleton: ModelProto, data_prop: bool) -> dict[str, list[int | None] | None]:
    """The shape of each tensor, None where it or one of its axes is not known; a huge one is refused."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=data_prop).graph
    except onnx.shape_inference.InferenceError as error:
        raise ValueError(f"the shapes in its graph do not fit together: {_first_line(error)}") from error
    known = {value.name: _shape(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    for name, sizes in known.items():
        if math.prod(size or 1 for size in sizes or ()) > _MAX_VALUES:
            raise ValueError(f"its tensor {shown(name)} would have the shape {sizes}")
    return known


def _check_held(graph: GraphProto, given: str, known: Mapping[str, list[int | None] | None]) -> None:
    """Go through a graph and add up what is held: constants to the end, all else until its last use.

    What hangs on the shape of the input alone is a constant for ONNX Runtime.
    """
    uses = Counter(name for node in graph.node for name in node.input)
    varying, sizes, held = {given}, {given: 0}, 0
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and not varying.isdisjoint(node.input):
            varying.update(node.output)
        for name in filter(None, node.output):
            shape = known.get(name)
            if shape is None or None in shape:
                raise ValueError(f"the size of {shown(name)}, a {node.op_type}, depends on what it is given")
            sizes[name] = math.prod(size or 0 for size in shape)
            held += sizes[name]
        if held > _MAX_VALUES:
            raise ValueError(f"it holds {held:,} values at once, more than {_MAX_VALUES:,}")
        for name in node.input:
            uses[name] -= 1
            held -= sizes.get(name, 0) if name in varying and not uses[name] else 0


def _shape(value: ValueInfoProto) -> list[int | None] | None:
    """The sizes of a tensor, each None where it is free; None if even their number is."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    axes = value.type.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value >= 0 else None for axis in axes]


def _check_node(node: NodeProto) -> None:
    if node.domain not in STANDARD_DOMAINS:
        raise Refused(
            f"is refused: {shown(node.op_type)} is an operation of {shown(node.domain)}, not of ONNX"
        )
    for attribute in node.attribute:
        if attribute.HasField("g") or len(attribute.graphs):
            raise Refused(f"is refused: its graph has control flow, a {shown(node.op_type)}")
        if attribute.HasField("sparse_tensor") or len(attribute.sparse_tensors):
            raise Refused("is refused: its graph has sparse tensors")


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All constants of a graph: its own, and those of nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensor(tensor: TensorProto) -> None:
    import numpy as np
    from onnx import TensorProto, numpy_helper

    name = shown(tensor.name)
    if tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data):
        raise Refused(f"is refused: its tensor {name} is in another file; export it into one file")
    if tensor.data_type not in _types() or min(tensor.dims, default=0) < 0:
        raise Refused(f"is refused: its tensor {name} has no type or shape that a network's constants have")
    try:
        values = numpy_helper.to_array(tensor)
    except ValueError as error:
        raise Refused(f"is refused: its tensor {name} has not as many values as its shape says") from error
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    if (
        np.isnan(values).any() or values.size > 1
    ):  # a single infinity is what masks and limits are written with
        raise Refused(f"is refused: its tensor {name} holds NaN or infinity; export it again")


def _types() -> frozenset[int]:
    """What constants may be: the numbers that numpy has, too."""
    from onnx import TensorProto

    names = ("FLOAT", "FLOAT16", "DOUBLE", "BOOL")
    whole = (f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
    return frozenset(TensorProto.DataType.Value(name) for name in (*names, *whole))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
