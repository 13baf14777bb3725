"""Which part of a checkpoint is the state dict, and whether its tensors can be a network's."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kmdx.errors import shown
from kmdx.weights.pickled import Call, Refused
from kmdx.weights.torch_file import is_tensor

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state", "state_dict", "model_state_dict", "model")  # the first is the author's and Meta's
MAX_TENSORS = 10_000  # the largest separation networks have about 2,000
FLOATS = ("float16", "bfloat16", "float32", "float64")
QUANTIZED = "is refused: its state is quantized (diffq); pull the full-size weights"
_MAX_DEPTH = 4  # of wrappers in wrappers
_FLOAT32_MAX = 3.4028234663852886e38  # networks compute in it, whatever is stored


def find(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict in a checkpoint: all of it, or what is under a key that trainers use for it.

    What is next to it (an optimizer, a copy with averaged weights under a key such as ``ema``) is ignored.

    Raises
    ------
    Refused
        If there is none, or two, or it is quantized; the message names the keys of what there is.
    """
    found = content
    for _ in range(_MAX_DEPTH):
        inner = {key: found[key] for key in WRAPPERS if isinstance(found.get(key), dict)}
        if "__quantized" in found or any("__quantized" in value for value in inner.values()):
            raise Refused(QUANTIZED)
        inner = {key: value for key, value in inner.items() if _places(value)}
        if not inner:
            break
        if len(inner) > 1 and WRAPPERS[0] not in inner:
            raise Refused(f"holds state dicts under {' and '.join(inner)}: save it again with one of them")
        found = next(iter(inner.values()))
    tensors = sum(map(is_tensor, found.values()))
    if not tensors and (places := _places(content)):
        raise Refused(
            f"holds its tensors under {' and '.join(map(shown, places[:3]))}: expected them at the top, or "
            f"under {', '.join(WRAPPERS)}; save that part alone, or rename its key"
        )
    for name, value in found.items():
        if not (isinstance(name, str) and is_tensor(value)):
            raise Refused(f"holds no state dict: {shown(str(name))} is of the type {_kind(value)}")
    if not tensors:
        raise Refused("holds no state dict: expected names with tensors")
    if tensors > MAX_TENSORS:
        raise ValueError(f"it has {tensors:,} tensors, more than {MAX_TENSORS:,}")
    return dict(found)


def check(state: Mapping[str, Tensor], file_bytes: int) -> None:
    """Check that tensors are no larger than their file, and that they hold numbers.

    Raises
    ------
    ValueError
        If the file is too small for them. Twice its size is allowed: a tensor may have two names.
    Refused
        If a tensor is complex or of a rare type, or holds NaN, infinity, or what float32 cannot hold.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > 2 * file_bytes:
        raise ValueError(f"its tensors declare {size:,} bytes, and the file has {file_bytes:,}")
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue  # a counter, perhaps
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in FLOATS:
            raise bad_tensor(name, f"is of the type {kind}, not one of {', '.join(FLOATS)}")
        if tensor.numel():
            ends = [abs(float(end)) for end in tensor.aminmax()]  # NaN, where one of the values is NaN
            if not all(math.isfinite(end) and end <= _FLOAT32_MAX for end in ends):
                raise bad_tensor(name, "holds NaN or infinity")


def bad_tensor(name: str, reason: str) -> Refused:
    """A tensor that cannot be a network's, and why."""
    return Refused(f"is refused: its tensor {shown(name)} {reason}; export the weights again, or pull them")


def _kind(value: Any) -> str:
    return shown(value.name) if isinstance(value, Call) else type(value).__name__


def _places(content: Mapping[Any, Any]) -> list[str]:
    """The dotted paths to all dicts in a checkpoint that have tensors, that with the most tensors first."""
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
