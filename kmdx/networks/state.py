"""Strict loading of a state dict, with one line that says what does not fit, into a network built for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class NoInitialization(TorchFunctionMode):
    """While it is on, networks are built without the drawing of random weights that are replaced at once."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what initializes, and do everything else."""
        drawing = function in (Tensor.normal_, Tensor.uniform_)
        if drawing or getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def load_strictly(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make ``state`` the parameters and buffers of ``module``, floating tensors as float32.

    The tensors are taken over, not copied, so the module may have been built under :class:`NoInitialization`.

    Raises
    ------
    ValueError
        If a tensor is missing, unknown or of another shape; says how many and names the first.
    """
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [name for name in own if name in state and own[name].shape != state[name].shape],
    }
    if any(problems.values()):
        counts = ", ".join(f"{len(names)} {what} ({names[0]})" for what, names in problems.items() if names)
        raise ValueError(f"another network's weights: of {len(own)} tensors {counts}")
    floats = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    module.load_state_dict(floats, strict=True, assign=True)
