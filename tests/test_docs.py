"""The documentation: its commands are parsed, its examples run, and its links, files and messages exist."""

import ast
import csv
import logging
import re
import shlex
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import pytest
import typer
import yaml
from conftest import noise

import kmdx
from evaluator import command as evaluation
from evaluator import comparison_command, described, published, submission_check
from evaluator.blend_search import command as blend_search
from evaluator.tradeoff import command as tradeoff
from kmdx import audio, batch, cli, cluster, familiar, plan_file
from training import command as training

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = {
    "kmdx": cli.app,
    "python local_evaluation.py": evaluation.app,
    "python -m evaluator": evaluation.app,
    "python -m evaluator.compare": comparison_command.app,
    "python -m evaluator.blend_search": blend_search.app,
    "python -m evaluator.tradeoff": tradeoff.app,
    "python -m my_submission.check": submission_check.app,
    "python -m training": training.app,
}
OTHERS = {"curl", ".", "export", "git", "kubectl", "ray", "sudo", "python3", "python3.12"}
"""Commands on the pages that are not of this project; only their syntax is checked."""
PLACEHOLDERS = re.compile(r"…| \| | \[|\$\{")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    """The lines of the indented blocks of a page, which are for a shell."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^ {4,}(.*)", text, re.MULTILINE)
    return [line for line in lines if "→" not in line]


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of each command on a page, and whether it is complete: one in a sentence may not be."""
    lines = shell_lines(page)
    for line in [*lines, *re.findall(r"`([^`]+)`", page.read_text("utf-8"))]:
        text = re.sub(r"^(?:[A-Z_]+=\S* )+", "", line.strip())
        if text.startswith(("kmdx ", "python ")) and "-m pytest" not in text:
            complete = line in lines and not PLACEHOLDERS.search(line)
            yield shlex.split(text.removesuffix("&"), comments=True), complete


def options(command: Any) -> set[str]:
    """Every option of a command and of those below it."""
    own = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return own.union({"--help", "-h"}, *map(options, getattr(command, "commands", {}).values()))


def check(words: list[str], complete: bool) -> None:
    """Fail unless a command and the options after it exist; parse it as the shell does if it is complete."""
    text = " ".join(words)
    known = next((name for name in COMMANDS if text == name or text.startswith(f"{name} ")), None)
    if known is None:
        if words[1] == "-m" and words[2].partition(".")[0] in {"kmdx", *sys.stdlib_module_names}:
            return
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
    if complete:
        found.make_context(known, rest)
    given = {word.strip("[]").partition("=")[0] for word in rest if word.strip("[]").startswith("-")}
    assert given <= options(found), text


@every_page
def test_every_command_on_a_page_can_be_parsed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kmdx"])
    for words, complete in commands(page):
        check(words, complete)
    known = set().union(*(options(typer.main.get_command(app)) for app in COMMANDS.values()))
    known |= {name for option in familiar.OPTIONS for name in option.names.split()}
    known |= {familiar.OTHER_METHOD, familiar.DOWNLOAD, "--install-completion"}
    shown = {name.replace("_", "-") for name in re.findall(r"`(--[a-z][\w-]*)", page.read_text("utf-8"))}
    assert shown <= known


@every_page
def test_every_link_on_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if re.match("https?:", target):
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", urlsplit(target).netloc), target
            assert target.startswith("https:"), target
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        is_of_site = page.parent.name == "docs"
        assert not is_of_site or file.resolve().is_relative_to(page.parent.resolve()), (
            f"not on the site: {target}"
        )
        if anchor:
            titles = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], (
                target
            )


@every_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    folders = "benchmarks|docs|evaluator|kmdx|models|my_submission|recipes|tests|tools|training"
    for name in re.findall(rf"`((?:{folders})/[\w./*-]+)`", page.read_text("utf-8")):
        assert [*ROOT.glob(name.rstrip("/"))], name


@every_page
def test_the_shell_blocks_of_a_page_are_for_commands_that_exist(page: Path) -> None:
    lines = [line for line in shell_lines(page) if not PLACEHOLDERS.search(line) or "EDITOR" in line]
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for command in re.split(r"&&|\n", "\n".join(lines)):
        words = shlex.split(re.sub(r"^\s*(?:[A-Z_]+=\S* )+", "", command), comments=True)
        if not words or words[0] in {"kmdx", "python", "${EDITOR:-vi}", *OTHERS}:
            continue
        if words[0] == "pip":
            named = {extra for word in words for extra in re.findall(r"\.\[([\w,]+)\]", word)}
            assert {extra for names in named for extra in names.split(",")} <= {*extras}, command
        elif words[0] == "make":
            assert {*words[1:]} <= {*targets}, command
        else:
            scripts = [word for word in words if word.endswith(".sh")]
            assert scripts, command
            assert (ROOT / scripts[0]).is_file(), command


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page, "python")], ids=lambda page: page.name
)
def test_the_examples_in_python_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = noise(2 * 44_100)
    audio.write(tmp_path / "song.wav", samples, 44_100)
    audio.write(tmp_path / "song.mp3", samples, 44_100, "mp3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda level: None)
    result = batch.SongResult("album/one.wav", ("vocals",), None, "node")
    monkeypatch.setattr(cluster, "separate", mock.create_autospec(cluster.separate, return_value=[result]))
    names: dict[str, Any] = {"samples": samples, "rate": 44_100}
    with warnings.catch_warnings():
        for block in blocks_of(page, "python"):
            small = re.sub(r'"htdemucs", (?=device|speed)', '"mini", ', block)
            exec(small.replace("start=60, duration=30", "start=0.5, duration=1"), names)
    if page.name == "api.md":
        assert audio.read(tmp_path / "stems/song/vocals.flac").samples.shape == (44_100, 2)
        whole = names["made"].stems["vocals"]
        assert np.abs(audio.read(tmp_path / "vocals.wav").samples - whole).max() < 2**-14


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page, "yaml")], ids=lambda page: page.name
)
def test_the_examples_in_yaml_can_be_read(page: Path, tmp_path: Path) -> None:
    plan, part = tmp_path / "plan.yaml", tmp_path / "part.yaml"
    for block in blocks_of(page, "yaml"):
        content = yaml.safe_load(block)
        part.write_text(block, "utf-8")
        if "signals" in content:
            assert plan_file.load(part).stems
        elif "mixture" in content:
            assert described.load(part).stems
        else:  # the networks of a plan, or the weights of one of them
            network = {"trim_and_join": {"chunk": 261120, "trim": 3840}, **content}
            networks = content.get("networks", {"one": network})
            for each in networks.values():
                each["weights"] = {"my_drums": "mdx_drums"}.get(str(each["weights"]), each["weights"])
            signals = {name.upper(): {"network": name, "hears": "mixture"} for name in networks}
            whole = {"title": "x", "description": "x", "sample_rate": 44100, "networks": networks}
            stems = {name: {"sum": {f"{name.upper()}.drums": 1}} for name in networks}
            plan.write_text(yaml.safe_dump({**whole, "signals": signals, "stems": stems}), "utf-8")
            assert plan_file.load(plan).stems


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    def pages(entry: Any) -> Iterator[str]:
        for each in entry if isinstance(entry, list) else entry.values():
            yield from [each] if isinstance(each, str) else pages(each)

    navigation = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["nav"]
    assert sorted(pages(navigation)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text("utf-8"), re.MULTILINE)
    assert {*shown} >= {f"kmdx.{name}" for name in kmdx.__all__ if name != "__version__"}


def texts(file: Path) -> Iterator[str]:
    """The strings of a module; a part that is computed is an ellipsis."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_on_the_page_about_problems_is_in_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"(?:^- \*\*|^\| |the error \w+ with )`([^`]+ [^`]+)`", page, re.MULTILINE)
    found = "\n".join(text for file in (ROOT / "kmdx").rglob("*.py") for text in texts(file))
    assert len(messages) > 15
    for message in messages:
        for part in message.split("…"):
            assert part.strip(" ,") in found, message


def test_the_page_of_the_python_interface_names_all_of_it() -> None:
    table = (ROOT / "docs/api.md").read_text("utf-8").partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))) | {
        "Audio"
    } == set(kmdx.__all__)


def test_the_docs_show_the_published_scores_of_leaderboard_c() -> None:
    page = (ROOT / "docs/choose.md").read_text("utf-8").replace("**", "")
    (table,) = (each for each in published.tables() if "leaderboard C" in each.title)
    for row in table.rows:
        name = "this ensemble" if row.ours else row.name
        scores = [row.average, *(row.scores[stem] for stem in ("bass", "drums", "other", "vocals"))]
        numbers = next(line for line in page.splitlines() if line.startswith(f"| {name} |")).split("|")[2:-1]
        assert [float(number) for number in numbers] == scores


def test_the_docs_show_the_measured_scores_of_ensembles() -> None:
    page = (ROOT / "docs/choose.md").read_text("utf-8")
    with (ROOT / "recipes/mini/scores.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["set"], row["way"]) == ("musdb18-excerpts", "plan")
        ]
    mini = statistics.fmean(float(row["sdr"]) for row in rows)
    measured = (ROOT / "benchmarks/results/2026-11.md").read_text("utf-8")
    htdemucs = float(re.findall(r"^\| mean \| ([\d.]+) ", measured, re.MULTILINE)[0])
    assert re.search(rf"^\| `mini` .*\| {mini:.2f} dB on", page, re.MULTILINE)
    assert re.search(rf"^\| `htdemucs` .*\| {htdemucs:.2f} dB on", page, re.MULTILINE)
