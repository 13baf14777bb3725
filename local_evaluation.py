"""Replays the challenge's hidden-set protocol on songs whose stems are known: see ``--help``."""

import sys

if __name__ == "__main__":
    try:
        from evaluator.command import main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("evaluator", "kmdx", "my_submission"):
            raise
        print(f"error: {error.name} is missing; install it with: pip install '.[evaluator]'", file=sys.stderr)
        sys.exit(2)
    main()
