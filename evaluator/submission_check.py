"""``python -m my_submission.check``: whether this repository is ready to be submitted, or what to do first.

The command prints "ready" and exits with code 0, or lists what to do, each with a command to type, and exits
with code 1.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from evaluator import submission_files, trial
from evaluator.process import Interpreter, find_pointer
from evaluator.repository import SUBMISSION, CommittedFile, Repository
from evaluator.trial import Trial
from kmdx import plan_file, terminal, weights
from kmdx.challenge import MEMORY, TIME_FACTOR
from kmdx.errors import DocumentError, KmdxError, counted, listed
from kmdx.terminal import err, out
from kmdx.weights import Weight

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 5 * 10**6
"""Bytes of the largest file that is committed without Git LFS; the starter kit's limit."""
EDIT = '"${EDITOR:-vi}"'
SETUP_LFS = "sudo apt-get install git-lfs && git lfs install"
SETTINGS = ("KMDX_", "AICROWD_")
"""Beginnings of environment variables that the server does not set to this machine's values."""
app = terminal.app()


@dataclass(frozen=True)
class Step:
    """Something to do before the submission is ready."""

    problem: str
    command: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.command}"


@dataclass
class Findings:
    """The result of a check."""

    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was measured, and what could not be checked
    is_complete: bool = True  # whether the commit has all files that a song needs


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command()
def check(
    before_tag: Annotated[
        bool, typer.Option("--before-tag", help="The commit must have no submission tag yet.")
    ] = False,
    files: Annotated[
        bool,
        typer.Option(
            "--files", help="Only print the ensemble's files, with a NUL after each, for submit.sh."
        ),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=1, max=3600, help="Duration of the song that is separated.")
    ] = 30.0,
    python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Python interpreter that runs the submission.")
    ] = None,
    accept_python: Annotated[
        bool, typer.Option("--accept-python", help="Accept another version of Python than the image's.")
    ] = False,
) -> None:
    """Check that this repository is ready to be submitted to AIcrowd.

    It separates a song with the committed files: offline, as another user, and within the memory limit.
    Prints "ready", or lists what to do, each with the command to type. Exit code: 0 if ready, 1 if there is
    something to do, 2 for a user error.
    """
    os.chdir(ROOT)
    named = os.environ.get("KMDX_MODELS")
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        del os.environ[name]
    repository = Repository(ROOT)
    if files:
        steps = [*check_description(ROOT), *check_requirements(ROOT)]
        if steps := [*steps, *check_weights(ROOT), *check_sizes(repository)]:
            _print(Findings(steps))
        sys.stdout.write("".join(f"{path}\0" for path in ensemble_files(ROOT)))
        return
    findings = examine(repository)
    if named:
        findings.notes.append(f"KMDX_MODELS ({named}) is ignored: the server reads models/ of the repository")
    if findings.is_complete:
        try_song(repository, findings, seconds, python, accept_python)
    else:
        findings.notes.append("no song was separated: complete the commit first")
    findings.steps += check_tag(repository, before_tag)
    _print(findings)


def examine(repository: Repository) -> Findings:
    """Check the files and the commit. The current folder must be the submission's."""
    root, findings = repository.folder, Findings()
    findings.steps += check_description(root)
    findings.steps += check_requirements(root)
    if repository.head() is None:
        findings.steps.append(Step("nothing is committed", "git add --all && git commit -m Submission"))
        findings.is_complete = False
        return findings
    committed = repository.files()
    lacking = [*check_weights(root), *check_commit(repository, committed)]
    findings.steps += lacking
    findings.is_complete = not lacking
    stored = [file.pointer.bytes for file in committed.values() if file.pointer]
    plain = sum(file.bytes for file in committed.values())
    sizes = f"{plain / 1e6:.1f} MB in git, {sum(stored) / 1e6:.1f} MB in Git LFS"
    findings.notes.append(f"{counted(len(committed), 'file')}: {sizes}")
    with suppress(KmdxError):  # reported by check_weights
        if submission_files.ensemble(root) is None:
            findings.notes.append(
                "my_submission/user_config.py has no string ENSEMBLE: the files of its weights are not known"
            )
    return findings


def check_description(root: Path) -> Iterator[Step]:
    """Check ``aicrowd.json``."""
    try:
        submission_files.read_description(root)
    except DocumentError as error:
        yield Step(f"aicrowd.json: {error}", f"{EDIT} aicrowd.json")


def check_requirements(root: Path) -> Iterator[Step]:
    """Check that ``requirements.txt`` allows one version of each package."""
    edit = f"{EDIT} requirements.txt"
    try:
        for number, requirement in submission_files.requirements(root / "requirements.txt"):
            if not submission_files.is_pinned(requirement):
                problem = f"{requirement} is not pinned; expected NAME==VERSION"
                yield Step(f"requirements.txt, line {number}: {problem}", edit)
    except DocumentError as error:
        yield Step(f"requirements.txt: {error}", edit)


def check_weights(root: Path) -> Iterator[Step]:
    """Check that the weights of the ensemble are in the repository's folder, and complete."""
    if pointer := find_pointer(root):
        problem = f"{pointer} is a pointer of Git LFS instead of the file"
        yield Step(problem, "git lfs install && git lfs pull")
        return
    missing = []
    try:
        ensemble, used = submission_files.ensemble(root), _weights(root)
    except KmdxError as error:
        yield Step(str(error), f"{EDIT} my_submission/user_config.py")
        return
    for status in weights.verify(root / "models", used):
        name, path = status.weight.name, status.path
        if path is None and status.weight.sources:
            missing.append(name)
        elif path is None:
            yield Step(status.message, _copy(status.weight.path, root))
        elif not status.ok:
            file = shlex.quote(os.path.relpath(path, root))
            again = f"rm {file} && kmdx models pull {ensemble}"
            problem = f"{file}: {status.message.removeprefix(f'{path} is ')}"
            yield Step(problem, again if status.weight.sources else _copy(path, root))
        elif not path.resolve().is_relative_to(root):
            yield Step(f"{path} is outside of the repository", f"cp {shlex.quote(str(path))} models/")
    if missing:
        problem = f"{counted(len(missing), 'weight')} of the ensemble missing in models/ ({listed(missing)})"
        yield Step(problem, f"kmdx models pull {ensemble}")


def _copy(path: Path | None, root: Path) -> str:
    """The command that puts the complete file of a weight where the ensemble expects it."""
    place = root / "models" if path is None else path
    return f"cp COMPLETE_FILE {shlex.quote(os.path.relpath(place, root))}"


def ensemble_files(root: Path) -> list[str]:
    """Paths of the ensemble's own files in the repository: its weights, and its plan if it has a file."""
    found = [status.path for status in weights.verify(root / "models", _weights(root)) if status.path]
    name = submission_files.ensemble(root) or ""
    found += [root / name if name.endswith((".yaml", ".yml")) else root / "models" / f"{name}.yaml"]
    found += [root / "models" / weights.TRAINED]
    inside = [path for path in found if path.is_file() and path.resolve().is_relative_to(root)]
    return sorted({os.path.relpath(path, root) for path in inside})


def check_sizes(repository: Repository) -> Iterator[Step]:
    """Check that large files that are not committed yet would go into Git LFS."""
    paths = [path for path in repository.changes() if (repository.folder / path).is_file()]
    large = [path for path in paths if _is_large(repository, path)]
    for path in sorted({*large} - repository.in_lfs(large)):
        size = f"{(repository.folder / path).stat().st_size / 1e6:.1f} MB"
        yield Step(
            f"{path} ({size}) would not be in Git LFS, as files above {LARGEST / 1e6:.0f} MB must be",
            f"git lfs track {shlex.quote(path)}",
        )


def check_commit(repository: Repository, committed: dict[str, CommittedFile]) -> Iterator[Step]:
    """Check that the commit is complete, and that its large files are in Git LFS."""
    if changed := repository.changes():
        yield Step(
            f"not committed: {listed(changed, most=3)}", "git add --all && git commit -m 'My submission'"
        )
    try:
        needed = ensemble_files(repository.folder)
    except KmdxError:  # reported by check_weights
        needed = []
    large = [path for path, file in committed.items() if file.bytes > LARGEST]
    wrong = [path for path in needed if not _is_committed(repository, committed.get(path), path)]
    matched = repository.in_lfs([*committed, *needed])
    plain = {*large, *(path for path in needed if path in matched and _is_plain(committed.get(path)))}
    if (plain or matched & {*wrong}) and not repository.lfs_is_set_up():
        yield Step("Git LFS is not set up", SETUP_LFS)
    for path in sorted(plain):
        file, size = shlex.quote(path), f"{committed[path].bytes / 1e6:.1f} MB"
        why = f", as files above {LARGEST / 1e6:.0f} MB must be" if path in large else ""
        track = "" if path in matched else f"git lfs track {file} && "
        add = f"git add --renormalize .gitattributes {file}"
        yield Step(f"{path} ({size}) is not in Git LFS{why}", f"{track}{add} && git commit -m 'Git LFS'")
    for path in wrong:
        problem = "differs from the committed file" if path in committed else "is not committed"
        file, needs_pattern = shlex.quote(path), path not in matched and _is_large(repository, path)
        track = f"git lfs track {file} && git add .gitattributes && " if needs_pattern else ""
        yield Step(f"{path} {problem}", f"{track}git add --force {file} && git commit -m Weights")
    lost = [path for path, file in committed.items() if file.pointer and not repository.stored(file.pointer)]
    if lost:
        yield Step(f"{listed(lost, most=3)}: Git LFS does not have the file", "git lfs fetch")


def _is_plain(file: CommittedFile | None) -> bool:
    """Whether a file is committed, but not in Git LFS."""
    return file is not None and file.pointer is None


def _is_large(repository: Repository, path: str) -> bool:
    return (repository.folder / path).stat().st_size > LARGEST


def _is_committed(repository: Repository, file: CommittedFile | None, path: str) -> bool:
    """Whether a file on disk is the committed one."""
    if file is None:
        return False
    if file.pointer is None:
        return True  # git itself reports a difference
    return weights.file_sha256(repository.folder / path) == file.pointer.sha256


def check_tag(repository: Repository, before_tag: bool = False) -> Iterator[Step]:
    """Check that the commit has one annotated submission tag, or none ``before_tag``.

    AIcrowd evaluates a commit once, however many tags it gets.
    """
    if repository.head() is None:
        return
    tags = repository.tags()
    names = listed([tag.name for tag in tags])
    again = "git commit --allow-empty -m 'Submit again'"
    if before_tag:
        if tags:
            yield Step(f"the commit has the tag {names} already, and AIcrowd evaluates a commit once", again)
    elif not tags:
        yield Step(f"the commit has no tag {SUBMISSION}…", "./submit.sh NAME")
    elif len(tags) > 1:
        yield Step(f"the commit has the tags {names}, and AIcrowd evaluates a commit once", again)
    elif not tags[0].annotated:
        name = shlex.quote(tags[0].name)
        yield Step(
            f"the tag {names} is not annotated", f"git tag --force --annotate --message={name} {name} HEAD"
        )


def try_song(
    repository: Repository,
    findings: Findings,
    seconds: float,
    python: Path | None = None,
    accept_python: bool = False,
) -> None:
    """Separate a song with the committed submission, and add what is found."""
    wanted = submission_files.image_python(repository.folder)
    own = sys.version.split()[0]
    chosen = python or (None if _matches(own, wanted) else _find_python(wanted, repository.folder))
    if chosen is None and not accept_python and not _matches(own, wanted):  # before the song takes minutes
        findings.steps.append(_other_python(own, wanted))
        return
    with terminal.SongBars(1) as bars, bars.song("a song", 1, seconds) as progress:
        result = trial.run(repository, seconds, chosen, progress)
    findings.notes += result.isolation
    if result.failure is not None:
        findings.notes += [f"the submission printed: {line}" for line in result.log_tail]
        findings.steps.append(
            Step(f"a song failed, correct it: {result.failure}", f"{EDIT} my_submission/user_config.py")
        )
    elif not result.returned_true:
        problem = "separate_music_file of the wrapper did not return True, as the starter kit's does"
        findings.steps.append(Step(problem, f"{EDIT} my_submission/aicrowd_wrapper.py"))
    if result.interpreter is None:
        return
    findings.notes += _differences(repository.folder, result.interpreter)
    _check_python(result.interpreter, wanted, accept_python, findings)
    if result.failure is None:
        _check_time(repository.folder, result, seconds, findings)


def _check_python(
    interpreter: Interpreter, wanted: str | None, accept_python: bool, findings: Findings
) -> None:
    """Compare the version of the interpreter that ran the song with the image's."""
    if wanted is None:
        ran = f"the song ran on {interpreter.version}"
        findings.notes.append(f"neither Dockerfile nor apt.txt names the image's Python; {ran}")
    elif not _matches(interpreter.version, wanted):
        step = _other_python(interpreter.version, wanted)
        if accept_python:
            findings.notes.append(step.problem)
        else:
            findings.steps.append(step)


def _matches(version: str, wanted: str | None) -> bool:
    return wanted is None or f"{version}.".startswith(f"{wanted}.")


def _other_python(version: str, wanted: str | None) -> Step:
    """What to do about an interpreter whose version is not the image's."""
    folder = f".venv-{wanted}"
    make = f"python{wanted} -m venv {folder} && {folder}/bin/pip install -r requirements.txt"
    return Step(
        f"the image has Python {wanted}, this is {version} (--accept-python accepts that)",
        f"{make} && python -m my_submission.check --python {folder}/bin/python",
    )


def _check_time(root: Path, result: Trial, seconds: float, findings: Findings) -> None:
    """Compare the song's time with the limit, if this machine has what the submission asks for."""
    factor = result.seconds / seconds
    try:
        needs_gpu = submission_files.read_description(root).gpu
    except DocumentError:  # reported by check_description
        needs_gpu = True
    device = result.interpreter.device if result.interpreter else None
    measured = (
        f"the song took {factor:.2f} × its duration on {device or 'this machine'} (limit {TIME_FACTOR:g} ×); "
        f"loading took {result.load_seconds:.1f} s; peak host memory {result.peak_memory / 1e9:.2f} GB "
        f"(limit {MEMORY / 1e9:g} GB)"
    )
    if factor <= TIME_FACTOR:
        findings.notes.append(measured)
    elif needs_gpu and device == "cpu":
        findings.notes.append(f"{measured}: try it on a machine with a GPU, as the server has")
    else:
        findings.steps.append(Step(measured, f"{EDIT} my_submission/user_config.py"))


def _differences(root: Path, interpreter: Interpreter) -> list[str]:
    """A note on packages whose versions differ from those in ``requirements.txt``."""
    pins = submission_files.pins(root / "requirements.txt")
    found = {
        submission_files.normalized(name): version.partition("+")[0]
        for name, version in interpreter.packages.items()
    }
    others = [
        f"{name} {found[name]} instead of {pin}" for name, pin in pins.items() if found.get(name, pin) != pin
    ]
    return [f"other versions than in requirements.txt: {listed(others)}"] if others else []


def _weights(root: Path) -> list[Weight]:
    """The weights of the submission's ensemble; none if it does not use an ensemble."""
    name = submission_files.ensemble(root)
    used = [] if name is None else [use.weight for use in plan_file.load(name).networks.values()]
    return list({weight.name: weight for weight in used}.values())


def _find_python(version: str | None, root: Path) -> Path | None:
    """An interpreter of a version that has the packages of ``requirements.txt``; None if there is none."""
    names = [*submission_files.pins(root / "requirements.txt")]
    program = "import importlib.metadata as m, sys; [m.version(name) for name in sys.argv[1:]]"
    found = shutil.which(f"python{version}")
    for path in (root / f".venv-{version}" / "bin" / "python", Path(found) if found else None):
        if path is not None and path.is_file():
            words = [str(path), "-I", "-c", program, *names]
            if subprocess.run(words, capture_output=True).returncode == 0:
                return path
    return None


def _print(findings: Findings) -> None:
    """Print the result and end with its exit code."""
    for note in findings.notes:
        err.print(f"note: {escape(terminal.one_line(note))}", soft_wrap=True)
    _print_steps(findings.steps)
    raise typer.Exit(1 if findings.steps else 0)


def _print_steps(steps: Sequence[Step]) -> None:
    if not steps:
        out.print("ready")
        return
    out.print(f"not ready; {counted(len(steps), 'thing')} to do:")
    for step in steps:
        out.print(escape(terminal.one_line(f"- {step}")), soft_wrap=True)
