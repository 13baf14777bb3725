"""``python -m evaluator``: see :mod:`evaluator.command`."""

from evaluator.extra import start

if __name__ == "__main__":
    start("evaluator.command", "evaluator", "matplotlib")
