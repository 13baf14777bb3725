"""Weight files to tensors, safely: nothing in a file is ever run, and only two classes are accepted.

The first bytes of a file determine its format, not its name:

- torch's zip or legacy pickle: a bare state dict (``.pt``), or one under the key ``state`` (the author's
  ``.ckpt``, and Meta's ``.th`` with ``klass``, ``args``, ``kwargs`` and ``training_args`` next to it),
  ``state_dict``, ``model`` or ``model_state_dict`` (other trainers),
- safetensors, on the hub with ``klass``, ``args`` and ``kwargs`` as JSON in the metadata,
- ONNX graphs, which stay in their file and are only checked here.

What a file declares is compared with its size before memory is allocated for it. Tensors are mapped from
the file. NaN and infinity are detected here, where the file and the tensor can be named.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx import bounded
from kmdx.errors import Refused, WeightsError, first_line, shown
from kmdx.weights import onnx_file, torch_file
from kmdx.weights.torch_file import Call, Name, is_tensor

if TYPE_CHECKING:
    from torch import Tensor

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of torch's two formats
_EXPECTED = "expected a .ckpt, .th, .pt, .safetensors or .onnx file"
_WRAPPERS = ("state", "state_dict", "model_state_dict", "model")  # the first is the author's and Meta's
_MAX_DEPTH = 4  # of wrappers in wrappers
_MAX_TENSORS = 30_000  # a BS-RoFormer of 53 stems has 13,600
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_FLOAT32_MAX = 3.4028234663852886e38  # networks compute in float32, whatever is stored
_QUANTIZED = "is refused: its state is quantized (diffq); pull the full-size weights"
_TUNED_FOR = ("drums", "bass", "other", "vocals")  # the order of training_args['weights']
_MAX_HEADER, _MAX_METADATA = 1 << 24, 1 << 20  # bytes of a safetensors file's header and of its arguments
_SAFETENSORS_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
# To open a graph and to run it once: seconds of a processor, and bytes of address space.
_SECONDS, _BYTES_PER_SECOND = 3, 2 * 10**7  # with the libraries, which take less than 1
_LIBRARIES, _COPIES = 6 * 10**8, 8  # of the file
_MULTIPLICATIONS_PER_SECOND = 10**9  # at least
_BYTES_PER_VALUE = 16  # float64, or float32 and as much again for a layer's own needs
_GIT_LFS = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/")
_FRACTION = re.compile(r"(-?\d{1,18})(?:/(\d{1,18}))?")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file."""

    path: Path
    state: dict[str, Tensor] | None  # the state dict in the stored precision; None for ONNX
    klass: str | None = None  # ``htdemucs`` or ``hdemucs``, if the file states it
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """How the file says to build the network; a segment in seconds may be a ``Fraction``."""
    tuned_for: str | None = None
    """The one source for which the network was tuned, according to ``training_args``."""


def load(path: Path | str) -> Checkpoint:
    """Read a weight file.

    Raises :class:`WeightsError` if the file is missing, damaged, of another type, quantized, a pickle that
    would run code or a Git LFS pointer; if it contains NaN or infinity, or declares more than it contains.
    """
    path = Path(path)
    start = _start(path)
    try:
        if start[8:9] == b"{":  # the header's length is before it
            return _load_safetensors(path, int.from_bytes(start[:8], "little"))
        if start.startswith((_ZIP, _PICKLE)):
            return _load_torch(path)
        if path.suffix.lower() == ".onnx":
            onnx_file.read(path)
            return Checkpoint(path=path, state=None)
    except Refused as error:
        raise WeightsError(f"{path} {error}") from error
    except (ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or cut off ({first_line(error)}); delete it and download it again"
        ) from error
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise WeightsError(f"{path} is a web page, not a weight file: download the file itself")
    raise WeightsError(f"{path} is not a weight file: {_EXPECTED}")


def check_graph(path: Path, shape: Sequence[int]) -> None:
    """Check that it is safe for ONNX Runtime to run a graph, by running it once within limits.

    Parameters
    ----------
    shape : sequence of int
        Channels, bins and frames of its input and output spectrogram.

    Raises
    ------
    WeightsError
        As :func:`load` does.
    ValueError
        If its input or output has another size, it needs too much memory or time, or running it fails.
    """
    if load(path).state is not None:
        raise ValueError("expected an ONNX graph, found tensors")
    if importlib.util.find_spec("onnxruntime") is None:
        return  # nothing will run it
    seconds = _SECONDS + path.stat().st_size // _BYTES_PER_SECOND
    memory = _LIBRARIES + _COPIES * path.stat().st_size
    try:
        found = bounded.call(onnx_file.cost, str(path), list(shape), seconds=seconds, memory=memory)
        if "problem" in found:
            raise ValueError(found["problem"])
        bounded.call(
            onnx_file.run,
            str(path),
            found["input"],
            seconds=seconds + found["work"] // _MULTIPLICATIONS_PER_SECOND,
            memory=memory + _BYTES_PER_VALUE * found["held"],
        )
    except bounded.Failed as error:
        raise ValueError(f"its graph cannot be run: {error}") from error


def decode_arguments(text: str) -> Any:
    """Decode a constructor's arguments from the hub's JSON, in which a fraction is a dict.

    Raises :class:`Refused` if the text is not JSON, is nested too deeply, or has a fraction without a value.
    """
    try:
        return json.loads(text, object_hook=_decoded_fraction)
    except Refused:
        raise
    except ValueError as error:
        raise Refused(f"is refused: its arguments are not JSON ({first_line(error)})") from error
    except RecursionError as error:
        raise Refused("is refused: its arguments are nested too deeply") from error


def _start(path: Path) -> bytes:
    """The first bytes of a file that is not empty and not a Git LFS pointer."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing or is not a file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise WeightsError(f"{path} is empty: the download was cut off; delete it and download it again")
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
    for name, call in _find_state(content).items():
        try:
            state[name] = file.tensor(call)
        except ValueError as error:
            raise _bad_tensor(name, str(error)) from error
    klass = content.get("klass")
    klass = str(klass) if isinstance(klass, Name) else None
    arguments = content.get("args", ()), content.get("kwargs", {})
    return _checkpoint(path, state, klass, *arguments, _tuned_for(content.get("training_args")))


def _load_safetensors(path: Path, header_bytes: int) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    if header_bytes > min(_MAX_HEADER, path.stat().st_size):
        raise ValueError(f"it declares a header of {header_bytes:,} bytes")
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if len(names) > _MAX_TENSORS:
                raise ValueError(f"it has {len(names):,} tensors, more than {_MAX_TENSORS:,}")
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if kind not in _SAFETENSORS_TYPES:
                    raise _bad_tensor(name, f"is of the type {kind}")
                state[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error
    if "structure" in metadata:
        raise Refused(_QUANTIZED)
    if not state:
        raise Refused("holds no state dict: expected names with tensors")
    args, kwargs = metadata.get("args", "[]"), metadata.get("kwargs", "{}")
    if len(args) + len(kwargs) > _MAX_METADATA:
        raise Refused(f"is refused: its arguments have more than {_MAX_METADATA:,} characters")
    return _checkpoint(path, state, metadata.get("klass"), decode_arguments(args), decode_arguments(kwargs))


def _checkpoint(
    path: Path,
    state: dict[str, Tensor],
    klass: str | None,
    args: Any,
    kwargs: Any,
    tuned_for: str | None = None,
) -> Checkpoint:
    """A checkpoint of checked tensors and arguments."""
    _check_tensors(state, path.stat().st_size)
    network = None if klass is None else _class(klass)
    name = network.__name__.lower() if network else None
    return Checkpoint(path, state, name, _arguments(network, args, kwargs), tuned_for)


def _find_state(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Find the state dict in a checkpoint: all of it, or what is under a key that trainers use for it.

    Anything next to it (an optimizer, a copy with averaged weights under a key such as ``ema``) is ignored.
    Raises :class:`Refused` if there is none, or two, or it is quantized; the message names the keys that
    exist.
    """
    found = content
    for _ in range(_MAX_DEPTH):
        inner = {key: found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)}
        if "__quantized" in found or any("__quantized" in value for value in inner.values()):
            raise Refused(_QUANTIZED)
        inner = {key: value for key, value in inner.items() if _places(value)}
        if not inner:
            break
        if len(inner) > 1 and _WRAPPERS[0] not in inner:
            raise Refused(f"holds state dicts under {' and '.join(inner)}: save it again with one of them")
        found = next(iter(inner.values()))
    tensors = sum(map(is_tensor, found.values()))
    if not tensors and (places := _places(content)):
        raise Refused(
            f"holds its tensors under {' and '.join(map(shown, places[:3]))}: expected them at the top, or "
            f"under {', '.join(_WRAPPERS)}; save that part alone, or rename its key"
        )
    for name, value in found.items():
        if not (isinstance(name, str) and is_tensor(value)):
            raise Refused(f"holds no state dict: {shown(str(name))} is of the type {_kind(value)}")
    if not tensors:
        raise Refused("holds no state dict: expected names with tensors")
    if tensors > _MAX_TENSORS:
        raise ValueError(f"it has {tensors:,} tensors, more than {_MAX_TENSORS:,}")
    return dict(found)


def _check_tensors(state: Mapping[str, Tensor], file_bytes: int) -> None:
    """Check that tensors are not larger than their file, and that they contain numbers.

    Raises
    ------
    ValueError
        If the file is too small for them. Twice its size is allowed: a tensor may have two names.
    Refused
        If a tensor is complex or of a rare type, or contains NaN, infinity or more than float32 can hold.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > 2 * file_bytes:
        raise ValueError(f"its tensors declare {size:,} bytes, but the file has {file_bytes:,}")
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue  # a counter, perhaps
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _FLOATS:
            raise _bad_tensor(name, f"is of the type {kind}, not one of {', '.join(_FLOATS)}")
        if tensor.numel():
            ends = [abs(float(end)) for end in tensor.aminmax()]  # NaN, where one of the values is NaN
            if not all(math.isfinite(end) and end <= _FLOAT32_MAX for end in ends):
                raise _bad_tensor(name, "holds NaN or infinity")


def _bad_tensor(name: str, reason: str) -> Refused:
    """The error for a tensor that cannot belong to a network."""
    return Refused(f"is refused: its tensor {shown(name)} {reason}; export the weights again, or pull them")


def _kind(value: Any) -> str:
    return shown(value.name) if isinstance(value, Call) else type(value).__name__


def _places(content: Mapping[Any, Any]) -> list[str]:
    """The dotted paths of all dicts in a checkpoint that contain tensors, the largest first."""
    found: dict[str, int] = {}
    waiting: deque[tuple[str, Mapping[Any, Any]]] = deque([("", content)])
    seen: set[int] = set()
    while waiting:
        path, part = waiting.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if tensors := sum(map(is_tensor, part.values())):
            found[path] = tensors
        else:
            waiting += [
                (f"{path}.{key}" if path else str(key), inner)
                for key, inner in part.items()
                if isinstance(inner, dict)
            ]
    return sorted(found, key=lambda path: -found[path])


def _class(name: str) -> type:
    """The class with that dotted name, which is compared with the two accepted ones and never imported."""
    from demucs.hdemucs import HDemucs
    from demucs.htdemucs import HTDemucs

    for klass in (HTDemucs, HDemucs):
        if name == f"{klass.__module__}.{klass.__qualname__}":
            return klass
    raise Refused(f"is refused: it asks for the class {shown(name)}, not for HTDemucs or HDemucs")


def _arguments(klass: type | None, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of the network's constructor, all by name."""
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
    """The fraction that a pickle stores as two numbers or as text."""
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
