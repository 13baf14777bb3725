"""``python -m evaluator.tradeoff``: see :mod:`evaluator.tradeoff.command`."""

from evaluator.extra import start

if __name__ == "__main__":
    start("evaluator.tradeoff.command", "evaluator", "matplotlib")
