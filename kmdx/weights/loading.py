"""Weight files to tensors, safely: nothing in a file is ever run, and a class is only ever one of two.

The container is told by the file's first bytes, not by its name:

- torch's zip or legacy pickle: the author's ``.ckpt`` (a dict with ``state``), Meta's ``.th``
  (``klass``, ``args``, ``kwargs``, ``state``, ``training_args``) and bare state dicts (``.pt``),
- safetensors, of the hub with ``klass``, ``args`` and ``kwargs`` as JSON in the metadata,
- ONNX graphs, which stay in their file: only their form is checked here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of torch's two formats
_MEANT = "expected a .ckpt, .th, .pt, .safetensors or .onnx file"
_TUNED_FOR = ("drums", "bass", "other", "vocals")  # the order of training_args['weights']


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
        If the file is missing, damaged, of another type, quantized, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is missing or no file")
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise WeightsError(f"{path} is empty: the download was cut off; delete it and pull it again")
    if start[8:] == b"{":  # the header's length is before it
        return _load_safetensors(path)
    if start.startswith((ZIP, PICKLE)):
        return _load_pickle(path, is_zip=start.startswith(ZIP))
    if path.suffix == ".onnx":
        return _check_onnx(path)
    raise WeightsError(f"{path} is not a weight file: {_MEANT}")


def decode_arguments(text: str) -> Any:
    """A constructor's arguments out of the hub's JSON form, which writes a fraction as a dict."""
    return json.loads(text, object_hook=_fraction)


def _load_pickle(path: Path, is_zip: bool) -> Checkpoint:
    import pickle

    import torch
    from demucs.hdemucs import HDemucs
    from demucs.htdemucs import HTDemucs

    try:
        with torch.serialization.safe_globals([HTDemucs, HDemucs, Fraction]), path.open("rb") as file:
            # A zip's tensors are mapped, not copied, for which torch wants its path; but by the ending of a
            # path it would take the file for one of safetensors.
            mapped = is_zip and path.suffix != ".safetensors"
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except Exception as error:  # a damaged file fails in torch's reader in many ways
        raise _damage(path, error) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}: expected a dict of tensors")
    klass = content.get("klass")
    return Checkpoint(
        path=path,
        state=_checked_state(path, content.get("state", content)),
        klass=klass.__name__.lower() if isinstance(klass, type) else None,
        kwargs=_arguments(klass, content.get("args", ()), content.get("kwargs", {})),
        tuned_for=_tuned_for(content.get("training_args")),
    )


def _load_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise _damage(path, error) from error
    if "structure" in metadata:
        raise _quantized(path)
    klass = _allowed_class(path, metadata.get("klass"))
    try:
        args = decode_arguments(metadata.get("args", "[]"))
        kwargs = decode_arguments(metadata.get("kwargs", "{}"))
    except ValueError as error:
        raise _damage(path, error) from error
    return Checkpoint(
        path=path,
        state=_checked_state(path, state),
        klass=klass.__name__.lower() if klass else None,
        kwargs=_arguments(klass, args, kwargs),
    )


def _check_onnx(path: Path) -> Checkpoint:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError) as error:
        raise _damage(path, error) from error
    if not (graph.node and graph.input and graph.output):
        raise WeightsError(f"{path} is damaged: it holds no ONNX graph; delete it and pull it again")
    return Checkpoint(path=path, state=None)


def _allowed_class(path: Path, name: str | None) -> type | None:
    """The class of that dotted name; never imported by name, only compared with the two there are."""
    if name is None:
        return None
    from demucs.hdemucs import HDemucs
    from demucs.htdemucs import HTDemucs

    for klass in (HTDemucs, HDemucs):
        if name == f"{klass.__module__}.{klass.__qualname__}":
            return klass
    raise WeightsError(f"{path} is refused: it asks for the class {name}, not for HTDemucs or HDemucs")


def _checked_state(path: Path, state: Any) -> dict[str, Tensor]:
    import torch

    if isinstance(state, Mapping) and "__quantized" in state:
        raise _quantized(path)
    if not (isinstance(state, Mapping) and state):
        raise WeightsError(f"{path} holds no state dict: expected names with tensors")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise WeightsError(f"{path} holds no state dict: {name!r} is a {type(value).__name__}")
    return dict(state)


def _arguments(klass: type | None, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of the network's constructor, the positional ones by their names."""
    named = zip(inspect.signature(klass).parameters, args, strict=False) if klass else ()
    return {**dict(named), **kwargs}


def _fraction(value: dict[str, Any]) -> Any:
    if value.get("_type") == "fraction":
        return Fraction(value["numerator"], value["denominator"])
    return value


def _tuned_for(training_args: Any) -> str | None:
    weights = training_args.get("weights") if isinstance(training_args, Mapping) else None
    if not (isinstance(weights, list) and len(weights) == len(_TUNED_FOR)):
        return None
    chosen = [source for source, weight in zip(_TUNED_FOR, weights, strict=True) if weight]
    return chosen[0] if len(chosen) == 1 else None


def _refusal(path: Path, error: Exception) -> WeightsError:
    """A pickle that torch's safe reader does not take: mostly one that names a function or class."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return WeightsError(f"{path} is refused: it is a pickle that would run code ({named[1]})")
    return WeightsError(f"{path} is refused: it is damaged, or a pickle of something else than tensors")


def _damage(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is damaged or cut off ({_first_line(error)}); delete it and pull it again")


def _quantized(path: Path) -> WeightsError:
    return WeightsError(f"{path} is refused: its state is quantized (diffq); pull the full-size weights")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
