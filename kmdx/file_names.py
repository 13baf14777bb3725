"""Names of files: how they are compared and sorted, and which ones every system accepts."""

from __future__ import annotations

import os
import re
import unicodedata

LONGEST = 255  # bytes: the longest name that every file system accepts
_ILLEGAL = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f]')  # on Windows
_RESERVED = re.compile(
    r"(con|prn|aux|nul|(clock|conin|conout)\$|(com|lpt)[0-9¹²³])(?= *(\.|$))", re.IGNORECASE
)


def key(name: str) -> str:
    """A name in a form that compares equal regardless of case and Unicode normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts names as people do: numbers by value, such as ``stem 2`` before ``stem 10``."""
    parts = re.split(r"(\d+)", key(name))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def is_reserved(name: str) -> bool:
    """Whether Windows takes a file of this name for a device."""
    return _RESERVED.match(name) is not None


def portable(name: str, longest: int = LONGEST) -> str:
    """The name, changed where necessary so that Windows, macOS and Linux accept it, or an empty string."""
    try:
        name = os.fsencode(name).decode()
    except UnicodeDecodeError:  # bytes that are not UTF-8
        name = name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    name = _ILLEGAL.sub("_", name)
    if match := _RESERVED.match(name):
        name = f"{match[0]}_{name[match.end() :]}"
    return shortened(os.fsdecode(name.encode()), longest)


def shortened(name: str, longest: int) -> str:
    """A name shortened to at most ``longest`` bytes, without dots or spaces at its end."""
    return os.fsdecode(os.fsencode(name)[:longest].decode(errors="ignore").rstrip(". ").encode())
