"""The command: ``python -m training run | report | export | variants | budget``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kmdx import terminal
from kmdx.documents import load_yaml
from kmdx.errors import DocumentError, KmdxWarning, shown
from kmdx.terminal import err, out
from training import config as configs
from training.config import Config, TrainingError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the config, such as batch=4."),
]


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.callback()
def training() -> None:
    """Train the MDX-Net half: networks for one stem each, from folders of songs."""


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or one of training/configs.")],
    data: Annotated[list[Path], typer.Option("--data", metavar="DIR", help="Songs; can be repeated.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="RUN", help="The run's folder; the same command continues it."
        ),
    ],
    variants: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="The same songs at another pitch or tempo.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Songs to validate with.")
    ] = None,
    decoded: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where decoded flac and Ogg are kept.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(help="How many GPUs, or processes on the CPU.")] = 1,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read songs; by default half the cores.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="PATH", help="Weights to start from: a file, a run, or a name."),
    ] = None,
    with_optimizer: Annotated[
        bool,
        typer.Option("--with-optimizer", help="With --from RUN: also its optimizer's state."),
    ] = False,
    change: Changes = None,
) -> None:
    """Train a network, or go on where it was interrupted: bit for bit, on the same machine.

    Checks everything first. A checkpoint is written after each epoch, and at the end the page of curves and
    excerpts. With --from the network starts from existing weights. A larger --set steps=N extends a run that
    has ended.
    """
    from training import run_report, songs, starting, trainer

    chosen = _config(config, change, validation)
    if with_optimizer and start is None:
        raise TrainingError("--with-optimizer needs --from RUN: the run whose optimizer is meant")
    try:
        made = trainer.fit(
            chosen,
            data,
            output,
            console=err,
            variants=variants or [],
            decoded=decoded,
            device=device,
            devices=devices,
            workers=workers,
            start=None if start is None else starting.read(start, chosen, with_optimizer),
        )
        if trainer.is_first():
            with warnings.catch_warnings():  # given when the run began
                warnings.simplefilter("ignore", KmdxWarning)
                found = songs.find(
                    data, chosen.source, chosen.network.chunk, chosen.validation, variants or []
                )
            written = run_report.write(made, found, trainer.accelerator_of(device, devices))
            out.print(f"report: {escape(str(written))}")
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on after the last epoch that was finished")
        raise typer.Exit(130) from None


@app.command()
def report(folder: RunFolder) -> None:
    """Write the page of curves and excerpts again, even during the run."""
    from training import run_report, songs
    from training.run import Run

    found = Run.existing(folder)
    chosen, data = found.config(), found.data()
    names = songs.find(
        [Path(each) for each in data["folders"]], chosen.source, chosen.network.chunk, data["validation"]
    )
    out.print(f"report: {escape(str(run_report.write(found, names)))}")


@app.command()
def export(
    folder: RunFolder,
    name: Annotated[
        str | None, typer.Option(help="Name of the files, and in plans; by default the folder's.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write to; by default the models folder.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Round the weights to float16.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a weight of that name from another run.")
    ] = False,
) -> None:
    """Write the best weights as .pt and .onnx into the models folder, where a plan can name them."""
    from kmdx import weights
    from training import export as exporting
    from training.run import Run

    made = exporting.export(
        Run.existing(folder),
        name or folder.resolve().name.lower(),
        weights.models_folder(models),
        half,
        replace,
    )
    score = "not validated yet" if made.score is None else f"SDR {made.score:.3f} dB"
    out.print(
        f"weights of step {made.step}, {score}; the run {'has ended' if made.ended else 'has not ended yet'}"
    )
    out.print(
        f"{escape(str(made.state))}\n{escape(str(made.graph))}: differs by {made.difference:.1e} of the peak"
    )
    out.print(escape(f"plans name it so: weights: {made.name}"))


@app.command()
def variants(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for --variants of a run.")],
    data: Annotated[list[Path], typer.Option("--data", metavar="DIR", help="Songs; can be repeated.")],
    speed: Annotated[float, typer.Option(help="0.5 is twice as long and an octave lower.")] = 0.5,
    every: Annotated[int, typer.Option(help="Use every nth song of each folder.")] = 1,
) -> None:
    """Write songs at another speed, pitch and tempo together, to train with next to the songs as they are."""
    from training import variants as writing

    count = sum(1 for _ in writing.write(output, data, speed, every))
    out.print(f"{count} songs at {speed:g} of their speed: {escape(str(output))}")


@app.command()
def budget(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG…", help="By default all of training/configs.")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Time one real step of each on this machine.")
    ] = False,
    change: Changes = None,
) -> None:
    """Predict memory and time: what one step needs, and how many windows go at once on a T4 of 16 GB."""
    from training import budget as budgets

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "config",
        "parameters",
        "GFLOP a step",
        "fixed",
        "a window",
        "at once on a T4",
        "then GPU memory",
        "min an epoch there",
    ):
        table.add_column(column, justify="left" if column == "config" else "right")
    if measured:
        for column in ("s a step here", "h an epoch here", "peak memory here"):
            table.add_column(column, justify="right")
    for name in names or sorted(configs.names()):
        chosen = _config(name, change, None)
        needed = budgets.measure(chosen)
        row = [name, *budgets.row(chosen, needed)]
        if measured:
            step = budgets.step(chosen)
            row += [
                f"{step.seconds:.1f}",
                f"{step.seconds * chosen.epoch / 3600:.1f}",
                f"{step.memory / 1e9:.2f} GB",
            ]
        table.add_row(*row)
    out.print(table)


def _config(name: str, change: Sequence[str] | None, validation: Sequence[str] | None) -> Config:
    changes: dict[str, Any] = {}
    for entry in change or []:
        key, sign, value = entry.partition("=")
        if not sign:
            raise TrainingError(f"--set {entry}: expected KEY=VALUE")
        try:
            changes[key] = load_yaml(value)
        except DocumentError as error:
            raise TrainingError(f"--set {shown(entry)}: {error.problem}") from error
    if validation:
        changes["validation"] = list(validation)
    return configs.load(name, changes)
