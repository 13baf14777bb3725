"""What commands share: consoles, progress bars, types of options, and how a command ends.

Every command of the project runs through :func:`run`.

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
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from kmdx.errors import KmdxError, KmdxWarning, shown

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

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


class FormatName(str, Enum):
    """Formats of written stems."""

    wav16 = "wav16"
    wav24 = "wav24"
    float32 = "float32"
    flac = "flac"
    mp3 = "mp3"


class Precision(str, Enum):
    """What the networks compute in."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class SpeedName(str, Enum):
    """How much work is put into a song."""

    leaderboard = "leaderboard"
    balanced = "balanced"
    fast = "fast"


class Engine(str, Enum):
    """Which operations the networks run."""

    tuned = "tuned"
    plain = "plain"


EnsembleOption = Annotated[
    str, typer.Option("--ensemble", "-e", help="Name of an ensemble, or the path of a plan (.yaml).")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or any torch device.")]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        case_sensitive=False,
        help="What the networks compute in. auto: fp16 on GPUs that are fast at it; on a CPU fp32, and with "
        "--speed balanced or fast bf16 where the CPU is fast at it.",
    ),
]
SpeedOption = Annotated[
    SpeedName,
    typer.Option(
        case_sensitive=False,
        help="leaderboard is the ensemble as published; balanced and fast overlap less.",
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        case_sensitive=False,
        help="tuned runs the project's own kernels where they are faster on this processor; plain runs "
        "torch's own operations alone.",
    ),
]
TracksOption = Annotated[str | None, typer.Option(metavar="GLOB", help="Only songs whose names match.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON.")]


def run(command: Callable[[], object], *, quiet: bool = False) -> None:
    """Run a command; a user's mistake ends it with one line and exit code 2.

    So does what the system refuses, such as a file in a folder that the user may not open. Otherwise the exit
    code is that of the work: it is 0 after ``kmdx models list >/dev/full``, too. A warning on standard error
    then reports that output was lost, except where its reader ended first (``| head``).
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
        except OSError as error:  # of the user's files, wherever they are first touched
            if error.strerror is None:
                raise
            where = "" if error.filename is None else f"{shown(error.filename)}: "
            complain(f"{where}{error.strerror}")
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        except SystemExit as end:
            # Typer takes every broken pipe for that of the output, which is protected, and ends silently.
            if isinstance(end.__context__, BrokenPipeError):
                complain("a process that this command started ended unexpectedly (broken pipe)")
            raise
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


def progress_bar(*columns: ProgressColumn, **options: Any) -> Progress:
    """A progress bar on a terminal, with a task's description before it and these columns behind it.

    Options are those of rich's ``Progress``: on standard error, and gone at its end, if not given.
    """
    from rich.progress import BarColumn, Progress, TextColumn

    options = {"console": err, "transient": True, **options}
    options.setdefault("disable", not options["console"].is_terminal)
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, **options)


@contextlib.contextmanager
def song_bar(label: str, seconds: float) -> Iterator[Callable[[float, float], None]]:
    """A bar in seconds of audio with the time left; the callback gets those done, and those in all."""
    from rich.progress import TaskProgressColumn, TextColumn, TimeRemainingColumn

    with progress_bar(
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        redirect_stdout=sys.stdout.isatty(),  # what is printed meanwhile appears above the bar
    ) as bar:
        task = bar.add_task(escape(label), total=seconds, text=f"0 of {seconds:.0f} s")
        yield lambda done, total: bar.update(
            task, completed=done, total=total, text=f"{done:.0f} of {total:.0f} s"
        )


@contextlib.contextmanager
def download_bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar in bytes with speed and time left; the callback gets those done, and those in all if known."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress_bar(*columns, transient=False, disable=False) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
