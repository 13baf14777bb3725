"""Warnings about a song's scores: the text in its record, and the summary in the report.

A record stores a warning as text. This table both creates the texts and recognizes the kind of a text, also
in records of earlier versions. Therefore the texts must not change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Kind:
    """A kind of warning."""

    text: str  # format string of the text in a record
    summary: str = ""  # the report's text before ``in 3 songs``; if empty, the text in the record

    def of(self, **values: object) -> str:
        """The text about one song."""
        return self.text.format(**values)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A pattern that matches the text about any song."""
        parts = re.split(r"\{.*?\}", self.text)
        return re.compile(".+".join(map(re.escape, parts)), re.DOTALL)


CLIPPED = Kind(
    "{stem}: {share:.2%} of the estimate's samples are at full scale (clipped)", "clipped estimates"
)
SILENT_ESTIMATE = Kind("{stem}: the estimate is silent in every frame", "a silent estimate")
SILENT_REFERENCE = Kind("{stem}: the reference is silent in every frame", "a silent reference")
SILENT_FRAMES = Kind(
    "{stem}: the estimate is silent in {count} of {total} frames and the reference is not; "
    "museval's median leaves these frames out",
    "frames that museval leaves out because an estimate is silent",
)
NO_FRAMES = Kind(
    "museval has no value for any stem: in every frame one of the files is silent", "no museval value"
)
PERFECT = Kind("{metric} of {stem} is infinite: a perfect estimate", "a perfect estimate")
NO_ESTIMATE = Kind("no estimate of {stem}")
ALL = (CLIPPED, SILENT_ESTIMATE, SILENT_REFERENCE, SILENT_FRAMES, NO_FRAMES, PERFECT, NO_ESTIMATE)


def summary_of(warning: str) -> str:
    """The summary of a warning's kind; a warning of an unknown kind is its own summary."""
    return next((kind.summary for kind in ALL if kind.pattern.fullmatch(warning)), "") or warning
