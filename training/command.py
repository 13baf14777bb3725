"""The command: ``python -m training run | report | export | variants | budget``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kmdx import terminal
from kmdx.documents import load_yaml
from kmdx.errors import DocumentError, KmdxWarning, shown
from kmdx.terminal import err, out
from training import config as configs
from training.config import Config, TrainingError

if TYPE_CHECKING:
    from training.run import Run

app = terminal.app(no_args_is_help=True)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
Data = Annotated[list[Path], typer.Option("--data", metavar="DIR", help="Folder of songs; can be repeated.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="RUN", help="The run's folder. The same command resumes a run."),
]
Start = Annotated[
    str | None,
    typer.Option("--from", metavar="PATH", help="Weights to start from: a file, a run, or a name."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the config, such as batch=4."),
]


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.callback()
def training() -> None:
    """Train MDX-Net networks, one for each stem, with folders of songs."""


@app.command()
def run(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or a name in training/configs.")
    ],
    data: Data,
    output: Output,
    variants: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Folder of the same songs at another pitch or tempo; can be repeated."
        ),
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Names of validation songs; can be repeated.")
    ] = None,
    decoded: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for decoded flac and Ogg files.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(help="Number of GPUs, or of processes on the CPU.")] = 1,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read songs; default: half the cores.")
    ] = None,
    start: Start = None,
    with_optimizer: Annotated[
        bool,
        typer.Option("--with-optimizer", help="With --from RUN, also load the optimizer's state."),
    ] = False,
    change: Changes = None,
) -> None:
    """Train a network, or resume an interrupted run; on the same machine, the result is identical.

    All inputs are checked first. A checkpoint is written after each epoch, and a report with curves and
    excerpts at the end. With --from, the network starts from existing weights. A larger --set steps=N extends
    a finished run.
    """
    from training import starting, trainer
    from training.hardware import Hardware

    chosen = _config(config, change, validation)
    if with_optimizer and start is None:
        raise TrainingError("--with-optimizer needs --from RUN, the run with the optimizer's state")
    hardware = Hardware(device, devices, workers)
    try:
        made = trainer.fit(
            chosen,
            data,
            output,
            console=err,
            hardware=hardware,
            variants=variants or [],
            decoded=decoded,
            start=None if start is None else starting.read(start, chosen, with_optimizer),
        )
        if trainer.is_first():
            _write_report(made, chosen, data, variants or [], hardware.accelerator)
    except KeyboardInterrupt:
        err.print("stopped; the same command resumes after the last complete epoch")
        raise typer.Exit(130) from None


@app.command()
def report(folder: RunFolder) -> None:
    """Write the report with curves and excerpts again; this also works during the run."""
    from training import run_report, songs
    from training.run import Run

    found = Run.existing(folder)
    chosen, data = found.config(), found.data()
    folders = [Path(each) for each in data["folders"]]
    used = songs.find(folders, chosen.source, chosen.network.chunk, data["validation"])
    out.print(f"report: {escape(str(run_report.write(found, used)))}")


@app.command()
def export(
    folder: RunFolder,
    name: Annotated[
        str | None, typer.Option(help="Name of the files, also used in plans; default: the folder's name.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder; default: the models folder.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Round the weights to float16.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a weight with this name from another run.")
    ] = False,
) -> None:
    """Write the best weights as .pt and .onnx into the models folder, for use in plans."""
    from kmdx import weights
    from training.export import write_weights
    from training.run import Run

    made = write_weights(
        Run.existing(folder),
        name or folder.resolve().name.lower(),
        weights.models_folder(models),
        half,
        replace,
    )
    score = "not validated yet" if made.score is None else f"SDR {made.score:.3f} dB"
    out.print(
        f"weights of step {made.step}, {score}; the run is {'complete' if made.ended else 'not complete yet'}"
    )
    out.print(
        f"{escape(str(made.state))}\n{escape(str(made.graph))}: differs by {made.difference:.1e} of the peak"
    )
    out.print(escape(f"to use it in a plan: weights: {made.name}"))


@app.command()
def variants(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder; pass it to a run as --variants.")
    ],
    data: Data,
    speed: Annotated[
        float, typer.Option(help="Speed factor; 0.5 makes songs twice as long and an octave lower.")
    ] = 0.5,
    every: Annotated[int, typer.Option(help="Use every nth song of each folder.")] = 1,
) -> None:
    """Write copies of songs at another speed, which changes pitch and tempo, as additional training data."""
    from training import variants as writing

    count = sum(1 for _ in writing.write(output, data, speed, every))
    out.print(f"{count} songs at {speed:g} × their speed: {escape(str(output))}")


@app.command()
def budget(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG…", help="Configs; default: all of training/configs.")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Also time one real step of each config on this machine.")
    ] = False,
    change: Changes = None,
) -> None:
    """Predict the memory and time of a training step, and the batch size that fits on a 16 GB T4."""
    from training import budget as budgets

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "config",
        "parameters",
        "GFLOP per step",
        "fixed",
        "per window",
        "at once on a T4",
        "GPU memory",
        "min per epoch on a T4",
    ):
        table.add_column(column, justify="left" if column == "config" else "right")
    if measured:
        for column in ("s per step here", "h per epoch here", "peak memory here"):
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


def _write_report(
    run: Run, config: Config, data: Sequence[Path], variants: Sequence[Path], device: str
) -> None:
    """Write the report of a run that has just ended, whose warnings were already shown."""
    from training import run_report, songs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KmdxWarning)
        found = songs.find(data, config.source, config.network.chunk, config.validation, variants)
    out.print(f"report: {escape(str(run_report.write(run, found, device)))}")


def _config(name: str, change: Sequence[str] | None, validation: Sequence[str] | None) -> Config:
    changes: dict[str, Any] = {}
    for entry in change or []:
        key, sign, value = entry.partition("=")
        if not sign:
            raise TrainingError(f"--set {entry}: expected KEY=VALUE, such as batch=4")
        try:
            changes[key] = load_yaml(value)
        except DocumentError as error:
            raise TrainingError(f"--set {shown(entry)}: {error.problem}") from error
    if validation:
        changes["validation"] = list(validation)
    return configs.load(name, changes)
