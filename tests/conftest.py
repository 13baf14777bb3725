"""What several test files share: small networks on disk, sounds, and where the big material lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small networks gain nothing from threads, and the tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def leaderboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a plan with leaderboard C's graph over ten small networks."""
    return tiny.write_leaderboard(tmp_path_factory.mktemp("leaderboard"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the htdemucs plan over one small network."""
    return tiny.write_htdemucs(tmp_path_factory.mktemp("small"))


def noise(samples: int, channels: int = 2, seed: int = 0, level: float = 0.1) -> np.ndarray:
    """Noise that swells and fades, float32 ``(samples, channels)``."""
    rng = np.random.default_rng(seed)
    swell = 0.6 + 0.4 * np.sin(np.linspace(0, 9, samples))[:, None]
    return (level * swell * rng.standard_normal((samples, channels))).astype(np.float32)


def decibels(reference: np.ndarray | torch.Tensor, estimate: np.ndarray | torch.Tensor) -> float:
    """10·log10 of the reference's energy over the difference's; infinite where they are equal."""
    truth = np.asarray(reference, np.float64)
    difference = truth - np.asarray(estimate, np.float64)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.square(truth).sum() / np.square(difference).sum()))


def shared(*parts: str) -> Path:
    """A path in the material that lies beside some checkouts; skips the test where it does not."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {Path('..', 'shared', *parts)} beside the checkout")
    return path
