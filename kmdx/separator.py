"""`Separator` separates songs into stems, with a plan, its weights and a device."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kmdx import (
    audio,
    devices,
    engines,
    ensemble,
    host,
    plan,
    plan_file,
    precisions,
    sound_source,
    speeds,
    turns,
    weights,
)
from kmdx.build import load_for_inference
from kmdx.devices import NetworkCache
from kmdx.ensemble import Progress
from kmdx.errors import AudioError, DeviceError, KmdxWarning, NetworkError, PlanError, first_line
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.signals import BLOCK, Signal, blocks, empty, release
from kmdx.sound_source import Source
from kmdx.transfers import Background

log = logging.getLogger(__name__)

Stems = dict[str, NDArray[np.float32]]

DEFAULT_ENSEMBLE = "leaderboard_c"
OVERFLOW = "half precision overflowed; this song is separated again in fp32 (--precision fp32 avoids this)"
LOUD = 8.0  # times full scale: a network may overflow on a louder song


class Separation(NamedTuple):
    """A separated song: its stems, each float32 ``(n, channels)``, and their rate in Hz."""

    stems: Stems
    rate: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(next(iter(self.stems.values()))) / self.rate

    def save(self, folder: str | os.PathLike[str], format: str = "wav16") -> dict[str, Path]:
        """Write each stem to ``folder/<stem>.<extension>``, all or none; return the files by stem.

        Existing files are replaced. Formats and errors are those of :func:`kmdx.audio.write_all`.
        """
        audio.check_format(format, self.rate)
        extension = audio.FORMATS[format].extension
        paths = {stem: Path(folder, f"{stem}{extension}") for stem in self.stems}
        audio.write_all({paths[stem]: samples for stem, samples in self.stems.items()}, self.rate, format)
        return paths

    def __repr__(self) -> str:
        return f"<Separation: {self.seconds:.3f} s of {', '.join(self.stems)} at {self.rate} Hz>"


class Separator:
    """Separates songs with one ensemble and loads its weights only once.

    Threads may share a separator: they take turns. It cannot be used in a process that was forked later.
    Pickling and copying it keeps only its arguments, with which the weights are loaded again.

    Parameters
    ----------
    ensemble : str, path_like or Plan
        Name of an ensemble, path or URL of a plan's YAML file, or a loaded plan; by default
        ``"leaderboard_c"``.
    device : str or torch.device
        ``"auto"`` (CUDA if available, else the CPU), or a torch device such as ``"cuda:1"``.
    stems : iterable of str, optional
        Stems of the plan, ``"accompaniment"``, and the mixture minus a stem, such as ``"no_drums"``; by
        default, all of the plan's stems. Only the networks that these stems need are loaded and run.
    folder : path_like, optional
        Folder of the weight files; by default that of :func:`kmdx.weights.where`.
    precision : str
        ``"auto"``, ``"fp32"``, ``"fp16"`` or ``"bf16"``. On GPUs that are fast at it, auto means float16 for
        the networks that support it. On a CPU, auto means float32, or bfloat16 if the CPU is fast at it and
        ``speed`` is below ``"leaderboard"``. See :func:`kmdx.precisions.choose`.
    speed : str
        ``"leaderboard"`` (the default, as published), ``"balanced"`` or ``"fast"`` (less overlap).
    engine : str
        ``"tuned"`` (the default: the project's own kernels where they are faster on this processor),
        ``"plain"`` (only torch's own operations), ``"compiled"`` (kernels by torch's compiler) or
        ``"graphs"`` (the same in CUDA graphs). Their results differ in the last bits of a float.

    Raises
    ------
    PlanError
        If the ensemble, speed, engine or a stem is unknown.
    WeightsError
        If a weight file is missing, damaged or unsafe, or belongs to another network.
    DeviceError
        If the device is not available, the precision is unknown, the engine lacks a compiler, or this process
        was forked from one that has used a separator.

    Examples
    --------
    >>> separator = Separator("leaderboard_c", stems=["vocals"])
    >>> vocals = separator.separate(samples, 44100)["vocals"]  # input and output are (n, channels)
    """

    def __init__(
        self,
        ensemble: str | os.PathLike[str] | plan.Plan = DEFAULT_ENSEMBLE,
        *,
        device: str | torch.device = "auto",
        stems: Iterable[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        precision: str = "auto",
        speed: str = speeds.DEFAULT,
        engine: str = engines.DEFAULT,
    ) -> None:
        level = speeds.get(speed)
        precisions.check(precision)
        self.speed, self.engine = speed, engines.check(engine)
        chosen = ensemble if isinstance(ensemble, plan.Plan) else plan_file.load(str(ensemble))
        self.plan = chosen.capped(level.overlap)  # the ensemble at this speed
        self.stems = self.plan.check_stems(stems)
        self.device = devices.choose(device)
        turns.check_process(self.device)
        engines.check_compiler(engine, self.device.type)
        precisions.warn_if_slow(precision, self.device)
        if self.device.type == "cpu":
            host.cap_threads()
        self.folder = None if folder is None else Path(folder)
        self._uses = self.plan.uses(self.stems)
        self._requested = {"device": str(device), "precision": precision}
        weights.pull_from_urls((use.weight for use in self._uses.values()), self.folder)
        check_weights(self.plan, self._uses, self.folder)
        self.cache = NetworkCache(self._load(precision), self.device, engine=engine)
        log.debug("loaded %r", self)

    def __repr__(self) -> str:
        arguments = {**self.__getstate__(), "device": str(self.device)}
        shown = (f"{key}={arguments[key]!r}" for key in ("device", "stems", "precision", "speed", "engine"))
        return f"Separator({self.plan.name!r}, {', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        """The arguments from which an equal separator is made."""
        own = {"ensemble": self.plan, "stems": self.stems, "folder": self.folder}
        return {**own, **self._requested, "speed": self.speed, "engine": self.engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _load(self, precision: str) -> dict[str, Network]:
        """The networks by the plan's names; networks with the same weight and length are loaded once."""
        loaded: dict[tuple[str, int], Network] = {}
        for use in self._uses.values():
            key = (use.weight.name, use.chunking.length)
            if key not in loaded:
                loaded[key] = load_for_inference(
                    use,
                    self.plan.sample_rate,
                    self.device,
                    self.folder,
                    engine=self.engine,
                    precision=precision,
                    speed=self.speed,
                )
        return {name: loaded[use.weight.name, use.chunking.length] for name, use in self._uses.items()}

    def with_plan(self, changed: plan.Plan) -> Separator:
        """A separator with the same loaded networks, for a plan that differs only in signals and stems.

        Raises :class:`PlanError` if the plan's networks differ.
        """
        if changed.networks != self.plan.networks:
            raise PlanError(
                f"{changed.name}: its networks differ from the loaded ones; create a new separator"
            )
        separator = object.__new__(type(self))
        separator.__dict__.update(vars(self), plan=changed)
        return separator

    @property
    def networks(self) -> Mapping[str, Network]:
        """The networks by the plan's names."""
        return self.cache.networks

    @property
    def precisions(self) -> dict[str, str]:
        """The precision of each network, by the plan's names: ``fp32``, ``fp16`` or ``bf16``.

        If half precision overflows in a song, only that song is separated again in fp32.
        """
        return {name: precisions.NAMES[network.dtype] for name, network in self.networks.items()}

    @property
    def providers(self) -> dict[str, tuple[str, ...]]:
        """The execution providers that ONNX Runtime actually uses for each of its networks."""
        return {
            name: network.providers
            for name, network in self.networks.items()
            if isinstance(network, OnnxNetwork)
        }

    def separate(
        self,
        samples: ArrayLike,
        rate: int,
        *,
        stems: Iterable[str] | None = None,
        progress: Progress | None = None,
        name: str = "the song",
    ) -> Stems:
        """Separate a song held in an array.

        Parameters
        ----------
        samples : array_like
            ``(n, 2)``, ``(n, 1)`` or ``(n,)``, full scale ±1.
        rate : int
            Sample rate of the song in Hz. If it differs from the plan's rate, the song is resampled, and
            the stems are resampled back.
        stems : iterable of str, optional
            A subset of the separator's stems; by default, all of them.
        progress : callable, optional
            Called with ``(seconds of audio done, seconds in total)`` when the song's turn comes, and after
            every window. An exception that it raises ends the call; the separator can be used again.
        name : str
            The song's name in errors and warnings.

        Returns
        -------
        dict of str to ndarray
            Float32, each ``(n, channels)`` like the input; ``(n, 1)`` for ``(n,)``. A mono song is separated
            as two equal channels, and the result is their mean. Nothing is rescaled.

        Warns
        -----
        KmdxWarning
            If the song exceeds eight times full scale, for example 16-bit values stored as floats.

        Raises
        ------
        AudioError
            If the array is not a song: no samples, more than two channels, or NaN.
        NetworkError
            If a network returns NaN or infinity even in fp32.
        PlanError
            If the separator was not created for one of the stems.
        DeviceError
            If the device does not have enough memory, or this process was forked from one that has used a
            separator.
        """
        song = audio.check(samples, name, loudest=audio.LOUDEST)
        wanted = self.stems if stems is None else self.plan.check_stems(stems, self.stems)
        signals = self._signals(song, rate, self.plan.signals_of(wanted), progress)
        for stem in wanted:
            if (subtracted := self.plan.subtracted(stem)) is not None:
                signals[stem] = _difference(song, signals[subtracted])
        return {name: signals[name] for name in wanted}

    def separate_file(
        self,
        source: Source,
        *,
        start: float = 0.0,
        duration: float | None = None,
        downmix: bool = False,
        stems: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> Separation:
        """Separate a file of any format, or ``duration`` seconds of it from ``start``.

        It may be a path, a URL, or an open binary file. Parameters and errors are those of
        :func:`kmdx.audio.read` and :meth:`separate`.

        Returns
        -------
        Separation
            ``(stems, rate)``, at the file's own rate, channels and length.
        """
        song, name = audio.read(source, start, duration, downmix), sound_source.name_of(source)
        separated = self.separate(song.samples, song.rate, stems=stems, progress=progress, name=name)
        return Separation(separated, song.rate)

    def stream(
        self,
        song: Source | Iterable[ArrayLike],
        rate: int | None = None,
        *,
        block: int = BLOCK,
        stems: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Separation]:
        """Separate a song that is longer than memory, and yield its stems block by block.

        A long song and its stems are in scratch files (:mod:`kmdx.signals`), not in memory. The first block
        is yielded when the whole song is separated, because a network's input is normalized by the level of
        the whole song. The stems are those of :meth:`separate`, which raises the same errors.

        Parameters
        ----------
        song : str, path_like, BinaryIO or iterable of array_like
            A file as for :meth:`separate_file`, or blocks ``(n, channels)`` of any lengths.
        rate : int, optional
            Sample rate of the blocks in Hz; a file states its own.
        block : int
            Samples of each yielded block; the last one may be shorter.
        stems, progress
            As for :meth:`separate`.

        Yields
        ------
        Separation
            ``(stems, rate)`` of the next ``block`` samples.
        """
        wanted = self.stems if stems is None else self.plan.check_stems(stems, self.stems)
        if block < 1:
            raise AudioError(f"blocks of {block} samples: expected 1 or more")
        if (rate is None) != sound_source.is_source(song):
            expected = "blocks need a rate in Hz" if rate is None else "a file states its own rate"
            raise AudioError(f"{sound_source.name_of(song)}: rate {rate}, but {expected}")
        return self._stream(song, rate, block, wanted, progress)

    def _stream(
        self, song: Any, rate: int | None, block: int, wanted: Collection[str], progress: Progress | None
    ) -> Iterator[Separation]:
        """Do what :meth:`stream` describes; nothing happens before the first block is requested."""
        name = sound_source.name_of(song)
        if rate is None:
            samples, rate = audio.read(song)
        else:
            is_array = getattr(song, "ndim", 3) < 3  # not an iterable of blocks, but all samples at once
            samples = audio.gather([song] if is_array else song, name)
        separated = self.separate(samples, rate, stems=wanted, progress=progress, name=name)
        del samples
        for begin in range(0, len(next(iter(separated.values()))), block):
            parts = {stem: whole[begin : begin + block] for stem, whole in separated.items()}
            yield Separation({stem: part.copy() for stem, part in parts.items()}, rate)
            for part in parts.values():
                release(part)

    def signals(
        self,
        samples: ArrayLike,
        rate: int,
        names: Collection[str],
        *,
        known: Mapping[str, ArrayLike] | None = None,
        progress: Progress | None = None,
    ) -> Stems:
        """Compute any signals of the plan, such as one half's estimate of a stem.

        Parameters
        ----------
        samples, rate
            As for :meth:`separate`.
        names : collection of str
            Names of the plan's signals, or ``NODE.SOURCE``.
        known : mapping of str to array_like, optional
            Signals of the same song from an earlier call, ``(n, channels)`` at ``rate``. Networks that
            only these signals need do not run again.
        progress : callable, optional
            As for :meth:`separate`.

        Returns
        -------
        dict of str to ndarray
            Each signal by name, float32 ``(n, channels)``.

        Raises
        ------
        AudioError
            As for :meth:`separate`, or if a known signal's shape differs from the song's.
        NetworkError
            As for :meth:`separate`.
        PlanError
            If the plan has no such signal, or the separator did not load a network that it needs.
        """
        known = known or {}
        self.plan.check_wanted(names)
        self.plan.check_known(known)
        missing = [name for name in self.plan.networks_used(names, known) if name not in self.networks]
        if missing:
            raise PlanError(
                f"this separator was created for {', '.join(self.stems)} and did not load "
                f"{', '.join(missing)}; create one for all stems"
            )
        song = audio.check(samples, "the song", loudest=audio.LOUDEST)
        needed = self.plan.needed(names, known)
        checked = {name: audio.check(signal, name) for name, signal in known.items() if name in needed}
        for name, signal in checked.items():
            if signal.shape != song.shape:
                raise AudioError(f"{name}: shape {signal.shape}, expected the song's shape {song.shape}")
        return self._signals(song, rate, names, progress, checked)

    def _signals(
        self,
        song: NDArray[np.float32],
        rate: int,
        names: Collection[str],
        progress: Progress | None,
        known: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Stems:
        """Run the plan on a checked song; the signals have the song's rate, channels and length."""
        count, channels = song.shape
        resampled = audio.resample(song, rate, self.plan.sample_rate)
        if len(resampled) < 2:
            raise AudioError(f"the song is too short to separate: {count} samples at {rate} Hz")
        mixture = Signal.from_samples(resampled)
        del resampled
        given = {
            name: Signal.from_samples(audio.resample(signal, rate, self.plan.sample_rate))
            for name, signal in (known or {}).items()
        }
        seconds = count / rate
        try:
            with self._turn(), Background(self.device, torch.device("cpu")) as background:
                if progress is not None:  # which can end a song that nobody waits for any more
                    progress(0.0, mixture.length / self.plan.sample_rate)
                copies: dict[str, Future[NDArray[np.float32]]] = {}

                def copy(name: str, signal: Signal) -> None:
                    if signal.tensor.is_cuda:  # copied while the next networks run
                        copies[name] = background.submit(signal.to_samples, channels)

                signals = self._run(mixture, names, progress, given, copy)
                made = {
                    name: copies[name].result() if name in copies else signals.pop(name).to_samples(channels)
                    for name in names
                }
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            details = f" ({first_line(error)})" if str(error).strip() else ""
            raise DeviceError(
                f"out of memory on {self.device} with a song of {seconds:.0f} s; separate it in parts "
                f"(start and duration), request fewer stems, or choose another device{details}"
            ) from error
        log.debug("separated %.1f s on %s", seconds, self.device)
        del mixture
        return {name: audio.resample(made.pop(name), self.plan.sample_rate, rate, count) for name in names}

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Use the device alone, within its memory budget and in exact float32."""
        with turns.turn(self.device):
            self.cache.refresh_budget()
            heap = host.warm_heap() if self.device.type == "cpu" else nullcontext()
            with heap, devices.limited(self.device, self.cache.limit), precisions.exact():
                yield

    def _run(
        self,
        mixture: Signal,
        names: Collection[str],
        progress: Progress | None,
        known: Mapping[str, Signal],
        on_made: Callable[[str, Signal], None],
    ) -> dict[str, Signal]:
        """Run the plan; if half precision overflows, run it again in fp32 for this song only."""
        try:
            return ensemble.run(self.plan, self.cache, mixture, names, progress, known, on_made)
        except ensemble.NotFinite as error:
            failed = error.network
        # Outside the except block, the error and the signals in its stack frames are freed.
        if any(network.dtype != torch.float32 for network in self.networks.values()):
            warnings.warn(OVERFLOW, KmdxWarning, stacklevel=4)
            half = self.cache.networks
            self.cache.replace(self._load("fp32"))
            try:
                return ensemble.run(self.plan, self.cache, mixture, names, progress, known, on_made)
            except ensemble.NotFinite as error:
                failed = error.network
            finally:
                self.cache.replace(half)
        raise self._not_finite(failed, mixture)

    def _not_finite(self, name: str, mixture: Signal) -> NetworkError:
        """The error for a network that returned NaN or infinity in fp32."""
        weight = self.plan.networks[name].weight
        file = str(weights.find(weight, self.folder).path)
        if weight.path:  # its name is its path
            check = "use another file"
        else:
            file, check = f"{weight.name} in {file}", f"check it with `kmdx models verify {weight.name}`"
        peak = mixture.peak()
        loud = f"; or the song is too loud: it peaks at {peak:.3g}, expected about 1" if peak > LOUD else ""
        return NetworkError(
            f"network {name} returned NaN or infinity in fp32; its weights, {file}, are damaged "
            f"or belong to another network: {check}{loud}"
        )


def check_weights(chosen: plan.Plan, uses: Mapping[str, plan.NetworkUse], folder: Path | None) -> None:
    """Raise :class:`MissingWeights` with the names and total size of all missing weights of an ensemble."""
    needed = {use.weight.name: use.weight for use in uses.values()}
    errors = {}
    for name, weight in needed.items():
        try:
            weights.find(weight, folder)
        except weights.MissingWeights as error:
            errors[name] = error
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        everything = {use.weight.name for use in chosen.networks.values()}
        known = chosen.name in plan_file.names() and plan_file.load(chosen.name).digest == chosen.digest
        pull = chosen.name if known and everything == set(errors) else " ".join(errors)
        size = sum(needed[name].bytes or 0 for name in errors)
        raise weights.MissingWeights(
            f"{len(errors)} of the weights that {chosen.name} needs are not in "
            f"{weights.described(folder)}: {', '.join(errors)}; "
            f"`kmdx models pull {pull}` downloads them (about {size / 1e6:.0f} MB)"
        )


def _difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first array minus the second."""
    result = empty(first.shape)
    for target, minuend, subtrahend in zip(*map(blocks, (result, first, second)), strict=True):
        np.subtract(minuend, subtrahend, out=target)
    return result
