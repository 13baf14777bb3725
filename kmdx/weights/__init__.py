"""Weights: which exist, where they are, how to get them, and how to read them safely.

Conventions: a weight is one trained network, known by its name or by Meta's signature; a role is the place
in a plan that names it. Sizes are in bytes, checksums are sha256 in hexadecimal.
"""

from kmdx.weights.checkpoints import CommunityCheckpoint, checkpoints
from kmdx.weights.download import Progress
from kmdx.weights.folder import ModelsFolder, described, models_folder, shipped_folder, where
from kmdx.weights.loading import Checkpoint, check_graph, load
from kmdx.weights.local import (
    FoundWeight,
    MissingWeights,
    WeightStatus,
    file_sha256,
    find,
    find_all,
    state_sha256,
    verify,
)
from kmdx.weights.onnx_unet import UnetGraph, unet
from kmdx.weights.pulling import pull, pull_all, pull_from_urls, pull_missing, pull_text
from kmdx.weights.registry import (
    OWN,
    TRAINED,
    DownloadSource,
    UrlSource,
    Weight,
    at_url,
    check_path,
    get,
    known,
    own,
    published,
    register,
    shipped,
    trained,
)

__all__ = [
    "OWN",
    "TRAINED",
    "Checkpoint",
    "CommunityCheckpoint",
    "DownloadSource",
    "FoundWeight",
    "MissingWeights",
    "ModelsFolder",
    "Progress",
    "UnetGraph",
    "UrlSource",
    "Weight",
    "WeightStatus",
    "at_url",
    "check_graph",
    "check_path",
    "checkpoints",
    "described",
    "file_sha256",
    "find",
    "find_all",
    "get",
    "known",
    "load",
    "models_folder",
    "own",
    "published",
    "pull",
    "pull_all",
    "pull_from_urls",
    "pull_missing",
    "pull_text",
    "register",
    "shipped",
    "shipped_folder",
    "state_sha256",
    "trained",
    "unet",
    "verify",
    "where",
]
