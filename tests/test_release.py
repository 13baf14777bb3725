"""A release: its version, what the wheel and its page contain, and the workflow that tests it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import kmdx
import setup as packaging
from kmdx.challenge import STEMS
from tools import release

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CODE = ("kmdx", "evaluator", "training", "my_submission", "models/mini")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the checkout, because a build leaves things behind."""
    source = tmp_path_factory.mktemp("source")
    for name in CODE:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    return zipfile.ZipFile(*source.glob("*.whl"))


def test_the_wheel_contains_every_file_of_its_packages(wheel: zipfile.ZipFile) -> None:
    places = {"models/mini": "kmdx/mini", "my_submission": "evaluator/submission/my_submission"}
    expected = {
        f"{places.get(folder, folder)}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder in CODE
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".onnx")
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert {"kmdx/py.typed", "kmdx/mini/mini_bass.pt"} <= expected


def test_the_wheel_works_outside_a_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    program = """
from evaluator import command, submission_files
from kmdx import Separator, listening
from training import config
print(listening.__file__)
assert listening.script() and listening.style()
print(*Separator("mini", device="cpu").networks)
print(submission_files.ensemble(command.ROOT), *config.names())
command.check_submission(command.ROOT)
"""
    models = {"PYTHONPATH": str(tmp_path / "site"), "KMDX_MODELS": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, **models},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    place, networks, names = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path / "site")
    assert set(networks.split()) == set(STEMS)
    assert set(names.split()) == {"leaderboard_c", *STEMS}


def test_the_page_of_the_package_has_no_relative_links(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    page = Parser().parsestr(wheel.read(name).decode()).get_payload()
    assert "separates songs into" in page
    assert {target.partition(":")[0] for target in re.findall(r"\]\(([^)]*)\)", page)} == {"https"}


def test_links_into_the_repository_lead_to_the_version() -> None:
    text = "![A graph](docs/a.svg) [b](docs/b.md#c) [`code`](kmdx/x.py) [d](https://d.org) [e](#e)"
    assert packaging.description(text, "https://x.org/kmdx", "1.2.3") == (
        "![A graph](https://x.org/kmdx/raw/v1.2.3/docs/a.svg) [b](https://x.org/kmdx/blob/v1.2.3/docs/b.md#c) "
        "[`code`](https://x.org/kmdx/blob/v1.2.3/kmdx/x.py) [d](https://d.org) [e](#e)"
    )
    assert packaging.description(text, None, "1.2.3") == " b `code` [d](https://d.org) [e](#e)"


def test_the_versions_are_that_of_the_newest_release_in_the_changelog() -> None:
    headings = release.HEADING.findall((ROOT / "CHANGELOG.md").read_text("utf-8"))
    newest = next(heading for heading in headings if heading != "Unreleased")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"]
    assert newest == PROJECT["version"] == kmdx.__version__ == citation
    assert "Unreleased" not in headings[1:]


def write_versions(folder: Path, heading: str, version: str, citation: str) -> None:
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n- x\n\n## 0.0.1\n")
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (folder / "CITATION.cff").write_text(f"title: x\nversion: {citation}\nlicense: MIT\n")


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        (("0.2.0", "0.2.0", "0.2.0"), None),
        (("Unreleased", "0.2.0", "0.2.0"), "begins with Unreleased"),
        (("0.2.0", "0.2.1", "0.2.1"), r"states 0\.2\.1"),
        (("0.2.0", "0.2.0", "0.1.0"), r"CITATION\.cff does not"),
    ],
)
def test_a_release_whose_versions_differ_is_refused(
    tmp_path: Path, versions: tuple[str, str, str], problem: str | None
) -> None:
    write_versions(tmp_path, *versions)
    if problem is None:
        assert release.check_version(tmp_path) == "0.2.0"
    else:
        with pytest.raises(release.Refused, match=problem):
            release.check_version(tmp_path)


def test_a_release_needs_a_clean_commit_whose_version_has_no_other_tag(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "--message", "one")
    release.check_commit(tmp_path, "0.2.0")
    git("tag", "v0.2.0")
    release.check_commit(tmp_path, "0.2.0")
    git("commit", "--allow-empty", "--message", "two")
    with pytest.raises(release.Refused, match=r"another commit has the tag v0\.2\.0"):
        release.check_commit(tmp_path, "0.2.0")
    (tmp_path / "new").touch()
    with pytest.raises(release.Refused, match="not committed"):
        release.check_commit(tmp_path, "0.3.0")


def test_every_extra_for_users_has_commands_to_try() -> None:
    # A GPU is needed; part of the evaluator; for developers; serves until it is stopped (test_web_process.py).
    untried = {"gpu", "plots", "dev", "web"}
    assert {*release.COMMANDS} == {*PROJECT["optional-dependencies"]} - untried


def test_the_workflow_tests_each_python_that_the_package_supports() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text("utf-8"))
    minors = [
        f"3.{minor}" for minor in range(5, 30) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])
    ]
    assert [
        name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)
    ] == minors
    for job in ("tests", "commands"):
        assert workflow["jobs"][job]["strategy"]["matrix"]["python"] == minors
    systems = {
        name.partition("-")[0] for name in workflow["jobs"]["commands"]["strategy"]["matrix"]["system"]
    }
    assert systems == {"ubuntu", "macos", "windows"}
