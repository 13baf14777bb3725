"""A TFC-TDF U-Net with batch normalization, reconstructed from its exported ONNX graph.

The names in a graph do not identify modules: the published training code uses other names, and the exporter
generates names for folded constants. So the graph is followed from its input to its output. Each node must be
the one that the U-Net has at that point (operation, inputs, attributes, shapes of constants), and no node may
be left over. The parameters found on the way are those of the network:

- ``Conv``: usually with the next norm folded into it; that norm then becomes an identity;
- ``ConvTranspose``: unchanged, followed by its norm;
- ``MatMul``: the transposed weight of a linear layer, followed by its norm;
- ``BatchNormalization``: unchanged; an epsilon other than torch's is added to the variance.

The two 1×1 convolutions commute with the transposition of time and frequency and may come before or after it.
Nodes that change nothing (``Identity``, and ``Cast`` from float32 to float32) are ignored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from kmdx.errors import WeightsError
from kmdx.weights import onnx_file

if TYPE_CHECKING:
    from numpy import ndarray
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto
    from torch import Tensor

_SPECTRUM_CHANNELS = 4  # real and imaginary part of left and right
_EPSILON = 1e-5  # of torch's batch norms
_OLDEST_OPSET = 9  # the operations used here have not changed since
_WINDOW = {"auto_pad": b"NOTSET", "dilations": [1, 1], "group": 1, "pads": [0, 0, 0, 0], "strides": [1, 1]}
_DEFAULTS: dict[str, dict[str, Any]] = {  # attributes that a node may omit
    "Conv": _WINDOW,
    "ConvTranspose": {**_WINDOW, "output_padding": [0, 0]},
    "BatchNormalization": {"training_mode": 0},
}
_FREE = ("epsilon", "momentum")  # the first is handled separately, the second is only for training


@dataclass(frozen=True)
class UnetGraph:
    """The content of a U-Net's graph."""

    bins: int
    frames: int
    """``bins`` and ``frames``: size of its input and output spectrogram, ``(batch, 4, bins, frames)``."""
    sizes: dict[str, Any]
    """Sizes of the network: the arguments of ``TfcTdfConfig`` other than the spectrogram."""
    state: dict[str, Tensor]  # the state dict of that ``TfcTdf``, in float32


def unet(source: Path | str | ModelProto, spectrum: tuple[int, int] | None = None) -> UnetGraph:
    """Read a TFC-TDF U-Net from an ONNX file or a parsed graph.

    Raises :class:`WeightsError` if the graph is not exactly such a U-Net with batch normalization and float32
    weights.

    Parameters
    ----------
    spectrum : tuple of int, optional
        Bins and frames that it will be run with, if the graph leaves them open.
    """
    model = _parsed(Path(source)) if isinstance(source, str | Path) else source
    walk = _Walk(model, spectrum)
    sizes = _sizes(walk)
    _follow(walk, sizes["layers"] // 2, sizes["convolutions"], sizes["growth"], sizes["bottleneck"])
    return UnetGraph(*walk.spectrum, sizes, walk.state)


def _sizes(walk: _Walk) -> dict[str, Any]:
    """The sizes that a U-Net with these nodes and first weights must have."""
    bins, frames = walk.spectrum
    levels = walk.count("ConvTranspose")
    layers = 2 * levels + 1
    convolutions, rest = divmod(walk.count("Conv") - 2 - levels, layers)
    if levels < 1 or convolutions < 1 or rest:
        _refuse(f"it has {walk.count('Conv')} Conv and {levels} ConvTranspose nodes")
    growth = walk.weight_shape("Conv")[0]
    narrow = walk.weight_shape("MatMul")[1]
    bottleneck, rest = divmod(bins, narrow)
    if bottleneck < 1 or rest or bins % (2**levels * bottleneck) or frames % 2**levels:
        _refuse(f"{bins} bins, {frames} frames and a bottleneck of {narrow} do not suit {levels} levels")
    return {
        "layers": layers,
        "convolutions": convolutions,
        "growth": growth,
        "norm_groups": None,
        "bottleneck": bottleneck,
    }


def _follow(walk: _Walk, levels: int, convolutions: int, growth: int, bottleneck: int) -> None:
    """Follow the whole graph in the steps of ``TfcTdf.unet``."""
    channels = [growth * (level + 1) for level in range(levels + 1)]
    bins = [walk.spectrum[0] >> level for level in range(levels + 1)]

    def block(module: str, x: str, level: int) -> str:
        square = (channels[level], channels[level], 3, 3)
        for number in range(convolutions):
            x = walk.convolution(f"{module}.tfc.H.{number}", x, square, pads=[1, 1, 1, 1])
        wide, narrow = bins[level], bins[level] // bottleneck
        tdf = walk.linear(f"{module}.tdf", 0, x, (wide, narrow), channels[level])
        tdf = walk.linear(f"{module}.tdf", 3, tdf, (narrow, wide), channels[level])
        return walk.join("Add", x, tdf)

    x = walk.input
    swaps_first = walk.goes_into(x, "Transpose")
    x = walk.swap(x) if swaps_first else x
    x = walk.convolution("first_conv", x, (growth, _SPECTRUM_CHANNELS, 1, 1))
    x = x if swaps_first else walk.swap(x)
    skips = []
    for i in range(levels):
        x = block(f"encoding_blocks.{i}", x, i)
        skips.append(x)
        x = walk.convolution(f"ds.{i}", x, (channels[i + 1], channels[i], 2, 2), strides=[2, 2])
    x = block("bottleneck_block", x, levels)
    for number, i in enumerate(reversed(range(levels))):
        shape = (channels[i + 1], channels[i], 2, 2)
        x = walk.convolution(f"us.{number}", x, shape, "ConvTranspose", strides=[2, 2])
        x = block(f"decoding_blocks.{number}", walk.join("Mul", x, skips.pop()), i)
    swaps_first = walk.goes_into(x, "Transpose")
    x = walk.swap(x) if swaps_first else x
    x = walk.plain_convolution("final_conv.0", x, (_SPECTRUM_CHANNELS, growth, 1, 1))
    walk.end(x if swaps_first else walk.swap(x))


class _Found(NamedTuple):
    """A node that meets the expectations: its output tensor, its constants and its attributes."""

    output: str
    constants: list[ndarray]
    attributes: dict[str, Any]


class _Walk:
    """Follows a graph from its input, node by node, and collects the parameters on the way.

    Every step takes the name of a tensor, checks the node that has it as input, and returns the name of that
    node's output tensor.
    """

    def __init__(self, model: ModelProto, spectrum: tuple[int, int] | None) -> None:
        graph = model.graph
        _check_standard(model)
        self.origins = _origins(graph)
        self.constants = _constants(graph, self.origins)
        idle = self.constants.keys() | self.origins.keys()
        self.nodes = [node for node in graph.node if node.output[0] not in idle]
        self.left = {node.output[0]: node for node in self.nodes}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for given in self._inputs(node):
                self.users[given].append(node)
        inputs = onnx_file.inputs(graph)
        if len(inputs) != 1 or len(graph.output) != 1:
            _refuse(f"it has {len(inputs)} inputs and {len(graph.output)} outputs, not one each")
        self.input = inputs[0].name
        self.output = self.origins.get(graph.output[0].name, graph.output[0].name)
        self.spectrum = _spectrum(inputs[0].type.tensor_type, spectrum)
        self.state: dict[str, Tensor] = {}

    def count(self, operation: str) -> int:
        """Number of nodes with this operation."""
        return sum(node.op_type == operation for node in self.nodes)

    def weight_shape(self, operation: str) -> tuple[int, ...]:
        """Shape of the weight of the first node with this operation."""
        for node in self.nodes:
            if node.op_type == operation:
                weight = self.constants.get(self._inputs(node)[1]) if len(node.input) > 1 else None
                if weight is None or weight.ndim < 2 or not weight.size:
                    _refuse(f"{node.output[0]} has no float32 weight")
                return weight.shape
        _refuse(f"it has no {operation}")

    def goes_into(self, tensor: str, operation: str) -> bool:
        """Whether a tensor goes into one node with this operation and nowhere else."""
        return [node.op_type for node in self.users[tensor]] == [operation]

    def swap(self, tensor: str) -> str:
        """Transpose time and frequency."""
        return self._take("Transpose", [tensor], perm=[0, 1, 3, 2]).output

    def join(self, operation: str, *tensors: str) -> str:
        """Combine two tensors."""
        return self._take(operation, tensors).output

    def convolution(
        self, module: str, tensor: str, shape: tuple[int, ...], operation: str = "Conv", **attributes: Any
    ) -> str:
        """A convolution, its norm (unless that is folded into it) and ReLU."""
        channels = _channels(operation, shape)
        tensor = self.plain_convolution(f"{module}.0", tensor, shape, operation, **attributes)
        if self.goes_into(tensor, "Relu"):
            self._keep_identity(f"{module}.1", channels)
        else:
            tensor = self._norm(f"{module}.1", tensor, channels)
        return self._take("Relu", [tensor]).output

    def plain_convolution(
        self, module: str, tensor: str, shape: tuple[int, ...], operation: str = "Conv", **attributes: Any
    ) -> str:
        """A convolution with a bias, without norm and activation."""
        shapes = [shape, (_channels(operation, shape),)]
        found = self._take(operation, [tensor], shapes, kernel_shape=list(shape[2:]), **attributes)
        weight, bias = found.constants
        self._keep(module, weight=weight, bias=bias)
        return found.output

    def linear(self, module: str, number: int, tensor: str, shape: tuple[int, ...], channels: int) -> str:
        """A linear layer along frequency, the child ``number`` of its module, its norm and ReLU."""
        found = self._take("MatMul", [tensor], [shape])
        self._keep(f"{module}.{number}", weight=found.constants[0].T)
        tensor = self._norm(f"{module}.{number + 1}", found.output, channels)
        return self._take("Relu", [tensor]).output

    def end(self, tensor: str) -> None:
        """Check that this tensor is the graph's output, and that no node remains."""
        if tensor != self.output or self.users[tensor]:
            _refuse(f"its output is {self.output}, not {tensor}")
        if self.left:
            node = next(iter(self.left.values()))
            _refuse(f"it has {len(self.left)} more nodes than that, first the operator {node.op_type}")

    def _norm(self, module: str, tensor: str, channels: int) -> str:
        import numpy as np

        found = self._take("BatchNormalization", [tensor], [(channels,)] * 4)
        weight, bias, mean, variance = found.constants
        usual = float(np.float32(_EPSILON))  # attributes are float32
        excess = found.attributes.get("epsilon", usual) - usual
        if excess:
            variance = (variance.astype(np.float64) + excess).astype(np.float32)
        if not (variance + np.float32(_EPSILON) > 0).all():
            _refuse(f"{found.output} has a variance that is not positive")
        self._keep_norm(module, weight, bias, mean, variance)
        return found.output

    def _keep_identity(self, module: str, channels: int) -> None:
        """Add a norm that changes nothing."""
        import numpy as np

        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        self._keep_norm(module, ones, zeros, zeros, ones - np.float32(_EPSILON))

    def _keep_norm(self, module: str, *values: ndarray) -> None:
        import numpy as np

        parameters = dict(zip(("weight", "bias", "running_mean", "running_var"), values, strict=True))
        self._keep(module, **parameters, num_batches_tracked=np.array(0))

    def _keep(self, module: str, **parameters: ndarray) -> None:
        import numpy as np
        import torch

        for name, values in parameters.items():
            if not np.isfinite(values).all():
                _refuse(f"its {module}.{name} holds NaN or infinity")
            self.state[f"{module}.{name}"] = torch.from_numpy(values.copy())

    def _take(
        self,
        operation: str,
        tensors: Sequence[str],
        shapes: Sequence[tuple[int, ...]] = (),
        **attributes: Any,
    ) -> _Found:
        """The only node with this operation on these tensors and constants of these shapes."""
        candidates = [node for node in self.users[tensors[0]] if node.op_type == operation]
        if len(candidates) != 1:
            others = ", ".join(node.op_type for node in self.users[tensors[0]]) or "nothing"
            _refuse(f"{tensors[0]} goes into {others}, not into one {operation}")
        node = candidates[0]
        inputs = self._inputs(node)
        given, constants = inputs[: len(tensors)], inputs[len(tensors) :]
        if sorted(given) != sorted(tensors):  # the operands of a sum or product may be in any order
            _refuse(f"{node.output[0]} is of {' and '.join(given)}, not of {' and '.join(tensors)}")
        found = [self.constants[name].shape if name in self.constants else None for name in constants]
        if found != list(shapes):
            _refuse(f"{node.output[0]} needs float32 constants of the shapes {list(shapes)}, and has {found}")
        defaults = _DEFAULTS.get(operation, {})
        if "kernel_shape" in attributes:
            defaults = {**defaults, "kernel_shape": attributes["kernel_shape"]}
        wanted = {**defaults, **attributes}
        actual = {**defaults, **_attributes(node)}
        for name in sorted((wanted.keys() | actual.keys()) - set(_FREE)):
            if actual.get(name) != wanted.get(name):
                _refuse(f"{node.output[0]} has {name} {actual.get(name)}, not {wanted.get(name)}")
        del self.left[node.output[0]]
        return _Found(node.output[0], [self.constants[name] for name in constants], actual)

    def _inputs(self, node: NodeProto) -> list[str]:
        return [self.origins.get(name, name) for name in node.input]


def _channels(operation: str, shape: tuple[int, ...]) -> int:
    """Number of output channels of a convolution whose weight has this shape."""
    return shape[1] if operation == "ConvTranspose" else shape[0]


def _attributes(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    try:
        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    except ValueError:
        _refuse(f"the operator {node.op_type} has an attribute of unknown type")


def _parsed(path: Path) -> ModelProto:
    try:
        return onnx_file.parse(path)
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as an ONNX graph: it is damaged or missing") from error


def _check_standard(model: ModelProto) -> None:
    """Check that all nodes are standard ONNX, and that every tensor has one origin."""
    graph = model.graph
    versions = [opset.version for opset in model.opset_import if opset.domain in onnx_file.STANDARD_DOMAINS]
    if len(versions) != 1 or versions[0] < _OLDEST_OPSET:
        _refuse(f"it is of opset {', '.join(map(str, versions)) or 'unknown'}, not {_OLDEST_OPSET} or later")
    if len(model.functions):
        _refuse("it has functions of its own")
    for node in graph.node:
        if node.domain not in onnx_file.STANDARD_DOMAINS:
            _refuse(f"{node.op_type} is an operation of {node.domain}")
        if len(node.output) != 1:
            _refuse(f"{node.op_type} gives {len(node.output)} tensors, not one")
    tensors = (*graph.initializer, *onnx_file.inputs(graph))
    origins = [*(tensor.name for tensor in tensors), *(node.output[0] for node in graph.node)]
    if len(set(origins)) != len(origins):
        _refuse("two of its tensors have the same name")


def _origins(graph: GraphProto) -> dict[str, str]:
    """The original of each tensor that a node only passes on, for float32 (other types are refused)."""
    from onnx import TensorProto

    origins: dict[str, str] = {}
    for node in graph.node:
        to = _attributes(node).get("to")
        if node.op_type == "Identity" or (node.op_type == "Cast" and to == TensorProto.FLOAT):
            for given in node.input:
                origins[node.output[0]] = origins.get(given, given)
    return origins


def _constants(graph: GraphProto, origins: Mapping[str, str]) -> dict[str, ndarray]:
    """The float32 tensors that do not depend on the input, including weights transposed in the graph."""
    constants = {tensor.name: _array(tensor) for tensor in graph.initializer if _is_plain(tensor)}
    for node in graph.node:
        attributes = _attributes(node)
        if node.op_type == "Constant" and "value" in attributes and _is_plain(attributes["value"]):
            constants[node.output[0]] = _array(attributes["value"])
        elif node.op_type == "Transpose" and attributes.get("perm") == [1, 0]:
            given = node.input[0] if len(node.input) else ""
            weight = constants.get(origins.get(given, given))
            if weight is not None and weight.ndim == 2:
                constants[node.output[0]] = weight.T
    return constants


def _is_plain(tensor: TensorProto) -> bool:
    """Whether a tensor is float32 and stored in this file."""
    from onnx import TensorProto

    return tensor.data_type == TensorProto.FLOAT and tensor.data_location != TensorProto.EXTERNAL


def _array(tensor: TensorProto) -> ndarray:
    from onnx import numpy_helper

    try:
        return numpy_helper.to_array(tensor)
    except ValueError:
        _refuse(f"{tensor.name} has more or fewer values than its shape {list(tensor.dims)}")


def _spectrum(input_type: Any, free: tuple[int, int] | None) -> tuple[int, int]:
    """Bins and frames of the input, ``(batch, 4, bins, frames)``; the batch may have any size.

    Other open axes get the sizes that the network will be run with.
    """
    from onnx import TensorProto

    if input_type.elem_type != TensorProto.FLOAT:
        _refuse("its input is not float32")
    shape = [axis.dim_value or axis.dim_param or "?" for axis in input_type.shape.dim]
    if free and len(shape) == 4:
        run_with = (shape[0], _SPECTRUM_CHANNELS, *free)
        shape = [own if isinstance(own, int) else given for own, given in zip(shape, run_with, strict=True)]
    match shape:
        case [_, channels, int(bins), int(frames)] if channels == _SPECTRUM_CHANNELS:
            return bins, frames
    expected = f"batch, {_SPECTRUM_CHANNELS}, bins, frames"
    _refuse(f"its input has the shape ({', '.join(map(str, shape))}), not ({expected})")


def _refuse(reason: str) -> NoReturn:
    raise WeightsError(f"the ONNX graph is not a TFC-TDF U-Net with batch normalization: {reason}")
