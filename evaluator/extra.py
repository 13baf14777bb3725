"""Starts a command whose packages may not be installed. This module uses only the standard library."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
        project = ROOT if (ROOT / "pyproject.toml").is_file() else "kmdx-net"
        print(
            f"error: {package} is missing; install it with: pip install '{project}[{extra}]'", file=sys.stderr
        )
        sys.exit(2)
    command.main()
