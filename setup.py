"""The description on the package's page: README.md, with links that work outside the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent


def description(readme: str, repository: str | None, version: str) -> str:
    """Make links into the repository absolute, to the version's tag; without one, keep only their text."""

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if repository is None:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", absolute, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    setup(
        long_description=description(
            (ROOT / "README.md").read_text("utf-8"), project["urls"].get("Repository"), project["version"]
        ),
        long_description_content_type="text/markdown",
    )
