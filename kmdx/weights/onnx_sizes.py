"""How large all is that an ONNX graph computes, found out without computing it.

A graph of 200 bytes can ask for any amount of memory, while ONNX Runtime opens it (which folds constants)
or when it runs. So the graph is followed node by node. The standard's own inference gives the shape of each
output; where sizes are computed from other sizes, as exporters do it, those few numbers are computed here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kmdx.errors import first_line, shown
from kmdx.networks.architecture import MAX_VALUES

if TYPE_CHECKING:
    from numpy import ndarray
    from onnx import GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto

_MAX_SIZES = 64  # numbers of a tensor that may stand for sizes
# What exporters compute sizes with. Each needs no more memory than its inputs and outputs have, and gives
# the same numbers in ONNX Runtime to the last bit, so a graph cannot be larger there than it seems here.
_COMPUTED = {
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand",
    "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max",
    "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum",
    "Reshape", "Sign", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where", "Xor",
}  # fmt: skip


def check(model: ModelProto, shape: Sequence[int]) -> None:
    """Check that a graph makes a spectrogram out of a spectrogram, and that what it computes is not huge.

    Parameters
    ----------
    model : ModelProto
        As :func:`kmdx.weights.onnx_file.read` gives it.
    shape : sequence of int
        Channels, bins and frames of the spectrogram. Axes of the graph's input may be of any size instead,
        and so may its batch, which comes first.

    Raises
    ------
    ValueError
        If its input or output has another shape, or what it computes is too large or of unknown size.
    """
    graph = model.graph
    given = _input(graph, shape)
    walk = _Walk(model, given)
    uses = Counter(name for node in graph.node for name in node.input)
    varying, held = {given.name}, 0
    for node in graph.node:
        sizes = walk.follow(node)
        held += sum(sizes.values())
        if held > MAX_VALUES:  # for a batch of one; the largest published graph needs a third
            raise ValueError(
                f"at {shown(node.output[0])}, from its {_called(node)}, it holds {held:,} values at once"
            )
        # What hangs on the shape of the input alone is a constant, too, and constants are kept.
        if node.op_type not in ("Shape", "Size") and not varying.isdisjoint(node.input):
            varying.update(node.output)
        for name in node.input:
            uses[name] -= 1
            held -= walk.values(name) if name in varying and not uses[name] and name != given.name else 0
    outputs = [_shape(walk.types[value.name]) if value.name in walk.types else None for value in graph.output]
    if outputs != [_shape(given.type)]:
        raise ValueError(f"its outputs have the shapes {outputs}, not [{_shape(given.type)}]")


class _Walk:
    """Follows a graph from its input and its constants: the types of all tensors, and the values of sizes."""

    def __init__(self, model: ModelProto, given: ValueInfoProto) -> None:
        from onnx import numpy_helper

        self.types: dict[str, TypeProto] = {given.name: given.type}
        self.numbers: dict[str, ndarray] = {}
        self.opsets = list(model.opset_import)
        self.version = max(
            (opset.version for opset in self.opsets if opset.domain in ("", "ai.onnx")), default=1
        )
        self.ir_version = model.ir_version
        for tensor in model.graph.initializer:
            self.types[tensor.name] = _type(tensor.data_type, tensor.dims)
            if math.prod(tensor.dims) <= _MAX_SIZES:
                self.numbers[tensor.name] = numpy_helper.to_array(tensor)

    def follow(self, node: NodeProto) -> dict[str, int]:
        """How many values each output of a node has."""
        for name in filter(None, node.input):
            if name not in self.types:
                raise ValueError(f"its {_called(node)} needs {shown(name)}, which is not there")
        self.types.update(self._inferred(node))
        sizes = {}
        for name in filter(None, node.output):
            shape = _shape(self.types[name]) if name in self.types else None
            if shape is None or None in shape:
                raise ValueError(
                    f"the size of {shown(name)}, from its {_called(node)}, cannot be known beforehand"
                )
            sizes[name] = math.prod(size or 0 for size in shape)
        if max(sizes.values(), default=0) <= _MAX_SIZES:
            for name, numbers in zip(node.output, self._computed(node), strict=False):
                if name and self._fits(name, numbers):
                    self.numbers[name] = numbers
        return sizes

    def values(self, name: str) -> int:
        """How many values a tensor has."""
        return math.prod(size or 0 for size in _shape(self.types[name]) or ())

    def _inferred(self, node: NodeProto) -> Mapping[str, TypeProto]:
        """The types of a node's outputs, by the standard."""
        import onnx
        from onnx import numpy_helper

        value = next((attribute.t for attribute in node.attribute if attribute.HasField("t")), None)
        if node.op_type == "Constant" and value is not None:
            return {name: _type(value.data_type, value.dims) for name in node.output}
        given = [name for name in node.input if name]
        try:
            schema = onnx.defs.get_schema(node.op_type, self.version)
            if not (
                schema.min_input <= len(node.input) <= schema.max_input
                and schema.min_output <= len(node.output) <= schema.max_output
            ):
                raise ValueError(f"its {_called(node)} has too few or too many inputs or outputs")
            numbers = {attribute.name: attribute.i for attribute in node.attribute}
            parts = numbers.get("num_outputs", len(node.output))
            if numbers.get("batch_dims", 0) < 0 or parts != len(node.output):  # these crash the inference
                raise ValueError(f"its {_called(node)} has attributes that do not fit")
            return onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self.types[name] for name in given},
                {name: numpy_helper.from_array(self.numbers[name]) for name in given if name in self.numbers},
                opset_imports=self.opsets,
                ir_version=self.ir_version,
            )
        except (
            onnx.defs.SchemaError,
            onnx.shape_inference.InferenceError,
            onnx.checker.ValidationError,
        ) as error:
            raise ValueError(f"its {_called(node)} is not right: {first_line(error)}") from error

    def _fits(self, name: str, numbers: ndarray) -> bool:
        """Whether numbers have the type and shape that were inferred."""
        from onnx import helper

        dtype = helper.tensor_dtype_to_np_dtype(self.types[name].tensor_type.elem_type)
        return numbers.dtype == dtype and list(numbers.shape) == _shape(self.types[name])

    def _computed(self, node: NodeProto) -> Sequence[ndarray]:
        """The few numbers that a node gives, if they are sizes computed from sizes, and nothing otherwise."""
        import numpy as np
        from onnx import helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            return [numpy_helper.to_array(attributes["value"].t)]
        if node.op_type in ("Shape", "Size"):
            ends = [attributes[name].i if name in attributes else None for name in ("start", "end")]
            shape = np.array(_shape(self.types[node.input[0]]) or [], np.int64)
            return [shape[slice(*ends)] if node.op_type == "Shape" else shape.prod(dtype=np.int64)]
        names = [name for name in dict.fromkeys(node.input) if name]
        given = {name: self.numbers[name] for name in names if name in self.numbers}
        if node.op_type not in _COMPUTED or len(given) < len(names) or "noop_with_empty_axes" in attributes:
            return []
        if not _same_everywhere(node.op_type, [given[name] for name in node.input if name]):
            return []
        inputs, outputs = (
            [helper.make_value_info(name, self.types[name]) for name in each if name]
            for each in (names, node.output)
        )
        try:
            alone = ReferenceEvaluator(
                helper.make_graph([node], "node", inputs, outputs), opsets={"": self.version}
            )
            with np.errstate(all="ignore"):
                found = dict(zip(alone.output_names, alone.run(None, given), strict=True))
        # Inputs that the standard does not allow; ONNX Runtime will refuse them, too.
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ):
            return []
        return [np.asarray(found.get(name, ())) for name in node.output]


def _same_everywhere(operator: str, given: Sequence[ndarray]) -> bool:
    """Whether the standard leaves no doubt what an operator gives of these numbers."""
    import numpy as np

    if any(numbers.dtype.kind not in "biuf" for numbers in given):
        return False
    real = any(numbers.dtype.kind == "f" for numbers in given)
    if operator.startswith("Reduce"):  # of NaN, or beyond what whole numbers hold
        sizes = np.abs(given[0].astype(np.float64))
        if real or not np.prod(np.maximum(sizes, 1)) * max(sizes.size, 1) < 2**53:
            return False
    if operator.startswith(("Reduce", "Squeeze")) and any(not numbers.size for numbers in given):
        return False
    match operator:
        case "Cast":  # of what whole numbers cannot hold
            return not real or bool((np.abs(given[0]) < 2**31).all())
        case "Mod" | "Range" if real:  # rounded here and there
            return False
        case "Div" | "Mod":  # of negative numbers; some versions round down
            return real or bool((given[0] >= 0).all() and (given[1] > 0).all())
    return True


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


def _type(kind: int, shape: Sequence[int]) -> TypeProto:
    from onnx import helper

    return helper.make_tensor_type_proto(kind, shape)


def _shape(kind: TypeProto) -> list[int | None] | None:
    """The sizes of a tensor, each None where it is free; None if even their number is."""
    if not kind.tensor_type.HasField("shape"):
        return None
    axes = kind.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value >= 0 else None for axis in axes]
