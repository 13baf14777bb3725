"""The errors that a user can cause.

Each is a :class:`ValueError` whose message is one line that says what was given, what was
expected and what to do. The command prints that line and exits with code 2.
"""


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


class NetworkError(KmdxError):
    """A network that gives NaN or infinity; the message names it, its weights and their file."""


class KmdxWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""
