"""Start or resume a training run, from its config and songs to its best weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from rich.console import Console

from kmdx import build, files, weights
from kmdx.challenge import RATE
from kmdx.devices import is_out_of_memory
from kmdx.errors import KmdxWarning, first_line
from kmdx.networks.network import Network
from kmdx.networks.tfc_tdf import TfcTdf
from kmdx.plan import NetworkUse
from kmdx.windows import TrimAndJoin
from training import budget, decoded_songs, freezing, logs, validation
from training.config import Config, TrainingError
from training.hardware import Hardware
from training.module import Averaging, Unmixing
from training.run import Run
from training.songs import Songs, contents, find
from training.starting import Start, without_prefix

KILLED = ("exited unexpectedly", "is killed by signal")  # torch's message about a process that reads songs
PRECISIONS = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


def fit(
    config: Config,
    folders: Sequence[Path],
    output: Path,
    *,
    console: Console,
    hardware: Hardware,
    variants: Sequence[Path] = (),
    decoded: Path | None = None,
    start: Start | None = None,
) -> Run:
    """Train a network, or resume an earlier run, which may be extended by more steps.

    Raises :class:`TrainingError` before the first step if anything that the run needs is missing, and later
    if it stops at a loss that is not finite.

    Parameters
    ----------
    folders, variants : sequence of Path
        As for :func:`training.songs.find`.
    output : Path
        The run's folder.
    console : Console
        Console for progress.
    decoded : Path, optional
        Folder for decoded stems; by default in the user's cache.
    start : Start, optional
        Weights for a new run to start from, instead of random ones; a resumed run must have the same.
    """
    run = Run(output)
    if config.rest.vocals is not None and config.hears != "rest":
        raise TrainingError(f"rest.vocals: the input of {config.title} is the mixture; set hears: rest")
    config = config.absolute()
    hardware.check(config)
    songs, messages = _find(config, folders, variants)
    validation.check(config, songs)
    with run.locked() if is_first() else nullcontext():
        vocals = vocals_network(config)
        if is_first():
            data = {
                **_described(folders, variants, songs),
                "vocals": _weights_of_vocals(config),
                "devices": hardware.devices,
                "start": None if start is None else start.record(),
                "warnings": messages,
            }
            _begin(run, config, data, hardware)
        songs = _decode(songs, decoded or decoded_songs.usual_folder(), console)
        hardware.limit_threads()
        start = None if run.last.is_file() else start
        module = Unmixing(config, songs, vocals, run.at_once(), hardware.readers, start)
        _train(run, module, hardware, console)
    return run


def _find(config: Config, folders: Sequence[Path], variants: Sequence[Path]) -> tuple[Songs, list[str]]:
    """The songs of a run, and the warnings about them, which are shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        songs = find(folders, config.source, config.network.chunk, config.validation, variants)
    for warning in caught:
        warnings.warn(warning.message, warning.category, stacklevel=3)
    return songs, [str(each.message) for each in caught if issubclass(each.category, KmdxWarning)]


def _described(folders: Sequence[Path], variants: Sequence[Path], songs: Songs) -> dict[str, Any]:
    """The songs of a run, for its ``data.yaml``."""
    return {
        "folders": [str(folder.resolve()) for folder in folders],
        "variants": [str(folder.resolve()) for folder in variants],
        "training": [song.name for song in songs.training],
        "validation": [song.name for song in songs.validation],
        "stems": contents((*songs.training, *songs.validation)),
    }


def _begin(run: Run, config: Config, data: dict[str, Any], hardware: Hardware) -> None:
    """Record a new run, or check that a resumed one has not changed."""
    with torch.device("meta"):
        size = freezing.freeze(TfcTdf(config.network.unet(), config.source), config.freeze)
    accelerator, devices = hardware.accelerator, hardware.devices
    run.begin(config, data, size.total, lambda: budget.at_once(config, accelerator, devices))


def _train(run: Run, module: Unmixing, hardware: Hardware, console: Console) -> None:
    """Take the remaining steps, unless the run stopped early."""
    logs.quiet()
    watching: list[Callback] = []
    if is_first():
        watching.append(logs.RunLog(run, console))
        for line in run.opening(module.parameters_trained):
            console.print(line, highlight=False, markup=False)
    if run.stopped_early():
        return
    trainer = _trainer(run, module, hardware, watching)
    with _plain_errors(run, module.at_once):
        trainer.fit(module, ckpt_path=run.last if run.last.is_file() else None, weights_only=True)


@contextmanager
def _plain_errors(run: Run, at_once: int) -> Iterator[None]:
    """Turn errors of a step into one line that states what to do."""
    try:
        yield
    except TrainingError as error:
        raise _of_worker(error) from error
    except (RuntimeError, MemoryError) as error:
        if any(sign in str(error) for sign in KILLED):
            raise TrainingError(
                "a process that reads songs was killed, probably for lack of memory or, in Docker, of "
                "/dev/shm; lower --workers, or start Docker with --shm-size=2g"
            ) from error
        if is_out_of_memory(error):
            raise TrainingError(
                f"out of memory with {at_once} windows at once: lower at_once, or set "
                f"checkpointing: true{f' ({first_line(error)})' if str(error).strip() else ''}"
            ) from error
        raise
    except OSError as error:
        raise TrainingError(
            f"{run.folder}: {error.strerror or error}; the last checkpoint is intact"
        ) from error
    except SystemExit as error:  # lightning raises it on Ctrl-C
        raise KeyboardInterrupt from error


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints completely or not at all, under another name first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(place) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)


class Patience(EarlyStopping):
    """Early stopping that uses the current config's patience, not the one in the checkpoint."""

    @property
    def state_key(self) -> str:
        """The key of lightning's own class, so that checkpoints of earlier runs can be read."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, and the number of validations since."""
        super().load_state_dict({**state_dict, "patience": self.patience})


class Checkpoints(ModelCheckpoint):
    """Checkpoints that remember the best score even if the run's folder was moved."""

    @property
    def state_key(self) -> str:
        """The key of lightning's own class, so that checkpoints of earlier runs can be read."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, unless its checkpoint is missing."""
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
    """An error from a worker, without the worker's traceback."""
    for line in reversed(str(error).splitlines()):
        name, _, message = line.partition(": ")
        if name.endswith(TrainingError.__name__):
            return TrainingError(message)
    return error


def is_first() -> bool:
    """Whether this is the main process, which started those of the other devices."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def vocals_network(config: Config) -> Network | None:
    """The network that estimates the vocals to subtract; None if true vocals or none are subtracted.

    Raises :class:`TrainingError` if its windows have another length than those of the trained network.
    """
    name = config.rest.vocals
    if config.hears != "rest" or name is None:
        return None
    sizes = config.network
    if not Path(name).is_dir() and (len(Path(name).parts) > 1 or name.startswith((".", "~"))):
        raise TrainingError(f"rest.vocals: {name}: no such run; expected a run's folder, or a weight's name")
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
    """The network of a run for inference, with its best weights or those of a checkpoint."""
    config = run.config()
    network = TfcTdf(config.network.unet(), config.source)
    network.load(without_prefix((checkpoint or run.checkpoint()[0])["state_dict"]))
    return network.requires_grad_(False).eval()


def _weights_of_vocals(config: Config) -> str | None:
    """The checksum that identifies a run of a vocals network; ``None`` if no such run is used."""
    name = config.rest.vocals
    if config.hears != "rest" or name is None or not Path(name).is_dir():
        return None
    return weights.file_sha256(Run.existing(Path(name)).weights)


def _decode(songs: Songs, folder: Path, console: Console) -> Songs:
    with console.status("reading the songs") as status:
        return decoded_songs.decode(
            songs, folder, lambda done, total: status.update(f"decoding stems: {done} of {total}")
        )


def _trainer(
    run: Run, module: Unmixing, hardware: Hardware, watching: Sequence[Callback]
) -> lightning.Trainer:
    config = module.config
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
                check_finite=False,  # the module does this, and names the song
                check_on_train_epoch_end=False,
            )
        )
    return lightning.Trainer(
        default_root_dir=run.folder,
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        strategy="ddp" if hardware.devices > 1 else "auto",
        precision=PRECISIONS[config.precision],  # type: ignore[arg-type]
        max_epochs=config.epochs,
        accumulate_grad_batches=config.batch // hardware.devices // module.at_once,
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
