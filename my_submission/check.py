"""``python -m my_submission.check``: see :mod:`evaluator.submission_check`."""

from evaluator.extra import start

if __name__ == "__main__":
    start("evaluator.submission_check", "evaluator")
