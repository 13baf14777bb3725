"""ONNX graphs that are safe to run, whoever wrote them.

ONNX Runtime runs endless loops, reads other files that a graph names, and allocates whatever a graph asks
for, partly while it opens the graph. So a graph is checked before the runtime gets it: it must be a plain
chain of standard operations, its constants must be in the file and be finite, and the size of everything
that it computes must be known in advance.

A graph of 200 bytes can ask for any amount of memory or time, and crash the native code of onnx and ONNX
Runtime. So :func:`cost` and :func:`run` are called in a separate process (:mod:`kmdx.bounded`): the first
determines how much memory and arithmetic the graph needs, the second runs it within these limits. While
ONNX Runtime opens a graph, it computes everything that does not depend on the input, including sizes. In
the graph that remains, ONNX's own shape inference knows all shapes.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx.errors import Refused, first_line, shown
from kmdx.networks.architecture import MAX_VALUES

if TYPE_CHECKING:
    from numpy import ndarray
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto

STANDARD_DOMAINS = ("", "ai.onnx")
_MAX_WORK = 10**12  # multiplications for one window; the largest published graph needs 0.4 * 10^12
_THREADS = 2  # each reserves memory
_MAX_NODES = 10_000  # the largest separation networks have about 3,000
_RANDOM = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
)  # fmt: skip
_MAY_BE_INFINITE = ("Clip", "Constant", "Pad")  # operators whose attributes are limits or fill values


def parse(path: Path) -> ModelProto:
    """Read a graph and no other file; raises :class:`ValueError` or :class:`OSError` if that fails."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError("it cannot be read as an ONNX graph") from error


def inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """The inputs of a graph; older files list constants among them."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def read(path: Path) -> ModelProto:
    """Read a graph and check its nodes and constants without running anything.

    Raises
    ------
    Refused
        If it has control flow, random numbers, its own functions or operations, or a constant that is in
        another file, damaged, NaN, or infinite without being a mask or limit.
    ValueError
        If the file is not a graph.
    OSError
        If it cannot be read.
    """
    model = parse(path)
    graph = model.graph
    if not (graph.node and graph.input and graph.output):
        raise ValueError("it contains no ONNX graph")
    if len(graph.node) > _MAX_NODES:
        raise Refused(f"is refused: its graph has {len(graph.node):,} nodes, more than {_MAX_NODES:,}")
    if len(model.functions) or len(graph.sparse_initializer):
        raise Refused("is refused: its graph has functions or sparse tensors of its own")
    for node in graph.node:
        _check_node(node)
    for tensor in _tensors(graph):
        _check_tensor(tensor)
    _check_dropout(graph)
    return model


def _check_node(node: NodeProto) -> None:
    import numpy as np

    if node.domain not in STANDARD_DOMAINS:
        raise Refused(
            f"is refused: {shown(node.op_type)} is an operation of {shown(node.domain)}, not of ONNX"
        )
    if node.op_type in _RANDOM:
        raise Refused(
            f"is refused: its operator {node.op_type} draws random numbers, and every run would differ"
        )
    for attribute in node.attribute:
        if attribute.HasField("g") or len(attribute.graphs):
            raise Refused(f"is refused: its graph has control flow, the operator {shown(node.op_type)}")
        if attribute.HasField("sparse_tensor") or len(attribute.sparse_tensors):
            raise Refused("is refused: its graph has sparse tensors")
        for values in ([attribute.f], attribute.floats):
            if not _are_numbers(np.array(values), masks=node.op_type in _MAY_BE_INFINITE):
                raise Refused(
                    f"is refused: {shown(attribute.name)} of its operator {shown(node.op_type)} holds NaN or "
                    "infinity; export it again"
                )


def _check_dropout(graph: GraphProto) -> None:
    """Refuse a Dropout whose third input switches random numbers on, or may do so."""
    from onnx import numpy_helper

    switches = {node.input[2] for node in graph.node if node.op_type == "Dropout" and len(node.input) > 2}
    if not switches - {""}:
        return
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values = [each.t for each in node.attribute if each.HasField("t")]
            constants.update(itertools.product(node.output, values))
    for name in switches - {""}:
        switch = constants.get(name)
        if switch is None or math.prod(switch.dims) != 1 or numpy_helper.to_array(switch).any():
            raise Refused(
                "is refused: its operator Dropout is in training mode and draws random numbers, and every "
                "run would differ; export it in evaluation mode"
            )


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All constants of a graph and of its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensor(tensor: TensorProto) -> None:
    from onnx import TensorProto, numpy_helper

    name = shown(tensor.name)
    if tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data):
        raise Refused(f"is refused: its tensor {name} is in another file; export it into one file")
    if tensor.data_type not in _types() or min(tensor.dims, default=0) < 0:
        raise Refused(f"is refused: its tensor {name} has no type or shape that a network's constants have")
    try:
        values = numpy_helper.to_array(tensor)
    except ValueError as error:
        raise Refused(f"is refused: its tensor {name} has more or fewer values than its shape") from error
    if not _are_numbers(values, masks=True):
        raise Refused(f"is refused: its tensor {name} holds NaN or infinity; export it again")


def _are_numbers(values: ndarray, masks: bool) -> bool:
    """Whether values are finite, or may be infinite because they are a mask or a limit.

    An attention mask is -inf at masked positions and 0, or a penalty by distance, elsewhere. A limit is a
    single value. A damaged tensor of weights has values of both signs.
    """
    import numpy as np

    if values.dtype.kind != "f" or np.isfinite(values).all():
        return True
    return masks and not np.isnan(values).any() and (values.size == 1 or bool((values <= 0).all()))


def _types() -> frozenset[int]:
    """The types that constants may have: those that numpy also supports."""
    from onnx import TensorProto

    names = ("FLOAT", "FLOAT16", "DOUBLE", "BOOL")
    whole = (f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
    return frozenset(TensorProto.DataType.Value(name) for name in (*names, *whole))


def cost(path: str, shape: Sequence[int]) -> dict[str, Any]:
    """Count the values that a graph keeps in memory at once and its multiplications, for its smallest batch.

    Parameters
    ----------
    shape : sequence of int
        Channels, bins and frames of its input and output spectrogram. The graph may leave the sizes of
        these axes open, and that of its batch, which comes first.

    Returns
    -------
    dict
        ``held``, ``work`` and ``input`` (the shape with the batch), or only ``problem``, the reason for
        refusing the graph.
    """
    model = read(Path(path))
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
    """The graph for an input of fixed shape, with constant parts computed and all shapes inferred."""
    import onnx
    import onnxruntime

    del model.graph.input[:]
    model.graph.input.append(given)
    del model.graph.value_info[:]  # the file's own claims
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
        except Exception as error:  # both have many classes of errors, without a common base
            raise ValueError(f"it is malformed: {first_line(error)}") from error
    return folded.graph


def _measured(graph: GraphProto, given: str) -> tuple[int, int]:
    """The number of values kept in memory at once, including constants, and of multiplications."""
    stored = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    sizes = {value.name: _shape(value.type) for value in (*graph.input, *graph.output, *graph.value_info)}
    shapes = {name: shape for name, shape in sizes.items() if shape is not None and None not in shape}
    shapes |= stored
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update([given, *stored])  # these are kept
    held = most = sum(map(math.prod, stored.values()))
    work = 0
    for node in graph.node:
        for name in filter(None, node.output):
            if name not in shapes:
                raise ValueError(
                    f"the size of {shown(name)}, from its {_called(node)}, cannot be determined in advance"
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
    if work > _MAX_WORK * batch:
        raise ValueError(
            f"it needs {work / batch:.1e} multiplications for one window, more than {_MAX_WORK:.0e}"
        )
    return most, work


def _work(node: NodeProto, given: Sequence[Sequence[int]], made: Sequence[Sequence[int]]) -> int:
    """Approximate multiplications of a node, and for other operators the number of values it touches."""
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
    """The only input of a graph, with this shape for open axes and 1 for an open batch."""
    from onnx import TensorProto, helper

    found = inputs(graph)
    shapes = [_shape(value.type) for value in found]
    match shapes:
        case [[batch, *axes]] if len(axes) == len(shape):
            fits = all(own in (None, wanted) for own, wanted in zip(axes, shape, strict=True))
            if fits and found[0].type.tensor_type.elem_type == TensorProto.FLOAT and batch != 0:
                return helper.make_tensor_value_info(found[0].name, TensorProto.FLOAT, [batch or 1, *shape])
    raise ValueError(f"its inputs have the shapes {shapes}, not [{['batch', *shape]}] in float32")


def _called(node: NodeProto) -> str:
    """The name of a node in messages."""
    return f"operator {shown(node.op_type)}{f' at {shown(node.name)}' if node.name else ''}"


def _shape(kind: TypeProto) -> list[Any] | None:
    """The sizes of a tensor, None for each open size; None if the number of axes is open."""
    if not kind.tensor_type.HasField("shape"):
        return None
    axes = kind.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value >= 0 else None for axis in axes]
