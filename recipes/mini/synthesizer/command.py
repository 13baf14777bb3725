"""The command: from its options to a data set's folder."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kmdx import host, terminal
from kmdx.errors import KmdxError
from kmdx.terminal import err
from recipes.mini.synthesizer import requirements
from recipes.mini.synthesizer import songs as data

TEST_PART = 6  # one song in so many is for testing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def synthesise(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="The data set's folder; the same one goes on.")
    ],
    songs: Annotated[int, typer.Option(help="In all.")] = 60,
    test_songs: Annotated[
        int | None, typer.Option(help="Of them in OUT/test; if not given, one in six.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long a song is.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Another one, other songs.")] = 0,
    jobs: Annotated[int | None, typer.Option(help="Songs made at a time; if not given, one a core.")] = None,
) -> None:
    """Render a data set of four-stem songs in MUSDB18-HQ's layout.

    Nothing is downloaded: songs are composed at random, and rendered with MMA, FluidSynth, Sinsy and
    their soundfonts and voices. With the same versions of these, the same seed gives the same bytes.
    """
    if jobs is not None and jobs < 1:
        raise KmdxError(f"--jobs {jobs}: expected 1 or more")
    planned = data.plan(seed, songs, songs // TEST_PART if test_songs is None else test_songs, seconds)
    requirements.check()
    _check_folder(output)
    from recipes.mini.synthesizer.song import make  # imports what was just looked for

    left = data.missing(output, planned)
    if len(left) < len(planned):
        err.print(f"{len(planned) - len(left)} of {len(planned)} songs are there")
    began = time.monotonic()
    try:
        for done, song in enumerate(
            data.render(output, left, min(jobs or host.usable_cores(), len(left) or 1), make), 1
        ):
            pace = (time.monotonic() - began) / done
            remaining = timedelta(seconds=round(pace * (len(left) - done)))
            err.print(f"[{done}/{len(left)}] {song.split}/{song.name} ({remaining} left)", markup=False)
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on where this one ended")
        raise typer.Exit(130) from None
    err.print(f"{escape(str(output))}: {len(planned)} songs")


def _check_folder(output: Path) -> None:
    """Make sure that the folder is there and can be written in."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KmdxError(f"{output}: expected a folder to write to: {error.strerror}") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise KmdxError(f"{output}: cannot be written to; choose another folder")
