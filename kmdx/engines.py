"""Engines: alternative implementations of the same network functions."""

from __future__ import annotations

import importlib.util
import os
import shutil

from kmdx.errors import DeviceError, PlanError, quoted, suggest

TUNED, PLAIN, COMPILED, GRAPHS = "tuned", "plain", "compiled", "graphs"
ENGINES = {
    TUNED: "the project's own kernels where they are faster on this processor",
    PLAIN: "only torch's own operations",
    COMPILED: "kernels that torch's compiler makes at the first song, which takes minutes",
    GRAPHS: "the same kernels, of which an NVIDIA GPU starts those of a whole batch at once (CUDA graphs)",
}
"""A description of each engine, by name."""

DEFAULT = TUNED
COMPILING = (COMPILED, GRAPHS)


def check(name: str) -> str:
    """Return an engine's name; raises :class:`PlanError` if no such engine exists."""
    if name not in ENGINES:
        hint = suggest(str(name), ENGINES)
        raise PlanError(f"unknown engine {quoted(name)}{hint}; available: {', '.join(ENGINES)}")
    return name


def check_compiler(name: str, device: str) -> None:
    """Raise :class:`DeviceError` if an engine needs a compiler for a type of device, and there is none.

    Also raised if the engine needs another type of device.
    """
    if name not in COMPILING:
        return
    if name == GRAPHS and device != "cuda":
        raise DeviceError(f"engine {name} needs an NVIDIA GPU, but the device is {device}; use {COMPILED}")
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise DeviceError(
            f"engine {name} needs a C++ compiler, and {compiler} is not available; "
            "install g++, or set CXX to another compiler"
        )
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise DeviceError(f"engine {name} needs triton on a GPU; install it with: pip install triton")
