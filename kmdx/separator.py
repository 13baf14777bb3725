"""`Separator`: a plan, its weights and a device make stems of songs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kmdx import audio, ensemble, plan, plan_file, weights
from kmdx.ensemble import Progress
from kmdx.errors import AudioError, DeviceError, KmdxWarning, PlanError
from kmdx.loading import load_network
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork

Stems = dict[str, NDArray[np.float32]]

DEFAULT_ENSEMBLE = "leaderboard_c"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Separation(NamedTuple):
    """What became of a song: its stems, float32 ``(n, channels)`` each, and their rate in Hz."""

    stems: Stems
    rate: int


class Separator:
    """Separates songs with one ensemble, whose weights are loaded once.

    Parameters
    ----------
    ensemble : str or Path
        Name of an ensemble, or the path of a plan's YAML file.
    device : str
        ``"auto"`` (CUDA where there is one, else the CPU), or a torch device such as ``"cuda:1"``.
    stems : iterable of str, optional
        What will be asked for: stems of the plan and ``"accompaniment"``. Only the networks that
        they need are loaded and run. All of the plan's stems if not given.
    folder : Path, optional
        Where weight files lie; by default ``$KMDX_MODELS``, a checkout's ``models/`` or the user's cache.

    Raises
    ------
    PlanError
        If there is no such ensemble, or no such stem in it.
    WeightsError
        If a weight file is missing, damaged, unsafe or another network's.
    DeviceError
        If this machine has no such device.

    Examples
    --------
    >>> separator = Separator("leaderboard_c", stems=["vocals"])
    >>> vocals = separator.separate(samples, 44100)["vocals"]  # (n, channels) in, the same out
    """

    def __init__(
        self,
        ensemble: str | Path = DEFAULT_ENSEMBLE,
        *,
        device: str = "auto",
        stems: Iterable[str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.plan = plan_file.load(str(ensemble))
        self.stems = self.plan.check_stems(stems)
        self.device = choose_device(device)
        uses = {
            name: self.plan.networks[name]
            for name in self.plan.networks_used(self.plan.signals_of(self.stems))
        }
        check_weights(self.plan, uses, folder)
        loaded: dict[tuple[str, int], Network] = {}
        for use in uses.values():
            key = (use.weight.name, use.chunking.length)
            if key not in loaded:
                loaded[key] = load_network(use, self.plan.sample_rate, self.device, folder)
        self.networks = {name: loaded[use.weight.name, use.chunking.length] for name, use in uses.items()}

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

        Returns
        -------
        dict of str to ndarray
            Float32, each ``(n, channels)`` as the input; ``(n, 1)`` for ``(n,)``. Mono is separated
            as two equal channels and folded back to their mean. Nothing is rescaled.

        Raises
        ------
        AudioError
            If the array is not a song: no samples, more than two channels, NaN.
        PlanError
            If a stem is asked for that the separator was not made for.
        DeviceError
            If the device's memory does not suffice.
        """
        song = audio.check(samples, "the song")
        wanted = self.stems if stems is None else self.plan.check_stems(stems, self.stems)
        signals = self._signals(song, rate, self.plan.signals_of(wanted), progress)
        if plan.ACCOMPANIMENT in wanted:
            signals[plan.ACCOMPANIMENT] = song - signals["vocals"]
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
        return Separation(self.separate(song.samples, song.rate, stems=stems, progress=progress), song.rate)

    def signals(self, samples: ArrayLike, rate: int, names: Collection[str]) -> Stems:
        """Compute any signals of the plan, such as one half's estimate of a stem.

        Parameters
        ----------
        samples, rate
            As for :meth:`separate`.
        names : collection of str
            Names of the plan's sums, or ``NODE.SOURCE``.

        Returns
        -------
        dict of str to ndarray
            Float32 ``(n, channels)`` each, under its name.
        """
        self.plan.check_wanted(names)
        missing = [name for name in self.plan.networks_used(names) if name not in self.networks]
        if missing:
            raise PlanError(
                f"made for {', '.join(self.stems)}, this separator has not loaded {', '.join(missing)}"
            )
        return self._signals(audio.check(samples, "the song"), rate, names, None)

    def _signals(
        self, song: NDArray[np.float32], rate: int, names: Collection[str], progress: Progress | None
    ) -> Stems:
        """Bring a checked song to the networks, and what they say back to its rate, channels and length."""
        count, channels = song.shape
        resampled = audio.resample(song, rate, self.plan.sample_rate)
        if len(resampled) < 2:
            raise AudioError(f"{count} samples at {rate} Hz are too short to separate")
        try:
            mixture = torch.from_numpy(resampled.T.copy()).to(self.device).expand(2, -1)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                signals = ensemble.run(self.plan, self.networks, mixture, names, progress)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            seconds = count / rate
            raise DeviceError(
                f"out of memory on {self.device} with a song of {seconds:.0f} s; separate it in parts "
                "(start and duration), ask for fewer stems, or choose another device"
            ) from error
        return {
            name: audio.resample(_channels(signal, channels), self.plan.sample_rate, rate, count)
            for name, signal in signals.items()
        }


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


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``"auto"`` is CUDA where there is one, else the CPU.

    Warns where ``"auto"`` comes to the CPU of a machine with an NVIDIA driver.

    Raises
    ------
    DeviceError
        If torch knows no such device or this machine does not have it.
    """
    if not isinstance(name, str):
        raise DeviceError(f"device {name!r}: expected a name such as auto, cpu or cuda:0")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if NVIDIA_DRIVER.exists():
            warnings.warn(
                f"this machine has an NVIDIA driver, but torch {torch.__version__} cannot use CUDA: all "
                "runs on the CPU, many times slower; install torch's CUDA build",
                KmdxWarning,
                stacklevel=2,
            )
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(":")[0]
        raise DeviceError(f"no device {name!r} here ({reason}); use auto, cpu, cuda or cuda:N") from error
    return device


def _is_out_of_memory(error: Exception) -> bool:
    """Tell torch's errors of memory, which on the CPU have no class of their own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _channels(signal: torch.Tensor, channels: int) -> NDArray[np.float32]:
    """Turn ``(2, samples)`` into an array ``(samples, channels)``, folding to the mean for one channel."""
    folded = signal.mean(0, keepdim=True) if channels == 1 else signal
    return np.ascontiguousarray(folded.T.cpu().numpy())
