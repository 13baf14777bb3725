"""What several test files share: small networks on disk, sounds, and the folder of large test data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from demucs.htdemucs import HTDemucs
from filelock import FileLock
from hypothesis import HealthCheck, settings

from kmdx import signals

SHARED = Path(__file__).parents[2] / "shared"

# The same few examples in every run of the tests; `make fuzz` tries new ones, and many more.
SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "short",
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=SLOW_IS_FINE,
)
settings.register_profile(
    "long", max_examples=10_000, deadline=None, print_blob=True, suppress_health_check=SLOW_IS_FINE
)
settings.load_profile("short")

# What changes how and what commands print, here and in the processes that tests start.
for setting in ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS",
                "COLUMNS", "LINES", "TERMINAL_WIDTH", "PYTHONIOENCODING", "PYTHONWARNINGS"):  # fmt: skip
    os.environ.pop(setting, None)

# A shell that starts a job behind its back has it ignore Ctrl-C, and so would what tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = (
    "test_golden_stages.py",
    "test_real.py",  # while the first process writes the weights that both golden tests need
    "test_blend_search_collecting.py",
    "test_training_trainer.py",
    "test_mini.py",
    "test_submit_script.py",
    "test_tradeoff.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take minutes, so that two processes end at about the same time."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small networks gain nothing from threads, and the tests run side by side.

    Processes that tests start inherit it: two of them with two threads each wait for each other's cores.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def no_weights_at_hand(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The models folder is empty, whatever ``make demo`` or KMDX_MODELS brought."""
    os.environ["KMDX_MODELS"] = str(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def stand_in_weights(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of stand-in weights for leaderboard C, written once for all processes that test."""
    script = shared("golden", "stand_in_weights.py")
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "stand-in weights"
    with FileLock(f"{folder}.lock"):
        if not (folder / "written").exists():
            subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
            (folder / "written").touch()
    if worker_id == "master":  # this process has all cores for itself
        torch.set_num_threads(os.cpu_count() or 1)
    return folder


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


def is_scratch(array: np.ndarray) -> bool:
    """Whether an array is in a scratch file."""
    return signals._mapping_of(array) is not None


def shared(*parts: str) -> Path:
    """A path in the material next to some checkouts; skips the test if it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {Path('..', 'shared', *parts)} next to the checkout")
    return path


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether TF32 was allowed, in each run of an HTDemucs."""

    seen: list[bool] = []
    forward = HTDemucs.forward

    def noted(model: HTDemucs, batch: Any) -> Any:
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(model, batch)

    monkeypatch.setattr(HTDemucs, "forward", noted)
    return seen
