"""Calls of functions that a stranger's file may crash, in a process of their own with limits.

Native code, and Python code that was not written for hostile input, can crash on a file, loop without end or
take all memory. :func:`call` makes each of these a :class:`Failed` with a reason. The process runs this
module; it never imports torch unless the function does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from kmdx.errors import SHOWN

# Threads of numpy reserve memory for each core, and so does the allocator for each thread.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

_TOO_LONG = "it takes longer than the {} s that it may"
_TOO_LARGE = "it needs more than the {} MB of memory that it may"


class Failed(Exception):
    """A call that gave nothing; the message is the reason, such as "crashes (SIGSEGV)"."""


def call(function: Callable[..., Any], *arguments: Any, seconds: int, memory: int) -> Any:
    """Call a function in a process of its own, and return what it returns.

    Parameters
    ----------
    function : callable
        A function of a module.
    *arguments
        Anything that JSON can hold; so is what it returns.
    seconds : int
        Of a processor. Windows does not limit these; ten times as long by the clock, and half a minute, is
        the limit everywhere.
    memory : int
        Bytes of address space. Windows and macOS do not limit it.

    Raises
    ------
    Failed
        If the process cannot be started, crashes, exceeds a limit, or the function raises anything.
    """
    try:
        given = json.dumps(
            [function.__module__, function.__name__, arguments, seconds, memory, str(Path.cwd())]
        )
        done = subprocess.run(
            [sys.executable, "-m", __name__, given],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # on Windows
            timeout=30 + 10 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(_TOO_LONG.format(seconds)) from error
    except (OSError, ValueError) as error:
        raise Failed(f"no process can be started: {error}") from error
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])  # after what libraries print
    raise Failed(_reason(done, seconds, memory))


def _reason(done: subprocess.CompletedProcess[bytes], seconds: int, memory: int) -> str:
    """Why a process ended without a result."""
    code, said = done.returncode, done.stderr.decode(errors="replace").rstrip().rpartition("\n")[2]
    said = re.sub(r"^(\w+\.)+|[^ -~]", "", said)[: 2 * SHOWN]  # the error's class, without its modules
    if code == -getattr(signal, "SIGXCPU", 0):
        return _TOO_LONG.format(seconds)
    if code == 1:
        return _TOO_LARGE.format(memory // 10**6) if said.startswith("MemoryError") else said
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"exit code {code:#x}"
    return f"it crashes ({name}), or needs more than the {memory // 10**6} MB of memory that it may"


def _limit(seconds: int, memory: int) -> None:
    """Limit what this process may use, where the system can."""
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory}
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        with suppress(OSError, ValueError):  # macOS refuses some
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _main(given: str) -> None:
    module, name, arguments, seconds, memory, folder = json.loads(given)
    _limit(seconds, memory)
    called = getattr(import_module(module), name)
    os.chdir(folder)  # relative paths are the caller's; it began where the package is found
    print(json.dumps(called(*arguments)))


if __name__ == "__main__":
    _main(sys.argv[1])
