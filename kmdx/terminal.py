"""What a command says on the terminal and how a mistake ends it: shared by all commands of the project."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from kmdx.errors import KmdxError, KmdxWarning


def run(command: Callable[[], object], console: Console) -> None:
    """Run a command; a user's mistake ends it with one line on the console and exit code 2.

    Warnings of this package come out in one line each, and nobody else's.
    """

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, KmdxWarning):
            warn(str(message), console)

    warnings.showwarning = show
    try:
        command()
    except KmdxError as error:
        complain(str(error), console)
        sys.exit(2)


def complain(message: str, console: Console) -> None:
    """Print what went wrong."""
    console.print(f"[bold red]error:[/bold red] {escape(message)}")


def warn(message: str, console: Console) -> None:
    """Print what the user should know."""
    console.print(f"[bold yellow]warning:[/bold yellow] {escape(message)}")
