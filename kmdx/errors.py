"""The errors that a user can cause, and how their messages show what was given.

Each is a :class:`ValueError` whose message is one line that says what was given, what was
expected and what to do. The command prints that line and exits with code 2.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable
from itertools import islice

SHOWN = 120  # characters of a value that a message shows
LISTED = 10  # names that a message lists
COMPARED = 500  # names that an unknown one is compared with


class KmdxError(ValueError):
    """A mistake that the user can mend; the base of every error raised on purpose."""


class AudioError(KmdxError):
    """A sound file or array that cannot be read, written or separated."""


class DocumentError(KmdxError):
    """A YAML or JSON text that cannot be read, is malformed or is too large.

    Attributes
    ----------
    problem : str
        What is wrong, without the line.
    line : int or None
        Where, counted from 1.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem if line is None else f"line {line}: {problem}")
        self.problem = problem
        self.line = line


class PlanError(KmdxError):
    """An ensemble's YAML file that is unknown, malformed or inconsistent."""


class WeightsError(KmdxError):
    """A weight file that is missing, damaged, unsafe or another network's."""


class Refused(ValueError):
    """A weight file that is intact but cannot be used; the message continues after the file's name."""


class DownloadError(WeightsError):
    """A weight that no source could deliver; the message names each source and its reason."""


class DeviceError(KmdxError):
    """A device that this machine does not have."""


class NetworkError(KmdxError):
    """A network that gives NaN or infinity; the message names it, its weights and their file."""


class KmdxWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""


class _Shortener(reprlib.Repr):
    """Python's own notation, of which it never computes more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 2, SHOWN // 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 4

    def repr_int(self, x: int, level: int) -> str:
        """A whole number; Python refuses to write out one of thousands of digits."""
        return repr(x) if abs(x) < 10**40 else f"a number of about {x.bit_length() * 3 // 10} digits"


_SHORTENER = _Shortener()


def quoted(value: object) -> str:
    """Return a value as a message quotes it: in Python's notation, on one line, of bounded length.

    Control characters, line breaks and what else cannot be printed are escaped.
    """
    text = _SHORTENER.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def shown(name: object) -> str:
    """Return a name as it is, or quoted where it is long or has characters that cannot be printed."""
    text = str(name)
    return text if len(text) <= SHOWN and text.isprintable() else quoted(text)


def listed(names: Collection[object], separator: str = ", ") -> str:
    """Return names as a message lists them: the first ones, and how many more there are."""
    text = separator.join(shown(name) for name in islice(names, LISTED))
    more = len(names) - LISTED
    return f"{text}{separator}… ({more} more)" if more > 0 else text


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` where something known is close."""
    close = difflib.get_close_matches(name[:SHOWN], list(islice(known, COMPARED)), n=1)
    return f"; did you mean {quoted(close[0])}?" if close else ""


def first_line(error: Exception) -> str:
    """The first line of another library's message, of bounded length; the error's class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][: 2 * SHOWN]


def reason(error: Exception) -> str:
    """The words of an error of the system, libsndfile or FFmpeg, without its number and file name."""
    text = getattr(error, "strerror", None) or getattr(error, "error_string", None) or first_line(error)
    return text[:1].lower() + text[1:].rstrip(".")
