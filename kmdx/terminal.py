"""Code shared by all commands: consoles, progress bars, option types, and exit codes.

Every command of the project runs through :func:`run`.

A failure to print never stops the work. Text that a stream cannot encode is replaced. Output that a stream
does not accept is dropped: the stream may be closed, its disk full, or its reader gone.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from kmdx.errors import KmdxError, KmdxWarning, quoted, shown, suggest

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

# Typer has its own copy of click, or uses click, by version; both have the same classes.
_UsageError: Any = typer.BadParameter.__mro__[1]
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")

BAR_WIDTH = 40  # columns of the widest bar
ROOMY = 60  # columns of a terminal with room for numbers next to the bar
PIPE_WIDTH = 200  # columns when the output is not a terminal
READABLE = "kmdx-readable"  # name of the error handler for text that a stream cannot encode
SPELLED_OUT = {
    "→": "->", "←": "<-", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "·": "*", "±": "+/-", "²": "^2",
    "½": "1/2", "∞": "inf", "≈": "~", "≤": "<=", "≥": ">=", "‖": "||", "µ": "u", "‘": "'", "’": "'", "“": '"',
    "”": '"', "─": "-", "━": "-", "│": "|", "┃": "|", "├": "|", "└": "`",
}  # fmt: skip


def _console(*, stderr: bool = False) -> Console:
    """Make a console that looks up its stream each time it prints."""
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream is not None and stream.isatty()
    return Console(width=None if on_terminal else PIPE_WIDTH, highlight=False, soft_wrap=True, stderr=stderr)


out = _console()
err = _console(stderr=True)


def seconds(text: str, option: str) -> float:
    """Seconds, from ``90``, ``1:30`` or ``0:01:30.5``; raises :class:`KmdxError` that names the option."""
    match = re.fullmatch(r"(?:(\d+):)?([0-5]?\d):([0-5]?\d(?:\.\d*)?)", text.strip())
    if match:
        hours, minutes, rest = match.groups()
        return 3600 * int(hours or 0) + 60 * int(minutes) + float(rest)
    if match := re.fullmatch(r"(\d+):([0-5]?\d(?:\.\d*)?)", text.strip()):  # 90:00 is an hour and a half
        return 60 * int(match[1]) + float(match[2])
    try:
        return float(text)
    except ValueError:
        raise KmdxError(
            f"{option} {quoted(text)}: expected seconds, m:ss or h:mm:ss, such as 90, 1:30 or 0:01:30.5"
        ) from None


class FormatName(str, Enum):
    """File formats of stems."""

    wav16 = "wav16"
    wav24 = "wav24"
    float32 = "float32"
    flac = "flac"
    mp3 = "mp3"


class Precision(str, Enum):
    """Number formats in which the networks compute."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class SpeedName(str, Enum):
    """Speed levels."""

    leaderboard = "leaderboard"
    balanced = "balanced"
    fast = "fast"


class Engine(str, Enum):
    """Implementations of the networks."""

    tuned = "tuned"
    plain = "plain"
    compiled = "compiled"
    graphs = "graphs"


def _complete_ensemble(incomplete: str) -> list[str]:
    """Names of ensembles for the shell."""
    from kmdx import plan_file

    return [name for name in (*plan_file.names(), *plan_file.imported()) if name.startswith(incomplete)]


def complete_stems(context: typer.Context, incomplete: str) -> list[str]:
    """Stems of the chosen ensemble for the shell, after those that are complete."""
    from kmdx import plan_file

    *given, last = incomplete.split(",")
    try:
        stems = plan_file.load(context.params.get("ensemble") or context.params.get("name") or "mini").stems
    except KmdxError:
        return []
    return [",".join((*given, stem)) for stem in stems if stem.startswith(last) and stem not in given]


EnsembleOption = Annotated[
    str,
    typer.Option(
        "--ensemble",
        "-e",
        help="Name of an ensemble, or path or URL of a plan (.yaml).",
        autocompletion=_complete_ensemble,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or any torch device.")]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        case_sensitive=False,
        help="Precision of the networks. auto means fp16 on GPUs that are fast at it. On a CPU it means "
        "fp32, or bf16 if the CPU is fast at it and --speed is balanced or fast.",
    ),
]
SpeedOption = Annotated[
    SpeedName,
    typer.Option(
        case_sensitive=False,
        help="leaderboard runs the ensemble as published. balanced and fast overlap segments less.",
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        case_sensitive=False,
        help="tuned uses the project's own kernels where they are faster on this processor. plain uses only "
        "torch's operations.",
    ),
]
FormatOption = Annotated[
    FormatName,
    typer.Option(case_sensitive=False, help="File format of the stems. mp3 is 320 kbit/s, flac 24-bit."),
]
OutputOption = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER|URL",
        help="Stems are written to OUTPUT/<song>/<stem>; folders are mirrored.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Separate finished songs again, and replace stems made with other settings."
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(help="Subfolder of DATA, or all; default: test, if it exists.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option(metavar="auto|ADDRESS", help="Use a Ray cluster; auto: the one on this machine."),
]
TracksOption = Annotated[str | None, typer.Option(metavar="GLOB", help="Only songs whose names match.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON to this file.")
]


def app(help: str | None = None, *, no_args_is_help: bool = False, completion: bool = False) -> typer.Typer:
    """A command, or a group of them: with ``-h``, and without decorated tracebacks.

    ``completion`` adds the options that install or show the shell's completion.
    """
    return typer.Typer(
        help=help,
        no_args_is_help=no_args_is_help,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run(
    command: Callable[..., object],
    *,
    quiet: bool = False,
    arguments: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Run a command; a user's mistake ends it with one line and exit code 2.

    ``arguments`` returns those of an :func:`app`, by default of the command line. What the system refuses,
    such as a file in a folder that the user may not open, ends a command in the same way. Lost output does
    not change the exit code: it is 0 even after ``kmdx models list >/dev/full``. A warning on standard error
    reports lost output, unless its reader ended first (``| head``). Each warning of this package is one line,
    whatever ``PYTHONWARNINGS`` is. Other warnings are shown as usual, or not at all if ``quiet``. What this
    package logs as information is printed on standard error.
    """
    protect_streams()
    with warnings.catch_warnings(), _printed_log():
        warnings.simplefilter("always", KmdxWarning)
        show_other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *more: Any, **others: Any) -> None:
            if issubclass(category, KmdxWarning):
                warn(str(message))
            elif not quiet:
                show_other(message, category, *more, **others)

        warnings.showwarning = show
        try:
            _call(command, arguments)
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


class _Lines(logging.Handler):
    """Prints each message on standard error, as it is now."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


@contextlib.contextmanager
def _printed_log() -> Iterator[None]:
    """Print what this package logs, from information on; a command inside a command prints it once."""
    logger, lines = logging.getLogger("kmdx"), _Lines(logging.INFO)
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [lines], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)


def _call(command: Callable[..., object], arguments: Callable[[], Sequence[str]] | None) -> None:
    """Call a command; an :func:`app` ends with SystemExit, or KmdxError for a mistake in its arguments."""
    if not isinstance(command, typer.Typer):
        command()
        return
    given = None if arguments is None else arguments()
    try:
        code = command(given, standalone_mode=False)
    except typer.Abort:  # the input ended at a question
        raise KmdxError("aborted") from None
    except _UsageError as error:
        kind = type(error).__name__
        if kind == "NoArgsIsHelpError":
            err.print(escape(error.format_message()))
            sys.exit(2)
        raise KmdxError(_explained(error)) from error
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: Any) -> str:
    """One line about a mistake in a command line, with a suggestion if a name is mistyped."""
    text, context, kind = error.format_message(), error.ctx, type(error).__name__
    command = context.command if context else None
    if (option := getattr(error, "option_name", None)) and kind == "NoSuchOption":
        known = [each for param in command.params for each in param.opts] if command else []
        text = f"unknown option {quoted(option)}{suggest(option, known)}"
    elif text.startswith("No such command") and command is not None:
        known = [each for each in command.commands if not command.commands[each].hidden]
        name, *_ = _names_in(error.message)
        return f"unknown command {quoted(name)}{suggest(name, known)}; available: {', '.join(known)}"
    elif " is not one of " in error.message and getattr(error, "param", None) is not None:
        name, *known = _names_in(error.message)
        noun = error.param.name.replace("_", " ")
        return f"unknown {noun} {quoted(name)}{suggest(name, known)}; available: {', '.join(known)}"
    help = f"; `{context.command_path} --help` lists all options" if context else ""
    return f"{text[:1].lower()}{text[1:].rstrip('.')}{help}"


def _names_in(message: str) -> list[str]:
    """The names that a message of click quotes, as Python's ``repr`` does."""
    return [str(ast.literal_eval(text)) for text in _QUOTED.findall(message)]


_ESCAPES = {
    code: chr(code).encode("unicode_escape").decode()
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
}


def complain(message: str) -> None:
    """Print an error."""
    err.print(f"[bold red]error:[/bold red] {escape(one_line(message))}")


def warn(message: str, console: Console = err) -> None:
    """Print a warning."""
    console.print(f"[bold yellow]warning:[/bold yellow] {escape(one_line(message))}")


def say(line: str) -> None:
    """Print a line on standard output, above the progress bar if standard error shows one.

    This uses ``print`` because the bar redirects ``print``, but not what :data:`out` prints.
    """
    print(one_line(line), flush=True)


def one_line(text: str) -> str:
    """A text with its control characters escaped: names of files may contain line breaks and colors."""
    return text.translate(_ESCAPES)


def progress_bar(*columns: ProgressColumn, **options: Any) -> Progress:
    """A progress bar, with the task's description before it and these columns after it.

    Options are those of rich's ``Progress``. By default the bar is on standard error, disappears at its end,
    and is shown only on a terminal. A description that is too long for the terminal is cut, and the bar is
    shortened; the other columns are not.
    """
    from rich.constrain import Constrain
    from rich.progress import BarColumn, Progress, ProgressColumn, Task
    from rich.text import Text

    class Title(ProgressColumn):
        """The task's description, on one line."""

        def render(self, task: Task) -> Text:
            # Without joiners and variation selectors, every terminal agrees on the width of emoji.
            text = Text.from_markup(task.description.translate({0x200D: None, 0xFE0E: None, 0xFE0F: None}))
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    class Bar(BarColumn):
        """A bar of at most :data:`BAR_WIDTH` columns."""

        def render(self, task: Task) -> Any:
            return Constrain(super().render(task), BAR_WIDTH)

    options = {"console": err, "transient": True, **options}
    options.setdefault("disable", not options["console"].is_terminal)
    return Progress(Title(), Bar(bar_width=None), *columns, **options)


class SongBars:
    """A bar in seconds of audio for the song that is separated, and one for all songs if there are several.

    Both have the time left. Use it as a context manager.
    """

    def __init__(self, songs: int) -> None:
        from rich.progress import TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        text = [TextColumn("{task.fields[text]}")] if err.width >= ROOMY else []
        self.songs = songs
        self.bar = progress_bar(
            TaskProgressColumn(),
            *text,
            TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            redirect_stdout=sys.stdout.isatty(),  # printed lines appear above the bar
        )

    def __enter__(self) -> SongBars:
        self.bar.start()
        self.whole = self.bar.add_task("all songs", total=self.songs, visible=self.songs > 1, text="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @contextlib.contextmanager
    def song(self, label: str, number: int, seconds: float) -> Iterator[Callable[[float, float], None]]:
        """Show a song's bar below that of all songs; call the callback with seconds done and in total.

        ``number`` counts from 1; those before it are done.
        """
        task = self.bar.add_task(escape(one_line(label)), total=seconds, text="")

        def update(done: float, total: float) -> None:
            self.bar.update(task, completed=done, total=total, text=f"{done:.0f} of {total:.0f} s")
            songs = number - 1 + (done / total if total else 1)
            self.bar.update(self.whole, completed=songs, text=f"{number - 1} of {self.songs}")

        update(0, seconds)
        try:
            yield update
        finally:
            self.bar.remove_task(task)
            self.bar.update(self.whole, completed=number, text=f"{number} of {self.songs}")


@contextlib.contextmanager
def download_bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar in bytes, with speed and time left; call the callback with bytes done and, if known, in total.

    It is shown only on a terminal, and only where a command prints what this package logs.
    """
    is_printed = any(isinstance(handler, _Lines) for handler in logging.getLogger("kmdx").handlers)
    if not is_printed or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress_bar(*columns, transient=False, disable=False) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def protect_streams() -> None:
    """Make standard output and standard error accept all text, wherever it goes.

    Closed descriptors 0 to 2 are opened on the null device. Otherwise the next file opened would get such a
    number, and the output of a library or a child process would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # This is the lowest free number, so open returns it. Child processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _protected(sys.stdout), _protected(sys.stderr)
    logging.raiseExceptions = False  # no traceback when a log cannot be written


def _protected(stream: Any) -> Any:
    """Return a stream like this one that never fails, or the stream itself if it does not write to a file."""
    if stream is None:
        stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (stays open until exit)
    if isinstance(stream, _Stream) or not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer above the raw file
    if not isinstance(raw, io.FileIO):  # a Windows console, or a test's buffer: only encoding can fail
        stream.reconfigure(errors=READABLE)
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return _Stream(stream, _Sink(raw.fileno(), "w", closefd=False))


class _Sink(io.FileIO):
    """A file that drops what it cannot write, so that no flush fails, not even the one at exit."""

    lost: OSError | None = None  # why output was dropped; None if nothing was

    def write(self, data: Any) -> int:
        """Write all data, or drop the part that cannot be written."""
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        try:
            while remaining:
                written = super().write(remaining)
                if written is None:  # a non-blocking pipe is full: wait until it can be written
                    select.select((), (self.fileno(),), ())
                else:
                    remaining = remaining[written:]
        except OSError as error:
            self.lost = error
        return size


class _Stream(io.TextIOWrapper):
    """A text stream into a sink, with another stream's encoding and buffering, and with replacements."""

    buffer = None  # type: ignore[assignment]  # hidden: click would write UTF-8 into it if this stream is ASCII

    def __init__(self, like: io.TextIOWrapper, sink: _Sink) -> None:
        self.sink = sink
        self.like = like  # a collected stream closes its descriptor, and the next file would get it
        super().__init__(
            sink,  # no second buffer, as with python -u: the text layer already buffers
            encoding=like.encoding,
            errors=READABLE,
            line_buffering=like.line_buffering,
            write_through=like.write_through,
        )


def _report_lost_output() -> None:
    """Warn about lost output, unless its reader ended first."""
    sys.stdout.flush()
    if isinstance(sys.stdout, _Stream) and sys.stdout.sink.lost is not None:
        reason, sys.stdout.sink.lost = sys.stdout.sink.lost, None
        if reason.errno != errno.EPIPE:
            warn(f"standard output cannot be written ({reason.strerror}); some output was lost")


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a stream cannot encode with similar ASCII text, or with escapes.

    Unlike question marks, escapes keep the names of songs distinct.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(SPELLED_OUT.get(each) or ascii(each)[1:-1] for each in found), error.end


codecs.register_error(READABLE, _readable)


def megabytes(size: int | None) -> str:
    """A size in bytes as text; a question mark if it is unknown."""
    return "?" if size is None else f"{size / 1e6:.{0 if size >= 1e6 else 1}f} MB"
