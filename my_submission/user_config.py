"""What the challenge's server runs: one line chooses the ensemble, one the device, and so on."""

from my_submission.music_separation_model import MusicSeparationModel

# The name of an ensemble that comes with kmdx, or the path of a plan's YAML file.
ENSEMBLE = "leaderboard_c"

# "auto" is CUDA where there is one, else the CPU.
DEVICE = "auto"

# "auto" is float16 on GPUs that are fast at it, for the networks that bear it, and float32 on CPUs; "fp32" as
# published.
PRECISION = "auto"

# "tuned" runs the project's own kernels where they are faster on this processor, "plain" only torch's own.
ENGINE = "tuned"


class MySeparationModel(MusicSeparationModel):
    """The submission: the separation model with the ensemble named above."""

    def __init__(self) -> None:
        super().__init__(ENSEMBLE, DEVICE, precision=PRECISION, engine=ENGINE)
