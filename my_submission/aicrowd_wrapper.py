"""The wrapper that the challenge's server calls: read a mixture, run the model, write the stems.

Environment
-----------
AICROWD_DATASET_DIR
    Folder of song folders, each with a ``mixture.wav``.
AICROWD_PUBLIC_SHARED_DIR
    Predictions are written to ``predictions/<song>/<stem>.wav`` in this folder, 16-bit.

To try a submission, run ``python -m my_submission.aicrowd_wrapper``, which separates all songs of the data
set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from kmdx import terminal
from kmdx.errors import KmdxError
from my_submission.user_config import MySeparationModel


class AIcrowdWrapper:
    """The entry point for the evaluator.

    Parameters
    ----------
    dataset_dir, predictions_dir : str
        Used if the environment variables are not set.
    """

    def __init__(
        self, dataset_dir: str = "./public_dataset/", predictions_dir: str = "./evaluator_outputs/"
    ) -> None:
        shared = os.environ.get("AICROWD_PUBLIC_SHARED_DIR")
        self.predictions_dir = Path(shared, "predictions") if shared else Path(predictions_dir)
        self.dataset_dir = Path(os.environ.get("AICROWD_DATASET_DIR") or dataset_dir)
        self.model = MySeparationModel()
        self.instruments = self.model.instruments

    def raise_aicrowd_error(self, msg: str) -> None:
        """Raise an error whose message the challenge shows to the participant.

        Raises
        ------
        NameError
            Always.
        """
        raise NameError(msg)

    def get_all_music_names(self) -> list[str]:
        """Names of the data set's song folders.

        Raises :class:`NameError` if the data set does not exist or has no songs.
        """
        if not self.dataset_dir.is_dir():
            self.raise_aicrowd_error(f"no data set at {self.dataset_dir}; set AICROWD_DATASET_DIR")
        names = sorted(path.parent.name for path in self.dataset_dir.glob("*/mixture.wav"))
        if not names:
            self.raise_aicrowd_error(f"{self.dataset_dir} has no song folders with a mixture.wav")
        return names

    def separate_music_file(self, music_name: str) -> bool:
        """Separate one song folder's ``mixture.wav``, write its stems, and return True.

        Raises :class:`NameError` if the model does not return exactly the expected stems, or returns a wrong
        length or rate.
        """
        mixture, rate = soundfile.read(self.dataset_dir / music_name / "mixture.wav")
        stems, rates = self.model.separate_music_file(mixture, rate)
        self._check(music_name, mixture, rate, stems, rates)
        folder = self.predictions_dir / music_name
        folder.mkdir(parents=True, exist_ok=True)
        for instrument in self.instruments:
            soundfile.write(folder / f"{instrument}.wav", stems[instrument], rates[instrument])
        return True

    def evaluate(self) -> None:
        """Separate all songs of the data set, and report each on standard error."""
        for music_name in self.get_all_music_names():
            self.separate_music_file(music_name)
            print(f"{music_name} → {self.predictions_dir / music_name}", file=sys.stderr)

    def _check(
        self, name: str, mixture: NDArray, rate: int, stems: Mapping[str, NDArray], rates: Mapping[str, int]
    ) -> None:
        for what, keys in (("stems", stems), ("sample rates", rates)):
            if sorted(keys) != sorted(self.instruments):
                self.raise_aicrowd_error(
                    f"{name}: {what} for {sorted(keys)}, expected {sorted(self.instruments)}"
                )
        for instrument in self.instruments:
            shape = np.shape(stems[instrument])
            if shape != mixture.shape:
                self.raise_aicrowd_error(f"{name}: {instrument} has shape {shape}, expected {mixture.shape}")
            if rates[instrument] != rate:
                self.raise_aicrowd_error(
                    f"{name}: {instrument} is at {rates[instrument]} Hz, expected {rate} Hz"
                )


def main() -> None:
    """Separate all songs of the data set.

    Raises :class:`KmdxError` if the data set or the model's stems are wrong.
    """
    try:
        AIcrowdWrapper().evaluate()
    except NameError as error:  # the challenge shows its message to the participant
        raise KmdxError(str(error)) from error


if __name__ == "__main__":
    terminal.run(main)
