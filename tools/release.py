"""``make release``: build the source archive and the wheel, and check them; CONTRIBUTING.md has the recipe.

With ``--wheel FILE``, only that wheel is checked: it is installed in an empty environment outside the
checkout, extra by extra, and the commands of each extra run there on songs that this script makes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import venv
import wave
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## (\S+)", re.MULTILINE)
STEMS = {"bass": 55, "drums": 90, "other": 330, "vocals": 220}  # Hz
NETWORK = {
    "n_fft": 512, "hop": 256, "bins": 64, "frames": 32, "layers": 3, "convolutions": 1, "growth": 4,
    "trim": 256,
}  # fmt: skip
RUN = {"steps": 2, "epoch": 2, "validate_every": 1, "batch": 2, "precision": "fp32"}
SMALL = [f"--set network.{name}={value}" for name, value in NETWORK.items()]
SMALL += [f"--set {name}={value}" for name, value in RUN.items()]
BARE = ["kmdx --version", "python -m kmdx --help", "kmdx doctor", "kmdx ensembles", "kmdx models list"]
COMMANDS = {
    "cpu": [
        "kmdx separate songs/test -o stems --ensemble mini --page --format flac",
        "kmdx page stems",
        "kmdx benchmark --ensemble mini --seconds 5",
        "kmdx ensembles show mini --svg mini.svg",
        "kmdx models where",
        "kmdx models verify mini",
    ],
    "evaluator": [
        "python -m evaluator songs -o run --ensemble mini --keep-stems --metrics all",
        "python -m evaluator songs -o given --estimates run/predictions",
        "python -m evaluator.compare run given published:tak1",
        "python -m evaluator.blend_search collect mini songs -o collection --keep",
        "python -m evaluator.blend_search solve collection -o mine.yaml --anyway",
        "python -m evaluator.blend_search members collection --svg members.svg",
        "python -m evaluator.blend_search stages mini songs --dry-run",
        "python -m evaluator.tradeoff mini songs -o curve --overlaps 0.5 --shifts 2 --no-tta --rounds 1",
        "kmdx separate songs/test -o tuned --ensemble mine.yaml",
    ],
    "training": [
        "python -m training budget",
        "python -m training variants slower --data songs/test --speed 0.9",
        f"python -m training run vocals --data songs/test --validation one -o fit {' '.join(SMALL)}",
        "python -m training report fit",
        "python -m training export fit --name own",
    ],
    "cluster": ["kmdx separate songs/test -o many --ensemble mini --workers 1"],
    "urls": ["kmdx separate songs/test -o memory://stems --ensemble mini"],
}
"""Commands that a wheel must run with each extra. Without it, the first one names the extra."""
PRESENT = ("cpu", "urls")
"""Extras without which their commands work, too: `mini` needs no ONNX Runtime, and torch needs fsspec."""


class Refused(Exception):
    """A release, or its wheel, is wrong."""


def check_version(root: Path) -> str:
    """Return the version of a checkout, which its changelog's newest heading and its citation must state."""
    project = (root / "pyproject.toml").read_text("utf-8")
    version = re.findall(r'^version = "(.*)"', project, re.MULTILINE)[0]
    newest = HEADING.findall((root / "CHANGELOG.md").read_text("utf-8"))[0]
    if newest != version:
        raise Refused(f"CHANGELOG.md begins with {newest}, and pyproject.toml states {version}")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text("utf-8"):
        raise Refused(f"CITATION.cff does not state version {version}")
    return version


def check_commit(root: Path, version: str) -> None:
    """Check that everything is committed, and that no other commit has the version's tag."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout

    if changes := git("status", "--porcelain"):
        raise Refused(f"not committed:\n{changes}")
    tag = f"v{version}"
    if git("tag", "--list", tag) and tag not in git("tag", "--points-at", "HEAD").split():
        raise Refused(f"another commit has the tag {tag}")


def build(root: Path) -> Path:
    """Build ``dist/`` and return the wheel, which is built from the source archive."""
    for folder in ("build", "dist"):
        shutil.rmtree(root / folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--quiet", str(root)], check=True)
    files = sorted(map(str, (root / "dist").iterdir()))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    (wheel,) = (root / "dist").glob("*.whl")
    return wheel


def make_songs(folder: Path) -> None:
    """Write two songs of four seconds in MUSDB18-HQ's layout: tones in noise."""
    chance = random.Random(0)
    times = [sample / 7019 for sample in range(4 * 44_100) for channel in range(2)]
    for name, factor in (("one", 1.0), ("two", 1.26)):
        (folder / name).mkdir(parents=True)
        stems = {
            stem: [int(5000 * math.sin(pitch * factor * time) + chance.gauss(0, 900)) for time in times]
            for stem, pitch in STEMS.items()
        }
        stems["mixture"] = [sum(samples) for samples in zip(*stems.values(), strict=True)]
        for stem, samples in stems.items():
            with wave.open(str(folder / name / f"{stem}.wav"), "wb") as file:
                file.setparams((2, 2, 44_100, 0, "NONE", ""))
                file.writeframes(struct.pack(f"<{len(samples)}h", *samples))


class Environment:
    """An empty environment and a folder outside the checkout, in which the commands of a wheel run."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self.work = folder / "work"
        self.work.mkdir()
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("KMDX", "PYTHON"))}
        self.variables = {**kept, "PATH": f"{self.bin}{os.pathsep}{kept['PATH']}", "PYTHONUTF8": "1"}
        self.variables["KMDX_MODELS"] = str(folder / "models")
        self.log = folder / "log.txt"

    def run(self, command: str, expected: int = 0) -> str:
        """Run a command and return its output, which is also appended to a log."""
        words = shlex.split(command)
        words[0] = shutil.which(words[0], path=str(self.bin)) or words[0]
        print(f"  {command}", flush=True)
        done = subprocess.run(
            words, cwd=self.work, env=self.variables, capture_output=True, encoding="utf-8", errors="replace"
        )
        output = done.stdout + done.stderr
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"$ {command}\n{output}\n")
        if done.returncode != expected:
            raise Refused(f"`{command}` ended with {done.returncode}, expected {expected}:\n{output}")
        return output


def check_wheel(wheel: Path, folder: Path) -> None:
    """Install a wheel and its extras in a folder, and run the commands of each."""
    here = Environment(folder)
    make_songs(here.work / "songs" / "test")
    index = os.environ.get("TORCH_INDEX")
    torch = os.environ.get("TORCH") or "torch"
    here.run(f"python -m pip install --quiet {torch}{f' --index-url {index}' if index else ''}")
    here.run(f"python -m pip install --quiet {shlex.quote(str(wheel))}")
    for command in BARE:
        here.run(command)
    for extra, commands in COMMANDS.items():
        if extra not in PRESENT:
            without = here.run(commands[0], expected=2)
            if f"[{extra}]" not in without:
                raise Refused(f"`{commands[0]}` does not name the extra {extra}:\n{without}")
        here.run(f"python -m pip install --quiet {shlex.quote(f'{wheel}[{extra}]')}")
        for command in commands:
            here.run(command)


def main() -> None:
    """Build and check a release, or check one wheel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--wheel", type=Path, help="Only check this wheel.")
    parser.add_argument("--keep", type=Path, help="Keep the environment and a log in this folder.")
    options = parser.parse_args()
    try:
        if options.wheel:
            version, wheel = "", options.wheel.resolve()
        else:
            version = check_version(ROOT)
            check_commit(ROOT, version)
            wheel = build(ROOT)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            folder = options.keep.resolve() if options.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            check_wheel(wheel, folder)
    except (Refused, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    if version:
        print(f"{wheel.name} is ready: git tag -a v{version} -m v{version}; git push origin v{version}")
    else:
        print(f"{wheel.name}: every command works")


if __name__ == "__main__":
    main()
