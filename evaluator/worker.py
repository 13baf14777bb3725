"""The process that a submission runs in: makes its wrapper once and separates the songs it is told.

It is started as a script, so that nothing of this package stands in the way of a submission that brings
modules of the same names, and it needs nothing but Python. Requests and replies are lines of JSON on
what were standard input and output; what the submission itself prints goes to standard error.

Requests: first the options ``{"ensemble", "device", "cut_network"}``, then ``{"song": name}`` for each.
Replies: ``{"ready": …}`` once, then for each song ``{"progress": [done, total]}`` any number of times
and one ``{"done": …}`` or ``{"failed": reason}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEMS = {"bass", "drums", "other", "vocals"}
CLONE_NEWUSER, CLONE_NEWNET, PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1


def main() -> None:
    """Serve requests until there are no more."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:  # noqa: PTH123 (no path)
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    die_with_parent()
    options = json.loads(requests.readline())
    network = cut_network() if options["cut_network"] else "not cut: not asked for"
    sys.path[0] = os.getcwd()  # noqa: PTH109 (a string is what belongs there)
    findings: list[str] = []
    began = time.perf_counter()
    try:
        wrapper = make_wrapper(options)
        watch(getattr(wrapper, "model", None), findings, lambda done, total: reply(progress=[done, total]))
    except BaseException as error:
        reply(failed=describe(error))
        return
    reply(ready={"seconds": time.perf_counter() - began, "network": network})

    for line in requests:
        findings.clear()
        reset_gpu_peak()
        began = time.perf_counter()
        try:
            wrapper.separate_music_file(json.loads(line)["song"])
        except BaseException as error:
            reply(failed="; ".join([*findings, describe(error)]), seconds=time.perf_counter() - began)
        else:
            seconds = time.perf_counter() - began
            reply(done={"seconds": seconds, "findings": findings, "peak_gpu_memory": gpu_peak()})


def make_wrapper(options: dict[str, Any]) -> Any:
    """Import the submission in the current folder and make its wrapper, which loads its model."""
    for setting in ("ensemble", "device"):
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


def watch(model: Any, findings: list[str], progress: Callable[[float, float], None]) -> None:
    """Look at what the model returns before the wrapper does, where the model lets itself be wrapped."""
    separate = getattr(model, "separate_music_file", None)
    if separate is None:
        return
    if hasattr(model, "progress"):
        model.progress = progress

    def watched(samples: Any, rate: Any) -> Any:
        result = separate(samples, rate)
        with contextlib.suppress(Exception):  # of another form: for the wrapper to judge
            findings.extend(look_at(result[0], samples))
        return result

    with contextlib.suppress(AttributeError):
        model.separate_music_file = watched


def look_at(stems: dict[str, Any], mixture: Any) -> list[str]:
    """What is wrong with returned stems: other keys, other lengths, NaN."""
    wrong = []
    if set(stems) != STEMS:
        missing, extra = sorted(STEMS - set(stems)), sorted(set(stems) - STEMS)
        wrong.append(
            "wrong stems: "
            + ", ".join(
                [*(f"{name} is missing" for name in missing), *(f"{name} is extra" for name in extra)]
            )
        )
    for name, stem in stems.items():
        if len(stem) != len(mixture):
            wrong.append(f"wrong length: {name} has {len(stem)} samples, the mixture {len(mixture)}")
        if (stem != stem).any():
            wrong.append(f"NaN in {name}")
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


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, however that happens."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


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
