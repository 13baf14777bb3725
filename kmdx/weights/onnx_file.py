"""ONNX graphs that can be run without surprises, whoever wrote them.

ONNX Runtime runs loops without end, reads other files that a graph names, and allocates whatever a graph
asks for, some of it while it opens the graph. So a graph is checked before the runtime sees it: it must be
a plain chain of standard operations, its constants must be in the file and hold numbers, and the size of
all that it computes must be known beforehand (:mod:`kmdx.weights.onnx_trial`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kmdx.errors import shown
from kmdx.weights.pickled import Refused

if TYPE_CHECKING:
    from numpy import ndarray
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

STANDARD_DOMAINS = ("", "ai.onnx")
_MAX_NODES = 10_000  # the largest separation networks have about 3,000
_RANDOM = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
)  # fmt: skip
_MAY_BE_INFINITE = ("Clip", "Constant", "Pad")  # operators whose attributes are limits or fill values


def read(path: Path) -> ModelProto:
    """Read a graph and check its nodes and constants; nothing is run, and no other file is opened.

    Raises
    ------
    Refused
        If it has control flow, random numbers, functions or operations of its own, or a constant that is
        elsewhere, damaged, NaN, or infinite and no mask or limit.
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
    """Refuse a Dropout that draws random numbers, or that may, as its third input decides."""
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
    """All constants of a graph: its own, and those of nodes."""
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
        raise Refused(f"is refused: its tensor {name} has not as many values as its shape says") from error
    if not _are_numbers(values, masks=True):
        raise Refused(f"is refused: its tensor {name} holds NaN or infinity; export it again")


def _are_numbers(values: ndarray, masks: bool) -> bool:
    """Whether values are finite, or may be infinite because they are a mask or a limit.

    A mask of attention has -inf where nothing is to be seen and 0, or a penalty by distance, elsewhere. A
    limit is a single value. A damaged tensor of weights has values of both signs.
    """
    import numpy as np

    if values.dtype.kind != "f" or np.isfinite(values).all():
        return True
    return masks and not np.isnan(values).any() and (values.size == 1 or bool((values <= 0).all()))


def _types() -> frozenset[int]:
    """What constants may be: the numbers that numpy has, too."""
    from onnx import TensorProto

    names = ("FLOAT", "FLOAT16", "DOUBLE", "BOOL")
    whole = (f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
    return frozenset(TensorProto.DataType.Value(name) for name in (*names, *whole))
