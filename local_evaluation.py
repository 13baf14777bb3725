"""Replays the challenge's hidden-set protocol on songs whose stems are known: see ``--help``."""

from evaluator.command import main

if __name__ == "__main__":
    main()
