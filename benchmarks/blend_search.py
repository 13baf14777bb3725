"""Measure the time and memory of blend search: ``python -m benchmarks.blend_search``.

Inner products are simulated: each signal is the true stem plus its own errors and errors shared with other
signals, with a different level in each song. "solve" finds the weights of all stems, from all starting
points. "cross-validate" computes the cross-validated scores of the command's table.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from evaluator.blend_search.cross_validation import BlendProblem, validate
from evaluator.blend_search.inner_products import InnerProducts
from evaluator.blend_search.solving import Constraints, best
from kmdx import terminal

SONGS, STEMS, SIGNALS = 150, 4, 10
COMMON = 3  # errors shared by signals
REPEATS = 5

CONSTRAINTS = {
    "free": Constraints(),
    "sum to one": Constraints(sum_to_one=True),
    "non-negative": Constraints(non_negative=True),
    "both": Constraints(sum_to_one=True, non_negative=True),
}


def simulate(seed: int) -> BlendProblem:
    """Simulated inner products of a stem's signals, with realistic levels and qualities."""
    rng = np.random.default_rng(seed)
    own = rng.uniform(0.15, 0.4, SIGNALS)
    common = rng.normal(0, 0.15, (SIGNALS, COMMON))
    energy = 1e4 * rng.lognormal(0, 1, SONGS)
    gain = rng.normal(0.97, 0.03, (SONGS, SIGNALS))  # of the true stem in each signal
    hardness = rng.lognormal(0, 0.5, (SONGS, 1, 1))
    errors = hardness * (np.diag(own**2) + common @ common.T)
    gram = energy[:, None, None] * (gain[:, :, None] * gain[:, None, :] + errors)
    products = InnerProducts(energy, energy, energy[:, None] * gain, gram)
    return BlendProblem(products, np.full(SIGNALS, 1 / SIGNALS), np.arange(SONGS))


def solve(problems: Sequence[BlendProblem], constraints: Constraints) -> None:
    """Find the weights of all stems."""
    for problem in problems:
        best(problem.products, problem.published, constraints)


def cross_validate(
    problems: Sequence[BlendProblem], constraints: Constraints, folds: int, prior: float | None
) -> None:
    """Compute the scores of all stems on held-out songs."""
    for problem in problems:
        validate([problem], folds, constraints, prior)


def main() -> None:
    """Print one line per measurement."""
    problems = [simulate(seed) for seed in range(STEMS)]
    size = sum(value.nbytes for problem in problems for value in vars(problem.products).values())
    print(f"{SONGS} songs × {STEMS} stems × {SIGNALS} signals: {size / 1e6:.2f} MB of inner products")
    for name, constraints in CONSTRAINTS.items():
        report(f"solve, {name}", partial(solve, problems, constraints))
    for folds in (10, SONGS):
        for prior, chosen in ((0.0, "no prior"), (None, "prior chosen, nested")):
            report(
                f"cross-validate, {folds} folds, {chosen}",
                partial(cross_validate, problems, Constraints(), folds, prior),
                1 if prior is None else REPEATS,
            )


def report(name: str, work: Callable[[], None], repeats: int = REPEATS) -> None:
    """Print the shortest time and the peak memory of arrays; these are measured in separate runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{name:45} {1000 * min(times):9.1f} ms {peak / 1e6:6.2f} MB")


if __name__ == "__main__":
    terminal.run(main)
