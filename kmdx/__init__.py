"""Music source separation with the ensemble of MDX23's leaderboard C.

>>> from kmdx import Separator
>>> stems = Separator("htdemucs").separate(samples, rate)  # {"vocals": (n, channels), …}

The names in ``__all__`` are the public interface; the page ``docs/api.md`` describes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmdx.audio import Audio, read, write
    from kmdx.catalog import ensembles, pull
    from kmdx.errors import (
        AudioError,
        DeviceError,
        DownloadError,
        KmdxError,
        KmdxWarning,
        NetworkError,
        PlanError,
        WeightsError,
    )
    from kmdx.separator import Separation, Separator
    from kmdx.urls import UrlError
    from kmdx.weights import MissingWeights

    __version__: str
else:
    _MODULES = {
        "audio": ("Audio", "read", "write"),
        "catalog": ("ensembles", "pull"),
        "errors": (
            "AudioError",
            "DeviceError",
            "DownloadError",
            "KmdxError",
            "KmdxWarning",
            "NetworkError",
            "PlanError",
            "WeightsError",
        ),
        "separator": ("Separation", "Separator"),
        "urls": ("UrlError",),
        "weights": ("MissingWeights",),
    }

    def __getattr__(name: str) -> Any:
        """Import the public names when they are first used: torch takes a second."""
        import importlib

        if name == "__version__":
            from importlib.metadata import version

            return version("kmdx-net")
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(f"kmdx.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Audio",
    "AudioError",
    "DeviceError",
    "DownloadError",
    "KmdxError",
    "KmdxWarning",
    "MissingWeights",
    "NetworkError",
    "PlanError",
    "Separation",
    "Separator",
    "UrlError",
    "WeightsError",
    "__version__",
    "ensembles",
    "pull",
    "read",
    "write",
]
