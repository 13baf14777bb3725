"""Makes a submission import its own modules, in its process and in every Python process that it starts.

The folder of this file is on the submission's ``PYTHONPATH``, so every Python process runs this file when it
starts. The file needs Python 3.8 or newer and only the standard library.
"""

import sys

STARTED = frozenset(sys.modules)  # modules that Python itself has imported

import importlib.machinery
import os
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder

FOLDER = "KMDX_SUBMISSION"
"""Environment variable that contains the path of the submission's folder."""


class OwnModules:
    """Finds the submission's modules in its own folder, whatever else is on the interpreter's path.

    This finder is first on ``sys.meta_path``. Modules and packages in the folder, or in its subfolders that
    are on ``sys.path``, take precedence over all others with the same name. This includes packages without an
    ``__init__.py``, which Python itself uses only if no other package has that name. If the standard library
    has a module with that name, the order of ``sys.path`` decides, as usual.

    Parameters
    ----------
    folder : str
        The submission's folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.real = os.path.realpath(folder)
        self.standard = os.path.realpath(os.path.dirname(os.__file__))
        self.known = {}  # type: dict[tuple[str, str], bool]  # results of is_foreign

    def install(self, started: "frozenset[str]") -> None:
        """Install the finder, and unload modules from elsewhere if the submission has one of the same name.

        Parameters
        ----------
        started : frozenset of str
            Names of the modules that Python itself imported when it started. If the submission's modules
            hide any module imported since then, all of those modules are unloaded, because others may depend
            on the hidden one.
        """
        sys.meta_path.insert(0, self)
        if any(self.find_spec(name) for name in set(sys.modules) - started):
            unload(started)
        for name, _ in self.foreign():
            del sys.modules[name]

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Find a top-level module; Python finds submodules through their package's own path."""
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
        if is_standard or not places:  # a folder of data, or of another project
            return None
        # Python's own type: its libraries check for it, and such a path is updated when sys.path changes.
        kind = type(spec.submodule_search_locations)
        spec.submodule_search_locations = kind(name, places, self.find_spec)  # type: ignore[call-overload, misc]
        return spec

    def is_standard(self, path: str) -> bool:
        """Whether an entry of ``sys.path`` belongs to the standard library."""
        return (os.path.realpath(path) + os.sep).startswith(self.standard + os.sep) and (
            "-packages" not in path
        )

    def holds(self, path: str) -> bool:
        """Whether a path is in the submission's folder, either as written or after its links are resolved."""
        for way, folder in ((os.path.abspath(path), self.folder), (os.path.realpath(path), self.real)):
            if way == folder or way.startswith(folder.rstrip(os.sep) + os.sep):
                return True
        return False

    def is_installed(self, path: str) -> bool:
        """Whether a path in the submission's folder belongs to the installed packages of an environment."""
        return "-packages" in os.path.relpath(os.path.realpath(path), self.real)

    def foreign(self) -> "list[tuple[str, str]]":
        """Names and files of modules from elsewhere, if the folder has a module with the same name."""
        found = []
        for name, module in list(sys.modules.items()):
            place = place_of(module)
            if isinstance(place, str) and name != "__main__":
                if (name, place) not in self.known:
                    self.known[name, place] = self.is_foreign(name, place)
                if self.known[name, place]:
                    found.append((name, place))
        return found

    def is_foreign(self, name: str, place: str) -> bool:
        """Whether a module's file is elsewhere although the folder has a module with that name."""
        if self.holds(place) or self.is_standard(place):
            return False
        return self.find_spec(name.partition(".")[0]) is not None

    def check(self) -> None:
        """Check that the submission's modules were imported from its own folder.

        Raises
        ------
        ImportError
            If a module was imported from elsewhere although the folder has one with that name. The message
            gives both paths.
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
    """Whether a folder without ``__init__.py`` is a package: it has modules and is not a separate project."""
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


def unload(started: "frozenset[str]") -> None:
    """Unload all modules except these, so that the next import loads them again."""
    for name in set(sys.modules) - started:
        del sys.modules[name]


def pass_on(folder: str) -> None:
    """Make the Python processes that this process starts run this file."""
    os.environ[FOLDER] = folder
    entries = (os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, entries))


def main() -> None:
    """Install the finder when Python starts, and leave nothing else behind."""
    itself = sys.modules[__name__]
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != here]
    if folder := os.environ.get(FOLDER):
        OwnModules(folder).install(STARTED)
    unload(STARTED)
    sys.modules[__name__] = itself  # Python looks it up after this file has run
    spec = PathFinder.find_spec(__name__)
    if spec is not None and spec.loader is not None:  # the sitecustomize that this file hides
        other = type(sys)(__name__)
        other.__spec__, other.__file__ = spec, spec.origin
        spec.loader.exec_module(other)


if __name__ == "sitecustomize":
    main()
