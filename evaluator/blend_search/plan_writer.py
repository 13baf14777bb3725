"""Writes plans with new weights; comments in the file document the origin of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evaluator.blend_search.flat_plan import pruned
from evaluator.run_folder import write_text
from kmdx import plan_file
from kmdx.errors import KmdxError
from kmdx.plan import Plan

MARK = "Written by evaluator.blend_search."
"""First line of the plans that this command writes. It recognizes its own plans by this line."""


def reweighted(plan: Plan, weights: Mapping[str, Mapping[str, float]]) -> Plan:
    """A flat plan with new weights ``{stem: {signal: weight}}``.

    Signals of weight 0 are left out, and so are nodes that nothing needs then.
    """
    nodes = dict(plan.nodes)
    for stem, terms in weights.items():
        nonzero = {name: weight for name, weight in terms.items() if weight}
        nodes[stem] = replace(nodes[stem], terms=nonzero or terms)
    return pruned(replace(plan, nodes=nodes), plan.stems)


def write(path: Path, plan: Plan, origin: Sequence[str]) -> None:
    """Write a plan atomically, with its origin in comments at the top.

    Raises :class:`KmdxError` if the name does not end in ``.yaml``, or the file cannot be written.
    """
    _check_name(path)
    comments = "".join(f"# {' '.join(line.split())}\n" for line in [MARK, *origin])
    text = comments + plan_file.dump(plan, path.parent)
    plan_file.parse(text, path.stem, path.parent)  # make sure that the plan can be loaded
    write_text(path, text)


def check_plan(path: Path, digest: str, collection: Path | None = None, force: bool = False) -> None:
    """Raise :class:`KmdxError` before any work if a plan must not be written to a path.

    Files in the collection, and the plan with this digest (the one that the weights are for), are never
    overwritten. ``force`` allows overwriting other plans that this command did not write.
    """
    _check_name(path)
    _check(path, collection)
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KmdxError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() == digest:
        raise KmdxError(f"{path} is the plan that the weights are for; choose another --output")
    if not (force or content.startswith(f"# {MARK}".encode())):
        raise KmdxError(f"{path} exists, and this command did not write it; use --force to overwrite it")


def check_report(path: Path, collection: Path) -> None:
    """Raise :class:`KmdxError` before any work if a report or picture must not be written to a path."""
    _check(path, collection)
    if path.suffix in (".yaml", ".yml"):
        raise KmdxError(f"{path} has the file name of a plan; choose another name for a report or a picture")


def check_distinct(*paths: Path | None) -> None:
    """Raise :class:`KmdxError` if two of these outputs are the same file."""
    given = [path.resolve() for path in paths if path is not None]
    for path in given:
        if given.count(path) > 1:
            raise KmdxError(f"{path} is given for two outputs; choose different files")


def _check(path: Path, collection: Path | None = None) -> None:
    """Raise :class:`KmdxError` before any work if a file cannot be written, or is in the collection."""
    if collection is not None and collection.resolve() in path.resolve().parents:
        raise KmdxError(f"{path} is in the collection, which must not be changed; choose another folder")
    if not path.parent.is_dir():
        raise KmdxError(f"{path} cannot be written: no folder {path.parent}")
    if path.is_dir():
        raise KmdxError(f"{path} is a folder, expected the name of a file to write")


def _check_name(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise KmdxError(f"{path}: expected a plan's file name, which ends in .yaml")
