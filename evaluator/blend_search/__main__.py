"""``python -m evaluator.blend_search``: see :mod:`evaluator.blend_search.command`."""

from evaluator.blend_search.command import main

if __name__ == "__main__":
    main()
