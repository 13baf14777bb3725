"""The separation model with the challenge's interface, based on :class:`kmdx.Separator`."""

from __future__ import annotations

from pathlib import Path

from numpy.typing import ArrayLike, NDArray

from kmdx import Separator
from kmdx.ensemble import Progress


class MusicSeparationModel:
    """Separates songs one by one; the weights are loaded when the model is made.

    Parameters
    ----------
    ensemble : str or Path
        Name of an ensemble, or path of a plan's YAML file.
    device : str
        As for :class:`kmdx.Separator`.
    folder : Path, optional
        Folder of the weight files.
    precision, engine : str
        As for :class:`kmdx.Separator`.

    Attributes
    ----------
    progress : callable or None
        Called with ``(seconds of audio done, seconds in total)`` while a song is separated.
    """

    def __init__(
        self,
        ensemble: str | Path = "leaderboard_c",
        device: str = "auto",
        folder: Path | None = None,
        precision: str = "auto",
        engine: str = "tuned",
    ) -> None:
        self.separator = Separator(ensemble, device=device, folder=folder, precision=precision, engine=engine)
        self.progress: Progress | None = None

    @property
    def instruments(self) -> list[str]:
        """Names of the ensemble's stems; the challenge requires bass, drums, other and vocals."""
        return sorted(self.separator.stems)

    def raise_aicrowd_error(self, msg: str) -> None:
        """Raise an error whose message the challenge shows to the participant.

        Raises
        ------
        NameError
            Always; the challenge prescribes this class.
        """
        raise NameError(msg)

    def separate_music_file(
        self, mixed_sound_array: ArrayLike, sample_rate: int
    ) -> tuple[dict[str, NDArray], dict[str, int]]:
        """Separate one song.

        Parameters
        ----------
        mixed_sound_array : array_like
            ``(n, 2)``, full scale ±1, as returned by ``soundfile.read``.
        sample_rate : int
            Its rate in Hz.

        Returns
        -------
        stems : dict of str to ndarray
            Float32 ``(n, 2)`` for each of ``instruments``.
        sample_rates : dict of str to int
            The input's rate for each stem.
        """
        stems = self.separator.separate(mixed_sound_array, sample_rate, progress=self.progress)
        return stems, dict.fromkeys(stems, sample_rate)
