"""What the challenge's server runs: one line chooses the ensemble, one the device."""

from my_submission.music_separation_model import MusicSeparationModel

# The name of an ensemble that comes with kmdx, or the path of a plan's YAML file.
ENSEMBLE = "leaderboard_c"

# "auto" is CUDA where there is one, else the CPU.
DEVICE = "auto"

# "auto" is half precision where the device is fast at it and the network bears it; "fp32" as published.
PRECISION = "auto"


class MySeparationModel(MusicSeparationModel):
    """The submission: the separation model with the ensemble named above."""

    def __init__(self) -> None:
        super().__init__(ENSEMBLE, DEVICE, precision=PRECISION)
