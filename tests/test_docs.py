import csv
import logging
import re
import shlex
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from conftest import noise

import kmdx
from evaluator import command as evaluation
from evaluator import comparison_command, published, submission_check
from evaluator.blend_search import command as blend_search
from evaluator.tradeoff import command as tradeoff
from kmdx import audio, cli, familiar
from training import command as training

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = {
    "kmdx": cli.app,
    "python local_evaluation.py": evaluation.app,
    "python -m evaluator.compare": comparison_command.app,
    "python -m evaluator.blend_search": blend_search.app,
    "python -m evaluator.tradeoff": tradeoff.app,
    "python -m my_submission.check": submission_check.app,
    "python -m training": training.app,
}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command that a page shows, in a block or in a sentence."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    shown = re.findall(r"^ {4,}(.*)", text, re.MULTILINE) + re.findall(r"`([^`]+)`", text)
    for line in shown:
        line = re.sub(r"^(?:[A-Z_]+=\S* )+", "", line.strip())
        if line.startswith(("kmdx ", "python ")) and "-m pytest" not in line:
            yield shlex.split(line.removesuffix("&"), comments=True)


def options(command: Any) -> set[str]:
    """Every option of a command and of those below it."""
    own = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return own.union({"--help", "-h"}, *map(options, getattr(command, "commands", {}).values()))


def check(words: list[str]) -> None:
    """Fail unless a command and the options after it exist."""
    text = " ".join(words)
    known = next((name for name in COMMANDS if text == name or text.startswith(f"{name} ")), None)
    if known is None:
        script = Path(words[1] if words[1] != "-m" else f"{words[2].replace('.', '/')}.py")
        source = (ROOT / script).read_text("utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), text
        return
    found: Any = typer.main.get_command(COMMANDS[known])
    rest = words[len(known.split()) :]
    if known == "kmdx":
        rest = familiar.translate(rest, found.commands).arguments
    while hasattr(found, "commands") and rest and not rest[0].startswith("-"):
        found = found.commands[rest.pop(0)]
    given = {word.strip("[]").partition("=")[0] for word in rest if word.strip("[]").startswith("-")}
    assert given <= options(found), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_exists_with_its_options(page: Path) -> None:
    for words in commands(page):
        check(words)
    known = set().union(*(options(typer.main.get_command(app)) for app in COMMANDS.values()))
    known |= {name for option in familiar.OPTIONS for name in option.names.split()}
    known |= {familiar.OTHER_METHOD, familiar.DOWNLOAD, "--install-completion"}
    shown = {name.replace("_", "-") for name in re.findall(r"`(--[a-z][\w-]*)", page.read_text("utf-8"))}
    assert shown <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_on_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], (
                target
            )


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_the_examples_in_python_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / name).read_text("utf-8").replace('"htdemucs", device', '"mini", device')
    samples = noise(2 * 44_100)
    audio.write(tmp_path / "song.wav", samples, 44_100)
    audio.write(tmp_path / "song.mp3", np.tile(samples, (31, 1)), 44_100, "mp3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda level: None)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {"samples": samples, "rate": 44_100}
    with warnings.catch_warnings():
        for block in blocks:
            exec(block.replace("start=60, duration=30", "start=60, duration=1"), names)
    if name == "docs/api.md":
        assert audio.read(tmp_path / "stems/song/vocals.flac").samples.shape == (44_100, 2)
        whole = names["made"].stems["vocals"]
        assert np.abs(audio.read(tmp_path / "vocals.wav").samples - whole).max() < 2**-14


def test_the_page_of_the_python_interface_names_all_of_it() -> None:
    table = (ROOT / "docs/api.md").read_text("utf-8").partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))) | {
        "Audio"
    } == set(kmdx.__all__)


def test_the_readme_shows_the_published_scores_of_leaderboard_c() -> None:
    readme = (ROOT / "README.md").read_text("utf-8").replace("**", "")
    (table,) = (each for each in published.tables() if "leaderboard C" in each.title)
    for row in table.rows:
        name = "this ensemble" if row.ours else row.name
        scores = [row.average, *(row.scores[stem] for stem in ("bass", "drums", "other", "vocals"))]
        numbers = next(line for line in readme.splitlines() if line.startswith(f"| {name} |")).split("|")[
            2:-1
        ]
        assert [float(number) for number in numbers] == scores


def test_the_readme_shows_the_measured_scores_of_ensembles() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    with (ROOT / "recipes/mini/scores.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["set"], row["way"]) == ("musdb18-excerpts", "plan")
        ]
    mini = statistics.fmean(float(row["sdr"]) for row in rows)
    measured = (ROOT / "benchmarks/results/2026-11.md").read_text("utf-8")
    htdemucs = float(re.findall(r"^\| mean \| ([\d.]+) ", measured, re.MULTILINE)[0])
    assert re.search(rf"^\| `mini` .*\| {mini:.2f} dB on", readme, re.MULTILINE)
    assert re.search(rf"^\| `htdemucs` .*\| {htdemucs:.2f} dB on", readme, re.MULTILINE)
