"""Call functions that read untrusted files, in a separate process with limits on time and memory.

On a hostile file, native code and careless Python code can crash, loop forever or exhaust memory.
:func:`call` turns each of these into :class:`Failed` with a reason. The process runs this module and imports
torch only if the function does.
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

# numpy reserves memory for each core, and the allocator for each thread.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

_TOO_LONG = "it takes longer than the limit of {} s"
_TOO_LARGE = "it needs more memory than the limit of {} MB"


class Failed(Exception):
    """A call returned no result; the message is the reason, such as "it crashes (SIGSEGV)"."""


def call(function: Callable[..., Any], *arguments: Any, seconds: int, memory: int) -> Any:
    """Call a function in a separate process and return its result.

    Raises :class:`Failed` if the process cannot start, crashes or exceeds a limit, or if the function raises
    an exception.

    Parameters
    ----------
    function : callable
        A function at the top level of a module.
    *arguments
        JSON values. The result must be a JSON value, too.
    seconds : int
        CPU time; not limited on Windows. Wall time is limited on every system: 30 s plus ten times this.
    memory : int
        Bytes of address space; not limited on Windows and macOS.
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
        return json.loads(done.stdout.splitlines()[-1])  # libraries may print before it
    raise Failed(_reason(done, seconds, memory))


def _reason(done: subprocess.CompletedProcess[bytes], seconds: int, memory: int) -> str:
    """Why a process ended without a result."""
    code, message = done.returncode, done.stderr.decode(errors="replace").rstrip().rpartition("\n")[2]
    message = re.sub(r"^(\w+\.)+|[^ -~]", "", message)[: 2 * SHOWN]  # drops the modules of the error's class
    if code == -getattr(signal, "SIGXCPU", 0):
        return _TOO_LONG.format(seconds)
    if code == 1:
        return _TOO_LARGE.format(memory // 10**6) if message.startswith("MemoryError") else message
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"exit code {code:#x}"
    return f"it crashes ({name}), or it needs more memory than the limit of {memory // 10**6} MB"


def _limit(seconds: int, memory: int) -> None:
    """Limit this process's time and memory, where the system supports it."""
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
    os.chdir(folder)  # relative paths are relative to the caller; this process started in another folder
    print(json.dumps(called(*arguments)))


if __name__ == "__main__":
    _main(sys.argv[1])
