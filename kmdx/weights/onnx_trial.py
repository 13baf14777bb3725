"""What an ONNX graph takes, gives and costs, found out before it is trusted.

A graph of 200 bytes can ask for any amount of memory or time, and make the native code of onnx and ONNX
Runtime crash. So both functions are called in a process of their own (:mod:`kmdx.bounded`): the first finds
out how much the graph holds and computes, the second runs it within these limits.

ONNX Runtime computes all that does not depend on the input while it opens a graph, sizes among them. What it
then has left is a graph whose shapes the standard's own inference knows.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx.errors import first_line, shown
from kmdx.networks.architecture import MAX_VALUES
from kmdx.weights import onnx_file

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto

MAX_WORK = 10**12  # multiplications for one window; the largest published graph needs 0.4 * 10^12
_THREADS = 2  # each reserves memory


def cost(path: str, shape: Sequence[int]) -> dict[str, Any]:
    """How many values a graph holds at once, and how many it multiplies, for its smallest batch.

    Parameters
    ----------
    path : str
    shape : sequence of int
        Channels, bins and frames of the spectrogram that it takes and gives. Axes of the graph's input may
        be of any size instead, and so may its batch, which comes first.

    Returns
    -------
    dict
        ``held``, ``work`` and ``input``, its shape with the batch; or only ``problem``, the reason why it is
        refused.
    """
    model = onnx_file.read(Path(path))
    try:
        given = _input(model.graph, shape)
        graph = _folded(model, given)
        held, work = _measured(graph, given.name)
        outputs = [_shape(value.type) for value in graph.output]
        if outputs != [_shape(given.type)]:
            raise ValueError(f"its outputs have the shapes {outputs}, not [{_shape(given.type)}]")
    except ValueError as error:
        return {"problem": str(error)}
    return {"held": held, "work": work, "input": _shape(given.type)}


def run(path: str, shape: Sequence[int]) -> None:
    """Run a graph once on zeros of this shape."""
    import numpy as np

    session = _session(path)
    session.run(None, {session.get_inputs()[0].name: np.zeros(shape, np.float32)})


def _session(graph: str | bytes, **options: Any) -> Any:
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = _THREADS
    chosen.log_severity_level = 4  # its errors are raised as well
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(graph, chosen, providers=["CPUExecutionProvider"])


def _folded(model: ModelProto, given: ValueInfoProto) -> GraphProto:
    """The graph for an input of fixed shape, without what does not depend on it, and with all shapes."""
    import onnx
    import onnxruntime

    del model.graph.input[:]
    model.graph.input.append(given)
    del model.graph.value_info[:]  # promises of the file
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "folded.onnx")
        try:
            _session(model.SerializeToString(), graph_optimization_level=basic, optimized_model_filepath=file)
            folded = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, data_prop=True)
        except MemoryError:
            raise
        except Exception as error:  # of any class: both have one for each kind of mistake, without a base
            raise ValueError(f"it is not right: {first_line(error)}") from error
    return folded.graph


def _measured(graph: GraphProto, given: str) -> tuple[int, int]:
    """How many values a graph holds at once, with its constants, and how many it multiplies."""
    stored = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    sizes = {value.name: _shape(value.type) for value in (*graph.input, *graph.output, *graph.value_info)}
    shapes = {name: known for name, shape in sizes.items() if (known := _known(shape)) is not None} | stored
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update([given, *stored])  # these are kept
    held = most = sum(map(math.prod, stored.values()))
    work = 0
    for node in graph.node:
        for name in filter(None, node.output):
            if name not in shapes:
                raise ValueError(
                    f"the size of {shown(name)}, from its {_called(node)}, cannot be known beforehand"
                )
            held += math.prod(shapes[name])
        most = max(most, held)
        if most > MAX_VALUES:  # for a batch of one; the largest published graph needs a third
            raise ValueError(
                f"at {shown(node.output[0])}, from its {_called(node)}, it holds {most:,} values at once"
            )
        work += _work(
            node, *([shapes.get(name, []) for name in names] for names in (node.input, node.output))
        )
        uses.subtract(node.input)
        held -= sum(math.prod(shapes[name]) for name in {*node.input} if name and not uses[name])
    batch = shapes[given][0]
    if work > MAX_WORK * batch:
        raise ValueError(f"it multiplies {work / batch:.1e} times for one window, more than {MAX_WORK:.0e}")
    return most, work


def _work(node: NodeProto, given: Sequence[Sequence[int]], made: Sequence[Sequence[int]]) -> int:
    """About how many multiplications a node takes; for others than these, how many values it touches."""
    touched = sum(map(math.prod, (*given, *made)))
    made_values = sum(map(math.prod, made))
    match node.op_type:
        case "Conv":
            return touched + made_values * math.prod(given[1][1:])
        case "ConvTranspose":
            return touched + math.prod(given[0]) * math.prod(given[1][1:])
        case "MatMul":
            return touched + made_values * given[0][-1]
        case "Gemm" | "Einsum":
            return touched + made_values * max(given[0], default=1)
        case "LSTM" | "GRU" | "RNN":
            return touched + math.prod(given[0][:2]) * (math.prod(given[1]) + math.prod(given[2]))
        case "AveragePool" | "MaxPool" | "LpPool":
            sizes = (attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape")
            return touched + made_values * math.prod(map(math.prod, sizes))
    return touched


def _input(graph: GraphProto, shape: Sequence[int]) -> ValueInfoProto:
    """The one input of a graph, with this shape in place of free axes and 1 in place of a free batch."""
    from onnx import TensorProto, helper

    stored = {tensor.name for tensor in graph.initializer}  # older files list them as inputs, too
    inputs = [value for value in graph.input if value.name not in stored]
    shapes = [_shape(value.type) for value in inputs]
    match shapes:
        case [[batch, *axes]] if len(axes) == len(shape):
            fits = all(own in (None, wanted) for own, wanted in zip(axes, shape, strict=True))
            if fits and inputs[0].type.tensor_type.elem_type == TensorProto.FLOAT and batch != 0:
                return helper.make_tensor_value_info(inputs[0].name, TensorProto.FLOAT, [batch or 1, *shape])
    raise ValueError(f"its inputs have the shapes {shapes}, not [{['batch', *shape]}] in float32")


def _called(node: NodeProto) -> str:
    """What a message calls a node."""
    return f"operator {shown(node.op_type)}{f' at {shown(node.name)}' if node.name else ''}"


def _known(shape: Sequence[int | None] | None) -> list[int] | None:
    """A shape whose sizes are all known; None for others."""
    sizes = [size for size in shape or [] if size is not None]
    return sizes if shape is not None and len(sizes) == len(shape) else None


def _shape(kind: TypeProto) -> list[int | None] | None:
    """The sizes of a tensor, each None where it is free; None if even their number is."""
    if not kind.tensor_type.HasField("shape"):
        return None
    axes = kind.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value >= 0 else None for axis in axes]
