"""The process that a submission runs in: makes its wrapper once and separates the songs it is told.

It is started as a script, so that nothing of this package stands in the way of a submission that brings
modules of the same names, and it needs nothing but Python. Requests and replies are lines of JSON on
what were standard input and output; what the submission itself prints goes to standard error.

Requests: first the options ``{"ensemble", "device", "engine", "cut_network"}``, then ``{"song": name}`` for
each.
Replies: ``{"pid"}`` and ``{"network", "seconds"}`` once, then for each song ``{"progress": [done, total]}``
any number of times and one ``{"findings", "ends_challenge", "seconds", "peak_gpu_memory"}``. In place of
the last of each, ``{"failed", "seconds"}`` says that the submission raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STEMS = {"bass", "drums", "other", "vocals"}
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """Serve requests until there are no more."""
    stand_guard()
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:  # noqa: PTH123 (no path)
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    reply(pid=os.getpid())
    options = json.loads(requests.readline())
    network = cut_network() if options["cut_network"] else "not cut: not asked for"
    sys.path[0] = os.getcwd()  # noqa: PTH109 (a string is what belongs there)
    findings: dict[str, bool] = {}
    began = time.perf_counter()
    try:
        wrapper = make_wrapper(options)
        watch(getattr(wrapper, "model", None), findings, lambda done, total: reply(progress=[done, total]))
    except BaseException as error:
        reply(failed=describe(error), seconds=time.perf_counter() - began)
        return
    reply(network=network, seconds=time.perf_counter() - began)

    for line in requests:
        findings.clear()
        reset_gpu_peak()
        began = time.perf_counter()
        try:
            wrapper.separate_music_file(json.loads(line)["song"])
        except BaseException as error:
            reply(failed="; ".join([*findings, describe(error)]), seconds=time.perf_counter() - began)
        else:
            reply(
                seconds=time.perf_counter() - began,
                findings=list(findings),
                ends_challenge=any(findings.values()),
                peak_gpu_memory=gpu_peak(),
            )


def make_wrapper(options: dict[str, Any]) -> Any:
    """Import the submission in the current folder and make its wrapper, which loads its model."""
    for setting in ("ensemble", "device", "engine"):
        if options[setting] is not None:
            from my_submission import user_config

            name = setting.upper()
            if not hasattr(user_config, name):
                raise ValueError(
                    f"my_submission/user_config.py has no {name}: --{setting} is not for this submission"
                )
            setattr(user_config, name, options[setting])
    from my_submission.aicrowd_wrapper import AIcrowdWrapper

    return AIcrowdWrapper()


def watch(model: Any, findings: dict[str, bool], progress: Callable[[float, float], None]) -> None:
    """Look at what the model returns before the wrapper does, where the model lets itself be wrapped.

    ``progress`` is only for a model that waits for one: its own is None. Methods and properties stay.
    """
    separate = getattr(model, "separate_music_file", None)
    if separate is None:
        return

    def watched(*arguments: Any, **named: Any) -> Any:
        result = separate(*arguments, **named)
        with contextlib.suppress(Exception):  # of another form: for the wrapper to judge
            findings.update(look_at(result[0], [*arguments, *named.values()][0]))
        return result

    with contextlib.suppress(Exception):
        if inspect.getattr_static(model, "progress", progress) is None:
            model.progress = progress
    with contextlib.suppress(Exception):
        model.separate_music_file = watched


def look_at(stems: Mapping[str, Any], mixture: Any) -> dict[str, bool]:
    """What is wrong with returned stems, and whether the challenge would have ended at it.

    It would at other stems and lengths; NaN and infinity were written as 16-bit numbers and scored.
    """
    wrong = {}
    missing, extra = sorted(STEMS - set(stems)), sorted(map(str, set(stems) - STEMS))
    if missing or extra:
        names = [*(f"{name} is missing" for name in missing), *(f"{name} is extra" for name in extra)]
        wrong[f"wrong stems: {', '.join(names)}"] = True
    for name, stem in stems.items():
        with contextlib.suppress(Exception):  # it has no length
            if len(stem) != len(mixture):
                wrong[f"wrong length: {name} has {len(stem)} samples, the mixture {len(mixture)}"] = True
        with contextlib.suppress(Exception):  # no numpy, or no numbers
            import numpy

            samples = numpy.asarray(stem)
            if numpy.isnan(samples).any():
                wrong[f"NaN in {name}"] = False
            if numpy.isinf(samples).any():
                wrong[f"infinity in {name}"] = False
    return wrong


def describe(error: BaseException) -> str:
    """The class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def cut_network() -> str:
    """Move this process into a network namespace with nothing in it; return ``cut``, or why it is not.

    Linux only. The super-user needs nothing else; others get a user namespace with it, in which they stay
    who they are.
    """
    if not sys.platform.startswith("linux"):
        return f"not cut: {sys.platform} has no network namespaces"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) == 0:
        return "cut"
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return f"not cut: the system refuses it ({os.strerror(ctypes.get_errno())})"
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return "cut"


def stand_guard() -> None:
    """Go on in a child of this process, which stays behind and lets nothing outlive the child.

    Linux only. Whatever the child starts falls to this process when its own parent ends, also what has
    left the child's session. Once the child has ended, or SIGTERM comes (from the evaluator, or from Linux
    when the evaluator dies), this process kills all that is left and exits with the child's exit code, or
    128 + the signal that ended it.
    """
    if not sys.platform.startswith("linux"):
        return
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for sigwait
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGTERM)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        die_with_parent()
        os.setsid()  # so that a signal to its own group does not end the guard
        return

    ended: dict[int, int] = {}
    while child not in ended and signal.sigwait(signals) == signal.SIGCHLD:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = found[1]
    while below := children():
        for pid in below:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(OSError):
                os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(ended.get(child, signal.SIGKILL))
    os._exit(code if code >= 0 else 128 - code)


def children() -> list[int]:
    """Process ids of the children of this process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent …", where the name may hold anything
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent dies, however that happens."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def reset_gpu_peak() -> None:
    """Begin to measure torch's GPU memory anew, where the submission uses it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> int | None:
    """Bytes of GPU memory that torch had reserved at most since then."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())


if __name__ == "__main__":
    main()
