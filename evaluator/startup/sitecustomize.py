"""Has a submission import its own modules: in its process, and in every Python that it starts.

The folder of this file is on the submission's ``PYTHONPATH``, so each Python runs it at its start. It needs
Python 3.8 and nothing but the standard library.
"""

import sys

STARTED = frozenset(sys.modules)  # what Python imports before any program does

import importlib.machinery
import os
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder

FOLDER = "KMDX_SUBMISSION"
"""The variable that names the submission's folder."""


class OwnModules:
    """Finds the submission's modules in its own folder, whatever else the interpreter's path holds.

    First on ``sys.meta_path``. Modules and packages in the folder, and in further folders within it that are
    on ``sys.path``, come before all others of the same name, also packages without an ``__init__.py``, which
    Python itself would only take where no other package has that name. Where the standard library has that
    name, the order of ``sys.path`` decides, as it always does.

    Parameters
    ----------
    folder : str
        The submission's folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.real = os.path.realpath(folder)
        self.standard = os.path.realpath(os.path.dirname(os.__file__))
        self.judged = {}  # type: dict[tuple[str, str], bool]

    def install(self, started: "frozenset[str]") -> None:
        """Come first, and forget modules that the submission has, too, but that came from elsewhere.

        Parameters
        ----------
        started : frozenset of str
            What Python had imported when it started. Where the submission's modules hide some of what was
            imported since, all of that is forgotten: the rest may depend on it.
        """
        sys.meta_path.insert(0, self)
        if any(self.find_spec(name) for name in set(sys.modules) - started):
            forget(started)
        for name, _ in self.foreign():
            del sys.modules[name]

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Find a top-level module; what is in a package is found by the package's own path."""
        if "." in name or BuiltinImporter.find_spec(name) or FrozenImporter.find_spec(name):
            return None
        entries = [entry for entry in sys.path if isinstance(entry, str)]
        if not has_cwd():  # relative paths lead nowhere
            entries = [entry for entry in entries if os.path.isabs(entry)]
        library = [entry for entry in entries if self.is_standard(entry)]
        hidden = PathFinder.find_spec(name, library)
        is_standard = hidden is not None and hidden.loader is not None
        before = entries[: entries.index(library[0])] if is_standard else [*entries, self.folder]
        own = [entry for entry in before if self.holds(entry) and not self.is_installed(entry)]
        spec = PathFinder.find_spec(name, list({os.path.realpath(entry): entry for entry in own}.values()))
        if spec is None or spec.loader is not None:
            return spec
        places = [place for place in spec.submodule_search_locations or () if has_code(place)]
        if is_standard or not places:  # data, or another project's folder
            return None
        # Of Python's own type, which its libraries look for, and as its own it grows with sys.path.
        kind = type(spec.submodule_search_locations)
        spec.submodule_search_locations = kind(name, places, self.find_spec)  # type: ignore[call-overload, misc]
        return spec

    def is_standard(self, path: str) -> bool:
        """Whether an entry of ``sys.path`` is of the standard library."""
        return (os.path.realpath(path) + os.sep).startswith(self.standard + os.sep) and (
            "-packages" not in path
        )

    def holds(self, path: str) -> bool:
        """Whether a path is in the submission's folder, as it is written or where its links lead."""
        for way, folder in ((os.path.abspath(path), self.folder), (os.path.realpath(path), self.real)):
            if way == folder or way.startswith(folder.rstrip(os.sep) + os.sep):
                return True
        return False

    def is_installed(self, path: str) -> bool:
        """Whether a path in the submission's folder is one of an environment's packages."""
        return "-packages" in os.path.relpath(os.path.realpath(path), self.real)

    def foreign(self) -> "list[tuple[str, str]]":
        """Modules whose name the folder has, but that came from elsewhere: their names and files."""
        found = []
        for name, module in list(sys.modules.items()):
            place = place_of(module)
            if isinstance(place, str) and name != "__main__":
                if (name, place) not in self.judged:
                    self.judged[name, place] = self.is_foreign(name, place)
                if self.judged[name, place]:
                    found.append((name, place))
        return found

    def is_foreign(self, name: str, place: str) -> bool:
        """Whether a module's file is elsewhere, though the folder has a module of that name."""
        if self.holds(place) or self.is_standard(place):
            return False
        return self.find_spec(name.partition(".")[0]) is not None

    def check(self) -> None:
        """See that the submission's code is the submission's.

        Raises
        ------
        ImportError
            If a module came from elsewhere though the folder has one of that name; gives both paths.
        """
        for name, place in self.foreign():
            raise ImportError(f"{name} was imported from {place}, expected it from {self.folder}")
        wrapper = sys.modules.get("my_submission.aicrowd_wrapper")
        place = str(getattr(wrapper, "__file__", None))
        if not self.holds(place):
            raise ImportError(
                f"my_submission.aicrowd_wrapper was imported from {place}, expected it from {self.folder}"
            )


def has_cwd() -> bool:
    """Whether the current folder exists, which relative paths need."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def place_of(module: object) -> object:
    """The file or folder of a module; None for one that is not loaded yet, or has none."""
    try:
        known = object.__getattribute__(module, "__dict__")
        return known.get("__file__") or next(iter(known.get("__path__") or ()), None)
    except Exception:
        return None


def has_code(folder: str) -> bool:
    """Whether a folder without ``__init__.py`` is a package: it has modules and is no project of its own."""
    if any(
        os.path.exists(os.path.join(folder, name)) for name in ("setup.py", "pyproject.toml", "setup.cfg")
    ):
        return False
    suffixes = tuple(importlib.machinery.all_suffixes())
    for count, (_, folders, files) in enumerate(os.walk(folder)):
        if any(name.endswith(suffixes) for name in files):
            return True
        folders[:] = [name for name in folders if name.isidentifier()]
        if count > 1000:
            break
    return False


def forget(started: "frozenset[str]") -> None:
    """Have all modules but these imported anew when they are asked for the next time."""
    for name in set(sys.modules) - started:
        del sys.modules[name]


def pass_on(folder: str) -> None:
    """Have the Pythons that this process starts run this file."""
    os.environ[FOLDER] = folder
    entries = (os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, entries))


def main() -> None:
    """Take part in the start of a Python, and leave no trace but the finder."""
    itself = sys.modules[__name__]
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != here]
    if folder := os.environ.get(FOLDER):
        OwnModules(folder).install(STARTED)
    forget(STARTED)
    sys.modules[__name__] = itself  # Python looks for it when this is done
    spec = PathFinder.find_spec(__name__)
    if spec is not None and spec.loader is not None:  # the one that this file is in the place of
        other = type(sys)(__name__)
        other.__spec__, other.__file__ = spec, spec.origin
        spec.loader.exec_module(other)


if __name__ == "sitecustomize":
    main()
