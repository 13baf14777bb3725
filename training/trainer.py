"""Runs a training run: from its config and songs to its best weights, and on where it was interrupted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from rich.console import Console

from kmdx import build, files, host, weights
from kmdx.challenge import RATE
from kmdx.device import is_out_of_memory
from kmdx.errors import KmdxWarning, first_line
from kmdx.networks.network import Network
from kmdx.networks.tfc_tdf import TfcTdf
from kmdx.plan import NetworkUse
from kmdx.windows import TrimAndJoin
from training import budget, decoded_songs, freezing, logs, validation
from training.config import Config, TrainingError
from training.module import Averaging, Unmixing
from training.run import Run
from training.songs import Songs, contents, find
from training.starting import Start

KILLED = ("exited unexpectedly", "is killed by signal")  # torch's message about a process that reads songs
PRECISIONS = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


def fit(
    config: Config,
    folders: Sequence[Path],
    output: Path,
    *,
    console: Console,
    variants: Sequence[Path] = (),
    decoded: Path | None = None,
    device: str = "auto",
    devices: int = 1,
    workers: int | None = None,
    start: Start | None = None,
) -> Run:
    """Train a network, or go on where an earlier process ended, also with more steps than it had.

    Parameters
    ----------
    config : Config
    folders, variants : sequence of Path
        As for :func:`training.songs.find`.
    output : Path
        The run's folder.
    console : Console
        Where progress goes.
    decoded : Path, optional
        Where decoded stems are kept; the user's cache if not given.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    devices : int
        How many GPUs, or processes on the CPU.
    workers : int, optional
        Processes that read windows, for each device; half the cores if not given.
    start : Start, optional
        What a new run starts from in place of random weights; a run that goes on must have begun with it.

    Raises
    ------
    TrainingError
        If anything that the run needs is missing, before the first step; or if it stops at a loss that is
        not finite.
    """
    run = Run(output)
    first = is_first()
    if config.rest.vocals is not None and config.hears != "rest":
        raise TrainingError(f"rest.vocals: {config.title} hears the mixture; it needs hears: rest")
    config = config.absolute()
    accelerator = accelerator_of(device, devices)
    _check_shares(config, devices)
    reading = _workers(workers, devices)
    if accelerator == "cpu" and config.precision == "fp16":
        raise TrainingError("precision fp16 needs a GPU: use --set precision=fp32, or bf16")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        songs = find(folders, config.source, config.network.chunk, config.validation, variants)
    for warning in caught:
        warnings.warn(warning.message, warning.category, stacklevel=2)
    validation.check(config, songs)
    with run.locked() if first else nullcontext():
        vocals = vocals_network(config)
        if first:
            data = {
                "folders": [str(folder.resolve()) for folder in folders],
                "variants": [str(folder.resolve()) for folder in variants],
                "training": [song.name for song in songs.training],
                "validation": [song.name for song in songs.validation],
                "stems": contents((*songs.training, *songs.validation)),
                "vocals": _weights_of_vocals(config),
                "devices": devices,
                "start": None if start is None else start.record(),
                "warnings": [str(each.message) for each in caught if issubclass(each.category, KmdxWarning)],
            }
            with torch.device("meta"):
                size = freezing.freeze(TfcTdf(config.network.unet(), config.source), config.freeze)
            run.begin(config, data, size.total, lambda: budget.at_once(config, accelerator, devices))
        songs = _decoded(songs, decoded or decoded_songs.usual_folder(), console)
        if accelerator == "cpu":
            host.cap_threads()
            torch.set_num_threads(max(1, torch.get_num_threads() // devices))
        module = Unmixing(
            config,
            songs,
            vocals,
            run.at_once(),
            reading,
            None if run.last.is_file() else start,
        )
        logs.quiet()
        if first:
            for line in run.opening(module.parameters_trained):
                console.print(line, highlight=False, markup=False)
        if run.stopped_early():
            return run
        watching: list[Callback] = [logs.Journal(run, console)] if first else []
        trainer = _trainer(config, run, accelerator, devices, module.at_once, watching)
        try:
            trainer.fit(module, ckpt_path=run.last if run.last.is_file() else None, weights_only=True)
        except TrainingError as error:
            raise _of_worker(error) from error
        except (RuntimeError, MemoryError) as error:
            if any(sign in str(error) for sign in KILLED):
                raise TrainingError(
                    "a process that reads songs was killed: too little memory, or, in Docker, too little "
                    "/dev/shm; set --workers lower, or start Docker with --shm-size=2g"
                ) from error
            if is_out_of_memory(error):
                raise TrainingError(
                    f"out of memory with {module.at_once} windows at once: set at_once lower, "
                    f"or checkpointing: true{f' ({first_line(error)})' if str(error).strip() else ''}"
                ) from error
            raise
        except OSError as error:
            raise TrainingError(
                f"{output}: {error.strerror or error}; the last checkpoint is untouched"
            ) from error
        except SystemExit as error:  # lightning's answer to Ctrl-C
            raise KeyboardInterrupt from error
    return run


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are complete or absent: written under another name first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(place) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)


class Patience(EarlyStopping):
    """Lightning's, which goes on counting with the config's patience, whatever it was before."""

    @property
    def state_key(self) -> str:
        """As of lightning's own class, so that checkpoints of earlier runs are understood."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and the count of validations since."""
        super().load_state_dict({**state_dict, "patience": self.patience})


class Checkpoints(ModelCheckpoint):
    """Lightning's, which remember the best score also where the run's folder has moved."""

    @property
    def state_key(self) -> str:
        """As of lightning's own class, so that checkpoints of earlier runs are understood."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, unless the checkpoint that has it is gone."""
        here = Path(str(self.dirpath))

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        best = moved(state_dict["best_model_path"])
        if best and not Path(best).is_file():
            return
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": best,
                "kth_best_model_path": moved(state_dict["kth_best_model_path"]),
                "last_model_path": moved(state_dict["last_model_path"]),
                "best_k_models": {moved(path): score for path, score in state_dict["best_k_models"].items()},
            }
        )


def _of_worker(error: TrainingError) -> TrainingError:
    """A mistake without the traceback that a worker sends along."""
    for line in reversed(str(error).splitlines()):
        name, _, message = line.partition(": ")
        if name.endswith(TrainingError.__name__):
            return TrainingError(message)
    return error


def is_first() -> bool:
    """Whether this is the process that started those of the other devices."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def vocals_network(config: Config) -> Network | None:
    """The network that estimates the vocals to be taken out, or None where the true ones are.

    Raises
    ------
    TrainingError
        If its windows have another length than those of the network that is trained.
    """
    name = config.rest.vocals
    if config.hears != "rest" or name is None:
        return None
    sizes = config.network
    if not Path(name).is_dir() and (len(Path(name).parts) > 1 or name.startswith((".", "~"))):
        raise TrainingError(f"rest.vocals: {name}: no such run")
    if Path(name).is_dir():
        network: Network = trained(Run.existing(Path(name)))
    else:
        use = NetworkUse(weights.get(name), TrimAndJoin(sizes.chunk, sizes.trim))
        network = build.load_network(use, RATE, torch.device("cpu"))
    if network.sources != ("vocals",) or network.length != sizes.chunk:
        raise TrainingError(
            f"rest.vocals: {name} estimates {', '.join(network.sources)} in windows of {network.length} "
            f"samples, expected vocals in windows of {sizes.chunk}"
        )
    return network


def trained(run: Run, checkpoint: Mapping[str, Any] | None = None) -> TfcTdf:
    """The network of a run with its best weights, or those of a checkpoint of it, for inference."""
    config = run.config()
    network = TfcTdf(config.network.unet(), config.source)
    state = (checkpoint or run.checkpoint()[0])["state_dict"]
    prefix = "network."
    network.load(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    return network.requires_grad_(False).eval()


def _weights_of_vocals(config: Config) -> str | None:
    """What a run of a vocals network is known by; ``None`` where none is taken out."""
    name = config.rest.vocals
    if config.hears != "rest" or name is None or not Path(name).is_dir():
        return None
    return weights.file_sha256(Run.existing(Path(name)).weights)


def _decoded(songs: Songs, folder: Path, console: Console) -> Songs:
    with console.status("reading the songs") as status:
        return decoded_songs.decode(
            songs, folder, lambda done, total: status.update(f"decoding stems: {done} of {total}")
        )


def accelerator_of(device: str, devices: int) -> str:
    """``cpu`` or ``cuda``, for what is asked for.

    Raises
    ------
    TrainingError
        If there is no such device, or there are not so many.
    """
    available = torch.cuda.device_count()
    if device not in ("auto", "cpu", "cuda"):
        raise TrainingError(f"device {device!r}: expected auto, cpu or cuda")
    chosen = ("cuda" if available else "cpu") if device == "auto" else device
    if devices < 1:
        raise TrainingError(f"--devices {devices}: expected 1 or more")
    if chosen == "cuda" and devices > available:
        raise TrainingError(f"--devices {devices}: this machine has {available} GPUs")
    return chosen


def _check_shares(config: Config, devices: int) -> None:
    """See that a batch can be shared among the devices, and a share go through by so many at once."""
    share, left = divmod(config.batch, devices)
    if left:
        raise TrainingError(f"a batch of {config.batch} cannot be shared by {devices} devices")
    if config.at_once != "auto" and share % min(config.at_once, share):
        raise TrainingError(
            f"a batch of {config.batch} cannot go through {devices} devices by {config.at_once} windows each"
        )


def _workers(asked: int | None, devices: int) -> int:
    if asked is not None and asked < 0:
        raise TrainingError(f"--workers {asked}: expected 0 or more")
    return max(1, host.usable_cores() // 2 // devices) if asked is None else asked


def _trainer(
    config: Config, run: Run, accelerator: str, devices: int, at_once: int, watching: list[Callback]
) -> lightning.Trainer:
    checkpoint = partial(
        Checkpoints, run.last.parent, enable_version_counter=False, auto_insert_metric_name=False
    )
    callbacks: list[Callback] = [] if config.average is None else [Averaging(config.average)]
    callbacks += [
        *watching,
        checkpoint(
            filename="best",
            monitor="sdr",
            mode="max",
            save_on_train_epoch_end=False,
        ),
        checkpoint(filename="last", save_on_train_epoch_end=True),
    ]
    if config.patience is not None:
        callbacks.append(
            Patience(
                "sdr",
                mode="max",
                patience=config.patience,
                check_finite=False,  # the module names the song
                check_on_train_epoch_end=False,
            )
        )
    return lightning.Trainer(
        default_root_dir=run.folder,
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision=PRECISIONS[config.precision],  # type: ignore[arg-type]
        max_epochs=config.epochs,
        accumulate_grad_batches=config.batch // devices // at_once,
        plugins=[WholeCheckpoints()],
        check_val_every_n_epoch=config.validate_every,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic="warn",
    )
