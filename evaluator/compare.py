"""``python -m evaluator.compare``: see :mod:`evaluator.comparison_command`."""

from evaluator.extra import start

if __name__ == "__main__":
    start("evaluator.comparison_command", "evaluator")
