"""Score a network on whole songs, run as in the ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import soundfile as sf
import torch
from numpy.typing import NDArray
from torch import nn

from evaluator.metrics import global_sdr
from kmdx import chunking
from kmdx.devices import Runner, memory_budget
from kmdx.networks.network import Network
from kmdx.networks.tfc_tdf import TfcTdf
from kmdx.signals import Signal
from training import sampling
from training.config import Config, TrainingError
from training.songs import Songs, TrainingSong, TrainingStem, blocks

BLOCK = 2**16  # samples read at a time


class Estimated(NamedTuple):
    """A network's input, its estimate and the true stem: float32 ``(2, samples)`` each."""

    input: NDArray[np.float32]
    estimate: NDArray[np.float32]
    truth: NDArray[np.float32]


def check(config: Config, songs: Songs) -> None:
    """Check that the source is not silent in all training songs, or in all validation songs.

    Raises :class:`TrainingError` if it is, or a file cannot be read.
    """
    for kind, group in (("training", songs.training), ("validation", songs.validation)):
        if not any(_has_sound(song.stems[config.source]) for song in group if config.source in song.stems):
            raise TrainingError(f"{config.source} is silent in all {kind} songs")


def _has_sound(stem: TrainingStem) -> bool:
    """Whether a stem contains anything except zeros; it is read only up to the first sound."""
    if stem.parts:
        return any(block.any() for block in blocks(stem))
    try:
        with sf.SoundFile(stem.path) as sound:
            return any(block.any() for block in sound.blocks(BLOCK, dtype="float32"))
    except (OSError, sf.SoundFileError) as error:
        raise TrainingError(f"{stem.path}: cannot be read: {error}") from error


def score(
    config: Config, network: TfcTdf, vocals: Network | None, song: TrainingSong, device: torch.device
) -> float | None:
    """Global SDR in dB; ``None`` if the true stem is silent."""
    if config.source not in song.stems:
        return None
    found = estimate(config, network, vocals, song, device)
    if not found.truth.any():
        return None
    return global_sdr(found.truth.T, found.estimate.T)


@torch.inference_mode()
def estimate(
    config: Config, network: TfcTdf, vocals: Network | None, song: TrainingSong, device: torch.device
) -> Estimated:
    """Run a network on a whole song, in chunks that are trimmed and joined."""
    stems = sampling.whole(song)
    signal = _input(config, vocals, stems, device)
    return Estimated(signal, _run(config, network, signal, device), stems[config.source])


@torch.inference_mode()
def excerpt(
    config: Config,
    network: TfcTdf,
    vocals: Network | None,
    song: TrainingSong,
    part: slice,
    device: torch.device,
) -> Estimated:
    """The result of :func:`estimate` for a part of a song, computed only from the chunks around it."""
    sizes = config.network
    keep = sizes.chunk - 2 * sizes.trim
    depth = 1 if vocals is None else 2  # number of networks; the input of each is longer than its output
    begin = max(0, part.start // keep - depth) * keep  # start of a chunk of the whole song
    around = slice(begin, part.stop + depth * sizes.chunk)
    stems = sampling.whole(song)
    if vocals is None:
        signal = _input(config, None, stems, device)[:, around]
    else:
        parts = {name: samples[:, around] for name, samples in stems.items()}
        signal = _input(config, vocals, parts, device)
    own = slice(part.start - begin, part.stop - begin)
    made = _run(config, network, signal, device)
    return Estimated(signal[:, own], made[:, own], stems[config.source][:, part])


def _input(
    config: Config, vocals: Network | None, stems: Mapping[str, NDArray[np.float32]], device: torch.device
) -> NDArray[np.float32]:
    """The network's input: the mixture, or the mixture without estimated vocals."""
    mixture: NDArray[np.float32] = np.sum([*stems.values()], axis=0)
    if config.hears != "rest":
        return mixture
    if vocals is None:
        return mixture - sampling.estimated(stems["vocals"], mixture, sum(config.rest.error) / 2)
    return mixture - _run(config, vocals, mixture, device)


def _run(
    config: Config, network: Network, signal: NDArray[np.float32], device: torch.device
) -> NDArray[np.float32]:
    """A network's estimate, in inference mode even during training."""
    made = np.empty_like(signal)
    modules = [*network.modules()] if isinstance(network, nn.Module) else []
    training = [module for module in modules if module.training]  # without frozen modules
    for module in training:
        module.training = False
    try:
        sizes = config.network
        runner = Runner(network, device, room=memory_budget(device))
        with torch.autocast(device.type, enabled=False):
            source, estimate = (Signal(torch.from_numpy(each)) for each in (signal, made))
            chunking.trim_and_join(runner, source, [estimate], sizes.chunk, sizes.trim)
    finally:
        for module in training:
            module.training = True
    return made
