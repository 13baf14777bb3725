"""Strict loading of a state dict into a network built for it, with a one-line error if it does not fit."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kmdx.errors import counted, listed, quoted, shown
from kmdx.networks.architecture import MAX_PARAMETERS

# Prefixes that trainers add to names: DataParallel; Lightning and many scripts; torch.compile.
PREFIXES = ("module.", "model.", "_orig_mod.")
TOO_LARGE = f"a network of more than {MAX_PARAMETERS:,} parameters is too large"
_MAX_PREFIXES = 16  # prefixes of one name
_MAX_NAME = 1000  # characters of a name in a copy with averaged weights
_SAMPLE = 20  # names used to search for an unknown prefix
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # from torch.compile of a part of a network
_AVERAGED = re.compile(r"(\w*_)?(ema|averaged?|swa)(_\w*)?\..*|n_averaged")  # a copy with averaged weights


class NoInitialization(TorchFunctionMode):
    """A context in which networks are built without random weights, which would be replaced anyway.

    A network that has more values raises :class:`ValueError` inside the context.

    Parameters
    ----------
    values : int
        Largest total number of values in the parameters; checked before memory is allocated.
    refusal : str
        The message of the error.
    """

    def __init__(self, values: int = MAX_PARAMETERS, refusal: str = TOO_LARGE) -> None:
        super().__init__()
        self.values_left = values
        self.refusal = refusal

    @classmethod
    def for_state(cls, state: Mapping[str, Tensor]) -> NoInitialization:
        """A context that refuses networks much larger than a state dict.

        The limit is twice the size, because Demucs builds some layers before it splits them into bands.
        """
        refusal = "another network's weights: the architecture has more parameters than the file"
        return cls(2 * sum(tensor.numel() for tensor in state.values()), refusal)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skip initializations, and run everything else."""
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
            raise ValueError(self.refusal)


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """Load ``state`` into the parameters and buffers of ``module``; floating tensors become float32.

    Prefixes that trainers add to some or all names (:data:`PREFIXES`) are removed. A copy with averaged
    weights next to the network's own is ignored. The tensors are copied, so that the file they are mapped
    from may change. The module may have been built under :class:`NoInitialization`. Raises
    :class:`ValueError` if a tensor is missing, unknown, or has the wrong shape or type; the message names the
    first one, and the names' prefix.

    Parameters
    ----------
    optional : collection of str
        Additional names that the state may have.

    Returns
    -------
    dict
        The tensors with the optional names.
    """
    own = module.state_dict()
    names = _without_prefixes(state, {*own, *optional})
    if problem := _problem({short: state[name] for short, name in names.items()}, names, own, optional):
        raise ValueError(problem)
    for short, needed in own.items():
        tensor = state[names[short]]
        real = tensor.is_floating_point() or (tensor.dtype != torch.bool and not needed.is_floating_point())
        if not real:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"its tensor {names[short]} has the type {kind}, expected a floating-point type")
    kinds = {name: torch.float32 if each.is_floating_point() else each.dtype for name, each in own.items()}
    taken = {name: state[names[name]].to(kind, copy=True) for name, kind in kinds.items()}
    module.load_state_dict(taken, strict=True, assign=True)
    return {name: state[names[name]] for name in optional if name in names}


class Shapes:
    """Shapes of the tensors in a state dict, from which a family infers a network's sizes.

    Raises :class:`ValueError` if it is of another family, or also has other parts.

    Parameters
    ----------
    state : mapping
        Its names may have prefixes that trainers add.
    family : str
        The name of the family in error messages, with an article.
    first : str
        A tensor with two or more axes that every network of the family has.
    names : re.Pattern
        All names that a network of the family may have.
    """

    def __init__(self, state: Mapping[str, Tensor], family: str, first: str, names: re.Pattern[str]) -> None:
        self.family = family
        self.tensors = without_prefixes(state)
        if first not in self.tensors:
            raise ValueError(f"not {family}: it has no tensor {first}")
        if foreign := [name for name in self.tensors if not names.fullmatch(name)]:
            unknown = counted(len(foreign), "unknown tensor")
            raise ValueError(
                f"{family} with parts that are not supported: {unknown}, the first is {shown(foreign[0])}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor, none of whose ``axes`` axes is empty."""
        shape = tuple(self.tensors[name].shape) if name in self.tensors else ()
        if len(shape) != axes or not all(shape):
            raise ValueError(f"not {self.family}: it has no tensor {name} with {axes} axes")
        return shape

    def count(self, pattern: str) -> int:
        """Number of different values of a pattern's group among the names that begin with the pattern."""
        return len({found[1] for name in self.tensors if (found := re.match(pattern, name))})


def complete(inferred: Mapping[str, Any], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """All known sizes of a network: those inferred from its weights, and those stated in its architecture.

    Raises :class:`ValueError` if the architecture differs from the weights. ``num_stems`` in ``inferred`` is
    the number of sources.
    """
    for key, found in inferred.items():
        stated = architecture.get(key, found)
        if (list(stated) if isinstance(stated, tuple) else stated) != found:
            raise ValueError(f"{key} is {found!r} in the weights, but {quoted(stated)} in the architecture")
    sources = architecture["sources"]
    found = inferred["num_stems"]
    if found != len(sources):
        raise ValueError(
            f"the weights estimate {found} source{'s' * (found != 1)}, not {len(sources)}: {listed(sources)}"
        )
    return {**architecture, **inferred}


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict by their names without prefixes, and without a copy of averaged weights.

    With these names, a network's family and sizes can be inferred before it is built. It must not have names
    of its own that begin with one of :data:`PREFIXES`.
    """
    names = _without_prefixes(state, ())
    return {short: state[name] for short, name in names.items() if not _is_averaged(short)}


def _without_prefixes(state: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """The names in a state dict, by the same names without the prefixes that trainers add."""
    names: dict[str, str] = {}
    for name in state:
        short = _COMPILED.sub("", name)
        for _ in range(_MAX_PREFIXES):
            prefix = next((each for each in PREFIXES if short.startswith(each)), None)
            if short in wanted or prefix is None:
                break
            short = short.removeprefix(prefix)
        if short in names and short in wanted:
            raise ValueError(
                f"it has two tensors for {short}, {shown(names[short])} and {shown(name)}: "
                "save it again with only one of them"
            )
        names[name if short in names else short] = name
    return names


def _problem(
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    own: Mapping[str, Tensor],
    optional: Collection[str],
) -> str | None:
    """What is wrong with a state dict; None if it fits. ``names`` are the names in the file."""
    prefix = _unknown_prefix(state, own)
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    others = [name for name in state if not name.startswith(prefix)]
    others += [prefix + name for name in inner if name not in own and name not in optional]
    problems = {
        "missing": [name for name in own if name not in inner],
        "unknown": [names[name] for name in others if not _is_averaged(name)],
        "of the wrong shape": [
            name for name in own if name in inner and own[name].shape != inner[name].shape
        ],
    }
    counts = ", ".join(f"{len(each)} {what} ({shown(each[0])})" for what, each in problems.items() if each)
    counts = counts and f"of {len(own)} tensors {counts}"
    if not prefix:
        removed = {names[name].removesuffix(name) for name in own if name in names} - {""}
        without = f", after removing {listed(sorted(removed))} from the names" if removed else ""
        return counts and f"another network's weights: {counts}{without}"
    first = next(name for name in own if name in inner)
    return (
        f"the names of its tensors begin with {shown(names[prefix + first].removesuffix(first))}"
        f"{counts and f'; without it, {counts}'}: expected {first} and so on, or only the prefixes "
        f"{', '.join(PREFIXES)}"
    )


def _is_averaged(name: str) -> bool:
    """Whether a tensor belongs to a copy with averaged weights."""
    return len(name) < _MAX_NAME and _AVERAGED.fullmatch(name) is not None


def _unknown_prefix(names: Collection[str], own: Collection[str]) -> str:
    """The prefix of most of a network's names, if the unchanged names do not fit."""
    sample = [*own][:: math.ceil(len(own) / _SAMPLE)]
    found = Counter(name.removesuffix(wanted) for wanted in sample for name in names if name.endswith(wanted))
    for prefix in ("", *(prefix for prefix, _ in found.most_common(3))):
        if 2 * sum(prefix + name in names for name in own) >= len(own):
            return prefix
    return ""
