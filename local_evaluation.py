"""Replays the challenge's hidden-set protocol on songs whose stems are known: see ``--help``."""

from evaluator.extra import start

if __name__ == "__main__":
    start("evaluator.command", "evaluator", "matplotlib")
