"""Engines: alternative implementations of the same network functions."""

from __future__ import annotations

import importlib.util
import os
import shutil

from kmdx.errors import DeviceError, PlanError, quoted, suggest

TUNED, PLAIN, COMPILED = "tuned", "plain", "compiled"
ENGINES = {
    TUNED: "the project's own kernels where they are faster on this processor",
    PLAIN: "only torch's own operations",
    COMPILED: "kernels that torch's compiler makes at the first song, which takes minutes",
}
"""A description of each engine, by name."""

DEFAULT = TUNED


def check(name: str) -> str:
    """Return an engine's name; raises :class:`PlanError` if no such engine exists."""
    if name not in ENGINES:
        hint = suggest(str(name), ENGINES)
        raise PlanError(f"unknown engine {quoted(name)}{hint}; available: {', '.join(ENGINES)}")
    return name


def check_compiler(name: str, device: str) -> None:
    """Raise :class:`DeviceError` if an engine needs a compiler for a type of device, and there is none."""
    if name != COMPILED:
        return
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise DeviceError(
            f"engine {name} needs a C++ compiler, and {compiler} is not available; "
            "install g++, or set CXX to another compiler"
        )
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise DeviceError(f"engine {name} needs triton on a GPU; install it with: pip install triton")
