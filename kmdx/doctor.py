"""``kmdx doctor``: what is installed, what this machine has, and what will run where, for a bug report.

The report has no secrets: folders below the user's home begin with ``~``, and nothing of the environment is
shown but the models folder.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kmdx.errors import KmdxError, KmdxWarning, first_line, listed

OPTIONAL = ("matplotlib", "ray", "fsspec", "fastapi", "jinja2", "psutil", "lightning")
"""A package of each extra besides ``cpu`` and ``gpu``; the report names those that are installed."""
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
SMALL = 10**9  # bytes of free disk below which a long song may not fit
GB = 1e9
WIDTH = 80  # columns


class Report:
    """The lines of the report, and what is broken and what to do about it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.broken: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KmdxWarning)
            for part in (
                self._versions,
                self._processor,
                self._devices,
                self._onnx,
                self._folders,
                self._plans,
            ):
                try:
                    part()
                except KmdxError as error:
                    self.broken.append(str(error))
                except (ImportError, OSError) as error:  # a damaged installation
                    self.broken.append(f"{first_line(error)}; install kmdx-net again")
                except RuntimeError as error:  # from torch, about a device
                    self.broken.append(f"{part.__name__.strip('_')}: {first_line(error)}")
        messages = [str(each.message) for each in caught if issubclass(each.category, KmdxWarning)]
        self.broken += dict.fromkeys(messages)

    def _add(self, title: str, text: str) -> None:
        self.lines += textwrap.wrap(
            _anonymous(text),
            WIDTH,
            initial_indent=f"{title:<11} ",
            subsequent_indent=12 * " ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    def _versions(self) -> None:
        self._add(
            "kmdx-net", f"{version('kmdx-net')}, Python {platform.python_version()}, {platform.platform()}"
        )
        import av

        ffmpeg = ".".join(map(str, av.library_versions["libavformat"]))
        self._add("packages", f"torch {_version('torch')}, demucs {_version('demucs')}, av {_version('av')}")
        self._add("", f"libavformat {ffmpeg}, soundfile {_version('soundfile')}, numpy {_version('numpy')}")
        command = shutil.which("ffmpeg")
        self._add("", f"ffmpeg command: {command or 'none (not needed)'}")
        found = [f"{name} {_version(name)}" for name in OPTIONAL if _is_installed(name)]
        missing = [name for name in OPTIONAL if not _is_installed(name)]
        self._add("optional", ", ".join(found) or "none")
        if missing:
            self._add("", f"not installed: {', '.join(missing)}")

    def _processor(self) -> None:
        from kmdx import host
        from kmdx.networks import kernels

        memory = host.memory()
        size = "?" if memory is None else f"{memory / GB:.0f} GB"
        self._add("processor", f"{host.cpu_name()}: {host.usable_cores()} cores, {size} of memory")
        self._add("", ", ".join(host.arithmetic()) or "no known instruction sets")
        chosen = kernels.here()
        used = [name for name in ("products", "winograd") if getattr(chosen, name)]
        used += [f"attention in {name}" for name in chosen.attention]
        self._add("kernels", f"{chosen.name}: {', '.join(used) or 'those of torch'}")

    def _devices(self) -> None:
        import torch

        from kmdx import devices

        if devices.NVIDIA_DRIVER.exists():
            text = devices.NVIDIA_DRIVER.read_text(errors="replace")
            found = re.search(r"\d+\.\d+(\.\d+)?", text)
            self._add("driver", f"NVIDIA {found[0] if found else 'of unknown version'}")
        built = torch.version.cuda
        for number in range(devices.gpu_count()):
            device = torch.device("cuda", number)
            card = devices.gpu_properties(device)
            free = devices.free_memory(device)
            capability = f"compute capability {card.major}.{card.minor}"
            sizes = f"{card.total_memory / GB:.1f} GB, {free / GB:.1f} GB free"
            self._add(str(device), f"{card.name}, {sizes}, {capability}")
        if not devices.gpu_count():
            self._add("CUDA", f"no card; torch is built for {f'CUDA {built}' if built else 'no CUDA'}")
        else:
            self._add("CUDA", f"{built}, cuDNN {torch.backends.cudnn.version()}")
        if sys.platform == "darwin":
            self._add("MPS", "available" if torch.backends.mps.is_available() else "not available")

    def _onnx(self) -> None:
        from kmdx import devices
        from kmdx.networks.onnx import INSTALL_HINT

        names = [f"{name} {_version(name)}" for name in RUNTIMES if _is_installed(name)]
        try:
            import onnxruntime
        except ImportError as error:
            self._add("ONNX", f"no ONNX Runtime ({first_line(error)}); {INSTALL_HINT}")
            return
        providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
        self._add("ONNX", f"{', '.join(names) or onnxruntime.__version__} on {', '.join(providers)}")
        if len(names) > 1:
            self.broken.append(
                "onnxruntime and onnxruntime-gpu exclude each other; pip uninstall one of them"
            )
        if devices.gpu_count() and "CUDA" not in providers:
            self.broken.append(f"ONNX Runtime cannot use the GPU; {INSTALL_HINT}")

    def _folders(self) -> None:
        from kmdx import weights

        models = weights.where()
        self._add("models", f"{models.path} ({models.reason}){_free(models.path)}")
        if models.path.is_dir() and not os.access(models.path, os.W_OK):
            self.broken.append(f"{models.path} cannot be written; set KMDX_MODELS to another folder")
        temporary = Path(tempfile.gettempdir())
        self._add("temporary", f"{temporary}{_free(temporary)}")
        if shutil.disk_usage(temporary).free < SMALL:
            self.broken.append(
                f"{temporary} is nearly full; free some of it, or set TMPDIR to another folder"
            )

    def _plans(self) -> None:
        import torch

        from kmdx import devices, engines, plan_file, precisions, weights

        device = devices.choose("auto")
        precision = precisions.in_words("auto", device)
        self._add(
            "runs on", f"{device} in {precision}, {engines.DEFAULT} engine, {torch.get_num_threads()} threads"
        )
        self._add("ensemble", "weights that are present")
        for name in plan_file.names():
            plan = plan_file.load(name)
            uses = {use.weight.name: use.weight for use in plan.networks.values()}
            found = weights.find_all(uses.values())
            count = sum(file is not None for file in found.values())
            onnx = any(file is not None and file.path.suffix == ".onnx" for file in found.values())
            where = f"runs on {device}{', partly in ONNX Runtime' if onnx else ''}"
            what = where if count == len(uses) else f"kmdx models pull {name}"
            self.lines.append(f"  {name:<20} {f'{count} of {len(uses)}':>8}  {what}")
        if imported := plan_file.imported():
            self._add("imported", listed(imported))
        for name in imported:
            try:
                plan_file.load(name)
            except KmdxError as error:
                self.broken.append(f"{error}; correct or delete {weights.models_folder() / name}.yaml")

    @property
    def text(self) -> str:
        """All lines; the last ones name what is broken and what to do about it."""
        found = [_anonymous(f"broken: {what}") for what in self.broken]
        return "\n".join([*self.lines, *(found or ["nothing is broken"])])


def _version(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _is_installed(package: str) -> bool:
    return _version(package) != "not installed"


def _free(folder: Path) -> str:
    """Free disk space where a folder is or would be."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f", {shutil.disk_usage(existing).free / GB:.0f} GB free"


def _anonymous(text: str) -> str:
    """A text whose paths in the user's home begin with ``~``, and in which no path has the user's name."""
    home = Path.home()
    if len(home.parts) < 2:
        return text
    text = re.sub(rf"(?<![\w.-]){re.escape(str(home))}(?![\w.-])", "~", text)
    return text.replace(f"{os.sep}{home.name}{os.sep}", f"{os.sep}USER{os.sep}")
