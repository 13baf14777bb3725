"""Freeze parts of a network, chosen by the config's ``freeze``.

A pattern is matched against the names of parameters, such as ``encoding_blocks.0.tfc.H.0.0.weight``, and of
the modules that contain them. Examples are ``encoding_blocks``, ``encoding_blocks.*`` and ``*.bias``. Frozen
parameters have no gradient and no optimizer state. A module whose parameters are all frozen runs in inference
mode, so that the statistics of batch norms do not change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from kmdx.errors import listed, shown
from training.config import TrainingError


@dataclass(frozen=True)
class Trained:
    """The number of trained parameters of a network, and the total."""

    trained: int
    total: int


def freeze(network: nn.Module, patterns: Sequence[str]) -> Trained:
    """Freeze the parameters of a network that match a pattern.

    Raises :class:`TrainingError` if a pattern matches nothing, or all parameters are frozen.
    """
    frozen = matching([name for name, _ in network.named_parameters()], patterns)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    hold_statistics(network)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return Trained(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def matching(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """The names of parameters that match a pattern.

    Raises :class:`TrainingError` if a pattern matches nothing, or all parameters match.
    """
    found: set[str] = set()
    for pattern in patterns:
        own = {name for name in names if any(fnmatchcase(part, pattern) for part in _parts(name))}
        if not own:
            raise TrainingError(
                f"freeze: no parameter matches {shown(pattern)}; their names begin with "
                f"{listed(_top_level(names))}"
            )
        found |= own
    if len(found) == len(names):
        raise TrainingError(
            f"freeze: all {len(names)} parameter tensors are frozen; leave some of "
            f"{listed(_top_level(names))} to train"
        )
    return found


def hold_statistics(network: nn.Module) -> None:
    """Set modules whose parameters are all frozen to inference mode."""
    for module in network.modules():
        parameters = [*module.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _parts(name: str) -> Iterator[str]:
    """A parameter's name, and the names of the modules that contain it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _top_level(names: Collection[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
