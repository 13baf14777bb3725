"""``python -m training``: see :mod:`training.command`."""

from training.command import main

if __name__ == "__main__":
    main()
