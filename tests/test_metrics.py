"""The challenge's measure, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import noise

from evaluator.metrics import DELTA, global_sdr


def test_global_sdr_is_the_formula() -> None:
    truth = noise(5_000)
    energy = float(np.square(truth, dtype=np.float64).sum())
    assert global_sdr(truth, truth) == pytest.approx(10 * math.log10((energy + DELTA) / DELTA))
    assert global_sdr(truth, 0.5 * truth) == pytest.approx(10 * math.log10(4), abs=1e-5)
    assert global_sdr(truth, np.zeros_like(truth)) == pytest.approx(0, abs=1e-6)
    assert global_sdr(np.zeros((9, 2)), np.zeros((9, 2))) == 0


def test_arrays_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        global_sdr(np.zeros((9, 2)), np.zeros((8, 2)))
