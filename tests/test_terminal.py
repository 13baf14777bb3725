"""Failures to print never affect the work, whatever standard output and standard error are."""

from __future__ import annotations

import ast
import errno
import io
import os
import re
import runpy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import typer
from conftest import noise
from rich.cells import cell_len
from rich.console import Console

from kmdx import terminal
from kmdx.errors import KmdxWarning

ROOT = Path(__file__).parents[1]
LINUX = sys.platform.startswith("linux")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="closes and fills descriptors as a shell does")
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
ENCODINGS = ("cp1252", "latin-1", "cp437", "ascii", "cp037", "shift_jis", "utf-8", "utf-16")

# How a shell starts a command, and whether what it prints on standard output can be lost.
CONDITIONS = {
    "no stdout": "{} >&-",
    "no stderr": "{} 2>&-",
    "no streams": "{} <&- >&- 2>&-",
    "stdout is full": "{} >/dev/full",
    "both are full": "{} >/dev/full 2>&1",
    "stdout may not be written": "{} 1</dev/null",
    "the reader is gone": "{} | true; exit ${{PIPESTATUS[0]}}",
    "the reader of both is gone": "{} 2>&1 | true; exit ${{PIPESTATUS[0]}}",
    "the reader leaves": "{} | head -c 5; exit ${{PIPESTATUS[0]}}",
}

TALKS = r"""
import logging, os, subprocess, sys, threading, warnings
from pathlib import Path
import typer
from rich.cells import cell_len
from rich.console import Console
from kmdx import terminal
from kmdx.errors import KmdxError, KmdxWarning

def talk():
    assert all(map(os.get_inheritable, range(3))), "a child process has all three, too"
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        for _ in range(50):
            terminal.say("one → B − A, 0.5 ×, Ж🎵 \udcff " + 200 * "x")
            terminal.out.print("[bold]two[/bold] ├── …")
            terminal.warn("three – ‘’")
            typer.echo("four é")
            typer.echo("five é", err=True)
        print("not flushed", end="")
        warnings.warn("six ∞", UserWarning)
        warnings.warn("seven ∞", KmdxWarning)
        logging.getLogger("x").error("eight → \udcff")
        for number in (1, 2):
            try:
                os.write(number, b"a library's own words\n")
            except OSError:
                pass
        subprocess.run("echo a child\'s words; echo and more of them >&2", shell=True)
        thread = threading.Thread(target=lambda: terminal.out.print("nine"))
        thread.start()
        thread.join()
        file.write("the work")
    if sys.argv[2] == "2":
        raise KmdxError("no → such – song \udcff")
    if sys.argv[2] == "130":
        raise KeyboardInterrupt
    sys.exit(int(sys.argv[2]))

terminal.run(lambda: terminal.run(talk))  # a command may run another one
"""


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in the checkout."""
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, env={**os.environ, **environment}
    )


def quiet(printed: bytes) -> bool:
    """Whether neither a traceback nor a complaint of a shutting down interpreter was printed."""
    return b"Traceback" not in printed and b"Exception ignored" not in printed


@POSIX
@FULL
@pytest.mark.parametrize(
    ("condition", "options"),
    [(name, "") for name in CONDITIONS] + [(name, "-u") for name in ("no streams", "both are full", "the reader leaves")],
)  # fmt: skip
def test_lost_output_does_not_change_the_work_or_its_exit_code(
    condition: str, options: str, tmp_path: Path
) -> None:
    code = ("0", "1", "2", "130")[list(CONDITIONS).index(condition) % 4]
    (tmp_path / "talks.py").write_text(TALKS, "utf-8")
    command = f"{sys.executable} {options} {tmp_path / 'talks.py'} {tmp_path / 'work'} {code}"
    done = shell(CONDITIONS[condition].format(command))
    assert done.returncode == int(code), done.stderr
    assert quiet(done.stderr + done.stdout)
    assert (tmp_path / "work").read_text("utf-8") == "the work", "nothing that was printed lands in a file"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp037", "utf-8", "utf-16"])
def test_text_that_cannot_be_encoded_is_replaced(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "talks.py").write_text(TALKS, "utf-8")
    command = [sys.executable, str(tmp_path / "talks.py"), str(tmp_path / "work"), "2"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    )
    assert done.returncode == 2, done.stderr
    assert quiet(done.stderr)
    printed = re.sub(rb"a (library's own|child's) words\n", b"", done.stdout)
    if encoding == "ascii":
        assert b"one -> B - A, 0.5 x, \\u0416\\U0001f3b5 \\udcff xxx" in printed
        assert b"four \\xe9" in printed.splitlines(), "what click prints is ASCII, too"
        assert b"error: no -> such - song \\udcff" in done.stderr
    elif encoding.startswith("utf"):
        assert "one → B − A, 0.5 ×, Ж🎵 \\udcff" in printed.decode(encoding)
    else:
        assert "one -> B - A, 0.5 " in printed.decode(encoding).replace("→", "->").replace("−", "-")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_character_can_be_printed(encoding: str) -> None:
    for number in (*range(0x20, 0x3000), *range(0xD7F0, 0xE010), 0x1F3B5, 0x10FFFF):
        character = chr(number)
        assert f"<{character}>".encode(encoding, terminal.READABLE)


def test_other_characters_are_escaped_so_that_names_stay_distinct() -> None:
    assert "歌 1".encode("cp1252", terminal.READABLE) == b"\\u6b4c 1"
    assert "a − b → c × d".encode("latin-1", terminal.READABLE) == b"a - b -> c \xd7 d"
    assert "├── é".encode("cp437", terminal.READABLE) == "├── é".encode("cp437"), "what can be is as it is"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", terminal.READABLE)


def protected(descriptor: int) -> io.TextIOWrapper:
    """A protected stream over a descriptor, as standard output is."""
    plain = open(descriptor, "w", encoding="cp1252", closefd=False)  # noqa: SIM115
    return terminal._protected(plain)


def test_a_stream_that_fails_midway_drops_the_rest() -> None:
    reading, writing = os.pipe()
    stream = protected(writing)
    print("before →", file=stream, flush=True)
    assert os.read(reading, 100).split() == [b"before", b"->"]
    os.close(reading)
    for _ in range(3):
        print("after", file=stream, flush=True)
    stream.write("more than a buffer holds" * 10_000)
    stream.flush()
    assert isinstance(stream.sink.lost, BrokenPipeError)
    assert terminal._protected(stream) is stream, "protecting it again changes nothing"
    os.close(writing)
    stream.write("even now")
    stream.flush()
    stream.close()


@POSIX
def test_a_non_blocking_pipe_gets_all_output() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    stream = protected(writing)
    got = bytearray()

    def read() -> None:
        while block := os.read(reading, 1 << 16):
            got.extend(block)

    thread = threading.Thread(target=read)
    thread.start()
    stream.write(500_000 * "x")
    stream.flush()
    os.close(writing)
    thread.join()
    os.close(reading)
    assert got == 500_000 * b"x"
    assert stream.sink.lost is None


@POSIX
@FULL
def test_lost_output_is_reported_unless_the_reader_ended(tmp_path: Path) -> None:
    command = f"{sys.executable} -m kmdx.cli models where"
    full = shell(f"{command} >/dev/full")
    assert full.returncode == 0
    assert b"warning: standard output cannot be written (No space left on device)" in full.stderr
    gone = shell(f"{command} | true; exit ${{PIPESTATUS[0]}}")
    assert gone.returncode == 0
    assert b"warning" not in gone.stderr


@POSIX
@FULL
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("PYTHONIOENCODING=cp1252 {} ensembles show leaderboard_c", 0),
        ("PYTHONIOENCODING=ascii {} separate nöne→.wav -e mini", 2),
        ("{} ensembles >&-", 0),
        ("{} models verify nöne >&- 2>&-", 2),
        ("{} separate --nöne 2>/dev/full", 2),
        ("{} --help >/dev/full", 0),
        ("{} models list | head -c 5; exit ${{PIPESTATUS[0]}}", 0),
    ],
)
def test_the_command_works_with_closed_or_broken_streams(line: str, code: int) -> None:
    done = shell(line.format(f"{sys.executable} -m kmdx.cli"))
    assert done.returncode == code, done.stderr
    assert quiet(done.stdout + done.stderr)


@pytest.mark.parametrize("setting", ["ignore", "error", "ignore::UserWarning"])
def test_the_users_warning_filters_neither_hide_nor_raise_ours(
    setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        for _ in range(2):
            warnings.warn("a hole at 1 s", KmdxWarning, stacklevel=1)

    with warnings.catch_warnings():
        action, _, category = setting.partition("::")
        warnings.simplefilter(action, UserWarning if category else Warning)  # type: ignore[arg-type]
        terminal.run(work)
    assert capsys.readouterr().err.count("a hole at 1 s") == 2


@POSIX
@pytest.mark.slow
def test_songs_are_separated_even_if_nothing_can_be_printed(tmp_path: Path) -> None:
    names = [b"one", "naïve – Ж🎵".encode(), b"caf\xe9 that is not UTF-8" if LINUX else b"three"]
    (tmp_path / "in").mkdir()
    for name in names:
        soundfile.write(os.fsencode(tmp_path / "in") + b"/" + name + b".wav", noise(13_000), 44100)
    command = f"{sys.executable} -m kmdx.cli separate {tmp_path}/in -e mini --stems vocals --device cpu"
    for number, line in enumerate(("PYTHONIOENCODING=ascii {}", "{} <&- >&- 2>&-")):
        done = shell(line.format(f"{command} -o {tmp_path}/{number}"))
        assert done.returncode == 0, done.stderr
        assert quiet(done.stderr)
        stems = [os.fsencode(path) for path in (tmp_path / str(number)).rglob("vocals.wav")]
        assert [soundfile.info(stem).frames for stem in stems] == [13_000] * 3


# Children of commands, whose pipes are their protocol, and what Python runs when it starts.
NO_COMMAND = {
    "evaluator/sandbox.py",
    "evaluator/startup/sitecustomize.py",
    "evaluator/submission_worker.py",
    "kmdx/bounded.py",
    "setup.py",
}


def sources() -> list[Path]:
    folders = ("kmdx", "evaluator", "training", "benchmarks", "my_submission", "recipes")
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def commands() -> list[str]:
    """Names of all modules that do something when they are run."""
    found = []
    for path in sources():
        name = path.relative_to(ROOT)
        runs = path.name == "__main__.py" or re.search(r"__name__\s*==", path.read_text("utf-8"))
        if runs and name.as_posix() not in NO_COMMAND:
            found.append(".".join(name.with_suffix("").parts).removesuffix(".__main__"))
    return sorted(found)


@pytest.mark.parametrize("name", commands())
def test_every_command_runs_through_the_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Callable[[], object]] = []
    monkeypatch.setattr(terminal, "run", lambda command, **options: started.append(command))
    monkeypatch.setattr(sys, "argv", [name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        runpy.run_module(name, run_name="__main__")
    assert len(started) == 1
    assert callable(started[0])


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("local_evaluation", "psutil", "evaluator"),
        ("evaluator.compare", "jinja2", "evaluator"),
        ("training", "lightning", "training"),
        ("local_evaluation", "matplotlib", "evaluator"),
        ("evaluator.blend_search", "matplotlib", "evaluator"),
        ("evaluator.tradeoff", "matplotlib", "evaluator"),
        ("training", "matplotlib", "training"),
    ],
)
def test_a_command_without_its_extra_names_it_in_one_line(command: str, package: str, extra: str) -> None:
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; "
        f"runpy.run_module({command!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {package} is missing; install it with: pip install '{ROOT}[{extra}]'\n"


def test_there_are_commands_to_check() -> None:
    assert {"kmdx.cli", "local_evaluation", "evaluator", "evaluator.compare", "training", "demo"} <= {
        *commands()
    }
    assert len(commands()) >= 19


def test_only_the_terminal_makes_consoles() -> None:
    for path in sources():
        if path == Path(terminal.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(
                getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", "")
            )
            assert name != "Console", f"{path}:{node.lineno} makes a console of its own"


LONG = "x" * 300
"""The system refuses every path with such a name, for any user."""
COMMANDS = [
    "kmdx.cli separate {long} -e mini",
    "kmdx.cli separate song.wav -e {long}.yaml",
    "kmdx.cli separate song.wav -e mini -o {long}",
    "kmdx.cli ensembles show {long}.yaml",
    "kmdx.cli benchmark -e {long}.yaml",
    "local_evaluation {long} -o run",
    "local_evaluation data -o {long}",
    "local_evaluation data -o run --submission {long}",
    "local_evaluation data -o run --estimates {long}",
    "local_evaluation data -o run --python {long}",
    "local_evaluation data -o run --ensemble {long}.yaml",
    "evaluator.compare {long} {long}",
    "evaluator.blend_search collect mini {long} -o collection",
    "evaluator.tradeoff mini {long} -o curve",
    "evaluator.blend_search solve {long} -o mine.yaml",
    "training run {long}.yaml --data data -o run",
    "training report {long}",
    "training export {long}",
]


@POSIX
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_the_system_refuses_is_a_one_line_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *arguments = command.format(long=tmp_path / LONG).split()
    monkeypatch.chdir(tmp_path)
    song = tmp_path / "data" / "test" / "song"
    song.mkdir(parents=True)
    soundfile.write("song.wav", noise(1000), 44100)
    for stem in ("bass", "drums", "mixture", "other", "vocals"):
        soundfile.write(song / f"{stem}.wav", noise(1000), 44100)
    assert_one_line(module, arguments, monkeypatch, capsys)


@pytest.mark.parametrize(
    "command", ["models list", "models verify htdemucs", "models pull htdemucs", "separate a.wav -e htdemucs"]
)
def test_a_models_folder_that_the_system_refuses_is_a_one_line_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1000), 44100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / LONG))
    assert_one_line("kmdx.cli", command.split(), monkeypatch, capsys)


def assert_one_line(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run a command that ends with one line that begins with ``error:``, and exit code 2."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert "File name too long" in errors[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "closed/a"), str(tmp_path / "closed/b")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("evaluator.compare", run_name="__main__")
    assert end.value.code == 2
    assert "closed/a: Permission denied" in capsys.readouterr().err


def test_a_broken_pipe_other_than_the_output_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(SystemExit) as end:
        terminal.run(lambda: app([]))
    assert end.value.code == 1
    assert "error: a process that this command started ended unexpectedly" in capsys.readouterr().err


def test_a_bar_is_drawn_on_a_terminal_unless_a_program_uses_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", written)
    with terminal.download_bar("htdemucs") as progress:
        progress(42_000_000, None)
    assert written.getvalue() == ""

    def download() -> None:
        with terminal.download_bar("htdemucs") as progress:
            progress(42_000_000, None)
            progress(84_000_000, 84_000_000)

    terminal.run(download)
    assert "htdemucs" in written.getvalue()
    assert "84.0/84.0 MB" in written.getvalue()


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "\x1b[31mred", "a\u2028b", "\u202egnp.wav", "a\x85b"])
def test_a_name_with_control_characters_is_printed_on_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for show in (terminal.say, terminal.complain, terminal.warn):
        show(f"the song {name} · 曲　名 👩‍🎤")
        captured = capsys.readouterr()
        (line,) = (captured.out + captured.err).splitlines()
        assert "曲　名 👩‍🎤" in line
        assert name not in line
        assert "the song" in line


@pytest.mark.parametrize(
    "title",
    ["a", "Symphony No. 5 in C minor, Op. 67: I. Allegro con brio", "日本語の長い曲名" * 6, "🎵👩‍👩‍👧❤️ [b]x" * 9, "x" * 300],
)  # fmt: skip
@pytest.mark.parametrize("width", [40, 80, 200])
def test_bar_percentage_and_time_stay_in_place_whatever_the_title(
    title: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "err", console)
    with terminal.SongBars(3) as bars, bars.song(title, 2, 60.0) as progress:
        progress(30.0, 60.0)
        plain = Console(file=io.StringIO(), width=width, color_system=None)
        plain.print(bars.bar.get_renderable())
    whole, song = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert cell_len(song) <= width
    assert re.search(r"━.* +50% .*\d?-?:\S\S:\S\S", song)
    assert re.match(r"all songs .*━.* +50% ", whole), "one song and a half of three"
    assert len(title) > 9 or song.startswith("a ")
    assert cell_len(whole) == cell_len(song)


def test_a_single_song_has_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "err", console)
    with terminal.SongBars(1) as bars, bars.song("one", 1, 60.0):
        plain = Console(file=io.StringIO(), width=40)
        plain.print(bars.bar.get_renderable())
    assert len(plain.file.getvalue().splitlines()) == 1  # type: ignore[attr-defined]
