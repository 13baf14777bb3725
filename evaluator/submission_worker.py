"""The process that a submission runs in: creates its wrapper once, then separates each requested song.

The submission's own interpreter runs this file as a script. It may be as old as Python 3.8 and needs only the
standard library. Requests arrive on the original standard input and replies go to the original standard
output, each as one line of JSON. What the submission itself prints goes to standard error.
:mod:`evaluator.replies` documents the replies.

Requests: ``{"hello": token}``, then ``{"make": token, "folder", "ensemble", "device", "precision", "engine",
"stems"}``, then ``{"song": name, "token": token}`` for each song. A reply repeats the token of its request.
"""

from __future__ import annotations

import sys

STARTED = frozenset(sys.modules)  # modules that the interpreter itself has imported

import contextlib
import faulthandler
import inspect
import json
import os
import runpy
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

STEMS = ("bass", "drums", "other", "vocals")  # as in kmdx.challenge, which this file cannot import
TEXT = 1000  # characters of a reason; the evaluator does not show more
TRACEBACK = 10**6  # bytes of a traceback in the log, at most
LOG_FILE = 2  # descriptor that tracebacks are written to
STARTUP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup", "sitecustomize.py")
PACKAGES = 800  # packages that are reported, at most


def main() -> None:
    """Answer requests until standard input is closed."""
    sys.path.pop(0)  # this file's folder, which the submission must not import from
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    global LOG_FILE
    LOG_FILE = os.dup(2)  # a copy, because the submission may replace descriptor 2
    faulthandler.enable(LOG_FILE)
    with contextlib.suppress(AttributeError):  # Windows has no such signal
        faulthandler.register(signal.SIGUSR1, LOG_FILE, all_threads=True)
    output: Any = sys.stdout
    with contextlib.suppress(AttributeError, ValueError):
        output.reconfigure(line_buffering=True)  # so that output printed before a kill is in the log
    lock = threading.Lock()

    def reply(**content: Any) -> None:
        line = (json.dumps(content) + "\n").encode("ascii")
        with lock:
            while line:
                line = line[os.write(replies, line) :]

    hello = json.loads(requests.readline())["hello"]
    reply(
        hello=hello,
        executable=sys.executable[:TEXT],
        version=sys.version.split()[0][:TEXT],
        packages=packages(),
    )
    options = json.loads(requests.readline())
    folder = options["folder"]
    findings: dict[str, bool] = {}
    startup = runpy.run_path(STARTUP)
    modules = startup["OwnModules"](folder)
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in ("", folder))]
    try:
        startup["pass_on"](folder)
        modules.install(STARTED)
        wrapper = make_wrapper(options)
        modules.check()
        model = getattr(wrapper, "model", None)
        wrap_model(model, findings, lambda done, total: reply(progress=[done, total]), options["stems"])
        device = gpu()
    except BaseException as error:
        reply(failed=options["make"], **report(error, folder))
        return
    reply(made=options["make"], device=device)

    for line in requests:
        request = json.loads(line)
        findings.clear()
        reset_gpu_peak()
        try:
            returned = wrapper.separate_music_file(request["song"])
            modules.check()
        except BaseException as error:
            reply(failed=request["token"], **report(error, folder, findings))
        else:
            reply(
                done=request["token"],
                findings=[finding[:TEXT] for finding in findings][:20],
                returned_true=returned is True,
                peak_gpu_memory=gpu_peak(),
                device=gpu(),
            )


def make_wrapper(options: dict[str, Any]) -> Any:
    """Import the submission from the current folder and create its wrapper, which loads its model."""
    for setting in ("ensemble", "device", "precision", "engine"):
        if options[setting] is not None:
            name = setting.upper()
            if find_spec("my_submission.user_config") is None:
                raise ValueError(
                    f"no my_submission/user_config.py, so --{setting} has no effect: leave it out"
                )
            from my_submission import user_config

            if not hasattr(user_config, name):
                raise ValueError(
                    f"my_submission/user_config.py has no {name}, so --{setting} has no effect: leave it out"
                )
            setattr(user_config, name, options[setting])
    from my_submission.aicrowd_wrapper import AIcrowdWrapper

    return AIcrowdWrapper()


def wrap_model(
    model: Any,
    findings: dict[str, bool],
    progress: Callable[[float, float], None],
    wanted: Any = STEMS,
) -> None:
    """Wrap the model's method, if possible, so that its stems are checked before the wrapper gets them.

    ``progress`` is passed only to a model with an attribute ``progress`` that is None. Methods and properties
    of that name are not replaced.
    """
    separate = getattr(model, "separate_music_file", None)
    if separate is None:
        return

    def watched(*arguments: Any, **named: Any) -> Any:
        result = separate(*arguments, **named)
        with contextlib.suppress(Exception):  # an unexpected result is left to the wrapper
            findings.update(check_stems(result[0], [*arguments, *named.values()][0], wanted))
        return result

    with contextlib.suppress(Exception):
        if inspect.getattr_static(model, "progress", progress) is None:
            model.progress = progress
    with contextlib.suppress(Exception):
        model.separate_music_file = watched


def check_stems(stems: Mapping[str, Any], mixture: Any, wanted: Any = STEMS) -> dict[str, bool]:
    """Problems of the returned stems, and whether each would have ended the challenge.

    Wrong stems and wrong lengths would have ended it. NaN and infinity would not: they were written as 16-bit
    numbers and scored. If the wanted stems are not the challenge's four, extra stems are allowed, and the
    evaluator takes the instrumental or a sum as a missing accompaniment.
    """
    wrong = {}
    extra = sorted(map(str, set(stems) - set(STEMS))) if set(wanted) == set(STEMS) else []
    has_others = (
        "instrumental" in stems or set(STEMS) - {"vocals"} <= set(stems) or set(stems) == {"vocals", "other"}
    )
    missing = sorted(set(wanted) - set(stems) - ({"accompaniment"} if has_others else set()))
    if missing or extra:
        names = [*(f"{name} is missing" for name in missing), *(f"{name} is extra" for name in extra)]
        wrong[f"wrong stems: {', '.join(names)}"] = True
    for name, stem in stems.items():
        with contextlib.suppress(Exception):  # the stem has no length
            if len(stem) != len(mixture):
                wrong[f"wrong length: {name} has {len(stem)} samples, the mixture {len(mixture)}"] = True
        with contextlib.suppress(Exception):  # numpy is missing, or the stem does not contain numbers
            import numpy

            samples = numpy.asarray(stem)
            if numpy.isnan(samples).any():
                wrong[f"NaN in {name}"] = False
            if numpy.isinf(samples).any():
                wrong[f"infinity in {name}"] = False
    return wrong


def report(error: BaseException, folder: str, findings: Any = ()) -> dict[str, Any]:
    """The reason and the location of an error for a reply; the full traceback is written to the log."""
    reason = "; ".join([*findings, describe(error)])
    log(error)
    return {"reason": reason[:TEXT], "where": where(error, folder)}


def describe(error: BaseException) -> str:
    """The class and the first line of an error."""
    try:
        lines = str(error)[: 4 * TEXT].strip().splitlines()
    except BaseException:  # its __str__ failed
        lines = []
    return f"{type(error).__name__}: {lines[0][:TEXT]}" if lines else type(error).__name__


def where(error: BaseException, folder: str) -> str | None:
    """The line of the submission's own code that failed, such as ``my_submission/deep.py:10``."""
    places = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno or 0))
    start = folder.rstrip(os.sep) + os.sep
    own = [
        (name[len(start) :], number)
        for name, number in places
        if name.startswith(start)
        and "-packages" not in name[len(start) :]
        and os.path.abspath(__file__) != name
    ]
    return "{}:{}".format(*own[-1])[:TEXT] if own else None


def log(error: BaseException) -> None:
    """Write the traceback to the log, even if the submission replaced ``sys.stderr``."""
    try:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        text = "".join(line if len(line) < 20 * TEXT else line[: 20 * TEXT] + "…\n" for line in lines)
    except BaseException:  # the error is malformed, or the submission replaced a standard module
        frames = [
            (frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)
        ]
        places = "".join(f'  File "{name[:TEXT]}", line {number}\n' for name, number in frames[-100:])
        text = f"{places}{describe(error)}\n"
    content = text.encode("utf-8", "backslashreplace")[:TRACEBACK]
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(LOG_FILE, content) :]


def packages() -> dict[str, str]:
    """Names and versions of the interpreter's packages."""
    found: dict[str, str] = {}
    with contextlib.suppress(Exception):
        from importlib.metadata import distributions

        for each in distributions():
            with contextlib.suppress(Exception):
                name = each.metadata["Name"]
                if isinstance(name, str) and len(found) < PACKAGES:
                    found.setdefault(name[:40], str(each.version)[:24])
    return dict(sorted(found.items()))


def gpu() -> str | None:
    """The name of torch's first GPU, or ``cpu``; None if the submission did not import torch."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):
        if torch is not None and torch.cuda.is_available():
            return str(torch.cuda.get_device_name(0))[:TEXT]
        if torch is not None:
            return "cpu"
    return None


def reset_gpu_peak() -> None:
    """Reset torch's peak of GPU memory, if the submission uses a GPU."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> int | None:
    """Peak of the GPU memory that torch reserved since the last reset, in bytes; None without a GPU."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):
        if torch is not None and torch.cuda.is_initialized():
            return int(torch.cuda.max_memory_reserved())
    return None


if __name__ == "__main__":
    main()
