"""The files from which AIcrowd builds and describes a submission: their rules, and what they state.

References
----------
The starter kit of the Sound Demixing Challenge 2023: README.md, docs/submission.md, docs/runtime.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kmdx import documents
from kmdx.errors import DocumentError, KmdxError, shown

PLACEHOLDER = "kmdx-net"
"""The author in this project's own ``aicrowd.json``."""
_PIN = re.compile(r"[A-Za-z0-9][\w.-]*(\[[^\]]*\])?\s*===?\s*[^\s;,*=]+\s*(;.*)?")
_EXACT_URL = re.compile(r"[A-Za-z0-9][\w.-]*(\[[^\]]*\])?\s*@\s*\S+(@[0-9a-f]{40}|#sha256=[0-9a-f]{64})\b.*")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_IMAGE_PYTHON = re.compile(r"\bpython:?(3\.\d+)\b")


class Description(BaseModel):
    """The content of ``aicrowd.json``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    challenge_id: Literal["music-demixing-track-mdx-23"]
    authors: list[str] = Field(min_length=1)
    labelnoise: bool
    bleeding: bool
    external_dataset_used: bool
    gpu: bool
    description: str = ""

    @field_validator("authors")
    @classmethod
    def _are_user_names(cls, authors: list[str]) -> list[str]:
        if any(not name.strip() or name != name.strip() for name in authors):
            raise ValueError("expected AIcrowd user names")
        if PLACEHOLDER in authors:
            raise ValueError("expected your AIcrowd user name")
        return authors

    @model_validator(mode="after")
    def _belongs_to_a_leaderboard(self) -> Description:
        if self.labelnoise + self.bleeding + self.external_dataset_used > 1:
            raise ValueError(
                "only one of labelnoise, bleeding and external_dataset_used can be true: "
                "leaderboards A and B allow no other data"
            )
        return self


def read_description(folder: Path) -> Description:
    """Read a submission's ``aicrowd.json``; raise :class:`DocumentError` if it breaks a rule."""
    return documents.checked(Description, documents.read_json(folder / "aicrowd.json"))


def requirements(file: Path) -> Iterator[tuple[int, str]]:
    """The requirements in a file of pip: the number of each line, and the requirement.

    Comments and options are left out, except ``--editable``.
    """
    text = documents.read_text(file).replace("\\\n", " ")
    for number, line in enumerate(text.splitlines(), 1):
        words = re.split(r"(?:^|\s)#|\s--(?:hash|config-settings|global-option)\b", line)[0].strip()
        if words and (not words.startswith("-") or words.startswith(("-e", "--editable"))):
            yield number, words


def is_pinned(requirement: str) -> bool:
    """Whether a requirement allows exactly one version of a package."""
    return bool(_PIN.fullmatch(requirement) or _EXACT_URL.fullmatch(requirement))


def pins(file: Path) -> dict[str, str]:
    """The versions to which a file pins packages, by their names in lower case with ``-``."""
    found = {}
    for _, requirement in requirements(file):
        if _PIN.fullmatch(requirement) and (name := _NAME.match(requirement)):
            version = re.split(r"===?", requirement, maxsplit=1)[1].partition(";")[0].strip()
            found[normalized(name[0])] = version
    return found


def normalized(name: str) -> str:
    """A package's name as registries compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def image_python(folder: Path) -> str | None:
    """The version of Python in a submission's image, such as ``3.12``; None if no file names it.

    The ``Dockerfile`` names it as a command (``python3.12``) or an image (``python:3.12``), or ``apt.txt`` as
    a package.
    """
    for name in ("Dockerfile", "apt.txt"):
        try:
            text = documents.read_text(folder / name)
        except DocumentError:
            continue
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        if found := _IMAGE_PYTHON.search("\n".join(lines)):
            return found[1]
    return None


def ensemble(folder: Path) -> str | None:
    """The string ``ENSEMBLE`` in ``my_submission/user_config.py``; see :func:`setting`."""
    return setting(folder, "ENSEMBLE")


def setting(folder: Path, name: str) -> str | None:
    """The string with this name in ``my_submission/user_config.py``; None if there is no such string.

    The file is not run. Raises :class:`KmdxError` if it cannot be read.
    """
    file = folder / "my_submission" / "user_config.py"
    try:
        tree = ast.parse(documents.read_text(file), file.name)
    except (DocumentError, SyntaxError, ValueError, RecursionError) as error:
        raise KmdxError(f"my_submission/user_config.py cannot be read: {shown(error)}") from error
    for node in reversed(tree.body):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        value = getattr(node, "value", None)
        if name in names:
            text = value.value if isinstance(value, ast.Constant) else None
            return text if isinstance(text, str) else None
    return None
