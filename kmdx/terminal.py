"""What a command says on the terminal and how a mistake ends it: shared by all commands of the project."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from kmdx.errors import KmdxError, KmdxWarning


def run(command: Callable[[], object], console: Console, *, quiet: bool = False) -> None:
    """Run a command; a user's mistake ends it with one line on the console and exit code 2.

    Warnings of this package come out in one line each, others as ever, or where ``quiet`` not at all.
    """
    with warnings.catch_warnings():
        ever = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *more: Any, **others: Any) -> None:
            if issubclass(category, KmdxWarning):
                warn(str(message), console)
            elif not quiet:
                ever(message, category, *more, **others)

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
