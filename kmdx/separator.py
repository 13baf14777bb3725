"""`Separator`: a plan, its weights and a device make stems of songs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kmdx import audio, ensemble, host, plan, plan_file, weights
from kmdx import device as devices
from kmdx import engine as engines
from kmdx import precision as precisions
from kmdx import speed as speeds
from kmdx.build import load_for_inference
from kmdx.challenge import ACCOMPANIMENT
from kmdx.device import NetworkCache
from kmdx.ensemble import Progress
from kmdx.errors import AudioError, DeviceError, KmdxWarning, NetworkError, PlanError, first_line
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.signals import Signal, blocks, empty

Stems = dict[str, NDArray[np.float32]]

DEFAULT_ENSEMBLE = "leaderboard_c"
OVERFLOW = (
    "half precision overflowed in this song; it is done again in fp32, which --precision fp32 does at once"
)
LOUD = 8.0  # times full scale: beyond, a network may overflow because of the song


class Separation(NamedTuple):
    """What became of a song: its stems, float32 ``(n, channels)`` each, and their rate in Hz."""

    stems: Stems
    rate: int


class Separator:
    """Separates songs with one ensemble, whose weights are loaded once.

    Parameters
    ----------
    ensemble : str, Path or Plan
        Name of an ensemble, the path of a plan's YAML file, or a plan that is loaded already.
    device : str
        ``"auto"`` (CUDA where there is one, else the CPU), or a torch device such as ``"cuda:1"``.
    stems : iterable of str, optional
        What will be asked for: stems of the plan and ``"accompaniment"``. Only the networks that
        they need are loaded and run. All of the plan's stems if not given.
    folder : Path, optional
        Where weight files lie; by default ``$KMDX_MODELS``, a checkout's ``models/`` or the user's cache.
    precision : str
        ``"auto"``, ``"fp32"``, ``"fp16"`` or ``"bf16"``. Auto is float16 on GPUs that are fast at it, for
        networks that bear it; on a CPU float32, unless ``speed`` is lower than ``"leaderboard"`` and the
        CPU is fast at bfloat16. See :func:`kmdx.precision.choose`.
    speed : str
        ``"leaderboard"`` (as published), ``"balanced"`` or ``"fast"``: less overlap; see ``speeds.yaml``.
    engine : str
        ``"tuned"`` (the project's own kernels where they are faster on this processor) or ``"plain"``
        (torch's own operations alone). The two differ in the last bits of a float.

    Attributes
    ----------
    plan : Plan
        What is run: the ensemble at this speed.
    stems : tuple of str
    device : torch.device
    speed, engine : str
        As given.

    Raises
    ------
    PlanError
        If there is no such ensemble, speed or engine, or no such stem in it.
    WeightsError
        If a weight file is missing, damaged, unsafe or another network's.
    DeviceError
        If this machine has no such device, or there is no such precision.

    Examples
    --------
    >>> separator = Separator("leaderboard_c", stems=["vocals"])
    >>> vocals = separator.separate(samples, 44100)["vocals"]  # (n, channels) in, the same out
    """

    def __init__(
        self,
        ensemble: str | Path | plan.Plan = DEFAULT_ENSEMBLE,
        *,
        device: str = "auto",
        stems: Iterable[str] | None = None,
        folder: Path | None = None,
        precision: str = "auto",
        speed: str = speeds.DEFAULT,
        engine: str = engines.DEFAULT,
    ) -> None:
        level = speeds.get(speed)
        precisions.check(precision)
        self.speed, self.engine = speed, engines.check(engine)
        chosen = ensemble if isinstance(ensemble, plan.Plan) else plan_file.load(str(ensemble))
        self.plan = chosen.capped(level.overlap)
        self.stems = self.plan.check_stems(stems)
        self.device = devices.choose(device)
        precisions.warn_if_slow(precision, self.device)
        if self.device.type == "cpu":
            host.cap_threads()
        uses = {
            name: self.plan.networks[name]
            for name in self.plan.networks_used(self.plan.signals_of(self.stems))
        }
        check_weights(self.plan, uses, folder)
        self.folder = folder
        self._load = partial(self._loaded, uses)
        self.cache = NetworkCache(self._load(precision), self.device)

    def _loaded(self, uses: Mapping[str, plan.NetworkUse], precision: str) -> dict[str, Network]:
        """The networks by the plan's names, each weight once."""
        loaded: dict[tuple[str, int], Network] = {}
        for use in uses.values():
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
        return {name: loaded[use.weight.name, use.chunking.length] for name, use in uses.items()}

    def under(self, changed: plan.Plan) -> Separator:
        """The same networks, not loaded again, under a plan in which only signals and stems differ.

        Raises
        ------
        PlanError
            If the plan has other networks.
        """
        if changed.networks != self.plan.networks:
            raise PlanError(f"{changed.name}: its networks are not those that were loaded")
        separator = copy.copy(self)
        separator.plan = changed
        return separator

    @property
    def networks(self) -> Mapping[str, Network]:
        """The networks by the plan's names."""
        return self.cache.networks

    @property
    def precisions(self) -> dict[str, str]:
        """What each network computes in: ``fp32``, ``fp16`` or ``bf16`` by the plan's names.

        A song in which half precision overflows is done again in fp32, and that song alone.
        """
        return {name: precisions.NAMES[network.dtype] for name, network in self.networks.items()}

    @property
    def providers(self) -> dict[str, tuple[str, ...]]:
        """For each network run by ONNX Runtime, the execution providers that it really got."""
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
            Its sample rate in Hz; other rates than the plan's are resampled both ways.
        stems : iterable of str, optional
            Some of those that the separator was made for; all of them if not given.
        progress : callable, optional
            Called with ``(seconds of audio done, seconds in all)`` after every window.
        name : str
            What errors and warnings call the song.

        Returns
        -------
        dict of str to ndarray
            Float32, each ``(n, channels)`` as the input; ``(n, 1)`` for ``(n,)``. Mono is separated
            as two equal channels and folded back to their mean. Nothing is rescaled.

        Warns
        -----
        KmdxWarning
            If the song exceeds eight times full scale, as 16-bit values do that were stored as floats.

        Raises
        ------
        AudioError
            If the array is not a song: no samples, more than two channels, NaN.
        NetworkError
            If a network gives NaN or infinity even in fp32.
        PlanError
            If a stem is asked for that the separator was not made for.
        DeviceError
            If the device's memory does not suffice.
        """
        song = audio.check(samples, name, loudest=audio.LOUDEST)
        wanted = self.stems if stems is None else self.plan.check_stems(stems, self.stems)
        signals = self._signals(song, rate, self.plan.signals_of(wanted), progress)
        if ACCOMPANIMENT in wanted:
            signals[ACCOMPANIMENT] = _difference(song, signals["vocals"])
        return {name: signals[name] for name in wanted}

    def separate_file(
        self,
        path: str | Path,
        *,
        start: float = 0.0,
        duration: float | None = None,
        downmix: bool = False,
        stems: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> Separation:
        """Separate a song held in a file of any format, or ``duration`` seconds of it from ``start``.

        Parameters are those of :func:`kmdx.audio.read` and of :meth:`separate`, and so are the errors.

        Returns
        -------
        Separation
            ``(stems, rate)``, at the file's own rate, channels and length.
        """
        song = audio.read(path, start, duration, downmix)
        separated = self.separate(song.samples, song.rate, stems=stems, progress=progress, name=str(path))
        return Separation(separated, song.rate)

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
            Names of the plan's sums, or ``NODE.SOURCE``.
        known : mapping of str to array_like, optional
            Signals that an earlier call gave for the same song, ``(n, channels)`` at ``rate``: networks
            that only they need do not run again.
        progress : callable, optional
            As for :meth:`separate`.

        Returns
        -------
        dict of str to ndarray
            Float32 ``(n, channels)`` each, under its name.

        Raises
        ------
        AudioError
            As for :meth:`separate`, or if a known signal has another form than the song.
        NetworkError
            As for :meth:`separate`.
        PlanError
            If the plan has no such signal, or the separator has not loaded a network for it.
        """
        known = known or {}
        self.plan.check_wanted(names)
        self.plan.check_known(known)
        missing = [name for name in self.plan.networks_used(names, known) if name not in self.networks]
        if missing:
            raise PlanError(
                f"made for {', '.join(self.stems)}, this separator has not loaded {', '.join(missing)}"
            )
        song = audio.check(samples, "the song", loudest=audio.LOUDEST)
        needed = self.plan.needed(names, known)
        checked = {name: audio.check(signal, name) for name, signal in known.items() if name in needed}
        for name, signal in checked.items():
            if signal.shape != song.shape:
                raise AudioError(f"{name}: shape {signal.shape}, but the song's is {song.shape}")
        return self._signals(song, rate, names, progress, checked)

    def _signals(
        self,
        song: NDArray[np.float32],
        rate: int,
        names: Collection[str],
        progress: Progress | None,
        known: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Stems:
        """Bring a checked song to the networks, and what they say back to its rate, channels and length."""
        count, channels = song.shape
        resampled = audio.resample(song, rate, self.plan.sample_rate)
        if len(resampled) < 2:
            raise AudioError(f"{count} samples at {rate} Hz are too short to separate")
        mixture = Signal.from_samples(resampled)
        del resampled
        given = {
            name: Signal.from_samples(audio.resample(signal, rate, self.plan.sample_rate))
            for name, signal in (known or {}).items()
        }
        self.cache.refresh_budget()
        heap = host.warm_heap() if self.device.type == "cpu" else nullcontext()
        try:
            with heap, devices.limited(self.device, self.cache.limit), precisions.exact():
                made = self._run(mixture, names, progress, given)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            seconds = count / rate
            said = f" ({first_line(error)})" if str(error).strip() else ""
            raise DeviceError(
                f"out of memory on {self.device} with a song of {seconds:.0f} s; separate it in parts "
                f"(start and duration), ask for fewer stems, or choose another device{said}"
            ) from error
        del mixture
        found = {}
        for name in names:
            samples = made.pop(name).to_samples(channels)
            found[name] = audio.resample(samples, self.plan.sample_rate, rate, count)
        return found

    def _run(
        self,
        mixture: Signal,
        names: Collection[str],
        progress: Progress | None,
        known: Mapping[str, Signal],
    ) -> dict[str, Signal]:
        """Run the plan, once more in fp32 if half precision overflows; the next song is in half again."""
        try:
            return ensemble.run(self.plan, self.cache, mixture, names, progress, known)
        except ensemble.NotFinite as error:
            failed = error.network
        # Here the error is gone, and with it the signals that its frames held.
        if any(network.dtype != torch.float32 for network in self.networks.values()):
            warnings.warn(OVERFLOW, KmdxWarning, stacklevel=4)
            half = self.cache.networks
            self.cache.replace(self._load("fp32"))
            try:
                return ensemble.run(self.plan, self.cache, mixture, names, progress, known)
            except ensemble.NotFinite as error:
                failed = error.network
            finally:
                self.cache.replace(half)
        raise self._not_finite(failed, mixture)

    def _not_finite(self, name: str, mixture: Signal) -> NetworkError:
        """What to tell of a network that gave NaN or infinity in fp32."""
        weight = self.plan.networks[name].weight
        file = str(weights.find(weight, self.folder).path)
        if weight.path:  # which is its name
            check = "use another file"
        else:
            file, check = f"{weight.name} in {file}", f"check it with `kmdx models verify {weight.name}`"
        peak = mixture.peak()
        loud = f"; or the song is too loud: it peaks at {peak:.3g}, expected about 1" if peak > LOUD else ""
        return NetworkError(
            f"network {name} gave NaN or infinity in fp32; its weights, {file}, are damaged "
            f"or of another network: {check}{loud}"
        )


def check_weights(chosen: plan.Plan, uses: Mapping[str, plan.NetworkUse], folder: Path | None = None) -> None:
    """Raise :class:`MissingWeights` naming all weights of an ensemble that are not there, and their size."""
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
            f"{weights.models_folder(folder)}: {', '.join(errors)}; "
            f"`kmdx models pull {pull}` gets them (about {size / 1e6:.0f} MB)"
        )


def _difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first array minus the second."""
    result = empty(first.shape)
    for target, minuend, subtrahend in zip(*map(blocks, (result, first, second)), strict=True):
        np.subtract(minuend, subtrahend, out=target)
    return result
