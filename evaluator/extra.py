"""Starts a command whose packages may not be installed. This module uses only the standard library."""

import importlib.util
import sys

OWN = ("evaluator", "kmdx", "my_submission", "training")


def start(module: str, extra: str, *needed: str) -> None:
    """Run a module's ``main``; if a package is missing, print one line that names the extra to install.

    Parameters
    ----------
    module : str
    extra : str
        The optional dependencies in ``pyproject.toml`` that the module needs.
    needed : str
        Packages of the extra that the module does not import at its top.
    """
    try:
        for name in needed:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(name=name)
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN:
            raise
        print(f"error: {package} is missing; install it with: pip install '.[{extra}]'", file=sys.stderr)
        sys.exit(2)
    command.main()
