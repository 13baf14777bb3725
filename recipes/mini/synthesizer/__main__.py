"""Renders a data set of four-stem songs: see ``--help``."""

from recipes.mini.synthesizer.command import main

if __name__ == "__main__":
    main()
