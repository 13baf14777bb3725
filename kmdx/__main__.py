"""``python -m kmdx`` is the ``kmdx`` command."""

from kmdx.cli import main

if __name__ == "__main__":
    main()
