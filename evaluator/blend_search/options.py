"""Arguments and options that the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EVERY_SPLIT = "all"

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="An ensemble, or a plan's path (.yaml).")]
DataArgument = Annotated[
    Path, typer.Argument(metavar="DATA", help="MUSDB18-HQ, or any folder in its layout.")
]
CollectionArgument = Annotated[
    Path, typer.Argument(metavar="COLLECTION", help="Folder that `collect` filled.")
]
SplitOption = Annotated[
    str, typer.Option(help=f"Subfolder of DATA, where it has one; {EVERY_SPLIT!r} takes every one.")
]
TracksOption = Annotated[str | None, typer.Option(metavar="GLOB", help="Only songs whose names match.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or any torch device.")]
PrecisionOption = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")]
SpeedOption = Annotated[str, typer.Option(help="leaderboard, balanced or fast.")]
FolderOption = Annotated[
    Path | None, typer.Option("--weights", metavar="DIR", help="Where weight files lie, if elsewhere.")
]
SumOption = Annotated[bool, typer.Option("--sum-to-one", help="Weights of a stem sum to one.")]
NonNegativeOption = Annotated[bool, typer.Option("--non-negative", help="No weight is below 0.")]
PriorOption = Annotated[
    str,
    typer.Option(
        metavar="auto|NUMBER",
        help="Pull to the published weights, dB for a distance of 1; auto chooses by cross-validation.",
    ),
]
JointOption = Annotated[
    bool, typer.Option("--joint", help="One prior for all stems, and all their weights or none.")
]
FoldsOption = Annotated[int | None, typer.Option(help="Of the cross-validation; by default one a song.")]
AnywayOption = Annotated[
    bool, typer.Option("--anyway", help="Take weights that gain nothing on songs held out, too.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Let --output write over a plan that this command did not write.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON.")]
