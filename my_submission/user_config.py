"""The configuration of the submission: the ensemble, the device, the precision and the engine."""

from my_submission.music_separation_model import MusicSeparationModel

# Name of an ensemble that comes with kmdx, or path of a plan's YAML file.
ENSEMBLE = "leaderboard_c"

# "auto" is CUDA if available, else the CPU.
DEVICE = "auto"

# "auto" is float16 on GPUs that are fast at it, for networks that support it, and float32 on CPUs. "fp32" is
# as published.
PRECISION = "auto"

# "tuned" uses the project's own kernels where they are faster on this processor; "plain" uses only torch's.
ENGINE = "tuned"


class MySeparationModel(MusicSeparationModel):
    """The submission: the separation model with the configuration above."""

    def __init__(self) -> None:
        super().__init__(ENSEMBLE, DEVICE, precision=PRECISION, engine=ENGINE)
