"""The check of a submission: each rule, a case that breaks it, and the command that it suggests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import submission_repository_cases as cases
import submissions
from process_cases import LINUX
from submission_repository_cases import HERE, NEEDS_LFS, commit, describe, run

from evaluator import submission_check, submission_files, trial
from evaluator.process import Interpreter
from evaluator.repository import Repository, RepositoryError, Tag
from evaluator.submission_check import Findings, Step, examine
from evaluator.trial import Trial
from kmdx.errors import KmdxError

entry, identity = cases.entry, cases.identity
ROOT = Path(__file__).parents[1]


@NEEDS_LFS
def test_a_complete_submission_has_nothing_to_do(entry: Path) -> None:
    found = examine(Repository(entry))
    assert found.steps == []
    assert found.is_complete
    (note,) = found.notes
    assert note.endswith(" MB in Git LFS")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"challenge_id": "mdx"}, "challenge_id: .*'music-demixing-track-mdx-23', not 'mdx'"),
        ({"authors": "me"}, "authors: .*list, not 'me'"),
        ({"authors": []}, "authors: .*at least 1"),
        ({"authors": [" "]}, "authors: expected AIcrowd user names"),
        ({"authors": [7]}, "authors.0: .*string, not 7"),
        ({"authors": ["kmdx-net"]}, r"authors: expected your AIcrowd user name, not \['kmdx-net'\]"),
        ({"gpu": "true"}, "gpu: .*boolean, not 'true'"),
        ({"gpu": 1}, "gpu: .*boolean, not 1"),
        ({"gpu": None}, "gpu: field required"),
        ({"labelnoise": 0}, "labelnoise: .*boolean"),
        ({"description": ["a"]}, "description: .*string"),
        ({"gpus": True}, "unknown key 'gpus' [(]did you mean 'gpu'"),
        ({"bleeding": True}, "only one of labelnoise, bleeding and external_dataset_used"),
        ({"labelnoise": True, "bleeding": True, "external_dataset_used": False}, "only one of labelnoise"),
    ],
)
def test_each_rule_of_aicrowd_json_is_checked(tmp_path: Path, changes: dict, problem: str) -> None:
    describe(tmp_path)
    assert not [*submission_check.check_description(tmp_path)]
    describe(tmp_path, **changes)
    (step,) = submission_check.check_description(tmp_path)
    assert step.command == '"${EDITOR:-vi}" aicrowd.json'
    with pytest.raises(KmdxError, match=problem):
        submission_files.read_description(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"gpu": NaN}', None])
def test_an_unreadable_aicrowd_json_is_reported(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "aicrowd.json").write_text(text)
    (step,) = submission_check.check_description(tmp_path)
    assert step.problem.startswith("aicrowd.json: ")


@pytest.mark.parametrize(
    "requirement",
    ["numpy", "numpy>=2", "numpy==2.*", "numpy==2,<3", "numpy~=2.0", "-e .", "a @ https://example.org/a.whl",
     "a @ git+https://example.org/a@main", "numpy = 2"],
)  # fmt: skip
def test_requirements_that_allow_several_versions_are_reported(tmp_path: Path, requirement: str) -> None:
    pinned = ["# numpy", "numpy==2.0", "a[b] == 1.0 ; python_version < '3.13'", "--prefer-binary", "",
              f"b @ git+https://example.org/b@{'0' * 40}", "c==1 \\", "    --hash=sha256:00"]  # fmt: skip
    (tmp_path / "requirements.txt").write_text("\n".join([*pinned, requirement, ""]))
    (step,) = submission_check.check_requirements(tmp_path)
    assert step.problem.endswith(f": {requirement} is not pinned; expected NAME==VERSION")


def test_this_projects_own_files_pass_except_for_the_author(monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = submission_check.check_description(ROOT)
    assert "expected your AIcrowd user name" in step.problem
    assert not [*submission_check.check_requirements(ROOT)]
    assert submission_files.image_python(ROOT) == "3.12"
    assert submission_files.ensemble(ROOT) == "leaderboard_c"


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("Dockerfile", "FROM python:3.10-slim\n", "3.10"),
        ("Dockerfile", "# python3.9\nRUN python3.12 -m venv .venv\n", "3.12"),
        ("Dockerfile", "FROM ubuntu\nRUN python3 -m venv .venv\n", None),
        ("apt.txt", "git\npython3.11-venv\n", "3.11"),
        ("README.md", "python3.11", None),
    ],
)
def test_the_images_python_is_the_one_that_its_files_name(
    tmp_path: Path, name: str, text: str, version: str | None
) -> None:
    (tmp_path / name).write_text(text)
    assert submission_files.image_python(tmp_path) == version


@pytest.mark.parametrize(
    ("text", "ensemble"),
    [
        ("ENSEMBLE = 'a'\nENSEMBLE = 'b'\n", "b"),
        ("ENSEMBLE: str = 'a'\n", "a"),
        ("ENSEMBLE = open('x')\n", None),
        ("raise SystemExit\n", None),
    ],
)
def test_the_ensemble_is_read_without_running_the_configuration(
    tmp_path: Path, text: str, ensemble: str | None
) -> None:
    (tmp_path / "my_submission").mkdir()
    (tmp_path / "my_submission" / "user_config.py").write_text(text)
    assert submission_files.ensemble(tmp_path) == ensemble


def append(path: Path, size: int) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * size)


def without_pointer(entry: Path) -> None:
    """Commit the weights to git itself, as without Git LFS."""
    append(entry / "models" / "small.ckpt", 1)
    run(entry, "git", "lfs", "uninstall", "--local")
    run(entry, "env", "GIT_CONFIG_NOSYSTEM=1", "git", "commit", "--quiet", "--all", "--message=Work")
    run(entry, "git", "lfs", "install", "--local")


def untracked(entry: Path) -> None:
    """Commit a large file that no pattern sends to Git LFS."""
    append(entry / "table.bin", 6 * 10**6)
    commit(entry)


def ignored(entry: Path) -> None:
    """Leave the weights out of the commit, which ``git status`` does not show."""
    run(entry, "git", "rm", "--quiet", "--cached", "models/small.ckpt", "models/small.yaml")
    commit(entry)


def replaced(entry: Path) -> None:
    """Replace the committed weights."""
    append(entry / "models" / "small.ckpt", 1)


def edited(entry: Path) -> None:
    (entry / "my_submission" / "user_config.py").open("a").write("\n")


def added(entry: Path) -> None:
    (entry / "my_submission" / "layers.py").touch()


def lost(entry: Path) -> None:
    """Remove what a push would upload."""
    os.utime(entry / "models" / "small.ckpt", (1, 1))  # so that git sees no need to store the file again
    run(entry, "git", "update-index", "--refresh")
    shutil.rmtree(entry / ".git" / "lfs" / "objects")


@NEEDS_LFS
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (edited, "not committed: my_submission/user_config.py"),
        (added, "not committed: my_submission/layers.py"),
        (without_pointer, "models/small.ckpt (1.3 MB) is not in Git LFS"),
        (untracked, "table.bin (6.0 MB) is not in Git LFS, as files above "),
        (ignored, "models/small.ckpt is not committed"),
        (replaced, "models/small.ckpt differs from the committed file"),
    ],
)
def test_an_incomplete_commit_is_reported_and_the_suggested_commands_complete_it(
    entry: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    spoil(entry)
    found = examine(Repository(entry))
    assert not found.is_complete
    assert any(step.problem.startswith(problem) for step in found.steps), found.steps
    for _ in range(3):  # a command may show that there is more to do
        for step in examine(Repository(entry)).steps:
            subprocess.run(["bash", "-c", step.command], cwd=entry, capture_output=True)
    assert examine(Repository(entry)).steps == []


@NEEDS_LFS
def test_large_files_are_reported_before_they_are_committed_without_git_lfs(entry: Path) -> None:
    (entry / "run").mkdir()
    append(entry / "run" / "a song.wav", 6 * 10**6)
    append(entry / "models" / "other.th", 6 * 10**6)
    (step,) = submission_check.check_sizes(Repository(entry))
    assert step.problem.startswith("run/a song.wav (6.0 MB) would not be in Git LFS")
    run(entry, "bash", "-c", step.command)
    assert not [*submission_check.check_sizes(Repository(entry))]


@NEEDS_LFS
def test_a_file_that_git_lfs_cannot_upload_is_reported(entry: Path) -> None:
    lost(entry)
    (step,) = examine(Repository(entry)).steps
    assert step == Step("models/small.ckpt: Git LFS does not have the file", "git lfs fetch")


@NEEDS_LFS
def test_a_clone_without_its_files_is_reported(entry: Path, tmp_path: Path) -> None:
    settings = {**os.environ, "GIT_LFS_SKIP_SMUDGE": "1"}
    subprocess.run(["git", "clone", "--quiet", entry, tmp_path / "clone"], env=settings, check=True)
    found = examine(Repository(tmp_path / "clone"))
    assert any(
        step == Step("models/small.ckpt is a pointer of Git LFS instead of the file",
                     "git lfs install && git lfs pull")
        for step in found.steps
    )  # fmt: skip


def test_large_files_without_git_lfs_ask_for_it_first(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untracked(entry)
    monkeypatch.setattr(Repository, "lfs_is_set_up", lambda repository: False)
    steps = examine(Repository(entry)).steps
    assert Step("Git LFS is not set up", submission_check.SETUP_LFS) in steps


def test_weights_that_are_missing_damaged_or_elsewhere_are_reported(entry: Path, tmp_path: Path) -> None:
    config = entry / "my_submission" / "user_config.py"
    config.write_text("ENSEMBLE = 'htdemucs_ft'\n")
    (step,) = submission_check.check_weights(entry)
    assert step.problem.startswith("4 weights of the ensemble missing in models/ (htdemucs_ft_vocals, ")
    assert step.command == "kmdx models pull htdemucs_ft"
    (entry / "models" / "955717e8-8726e21a.th").write_bytes(b"half")
    config.write_text("ENSEMBLE = 'htdemucs'\n")
    (step,) = submission_check.check_weights(entry)
    assert "models/955717e8-8726e21a.th: damaged" in step.problem
    assert step.command == "rm models/955717e8-8726e21a.th && kmdx models pull htdemucs"
    config.write_text("ENSEMBLE = 'small'\n")
    whole = (entry / "models" / "small.ckpt").read_bytes()
    (entry / "models" / "small.ckpt").write_bytes(whole[:1000])
    (step,) = submission_check.check_weights(entry)
    assert step.problem.startswith("models/small.ckpt: damaged or cut off")
    assert step.command == "cp COMPLETE_FILE models/small.ckpt"
    (entry / "models" / "small.ckpt").unlink()
    (step,) = submission_check.check_weights(entry)
    assert "small.ckpt is missing" in step.problem
    assert step.command == "cp COMPLETE_FILE models/small.ckpt"
    (entry / "models" / "small.ckpt").write_bytes(whole)
    outside = (entry / "models" / "small.ckpt").rename(tmp_path / "small.ckpt")
    (entry / "models" / "small.ckpt").symlink_to(outside)
    (step,) = submission_check.check_weights(entry)
    assert step.problem.endswith("is outside of the repository")
    config.write_text("ENSEMBLE = 'smal'\n")
    (step,) = submission_check.check_weights(entry)
    assert "unknown ensemble 'smal'" in step.problem


def test_a_submission_without_an_ensemble_is_checked_without_its_weights(entry: Path) -> None:
    (entry / "my_submission" / "user_config.py").write_text("class MySeparationModel: pass\n")
    commit(entry)
    found = examine(Repository(entry))
    assert found.steps == []
    assert "no string ENSEMBLE" in found.notes[-1]


def test_a_configuration_that_is_not_python_is_a_step(entry: Path) -> None:
    (entry / "my_submission" / "user_config.py").write_text("def\n")
    commit(entry)
    (step,) = examine(Repository(entry)).steps
    assert step.problem.startswith("my_submission/user_config.py cannot be read: invalid syntax")
    assert step.command.endswith(" my_submission/user_config.py")


def test_an_empty_repository_is_reported(tmp_path: Path, identity: None) -> None:
    run(tmp_path, "git", "init", "--quiet")
    describe(tmp_path)
    (tmp_path / "requirements.txt").touch()
    (step,) = examine(Repository(tmp_path)).steps
    assert step.problem == "nothing is committed"
    assert not [*submission_check.check_tag(Repository(tmp_path))]


def test_a_folder_that_is_no_repository_is_a_one_line_error(tmp_path: Path, entry: Path) -> None:
    with pytest.raises(RepositoryError, match="not a git repository"):
        Repository(tmp_path)
    with pytest.raises(RepositoryError, match="not a git repository of its own"):
        Repository(entry / "my_submission")


@pytest.mark.parametrize(
    ("tags", "before", "problem"),
    [
        ([], True, None),
        (["annotated submission-a"], False, None),
        (["annotated v1.0", "annotated submission-a"], False, None),
        (["annotated v1.0"], True, None),
        ([], False, "the commit has no tag submission-…"),
        (["annotated v1.0"], False, "the commit has no tag submission-…"),
        (["light submission-a"], False, "the tag submission-a is not annotated"),
        (["annotated submission-a", "annotated submission-b"], False,
         "the commit has the tags submission-a, submission-b, and AIcrowd evaluates a commit once"),
        (["annotated submission-a"], True,
         "the commit has the tag submission-a already, and AIcrowd evaluates a commit once"),
    ],
)  # fmt: skip
def test_a_commit_needs_one_annotated_tag(
    entry: Path, tags: list[str], before: bool, problem: str | None
) -> None:
    for kind, name in map(str.split, tags):
        run(entry, "git", "tag", *(["--annotate", "--message=a"] if kind == "annotated" else []), name)
    steps = [*submission_check.check_tag(Repository(entry), before)]
    assert [step.problem for step in steps] == ([] if problem is None else [problem])
    if problem and "annotated" in problem:
        run(entry, "bash", "-c", steps[0].command)
        assert Repository(entry).tags() == [Tag("submission-a", True)]


def test_a_tag_of_an_earlier_commit_does_not_count(entry: Path) -> None:
    run(entry, "git", "tag", "--annotate", "--message=a", "submission-a")
    commit(entry)
    assert Repository(entry).tags() == []


# ---- the song


def attempt(entry: Path, what: str, load: str = "") -> Trial:
    """Replace the model by one that does ``what``, and let it separate a song."""
    shutil.rmtree(entry / "my_submission")
    submissions.write(entry, what, load)
    commit(entry)
    return trial.run(Repository(entry), 1.0)


@LINUX
def test_a_song_is_separated_with_the_committed_files(entry: Path) -> None:
    (entry / "my_submission" / "user_config.py").write_text("this is not committed")
    done = trial.run(Repository(entry), 1.0)
    assert done.failure is None
    assert done.returned_true
    assert done.seconds > 0
    assert 10**7 < done.peak_memory < 10**9
    assert done.interpreter is not None
    assert done.interpreter.version == sys.version.split()[0]
    assert not (entry / ".git" / trial.FOLDER).exists()


@LINUX
@pytest.mark.parametrize(
    ("what", "load", "failure"),
    [
        ("raises", "", r"RuntimeError: out of ideas \(my_submission/user_config\.py:\d+"),
        ("returns three stems", "", "wrong stems: bass is missing"),
        ("returns a wrong length", "", "wrong length: other"),
        ("returns NaN", "", "NaN in drums"),
        ("works", "open('notes.txt')", r"FileNotFoundError: .*notes\.txt"),
        ("works", "open('cache', 'w')", r"(OSError|PermissionError): .*'cache'"),
        ("works", "open(os.path.expanduser('~/.cache/weights'))", "FileNotFoundError: "),
        ("works", "import socket; socket.create_connection(('127.0.0.1', 9), 1)", "OSError: .*unreachable"),
        ("works", f"assert os.getuid() == {os.getuid()}", "AssertionError"),
        ("works", "print('é')", None),
    ],
)
def test_what_would_fail_on_the_server_fails_here(
    entry: Path, what: str, load: str, failure: str | None
) -> None:
    (entry / "notes.txt").write_text("ignored by git")
    (entry / ".gitignore").open("a").write("notes.txt\n")
    done = attempt(entry, what, load)
    if done.isolation:
        pytest.skip(f"needs all kinds of isolation: {done.isolation[0]}")
    if failure is None:
        assert done.failure is None
    else:
        assert done.failure is not None
        pattern = rf"(the submission in \. cannot be loaded: )?{failure}"
        assert re.match(pattern, done.failure), done.failure
        if "traceback" in done.failure:
            log = entry / ".git" / trial.LOG
            assert str(log) in done.failure
            assert "Traceback" in log.read_text("utf-8")


@LINUX
def test_a_wrapper_that_does_not_return_true_is_reported(entry: Path) -> None:
    wrapper = entry / "my_submission" / "aicrowd_wrapper.py"
    wrapper.write_text(wrapper.read_text("utf-8").replace("return True", "return None"), "utf-8")
    commit(entry)
    found = Findings()
    submission_check.try_song(Repository(entry), found, 1.0)
    (step,) = found.steps
    assert step.problem.startswith("separate_music_file of the wrapper did not return True")
    assert step.command.endswith("my_submission/aicrowd_wrapper.py")


@LINUX
@NEEDS_LFS
def test_the_song_needs_the_weights_in_git_lfs(entry: Path) -> None:
    reads = "assert open('models/small.ckpt', 'rb').read(2) == b'PK', 'a pointer'"
    assert attempt(entry, "works", reads).failure is None
    lost(entry)
    done = trial.run(Repository(entry), 1.0)
    assert done.failure is not None
    assert "models/small.ckpt is a Git LFS pointer" in done.failure


@LINUX
def test_a_file_that_only_its_owner_may_read_does_not_change_the_trial(entry: Path) -> None:
    (entry / "my_submission" / "user_config.py").chmod(0o600)
    (entry / "models" / "small.ckpt").chmod(0o600)
    reads = "open('models/small.ckpt', 'rb').close()"
    assert attempt(entry, "works", reads).failure is None


def finding(entry: Path, seconds: float, device: str | None = "cpu", version: str | None = None) -> Findings:
    """What is found if a song took so long on a device and a Python."""
    interpreter = Interpreter("python", version or sys.version.split()[0], {"numpy": "1.0"}, device)
    done = Trial(None, seconds, interpreter=interpreter)
    found = Findings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "run", lambda *_: done)
        submission_check.try_song(Repository(entry), found, 10.0, Path("python"))
    return found


def test_a_song_over_the_time_limit_is_a_step_unless_only_a_gpu_is_missing(entry: Path) -> None:
    found = finding(entry, 15.0)
    assert not found.steps
    assert "the song took 1.50 × its duration on cpu (limit 1.57 ×)" in found.notes[-1]
    assert "1.60 ×" in finding(entry, 16.0).steps[0].problem
    describe(entry, gpu=True)
    assert not finding(entry, 16.0).steps
    assert "try it on a machine with a GPU" in finding(entry, 16.0).notes[-1]
    assert finding(entry, 16.0, "Tesla T4").steps
    (entry / "aicrowd.json").unlink()
    assert not finding(entry, 16.0).steps, "the missing file is reported elsewhere"


def test_packages_that_differ_from_the_pins_are_named(entry: Path) -> None:
    assert "other versions than in requirements.txt: numpy 1.0 instead of 2.0.0" in finding(entry, 1.0).notes


def test_another_python_than_the_images_is_a_step(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = finding(entry, 1.0, version="3.8.1").steps
    assert step.problem == f"the image has Python {HERE}, this is 3.8.1 (--accept-python accepts that)"
    (entry / "Dockerfile").write_text("FROM python:3.9\n")
    found = Findings()
    submission_check.try_song(Repository(entry), found, 1.0)
    assert "the image has Python 3.9" in found.steps[0].problem
    monkeypatch.setattr(trial, "run", lambda *_: Trial("no luck"))
    found = Findings()
    submission_check.try_song(Repository(entry), found, 1.0, accept_python=True)
    assert [step.problem for step in found.steps] == ["a song failed, correct it: no luck"]


def test_an_environment_with_the_images_python_is_found(entry: Path) -> None:
    folder = entry / ".venv-3.9" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    assert submission_check._find_python("3.9", entry) == folder / "python"
    (entry / "requirements.txt").write_text("no-such-package==1\n")
    assert submission_check._find_python("3.9", entry) is None
