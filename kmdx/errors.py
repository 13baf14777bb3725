"""The errors that a user can cause.

Each is a :class:`ValueError` whose message is one line that says what was given, what was
expected and what to do. The command prints that line and exits with code 2.
"""


def shown(text: str) -> str:
    """Text out of a file as a message can show it: on one line, and not longer than that."""
    return text if len(text) <= 80 and text.isprintable() else repr(text[:80])


class KmdxError(ValueError):
    """A mistake that the user can mend; the base of every error raised on purpose."""


class AudioError(KmdxError):
    """A sound file or array that cannot be read, written or separated."""


class PlanError(KmdxError):
    """An ensemble's YAML file that is unknown, malformed or inconsistent."""


class WeightsError(KmdxError):
    """A weight file that is missing, damaged, unsafe or another network's."""


class DownloadError(WeightsError):
    """A weight that no source could deliver; the message names each source and its reason."""


class DeviceError(KmdxError):
    """A device that this machine does not have."""


class KmdxWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""
