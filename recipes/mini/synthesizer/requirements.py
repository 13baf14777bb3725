"""Finds the programs, soundfonts and Python packages that the synthesizer needs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from kmdx.errors import KmdxError

LIBRARY = Path("/usr/share/mma/lib")  # MMA's grooves, where Debian installs them
FONTS = Path("/usr/share/sounds/sf2")

FLUID, TIM = FONTS / "FluidR3_GM.sf2", FONTS / "TimGM6mb.sf2"
BLACK_PEARL, RED_ZEPPELIN = FONTS / "Black_Pearl_4_LV2.sf2", FONTS / "Red_Zeppelin_4_LV2.sf2"

# The Debian package of each.
PROGRAMS = {"mma": "mma", "fluidsynth": "fluidsynth"}
FILES = {
    LIBRARY: "mma",
    FLUID: "fluid-soundfont-gm",
    TIM: "timgm6mb-soundfont",
    BLACK_PEARL: "avldrums.lv2-soundfont",
    RED_ZEPPELIN: "avldrums.lv2-soundfont",
}
MODULES = ("mido", "pedalboard", "pysinsy", "pyworld", "scipy")
INSTALL_MODULES = "pip install -r recipes/mini/requirements.txt"


def check() -> None:
    """Make sure that everything is installed.

    Raises :class:`KmdxError` if something is missing. The message lists all of it and how to install it.
    """
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    files = [path for path in FILES if not path.exists()]
    modules = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if not (programs or files or modules):
        return
    packages = sorted({PROGRAMS[name] for name in programs} | {FILES[path] for path in files})
    commands = [f"apt-get install {' '.join(packages)}"] if packages else []
    commands += [INSTALL_MODULES] if modules else []
    missing = ", ".join([*programs, *map(str, files), *(f"Python package {name}" for name in modules)])
    raise KmdxError(f"not installed: {missing}; install with: {'; '.join(commands)}")


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a program in a folder.

    Raises :class:`KmdxError` if the program is missing or fails. The message ends with the program's last
    line.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except FileNotFoundError as error:
        package = PROGRAMS.get(command[0], command[0])
        raise KmdxError(f"{command[0]}: not found; install with: apt-get install {package}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["no output"]
        raise KmdxError(f"{command[0]}: failed with exit code {done.returncode}: {lines[-1].strip()}")


def versions() -> dict[str, str]:
    """Versions of the Python packages that a song's bytes depend on."""
    return {name: version(name) for name in (*MODULES, "numpy", "soxr")}
