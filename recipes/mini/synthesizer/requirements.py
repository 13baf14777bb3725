"""The programs, soundfonts and Python packages that songs are rendered with: found, or named if missing."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from kmdx.errors import KmdxError

LIBRARY = Path("/usr/share/mma/lib")  # MMA's grooves, where Debian puts them
FONTS = Path("/usr/share/sounds/sf2")

FLUID, TIM = FONTS / "FluidR3_GM.sf2", FONTS / "TimGM6mb.sf2"
BLACK_PEARL, RED_ZEPPELIN = FONTS / "Black_Pearl_4_LV2.sf2", FONTS / "Red_Zeppelin_4_LV2.sf2"

# What Debian calls the package of each.
PROGRAMS = {"mma": "mma", "fluidsynth": "fluidsynth"}
FILES = {
    LIBRARY: "mma",
    FLUID: "fluid-soundfont-gm",
    TIM: "timgm6mb-soundfont",
    BLACK_PEARL: "avldrums.lv2-soundfont",
    RED_ZEPPELIN: "avldrums.lv2-soundfont",
}
MODULES = ("mido", "pedalboard", "pysinsy", "pyworld", "scipy")


def check() -> None:
    """Make sure that all is there.

    Raises
    ------
    KmdxError
        If something is missing; names all of it, and how to install it.
    """
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    files = [path for path in FILES if not path.exists()]
    modules = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if not (programs or files or modules):
        return
    packages = sorted({PROGRAMS[name] for name in programs} | {FILES[path] for path in files})
    ways = []
    if packages:
        ways.append(f"apt-get install {' '.join(packages)}")
    if modules:
        ways.append("pip install -r recipes/mini/requirements.txt")
    missing = ", ".join([*programs, *map(str, files), *(f"Python's {name}" for name in modules)])
    raise KmdxError(f"not installed: {missing}; install with: {'; '.join(ways)}")


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a program in a folder.

    Raises
    ------
    KmdxError
        If it cannot be run or fails; says its last words.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except FileNotFoundError as error:
        package = PROGRAMS.get(command[0], command[0])
        raise KmdxError(f"{command[0]}: not found; install with: apt-get install {package}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["no word"]
        raise KmdxError(f"{command[0]}: failed with {done.returncode}: {said[-1].strip()}")


def versions() -> dict[str, str]:
    """The versions of the Python packages, which a song's bytes depend on."""
    return {name: version(name) for name in (*MODULES, "numpy", "soxr")}
