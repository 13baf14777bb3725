"""How the documentation site shows docstrings and graphs. ``make docs`` uses it, through zensical.toml."""

from __future__ import annotations

import re
from typing import Any

import griffe
import mmdr


class PlainRoles(griffe.Extension):
    """Shows the roles of docstrings, such as ``:class:`Name```, as code."""

    def on_object(self, *, obj: griffe.Object, **settings: Any) -> None:
        """Change the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)


def mermaid(source: str, language: str, css_class: str, *settings: Any, **more: Any) -> str:
    """Return the text of a Mermaid graph as an SVG picture, so that no browser has to draw it."""
    return f'<div class="{css_class}">{mmdr.render(source).svg()}</div>'
