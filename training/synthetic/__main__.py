"""Renders a data set of four-stem songs: see ``--help``."""

from training.synthetic.command import main

if __name__ == "__main__":
    main()
