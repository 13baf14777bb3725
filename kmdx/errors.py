"""The errors that a user can cause, and helpers that format values in their messages.

Each error is a :class:`ValueError` with a one-line message: what was found, what was expected and what
to do. The command prints that line and exits with code 2.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import Any

SHOWN = 120  # longest value in a message, in characters
LISTED = 10  # most names in a message
COMPARED = 500  # most known names searched for a suggestion


class KmdxError(ValueError):
    """A mistake that the user can fix; the base class of every error raised on purpose."""

    def __reduce__(self) -> tuple[Callable[..., KmdxError], tuple[Any, ...], dict[str, Any]]:
        """Pickle it without calling ``__init__``, whose arguments may differ from the message."""
        return _without_init, (type(self), *self.args), vars(self)


def _without_init(kind: type[KmdxError], *args: Any) -> KmdxError:
    return kind.__new__(kind, *args)


class AudioError(KmdxError):
    """A sound file or array cannot be read, written or separated."""


class DocumentError(KmdxError):
    """A YAML or JSON text cannot be read, is malformed or is too large."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem if line is None else f"line {line}: {problem}")
        self.problem = problem  # without the line number
        self.line = line  # counted from 1


class PlanError(KmdxError):
    """An ensemble is unknown, or its YAML file is malformed or inconsistent."""


class WeightsError(KmdxError):
    """A weight file is missing, damaged or unsafe, or belongs to another network."""


class Refused(ValueError):
    """A weight file that is intact but cannot be used; the message continues after the file's name."""


class DownloadError(WeightsError):
    """No source could deliver a weight; the message names each source and why it failed."""


class DeviceError(KmdxError):
    """The requested device does not exist on this machine, or does not have enough memory."""


class NetworkError(KmdxError):
    """A network returned NaN or infinity; the message names it, its weights and their file."""


class KmdxWarning(UserWarning):
    """Something the user should know that does not stop the work."""


class _Shortener(reprlib.Repr):
    """A ``repr`` that computes no more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 2, SHOWN // 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 4

    def repr_int(self, x: int, level: int) -> str:
        """An integer; Python refuses to print one with thousands of digits."""
        return repr(x) if abs(x) < 10**40 else f"a number of about {x.bit_length() * 3 // 10} digits"


_SHORTENER = _Shortener()


def quoted(value: object) -> str:
    """Return a value's ``repr`` for a message: on one line, of bounded length.

    Line breaks, control characters and other unprintable characters are escaped.
    """
    text = _SHORTENER.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def shown(name: object) -> str:
    """Return a name unchanged, or quoted if it is long or contains unprintable characters."""
    text = str(name)
    return text if len(text) <= SHOWN and text.isprintable() else quoted(text)


def listed(names: Collection[object], separator: str = ", ", most: int = LISTED) -> str:
    """Return the first few names for a message, and how many more follow."""
    text = separator.join(shown(name) for name in islice(names, most))
    more = len(names) - most
    return f"{text} and {more} more" if more > 0 else text


def joined(names: Collection[object]) -> str:
    """Return the first few names for a sentence, such as ``a, b and c``, and how many more follow."""
    if not 1 < len(names) <= LISTED:
        return listed(names)
    *first, last = names
    return f"{listed(first)} and {shown(last)}"


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, such as ``1 song`` or ``2 songs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean …?)`` if a known name is similar, whatever its case, else an empty string."""
    names = {each.casefold(): each for each in islice(known, COMPARED)}
    close = difflib.get_close_matches(name[:SHOWN].casefold(), names, n=1)
    return f" (did you mean {quoted(names[close[0]])}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, of bounded length, or the error's class if it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][: 2 * SHOWN]


def reason(error: Exception) -> str:
    """The text of an error from the system, libsndfile or FFmpeg, without error number and file name."""
    text = getattr(error, "strerror", None) or getattr(error, "error_string", None) or first_line(error)
    return text[:1].lower() + text[1:].rstrip(".")
