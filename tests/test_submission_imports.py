"""A submission imports its own modules in every Python that it starts, as Python itself would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evaluator.process import STARTUP, WORKER

VERSIONS = Path.home() / ".pyenv" / "versions"
OTHERS = [
    str(path) for minor in (8, 9, 10, 12, 13) for path in sorted(VERSIONS.glob(f"3.{minor}.*/bin/python"))
]
PYTHONS = [sys.executable, *OTHERS]
WRAPPER = """
{}
class AIcrowdWrapper:
    pass
"""
TOOL = "def where():\n    return __file__\n\n\nprint('kmdx.tool is', __file__)\n"
RUN = "import subprocess, sys\nassert subprocess.run([sys.executable, {}).returncode == 0"
POOL = """
import concurrent.futures, multiprocessing, kmdx.tool
{}
"""
WAYS = {
    "a command": RUN.format("'-c', 'import kmdx.tool']"),
    "a module": RUN.format("'-m', 'kmdx.tool']"),
    "a command elsewhere": RUN.format("'-c', 'import kmdx.tool'], cwd='/'"),
    "a script": RUN.format("'scripts/deep.py']"),
    "a script that adds a path at the end": RUN.format("'scripts/adds.py']"),
    "a grandchild": RUN.format("""'-c', 'import os, sys; os.execv(sys.executable, ["p", "-mkmdx.tool"])']"""),
    "without site's environment": RUN.format("'-s', '-B', '-u', '-c', 'import kmdx.tool']"),
    "runpy": "import runpy\nrunpy.run_module('kmdx.tool')",
    "fork": "import os\npid = os.fork()\nif not pid:\n    import kmdx.tool\n    os._exit(0)\nos.waitpid(pid, 0)",
    **{
        f"a pool by {how}": POOL.format(
            f"with multiprocessing.get_context({how!r}).Pool(1) as pool:\n    print(pool.apply(kmdx.tool.where))"
        )
        for how in ("spawn", "forkserver", "fork")
    },
    "a forkserver with a preloaded module": POOL.format(
        "context = multiprocessing.get_context('forkserver')\ncontext.set_forkserver_preload(['kmdx.tool'])\n"
        "with context.Pool(1) as pool:\n    print(pool.apply(kmdx.tool.where))"
    ),
    "an executor": POOL.format(
        "context = multiprocessing.get_context('spawn')\n"
        "with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:\n"
        "    print(executor.submit(kmdx.tool.where).result())"
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A submission with a package ``kmdx``, of which another one is installed."""
    put(tmp_path / "submission", {"kmdx/tool.py": TOOL, "scripts/deep.py": "import kmdx.tool"})
    put(
        tmp_path / "submission",
        {"scripts/adds.py": "import sys\nsys.path.append('.')\nimport helper, kmdx.tool"},
    )
    put(tmp_path / "submission", {"helper.py": "print('helper is', __file__)"})
    put(tmp_path / "other", {"kmdx/__init__.py": "", "kmdx/tool.py": TOOL, "helper.py": "print('foreign')"})
    return tmp_path / "submission"


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def load(folder: Path, code: str, python: str = sys.executable) -> str:
    """Have a worker make a submission whose wrapper runs some code; returns what it replied and printed."""
    put(folder, {"my_submission/aicrowd_wrapper.py": WRAPPER.format(code)})
    make = {name: None for name in ("ensemble", "device", "precision", "engine")}
    requests = [{"hello": "1"}, {"make": "2", "folder": str(folder), "stems": [], **make}]
    done = subprocess.run(
        [python, str(WORKER)],
        input="".join(json.dumps(request) + "\n" for request in requests),
        env={**os.environ, "PYTHONPATH": str(folder.parent / "other"), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert replies[0]["hello"] == "1"
    return done.stderr + "".join(map(str, replies[1:]))


def same_as_plain(folder: Path, code: str, python: str = sys.executable) -> str:
    """Check that code prints the same as in a Python started in the submission's folder."""
    (folder / "starter.py").write_text(code)
    plain = subprocess.run([python, "starter.py"], cwd=folder, capture_output=True, text=True, check=True)
    found = load(folder, code, python)
    assert plain.stdout in found, found
    return found


@pytest.mark.skipif(os.name != "posix", reason="some of the ways are POSIX's")
@pytest.mark.parametrize("way", WAYS)
def test_every_python_that_a_submission_starts_imports_its_own_modules(folder: Path, way: str) -> None:
    found = load(folder, WAYS[way])
    assert f"kmdx.tool is {folder}/kmdx/tool.py" in found.replace("/./", "/")
    assert str(folder.parent / "other") not in found
    assert "foreign" not in found
    assert "'made': '2'" in found


@pytest.mark.parametrize("python", OTHERS)
@pytest.mark.parametrize("way", ["a module", "a pool by spawn"])
def test_own_modules_are_imported_in_every_version_of_python(folder: Path, python: str, way: str) -> None:
    found = load(folder, WAYS[way], python)
    assert f"kmdx.tool is {folder}/kmdx/tool.py" in found.replace("/./", "/")
    assert str(folder.parent / "other") not in found
    assert "'made': '2'" in found


@pytest.mark.parametrize("python", PYTHONS)
def test_own_modules_named_like_standard_ones_are_imported_where_python_would(
    folder: Path, python: str
) -> None:
    own = ["csv", "inspect", "json", "queue", "random", "traceback"]
    either = [
        "threading",
        "contextlib",
        "tokenize",
        "typing",
        "math",
        "heapq",
    ]  # by the version, and what it runs
    standard = ["os", "time", "io", "abc", "sys"]  # what Python has imported when it starts
    names = [*own, *either, *standard]
    put(folder, {f"{name}.py": "OWN = 1\n_shutdown = print\n" for name in names})
    code = "".join(f"import {name}; print('{name}', hasattr({name}, 'OWN'))\n" for name in names)
    found = same_as_plain(folder, code, python)
    assert all(f"{name} True" in found for name in own)
    assert all(f"{name} False" in found for name in standard)


def test_modules_that_depend_on_a_hidden_module_get_the_submissions_one(folder: Path) -> None:
    put(folder, {"heapq.py": "OWN = merge = heappush = heappop = 1\n", "bisect.py": "OWN = 1\n"})
    code = "import collections, json, inspect, heapq, bisect\nprint(json.dumps([heapq.OWN, bisect.OWN]))"
    assert "[1, 1]" in same_as_plain(folder, code)


def test_a_path_added_at_the_end_does_not_hide_the_standard_library(folder: Path) -> None:
    put(folder, {"src/queue.py": "OWN = 1", "src/logging/handler.py": "", "src/part.py": "OWN = 1"})
    code = "import sys; sys.path.append('src')\nimport queue, logging, part\nprint(queue.Queue, logging.INFO, part.OWN)"
    assert "<class 'queue.Queue'> 20 1" in same_as_plain(folder, code)


@pytest.mark.parametrize("python", PYTHONS)
def test_relative_paths_and_zip_files_in_the_folder_are_searched(folder: Path, python: str) -> None:
    put(folder, {"src/kmdx/extra.py": "print('extra is', __name__)", "src/deep.py": "import packed"})
    with zipfile.ZipFile(folder / "packed.egg", "w") as archive:
        archive.writestr("packed.py", "print('packed is', __file__)")
    put(folder.parent / "other", {"packed.py": "print('foreign')", "deep.py": "print('foreign')"})
    code = "import sys\nsys.path.insert(0, 'src')\nsys.path.append('packed.egg')\nimport deep, kmdx.extra, kmdx.tool"
    found = load(folder, code, python)
    assert "packed.egg" in found
    assert "extra is kmdx.extra" in found
    assert f"kmdx.tool is {folder}/kmdx/tool.py" in found
    assert "foreign" not in found


RESOURCES = """
import sys, importlib, pkgutil, inspect, pickle
import kmdx, kmdx.tool
print([module.name for module in pkgutil.iter_modules(kmdx.__path__)])
print(type(kmdx.__path__).__name__, type(kmdx.__loader__).__name__, kmdx.__spec__.origin)
print(getattr(kmdx, "__file__", None), inspect.getsource(kmdx.tool.where) != "")
print(pickle.loads(pickle.dumps(kmdx.tool.where)) is kmdx.tool.where)
print(pkgutil.get_data("kmdx.tool", "tool.py") != b"")
if sys.version_info >= (3, 10):
    import importlib.resources
    here = importlib.resources.files("kmdx")
    print(sorted(each.name for each in here.iterdir() if "__" not in each.name), (here / "tool.py").read_text() != "")
kmdx = importlib.reload(kmdx)
print(len(list(kmdx.__path__)), kmdx.__path__)
sys.path.insert(0, "src")
import kmdx.more
print(len(list(kmdx.__path__)))
"""


@pytest.mark.parametrize("python", PYTHONS)
def test_a_package_without_an_init_file_behaves_as_in_plain_python(folder: Path, python: str) -> None:
    put(folder, {"src/kmdx/more.py": ""})
    same_as_plain(folder, RESOURCES, python)


def test_the_interpreters_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    put(tmp_path, {"sitecustomize.py": "import queue\nprint('its own,', __name__, __file__)", "queue.py": ""})
    code = "import sys; print('queue' in sys.modules, 'importlib.machinery' in sys.modules, sys.path)"
    env = {"PYTHONPATH": os.pathsep.join([str(STARTUP), str(tmp_path)]), "KMDX_SUBMISSION": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert f"its own, sitecustomize {tmp_path}" in done.stdout
    assert "True" in done.stdout.splitlines()[1]
    assert str(STARTUP) not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("python", PYTHONS)
def test_python_without_a_submission_starts_normally(tmp_path: Path, python: str) -> None:
    code = "import sys; print(sorted(sys.modules), sys.path, len(sys.meta_path))"
    plain = subprocess.run([python, "-c", code], env={}, capture_output=True, text=True, check=True)
    env = {"PYTHONPATH": str(STARTUP), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.replace("'sitecustomize', ", "") == plain.stdout.replace("'sitecustomize', ", "")
    assert done.stderr == ""
