"""The command: renders a data set of four-stem songs."""

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
from recipes.mini.synthesizer import requirements, song_set

SONGS_PER_TEST_SONG = 6

app = terminal.app()


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command()
def render_songs(
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The data set's folder. Songs that it already contains are kept."),
    ],
    songs: Annotated[int, typer.Option(help="Number of songs, test songs included.")] = 60,
    test_songs: Annotated[
        int | None, typer.Option(help="Number of songs in OUT/test. Default: one in six.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Approximate length of a song.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Another seed gives other songs.")] = 0,
    jobs: Annotated[
        int | None, typer.Option(help="Songs to render in parallel. Default: one per core.")
    ] = None,
) -> None:
    """Render a data set of four-stem songs in MUSDB18-HQ's layout.

    Nothing is downloaded. Songs are composed at random and rendered with MMA, FluidSynth and Sinsy.
    With the same versions of these, the same seed gives the same bytes.
    """
    if jobs is not None and jobs < 1:
        raise KmdxError(f"--jobs {jobs}: expected 1 or more")
    test_songs = songs // SONGS_PER_TEST_SONG if test_songs is None else test_songs
    planned = song_set.plan(seed, songs, test_songs, seconds)
    requirements.check()
    _check_folder(output)
    from recipes.mini.synthesizer.song import make  # imports the packages that were just checked

    missing = song_set.missing(output, planned)
    if len(missing) < len(planned):
        err.print(f"{len(planned) - len(missing)} of {len(planned)} songs exist already")
    began = time.monotonic()
    jobs = min(jobs or host.usable_cores(), len(missing) or 1)
    try:
        for done, song in enumerate(song_set.render(output, missing, jobs, make), 1):
            seconds_per_song = (time.monotonic() - began) / done
            remaining = timedelta(seconds=round(seconds_per_song * (len(missing) - done)))
            err.print(f"[{done}/{len(missing)}] {song.split}/{song.name} ({remaining} left)", markup=False)
    except KeyboardInterrupt:
        err.print("stopped; run the same command to continue")
        raise typer.Exit(130) from None
    err.print(f"{escape(str(output))}: {len(planned)} songs")


def _check_folder(output: Path) -> None:
    """Make sure that the folder exists and can be written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KmdxError(f"{output}: expected a folder to write to: {error.strerror}") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise KmdxError(f"{output}: cannot be written to; choose another folder")
