"""How a command ends that a user's mistake stops: shared by all commands of the project."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from kmdx.errors import KmdxError


def run(command: Callable[[], object], console: Console) -> None:
    """Run a command; a user's mistake ends it with one line on the console and exit code 2."""
    try:
        command()
    except KmdxError as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        sys.exit(2)
