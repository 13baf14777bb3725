"""What a command prints and how it ends: every command of the project runs through :func:`run`.

Printing never decides what becomes of the work. Text that a stream cannot encode is replaced, and what a
stream does not accept (none is open, the disk behind it is full, its reader is gone) is dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from kmdx.errors import KmdxError, KmdxWarning

PIPE_WIDTH = 200  # columns where there is no terminal to ask
READABLE = "kmdx-readable"  # the name of the error handler for text that a stream cannot encode
SPELLED_OUT = {
    "→": "->", "←": "<-", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "·": "*", "±": "+/-", "²": "^2",
    "½": "1/2", "∞": "inf", "≈": "~", "≤": "<=", "≥": ">=", "‖": "||", "µ": "u", "‘": "'", "’": "'", "“": '"',
    "”": '"', "─": "-", "━": "-", "│": "|", "┃": "|", "├": "|", "└": "`",
}  # fmt: skip


def _console(*, stderr: bool = False) -> Console:
    """Make a console that looks up its stream whenever it prints."""
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream is not None and stream.isatty()
    return Console(width=None if on_terminal else PIPE_WIDTH, highlight=False, soft_wrap=True, stderr=stderr)


out = _console()
err = _console(stderr=True)


def run(command: Callable[[], object], *, quiet: bool = False) -> None:
    """Run a command; a user's mistake ends it with one line and exit code 2.

    The exit code is that of the work: it is 0 after ``kmdx models list >/dev/full``, too. A warning on
    standard error then reports that output was lost, except where its reader ended first (``| head``).
    Warnings of this package are printed in one line each, every time, whatever ``PYTHONWARNINGS`` asks for;
    others as ever, or where ``quiet`` not at all.
    """
    protect_streams()
    with warnings.catch_warnings():
        warnings.simplefilter("always", KmdxWarning)
        ever = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *more: Any, **others: Any) -> None:
            if issubclass(category, KmdxWarning):
                warn(str(message))
            elif not quiet:
                ever(message, category, *more, **others)

        warnings.showwarning = show
        try:
            command()
        except KmdxError as error:
            complain(str(error))
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            _report_lost_output()


def complain(message: str, console: Console = err) -> None:
    """Print what went wrong."""
    console.print(f"[bold red]error:[/bold red] {escape(message)}")


def warn(message: str, console: Console = err) -> None:
    """Print what the user should know."""
    console.print(f"[bold yellow]warning:[/bold yellow] {escape(message)}")


def say(line: str) -> None:
    """Print a line on standard output, above the progress bar if standard error has one.

    Not with rich: :data:`out` does not know of the bar that :data:`err` keeps, which catches what is
    printed with ``print``.
    """
    print(line, flush=True)


def protect_streams() -> None:
    """Make standard output and standard error accept all text, whatever is behind them.

    Descriptors 0 to 2 that are closed lead to the null device from here on. Otherwise the next file that
    is opened would get such a number, and what a library or a child process prints would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one. Child processes inherit it, as any standard stream.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _protected(sys.stdout), _protected(sys.stderr)
    logging.raiseExceptions = False  # a log that cannot be written is no reason for tracebacks


def _protected(stream: Any) -> Any:
    """Return a stream like this one that never fails, or the stream itself if no file is behind it."""
    if stream is None:
        stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the end)
    if isinstance(stream, _Stream) or not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer above the raw file
    if not isinstance(raw, io.FileIO):  # a Windows console, or a test's memory: only text can be wrong
        stream.reconfigure(errors=READABLE)
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return _Stream(stream, _Sink(raw.fileno(), "w", closefd=False))


class _Sink(io.FileIO):
    """A file that drops what cannot be written, so that no flush fails, and none at the very end.

    Attributes
    ----------
    lost : OSError or None
        Why something was dropped.
    """

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or drop what is left of it."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # a pipe that does not block is full: wait as for one that does
                    select.select((), (self.fileno(),), ())
                else:
                    rest = rest[written:]
        except OSError as error:
            self.lost = error
        return size


class _Stream(io.TextIOWrapper):
    """Text into a sink, encoded and passed on as another stream does it, with replacements."""

    buffer = None  # type: ignore[assignment]  # hidden: click would write UTF-8 into it if this stream is ASCII

    def __init__(self, like: io.TextIOWrapper, sink: _Sink) -> None:
        self.sink = sink
        self.like = like  # a stream that nobody holds closes its descriptor, which the next file would get
        super().__init__(
            sink,  # not buffered any further, as with python -u: the text above it is gathered, too
            encoding=like.encoding,
            errors=READABLE,
            line_buffering=like.line_buffering,
            write_through=like.write_through,
        )


def _report_lost_output() -> None:
    """Warn of output that was lost, unless nobody was left to read it."""
    sys.stdout.flush()
    if isinstance(sys.stdout, _Stream) and sys.stdout.sink.lost is not None:
        reason, sys.stdout.sink.lost = sys.stdout.sink.lost, None
        if reason.errno != errno.EPIPE:
            warn(f"standard output cannot be written ({reason.strerror}): some of the output is lost")


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Spell out what a stream cannot encode in ASCII, which every encoding has; escape what has no spelling.

    Escapes, unlike question marks, keep the names of songs apart.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(SPELLED_OUT.get(each) or ascii(each)[1:-1] for each in found), error.end


codecs.register_error(READABLE, _readable)
