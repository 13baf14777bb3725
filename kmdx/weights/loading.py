"""Weight files to tensors, safely: nothing in a file is ever run, and a class is only ever one of two.

The container is told by the file's first bytes, not by its name:

- torch's zip or legacy pickle: a bare state dict (``.pt``), or one under the key ``state`` (the author's
  ``.ckpt``, and Meta's ``.th`` with ``klass``, ``args``, ``kwargs`` and ``training_args`` next to it),
  ``state_dict``, ``model`` or ``model_state_dict`` (other trainers),
- safetensors, of the hub with ``klass``, ``args`` and ``kwargs`` as JSON in the metadata,
- ONNX graphs, which stay in their file: they are only checked here.

What a file declares is compared with its size before memory is taken for it. Tensors are mapped from the
file. Numbers that are NaN or infinite are found here, where the file and the tensor can be named.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx import bounded
from kmdx.errors import WeightsError, first_line, shown
from kmdx.weights import onnx_file, onnx_trial, state_dict, torch_file
from kmdx.weights.pickled import Call, Name, Refused

if TYPE_CHECKING:
    from torch import Tensor

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of torch's two formats
_MEANT = "expected a .ckpt, .th, .pt, .safetensors or .onnx file"
_TUNED_FOR = ("drums", "bass", "other", "vocals")  # the order of training_args['weights']
_MAX_HEADER, _MAX_METADATA = 1 << 24, 1 << 20  # bytes of a safetensors file's header and of its arguments
_SAFETENSORS_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
# To open a graph and to run it once: seconds of a processor, and bytes of address space.
_SECONDS, _BYTES_A_SECOND = 3, 2 * 10**7  # with the libraries, which take less than 1
_LIBRARIES, _COPIES = 6 * 10**8, 8  # of the file
_SLOWEST = 10**9  # multiplications a second
_BYTES_OF_A_VALUE = 16  # float64, or float32 and as much again for a layer's own needs
_GIT_LFS = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/")
_FRACTION = re.compile(r"(-?\d{1,18})(?:/(\d{1,18}))?")


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds.

    Attributes
    ----------
    path : Path
    state : dict of str to Tensor, optional
        The state dict in the precision that is stored; None for ONNX.
    klass : str, optional
        ``htdemucs`` or ``hdemucs``, where the file says so.
    kwargs : mapping
        How the file says to build the network; a segment in seconds may be a ``Fraction``.
    tuned_for : str, optional
        The one source that ``training_args`` say the network was tuned for.
    """

    path: Path
    state: dict[str, Tensor] | None
    klass: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tuned_for: str | None = None


def load(path: Path | str) -> Checkpoint:
    """Read a weight file.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, of another type, quantized, or a pickle that would run code; if it
        holds NaN or infinity, declares more than it has, or is a Git LFS pointer in place of the weights.
    """
    path = Path(path)
    start = _start(path)
    try:
        if start[8:9] == b"{":  # the header's length is before it
            return _load_safetensors(path, int.from_bytes(start[:8], "little"))
        if start.startswith((ZIP, PICKLE)):
            return _load_torch(path)
        if path.suffix.lower() == ".onnx":
            onnx_file.read(path)
            return Checkpoint(path=path, state=None)
    except Refused as error:
        raise WeightsError(f"{path} {error}") from error
    except (ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or cut off ({first_line(error)}); delete it and pull it again"
        ) from error
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise WeightsError(f"{path} is a web page, not a weight file: download the file itself")
    raise WeightsError(f"{path} is not a weight file: {_MEANT}")


def check_graph(path: Path, shape: Sequence[int]) -> None:
    """Check that an ONNX file holds a graph that ONNX Runtime can be trusted with, by running it once.

    Parameters
    ----------
    path : Path
    shape : sequence of int
        Channels, bins and frames of the spectrogram that it takes and gives.

    Raises
    ------
    WeightsError
        As :func:`load` does.
    ValueError
        If its input or output has another size, it holds or computes too much, or running it fails.
    """
    if load(path).state is not None:
        raise ValueError("it holds tensors, and an ONNX graph is needed")
    if importlib.util.find_spec("onnxruntime") is None:
        return  # nothing will run it
    seconds = _SECONDS + path.stat().st_size // _BYTES_A_SECOND
    memory = _LIBRARIES + _COPIES * path.stat().st_size
    try:
        found = bounded.call(onnx_trial.cost, str(path), list(shape), seconds=seconds, memory=memory)
        if "problem" in found:
            raise ValueError(found["problem"])
        bounded.call(
            onnx_trial.run,
            str(path),
            found["input"],
            seconds=seconds + found["work"] // _SLOWEST,
            memory=memory + _BYTES_OF_A_VALUE * found["held"],
        )
    except bounded.Failed as error:
        raise ValueError(f"its graph cannot be run: {error}") from error


def decode_arguments(text: str) -> Any:
    """A constructor's arguments out of the hub's JSON form, which writes a fraction as a dict.

    Raises
    ------
    Refused
        If the text is no JSON, nests too deeply, or has a fraction without a value.
    """
    try:
        return json.loads(text, object_hook=_decoded_fraction)
    except Refused:
        raise
    except ValueError as error:
        raise Refused(f"is refused: its arguments are no JSON ({first_line(error)})") from error
    except RecursionError as error:
        raise Refused("is refused: its arguments are nested too deeply") from error


def _start(path: Path) -> bytes:
    """The first bytes of a file, unless they tell that the weights are somewhere else."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing or no file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise WeightsError(f"{path} is empty: the download was cut off; delete it and pull it again")
    if _GIT_LFS.match(start.removeprefix(b"\xef\xbb\xbf").lstrip()):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in its repository"
        )
    return start


def _load_torch(path: Path) -> Checkpoint:
    file = torch_file.read(path)
    content = file.content
    if not isinstance(content, dict):
        what = content.name if isinstance(content, Call) else type(content).__name__
        raise Refused(
            f"holds an object of the type {what}: expected a dict of tensors, which state_dict() gives"
        )
    state = {}
    for name, call in state_dict.find(content).items():
        try:
            state[name] = file.tensor(call)
        except ValueError as error:
            raise state_dict.bad_tensor(name, str(error)) from error
    state_dict.check(state, path.stat().st_size)
    klass = content.get("klass")
    network = _class(klass) if isinstance(klass, Name) else None
    return Checkpoint(
        path=path,
        state=state,
        klass=network.__name__.lower() if network else None,
        kwargs=_arguments(network, content.get("args", ()), content.get("kwargs", {})),
        tuned_for=_tuned_for(content.get("training_args")),
    )


def _load_safetensors(path: Path, header_bytes: int) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    if header_bytes > min(_MAX_HEADER, path.stat().st_size):
        raise ValueError(f"it declares a header of {header_bytes:,} bytes")
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if len(names) > state_dict.MAX_TENSORS:
                raise ValueError(f"it has {len(names):,} tensors, more than {state_dict.MAX_TENSORS:,}")
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if kind not in _SAFETENSORS_TYPES:
                    raise state_dict.bad_tensor(name, f"is of the type {kind}")
                state[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error
    if "structure" in metadata:
        raise Refused(state_dict.QUANTIZED)
    if not state:
        raise Refused("holds no state dict: expected names with tensors")
    state_dict.check(state, path.stat().st_size)
    args, kwargs = metadata.get("args", "[]"), metadata.get("kwargs", "{}")
    if len(args) + len(kwargs) > _MAX_METADATA:
        raise Refused(f"is refused: its arguments have more than {_MAX_METADATA:,} characters")
    network = _class(metadata["klass"]) if "klass" in metadata else None
    return Checkpoint(
        path=path,
        state=state,
        klass=network.__name__.lower() if network else None,
        kwargs=_arguments(network, decode_arguments(args), decode_arguments(kwargs)),
    )


def _class(name: str) -> type:
    """The class of that dotted name; never imported by name, only compared with the two there are."""
    from demucs.hdemucs import HDemucs
    from demucs.htdemucs import HTDemucs

    for klass in (HTDemucs, HDemucs):
        if name == f"{klass.__module__}.{klass.__qualname__}":
            return klass
    raise Refused(f"is refused: it asks for the class {shown(name)}, not for HTDemucs or HDemucs")


def _arguments(klass: type | None, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of the network's constructor, the positional ones by their names."""
    if klass is None:
        return dict(kwargs) if isinstance(kwargs, dict) else {}
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise Refused("is refused: its arguments are not a list and a dict")
    names = list(inspect.signature(klass).parameters)
    if len(args) > len(names) or not all(isinstance(name, str) for name in kwargs):
        raise Refused(f"is refused: its arguments are not those of {klass.__name__}")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: _fraction(value) if isinstance(value, Call) else value for name, value in given.items()}


def _fraction(call: Call) -> Fraction:
    """The fraction that a pickle has as two numbers or as text."""
    match call.name, call.arguments:
        case "fractions.Fraction", (int(numerator), int(denominator)) if denominator:
            return Fraction(numerator, denominator)
        case "fractions.Fraction", (str(text),) if parts := _FRACTION.fullmatch(text):
            if denominator := int(parts[2] or 1):
                return Fraction(int(parts[1]), denominator)
    raise Refused(f"is refused: one of its arguments is a {shown(call.name)} without a value")


def _decoded_fraction(value: dict[str, Any]) -> Any:
    if value.get("_type") != "fraction":
        return value
    match value.get("numerator"), value.get("denominator"):
        case int(numerator), int(denominator) if denominator:
            return Fraction(numerator, denominator)
    raise Refused("is refused: one of its arguments is a fraction without a numerator and a denominator")


def _tuned_for(training_args: Any) -> str | None:
    weights = training_args.get("weights") if isinstance(training_args, Mapping) else None
    if not (isinstance(weights, list) and len(weights) == len(_TUNED_FOR)):
        return None
    chosen = [source for source, weight in zip(_TUNED_FOR, weights, strict=True) if weight]
    return chosen[0] if len(chosen) == 1 else None
