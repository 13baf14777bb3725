"""Strict loading of a state dict into a network built for it, with one line that says what does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kmdx.errors import shown

# What trainers put before the names: DataParallel, Lightning and many scripts, torch.compile.
PREFIXES = ("module.", "model.", "_orig_mod.")
_PREFIX = re.compile(rf"({'|'.join(map(re.escape, PREFIXES))})*")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile of a part of a network
_AVERAGED = re.compile(r"(\w*_)?(ema|averaged?|swa)(_\w*)?\..*|n_averaged")  # a copy, with averaged weights


class NoInitialization(TorchFunctionMode):
    """While it is on, networks are built without the drawing of random weights that are replaced at once.

    Parameters
    ----------
    values : int, optional
        How many values the parameters may have in all; checked before memory is taken for them.

    Raises
    ------
    ValueError
        From within, if a network has more.
    """

    def __init__(self, values: int | None = None) -> None:
        super().__init__()
        self.values_left = math.inf if values is None else values

    @classmethod
    def for_state(cls, state: Mapping[str, Tensor]) -> NoInitialization:
        """One that builds no network larger than a state dict.

        Twice as large, to be exact: what Demucs splits into bands of frequency it builds whole before.
        """
        return cls(2 * sum(tensor.numel() for tensor in state.values()))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what initializes, and do everything else."""
        kwargs = kwargs or {}
        drawing = function in (Tensor.normal_, Tensor.uniform_)
        if drawing or getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if function in (torch.empty, torch.zeros, torch.ones):
            sizes = args or (kwargs.get("size", ()),)
            self._take(math.prod(sizes[0] if isinstance(sizes[0], tuple | list) else sizes))
        elif function is Tensor.clone:
            self._take(args[0].numel())
        return function(*args, **kwargs)

    def _take(self, values: int) -> None:
        self.values_left -= values
        if self.values_left < 0:
            raise ValueError("another network's weights: the architecture has more parameters than the file")


def renamed(
    state: Mapping[str, Tensor], own: Collection[str], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """A state dict without what trainers put before its names, if the names are then exactly a network's.

    Parameters
    ----------
    state : mapping
    own : collection of str
        The network's names.
    optional : collection of str
        Names that the state may have on top.

    Returns
    -------
    dict
        The same state where it has none of :data:`PREFIXES`, or where they are not all that is wrong. A copy
        with averaged weights next to the network's own is left out.
    """
    names = {_COMPILED.sub("", name): name for name in state}
    if len(names) < len(state):  # two names would become one
        return dict(state)
    for prefix in dict.fromkeys(_prefixes(names, own)):
        fitting = {name: state[names[prefix + name]] for name in own if prefix + name in names}
        extra = [name for name in optional if prefix + name in names]
        rest = names.keys() - {prefix + name for name in (*fitting, *extra)}
        if _PREFIX.fullmatch(prefix) and len(fitting) == len(own) and all(map(_AVERAGED.fullmatch, rest)):
            return {**fitting, **{name: state[names[prefix + name]] for name in extra}}
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make ``state`` the parameters and buffers of ``module``, floating tensors as float32.

    The tensors are taken over, not copied, so the module may have been built under :class:`NoInitialization`.

    Raises
    ------
    ValueError
        If a tensor is missing, unknown, of another shape, or not of numbers of the kind that is needed; the
        message names the first, or a prefix of the names that is not one of :data:`PREFIXES`.
    """
    own = module.state_dict()
    state = renamed(state, own)
    problems = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [name for name in own if name in state and own[name].shape != state[name].shape],
    }
    if any(problems.values()):
        counts = ", ".join(
            f"{len(names)} {what} ({shown(names[0])})" for what, names in problems.items() if names
        )
        raise ValueError(
            _prefix_problem(state, own) or f"another network's weights: of {len(own)} tensors {counts}"
        )
    for name, tensor in state.items():
        real = tensor.is_floating_point() or (
            tensor.dtype != torch.bool and not own[name].is_floating_point()
        )
        if not real:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"its tensor {name} is of the type {kind}, and a floating-point type is needed")
    taken = {
        name: tensor.float() if own[name].is_floating_point() else tensor.to(own[name].dtype)
        for name, tensor in state.items()
    }
    module.load_state_dict(taken, strict=True, assign=True)


def _prefixes(names: Collection[str], own: Collection[str]) -> Iterator[str]:
    """What is before the first of a network's names, wherever that is among these names."""
    first = next(iter(own))
    for name in names:
        if name.endswith(first):
            yield name.removesuffix(first)


def _prefix_problem(state: Mapping[str, Tensor], own: Collection[str]) -> str | None:
    """What is wrong, if the network's names are there with something before them."""
    for prefix in _prefixes(state, own):
        if prefix and all(prefix + name in state for name in own):
            others = len(state) - len(own)
            more = f", and {others} other tensors are next to them" if others else ""
            return (
                f"the names of its tensors begin with {shown(prefix)}{more}: expected "
                f"{next(iter(own))} and so on, with nothing before them but {', '.join(PREFIXES)}"
            )
    return None
