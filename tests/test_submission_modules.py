"""A submission's modules come from its own folder, whatever else Python's path holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evaluator import replies, visible
from evaluator.process import Limits, Submission, SubmissionError, SubmissionOptions, find_pointer
from evaluator.startup.sitecustomize import OwnModules, has_code
from kmdx.errors import KmdxError

ROOT = Path(__file__).parents[1]
BARE = """
from pathlib import Path
{imports}
class AIcrowdWrapper:
    def __init__(self):
        print("made by", __file__)
        {make}

    def separate_music_file(self, name):
        {body}
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Submission]]:
    """Start a submission of these files, next to a wrapper that does nothing else."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "shared" / "predictions").mkdir(parents=True)
    made: list[Submission] = []

    def start(
        files: dict[str, str], imports: str = "", make: str = "pass", body: str = "pass", **options
    ) -> Submission:
        folder = tmp_path / "submission"
        wrapper = BARE.format(imports=imports, make=make, body=body)
        for name, text in {**files, "my_submission/aicrowd_wrapper.py": wrapper}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        made.append(
            Submission(
                folder,
                tmp_path / "dataset",
                tmp_path / "shared",
                Limits(600),
                tmp_path / "submission.log",
                SubmissionOptions(**options),
            )
        )
        made[-1].start()
        return made[-1]

    yield start
    for submission in made:
        submission.kill()


def printed(submission: Submission) -> str:
    """Everything that a submission printed, after it has been ended."""
    submission.kill()
    return submission.log.read_text("utf-8")


def test_a_submission_without_init_files_is_imported_from_its_own_folder(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert f"made by {tmp_path / 'submission'}/my_submission" in printed(start({}))


def test_modules_called_kmdx_and_evaluator_are_the_submissions_own(
    start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    files = {"kmdx/limits.py": "", "evaluator/__init__.py": "", "evaluator/metrics.py": "", "training.py": ""}
    imports = "import kmdx.limits, evaluator.metrics, training"
    log = printed(start(files, imports, "print(kmdx.__path__, training.__file__)"))
    assert "training.py" in log
    assert str(ROOT) not in log


def test_code_from_elsewhere_is_refused_with_both_paths(start, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "helper.py").write_text("")
    path = tmp_path / "submission" / "copied.py"  # in its own folder, under a name of elsewhere
    forge = "import sys, types\nhelper = types.ModuleType('helper')\nhelper.__file__ = '/usr/lib/helper.py'\n"
    with pytest.raises(SubmissionError) as caught:
        start({"helper.py": "", path.name: ""}, forge + "sys.modules['helper'] = helper")
    assert f"helper was imported from /usr/lib/helper.py, expected it from {tmp_path / 'submission'}" in str(
        caught.value
    )


def test_a_regular_package_elsewhere_does_not_win_over_one_without_an_init_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "own/thing/part.py",
        "other/thing/__init__.py",
        "own/weights/readme.txt",
        "own/demucs/setup.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    finder = OwnModules(str(tmp_path / "own"))
    assert list(finder.find_spec("thing").submodule_search_locations) == [str(tmp_path / "own" / "thing")]
    assert finder.find_spec("weights") is None, "a folder of data is no package"
    assert not has_code(str(tmp_path / "own" / "demucs")), "another project's folder is no package"
    assert finder.find_spec("thing.part") is None, "a package finds what is in it"


def test_what_a_submission_starts_imports_its_own_modules_in_the_sandbox(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other" / "kmdx").mkdir(parents=True)
    (tmp_path / "other" / "kmdx" / "__init__.py").write_text("print('foreign')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    imports = "import csv, subprocess, sys, multiprocessing\nprint(csv.OWN)"
    make = (
        "subprocess.run([sys.executable, '-m', 'kmdx.tool'], check=True)\n"
        "        with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "            print(pool.apply(csv.where))"
    )
    csv = "OWN = 'its own csv'\ndef where():\n    import kmdx.tool\n    return 'in a pool: ' + kmdx.tool.__file__"
    log = printed(start({"kmdx/tool.py": "print('own tool')", "csv.py": csv}, imports, make))
    assert "own tool" in log
    assert "its own csv" in log
    assert f"in a pool: {tmp_path}/submission/kmdx/tool.py" in log
    assert "foreign" not in log


def test_paths_that_a_submission_adds_itself_are_searched(start) -> None:
    add = "import sys\nsys.path.insert(0, str(Path(__file__).parents[1] / 'deep'))\nimport utils"
    files = {"deep/utils.py": "print('deep utils')", "utils/__init__.py": "print('shallow utils')"}
    assert "deep utils" in printed(start(files, add))


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a second interpreter")
def test_another_interpreter_runs_the_submission_and_is_recorded(start) -> None:
    submission = start({}, python=Path("/usr/bin/python3"))
    found = submission.interpreter
    assert found is not None
    reported = subprocess.check_output(["/usr/bin/python3", "-V"], text=True).split()[1]
    assert (found.version, found.executable, found.device) == (reported, "/usr/bin/python3", None)


def test_packages_of_the_interpreter_are_recorded(start) -> None:
    assert start({}).interpreter.packages["numpy"]


@pytest.mark.parametrize("path", ["nowhere/python", "/", "/etc/passwd"])
def test_a_file_that_is_not_executable_is_not_an_interpreter(path: str) -> None:
    with pytest.raises(KmdxError, match="expected the path of a Python interpreter"):
        visible.find_python(path)


@pytest.mark.skipif(not shutil.which("true"), reason="needs a program that is no Python")
def test_a_program_that_is_not_python_is_a_one_line_error(start) -> None:
    program = shutil.which("true")
    with pytest.raises(SubmissionError, match=r"true did not start as Python 3\.8 or newer") as caught:
        start({}, python=Path(program))
    assert "\n" not in str(caught.value)


def test_the_error_names_the_line_and_the_log_has_the_full_traceback(start, tmp_path: Path) -> None:
    deep = "def outer():\n    inner()\n\n\ndef inner():\n    import json\n    json.loads('{')\n"
    with pytest.raises(SubmissionError) as caught:
        start({"my_submission/deep.py": deep}, "from my_submission import deep", "deep.outer()")
    assert "(my_submission/deep.py:7; the full traceback is in submission.log)" in str(caught.value)
    log = (tmp_path / "submission.log").read_text()
    assert all(name in log for name in ("in outer", "in inner", "json/decoder.py", "JSONDecodeError"))


def test_a_git_lfs_pointer_is_named(start, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 167407275\n"
    with pytest.raises(SubmissionError, match=r"models/drums\.th is a Git LFS pointer.*git lfs pull"):
        start({"models/drums.th": pointer}, make="assert 1 == 2")
    (tmp_path / "submission" / "models" / "drums.th").unlink()
    assert find_pointer(tmp_path / "submission") is None


def test_the_end_of_the_log_is_cleaned_for_display(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        b"first\n" * 10**5 + b"  \x1b[2Jred \xff\n\n" + b"long" * 1000 + b"\nlast \xe2\x80\xaeword"
    )
    lines = replies.tail(log, 3)
    assert lines[0] == "  [2Jred \\xff"
    assert len(lines[1]) <= 300
    assert lines[2] == "last word"
    assert replies.tail(tmp_path / "nothing") == []


def test_the_worker_needs_only_python_3_8() -> None:
    import ast

    ast.parse((ROOT / "evaluator" / "submission_worker.py").read_text("utf-8"), feature_version=(3, 8))
    code = "import sys, runpy; sys.path[:] = [p for p in sys.path if 'packages' not in p]; runpy.run_path(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(ROOT / "evaluator" / "submission_worker.py")], check=True
    )


def test_a_link_to_a_file_outside_the_folder_is_named(start, tmp_path: Path) -> None:
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "models").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SubmissionError, match="models links to a file outside the submission's folder"):
        start({}, make="open('models/weights.pt')")


def test_a_link_to_what_it_can_read_is_not_blamed(start, tmp_path: Path) -> None:
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "python").symlink_to(sys.prefix)
    (tmp_path / "submission" / "bin").symlink_to("/usr/bin")
    with pytest.raises(SubmissionError) as caught:
        start({}, make="open('models/weights.pt')")
    assert "No such file" in str(caught.value)
    assert "is a link" not in str(caught.value)
