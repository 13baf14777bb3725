"""``python -m evaluator.blend_search``: see :mod:`evaluator.blend_search.command`."""

from evaluator.extra import start

if __name__ == "__main__":
    start("evaluator.blend_search.command", "evaluator", "matplotlib")
