"""Decides what a submission may see: folders of its interpreter, weights, and environment variables."""

from __future__ import annotations

import ast
import fnmatch
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from kmdx.errors import KmdxError
from kmdx.weights import folder as weights_folder

PASSED = (
    "PATH", "LANG", "LANGUAGE", "LC_*", "TZ", "LD_LIBRARY_PATH", "LIBRARY_PATH", "SSL_CERT_*",
    "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHASHSEED", "PYTHONFAULTHANDLER", "PYTHONWARNINGS",
    "KMDX_*", "AICROWD_*", "CUDA_*", "NVIDIA_*", "CUBLAS_*", "CUDNN_*", "NCCL_*", "ROCR_*", "HIP_*",
    "HSA_*", "OMP_*", "KMP_*", "GOMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "NUMEXPR_*", "VECLIB_*",
    "ACCELERATE_*", "TORCH*", "PYTORCH_*", "ATEN_*", "TF_*", "XLA_*", "ONEDNN_*", "DNNL_*",
    "TRITON_*", "NUMBA_*", "MALLOC_*", "SYSTEMROOT", "COMSPEC", "PATHEXT",
)  # fmt: skip
"""Patterns of environment variables that a submission gets: paths, languages, and GPU and thread settings."""
SECRETS = ("*KEY*", "*TOKEN*", "*SECRET*", "*PASSWORD*", "*CREDENTIAL*")
"""Patterns of variables that it never gets."""
IGNORED = {
    ".git", ".venv", "venv", "__pycache__", "node_modules", ".mypy_cache", ".ruff_cache", ".pytest_cache",
}  # fmt: skip
"""Names in a submission's folder that are not part of it."""
ENVIRONMENT = ("bin", "include", "lib", "lib64", "Include", "Lib", "Scripts")
"""Folders of a virtual environment."""
MAX_DEPTH = 100  # levels of a submission's folder that are searched


def environment(given: Mapping[str, str], submission: Path) -> dict[str, str]:
    """The part of the evaluator's environment that the submission in a folder gets."""

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in patterns)

    passed = {k: v for k, v in given.items() if matches(k, PASSED) and not matches(k, SECRETS)}
    if models := given.get("KMDX_MODELS"):  # absolute, because the submission runs in another folder
        passed["KMDX_MODELS"] = str(Path(models).expanduser().absolute())
    elif not (found := weights_folder.where(submission).path).is_relative_to(submission):
        passed["KMDX_MODELS"] = str(found)  # its home differs, and it may not see the rest of a checkout
    if kept := list(python_path(given)):
        passed["PYTHONPATH"] = os.pathsep.join(map(str, kept))
    if (user := Path.home() / ".local").is_dir():
        passed["PYTHONUSERBASE"] = str(user)
    passed.setdefault("TORCH_HOME", str(_torch_home(given)))
    passed["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # so that any text can be logged
    return passed


def python_path(given: Mapping[str, str]) -> Iterator[Path]:
    """Folders and archives of PYTHONPATH, without those that contain this project's own modules."""
    for entry in given.get("PYTHONPATH", "").split(os.pathsep):
        path = Path(entry).absolute()
        ours = (path / "evaluator" / "submission_worker.py").is_file() or (path / "my_submission").is_dir()
        if entry and path.exists() and not ours:
            yield path


def find_python(python: str | Path) -> Path:
    """The absolute path of an interpreter; links stay, because they identify a virtual environment.

    Raises
    ------
    KmdxError
        If it does not exist or is not executable.
    """
    path = Path(python).expanduser()
    try:
        if not path.exists() and path.name == str(python) and (found := shutil.which(path.name)):
            path = Path(found)
        path = path.absolute()
        exists, is_file = path.exists(), path.is_file()
    except OSError as error:
        raise KmdxError(
            f"--python {python}: {error.strerror}; expected an interpreter that this user can run"
        ) from error
    if not exists:
        raise KmdxError(f"--python {python}: no such file; expected the path of a Python interpreter")
    if not is_file or not os.access(path, os.X_OK):
        raise KmdxError(
            f"--python {python}: not an executable file; expected the path of a Python interpreter"
        )
    return path


def interpreter_folders(
    python: Path, given: Mapping[str, str], submission: Path, hidden: Sequence[Path] = ()
) -> list[Path]:
    """Folders that an interpreter needs: its own, those of its base interpreter, and those of its packages.

    The interpreter is not started, because it may belong to the submission. The submission's folder is not
    trusted: no configuration in it (``pyvenv.cfg``, ``.pth`` files, editable installs) makes other folders
    visible. No configuration makes ``hidden`` paths visible.
    """
    found: list[Path] = []
    for hop in links(python):
        if _in(hop, submission) or hop.name.startswith("python"):
            found.append(hop.parent.parent if hop.parent.name in ("bin", "Scripts", "shims") else hop.parent)
    for root in [root for root in found if not _in(root, submission)]:
        if home := _home(root / "pyvenv.cfg"):
            found += [hop.parent.parent for hop in links(home / "python3")]
    user = Path.home() / ".local" / "lib"
    packages = [
        path
        for root in (*found, user.parent)
        for path in root.glob("lib*/python3*/*-packages")
        if path.is_dir()
    ]
    found += [path for path in packages if path.is_relative_to(user)]
    for folder in packages:
        if not _in(folder, submission):
            found += _added_folders(folder)
    found += python_path(given)
    found += [Path(entry) for entry in given.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    parts = [part for path in dict.fromkeys(found) for part in _without_home(path) if part.exists()]
    return [part for part in parts if not any(_in(part, path) for path in hidden)]


def _in(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder (or is the folder), with or without resolving links."""
    return path.is_relative_to(folder) or path.resolve().is_relative_to(folder.resolve())


def weights(given: Mapping[str, str], submission: Path) -> list[Path]:
    """Folders of weights: a submission's models folder, the targets of its links, and torch.hub's folder."""
    models = weights_folder.where(submission).path.absolute()
    linked = [path.resolve() for path in _entries(models) if path.is_symlink()]
    hub = _torch_home(given) / "hub"
    return [path for path in (models, weights_folder.shipped_folder(), hub, *linked) if path.exists()]


def _without_home(folder: Path) -> list[Path]:
    """A folder; or only its interpreter's subfolders if it contains the user's home or the whole disk."""
    if not folder.is_absolute() or folder == Path("/"):
        return []
    if not Path.home().resolve().is_relative_to(folder.resolve()):
        return [folder]
    return [folder / name for name in ("bin", "lib", "lib64", "include", "share", "pyvenv.cfg")]


def _torch_home(given: Mapping[str, str]) -> Path:
    cache = given.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given.get("TORCH_HOME") or Path(cache, "torch")).expanduser().absolute()


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def links(path: Path) -> list[Path]:
    """A path, and the paths that its chain of links leads to."""
    found = [path]
    while path.is_symlink() and len(found) < 40:
        path = Path(os.path.normpath(path.parent / path.readlink()))
        found.append(path)
    return [*found, path.resolve()] if path.exists() else found


def _home(config: Path) -> Path | None:
    """The folder of the base interpreter of a virtual environment."""
    if not config.is_file():
        return None
    for line in config.read_text("utf-8", "replace").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "home":
            return Path(value.strip())
    return None


def _added_folders(packages: Path) -> Iterator[Path]:
    """Folders that ``.pth`` files and editable installs add to a folder of packages."""
    for file in filter(Path.is_file, packages.glob("*.pth")):
        for line in file.read_text("utf-8", "replace").splitlines():
            path = packages / line.strip()
            if line.strip() and not line.startswith(("#", "import")) and path.is_dir():
                yield path
    for file in filter(Path.is_file, packages.glob("__editable___*_finder.py")):
        for line in file.read_text("utf-8", "replace").splitlines():
            if line.startswith("MAPPING"):
                yield from _mapped(line.partition("=")[2])


def _mapped(literal: str) -> Iterator[Path]:
    """The paths in the mapping of an editable install."""
    try:
        mapping = ast.literal_eval(literal.strip())
        yield from map(Path, mapping.values())
    except (ValueError, SyntaxError, AttributeError, TypeError):
        return


def entries_of(folder: Path, without: Sequence[Path] = ()) -> Iterator[Path]:
    """Files, folders and links in a submission's folder, down to :data:`MAX_DEPTH` levels.

    Links are not followed. Caches, version control, virtual environments, the folders in ``without`` and
    unreadable folders are left out. If the folder itself is a virtual environment, only the environment's own
    folders are left out.
    """
    left_out = {path.resolve() for path in without}
    if (folder / "pyvenv.cfg").is_file():
        left_out |= {folder.resolve() / name for name in ENVIRONMENT}
    pending = [folder]
    while pending:
        place = pending.pop()
        try:
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        if place != folder and any(entry.name == "pyvenv.cfg" for entry in entries):
            continue
        own = [e for e in entries if e.name not in IGNORED and not e.name.endswith(".egg-info")]
        folders = [
            e for e in own if e.is_dir(follow_symlinks=False) and Path(e.path).resolve() not in left_out
        ]
        yield from (Path(entry.path) for entry in own)
        if len(place.parts) - len(folder.parts) < MAX_DEPTH:
            pending += [Path(entry.path) for entry in reversed(folders)]
