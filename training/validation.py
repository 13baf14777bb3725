"""Scores a network on whole songs, as the ensemble would run it."""

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
from kmdx.device import Runner, memory_budget
from kmdx.networks.network import Network
from kmdx.networks.tfc_tdf import TfcTdf
from kmdx.signals import Signal
from training import sampling
from training.config import Config, TrainingError
from training.songs import Songs, TrainingSong, TrainingStem, blocks

BLOCK = 2**16  # samples read at a time


class Estimated(NamedTuple):
    """A network's input, its estimate and the true stem: float32 ``(2, samples)`` each."""

    heard: NDArray[np.float32]
    estimate: NDArray[np.float32]
    truth: NDArray[np.float32]


def check(config: Config, songs: Songs) -> None:
    """See that something can be learned and scored: some stem of either kind is not silent.

    Raises
    ------
    TrainingError
        If the source is silent in every song to train or to validate with, or a file cannot be read.
    """
    for what, group in (("train", songs.training), ("validate", songs.validation)):
        if not any(_sounds(song.stems[config.source]) for song in group if config.source in song.stems):
            raise TrainingError(f"{config.source} is silent in every song to {what} with")


def _sounds(stem: TrainingStem) -> bool:
    """Whether there is anything in a stem but zeros; it is read until then."""
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
    """Global SDR in dB; ``None`` where the true stem is silent."""
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
    """Run a network over a song, in chunks that are trimmed and joined."""
    stems = sampling.whole(song)
    heard = _heard(config, vocals, stems, device)
    return Estimated(heard, _through(config, network, heard, device), stems[config.source])


@torch.inference_mode()
def excerpt(
    config: Config,
    network: TfcTdf,
    vocals: Network | None,
    song: TrainingSong,
    part: slice,
    device: torch.device,
) -> Estimated:
    """What :func:`estimate` gives for a part of a song, from the chunks around it."""
    sizes = config.network
    keep = sizes.chunk - 2 * sizes.trim
    depth = 1 if vocals is None else 2  # networks, each of which has more input than output
    begin = max(0, part.start // keep - depth) * keep  # where a chunk of the whole song begins, too
    around = slice(begin, part.stop + depth * sizes.chunk)
    stems = sampling.whole(song)
    if vocals is None:
        heard = _heard(config, None, stems, device)[:, around]
    else:
        parts = {name: samples[:, around] for name, samples in stems.items()}
        heard = _heard(config, vocals, parts, device)
    own = slice(part.start - begin, part.stop - begin)
    made = _through(config, network, heard, device)
    return Estimated(heard[:, own], made[:, own], stems[config.source][:, part])


def _heard(
    config: Config, vocals: Network | None, stems: Mapping[str, NDArray[np.float32]], device: torch.device
) -> NDArray[np.float32]:
    """The network's input: all stems, or what is left without vocals that are estimated."""
    mixture: NDArray[np.float32] = np.sum([*stems.values()], axis=0)
    if config.hears != "rest":
        return mixture
    if vocals is None:
        return mixture - sampling.estimated(stems["vocals"], mixture, sum(config.rest.error) / 2)
    return mixture - _through(config, vocals, mixture, device)


def _through(
    config: Config, network: Network, signal: NDArray[np.float32], device: torch.device
) -> NDArray[np.float32]:
    """A network's estimate; one in training computes as in inference."""
    made = np.empty_like(signal)
    modules = [*network.modules()] if isinstance(network, nn.Module) else []
    training = [module for module in modules if module.training]  # not those that are frozen
    for module in training:
        module.training = False
    try:
        sizes = config.network
        runner = Runner(network, device, room=memory_budget(device))
        with torch.autocast(device.type, enabled=False):
            heard, estimate = (Signal(torch.from_numpy(each)) for each in (signal, made))
            chunking.trim_and_join(runner, heard, [estimate], sizes.chunk, sizes.trim)
    finally:
        for module in training:
            module.training = True
    return made
