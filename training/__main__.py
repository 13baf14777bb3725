"""``python -m training``: see :mod:`training.command`."""

from evaluator.extra import start

if __name__ == "__main__":
    start("training.command", "training", "lightning", "matplotlib")
