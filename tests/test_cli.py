"""The command apart from ``separate``: help, ensembles and models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_cases
import pytest
from cli_cases import Run

from kmdx import audio, cli, drawing, engines, plan_file, precisions, speeds, weights
from kmdx.errors import DownloadError
from kmdx.weights import pulling

run = cli_cases.run


def test_the_choices_match_the_library() -> None:
    assert [choice.value for choice in cli.Precision] == list(precisions.PRECISIONS)
    assert [choice.value for choice in cli.SpeedName] == list(speeds.levels())
    assert cli.SpeedName.leaderboard.value == speeds.DEFAULT
    assert [choice.value for choice in cli.Engine] == [*engines.ENGINES]
    assert cli.Engine.tuned.value == engines.DEFAULT
    assert [choice.value for choice in cli.FormatName] == list(audio.FORMATS)


def test_the_help_about_weights_states_where_they_are(run: Run) -> None:
    text = " ".join(run("models", "--help").out.split())
    assert "$KMDX_MODELS; models/ of the checkout that contains the current folder" in text


def test_a_models_folder_with_brackets_in_its_name_is_printed_unchanged(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "[red]a[" / "x]"))
    assert f"folder: {tmp_path}/[red]a[/x]" in run("models", "list").out


@pytest.mark.parametrize(
    ("modules", "unloaded"),
    [("cli", {"yaml", "filelock"}), ("cli, plan, weights", {"torch", "demucs", "pydantic"})],
)
def test_the_command_starts_without_loading_what_it_may_not_need(modules: str, unloaded: set[str]) -> None:
    check = f"import sys; from kmdx import {modules}; sys.exit(bool({unloaded} & {{*sys.modules}}))"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_help_and_version_are_printed(run: Run) -> None:
    assert "separate" in run("--help").out
    assert run("--version").out.startswith("kmdx-net ")
    assert run("separate", "--nope").code == 2


def test_ensembles_are_listed_and_shown(run: Run, leaderboard: Path, tmp_path: Path) -> None:
    listed = run("ensembles").out
    for name in ("leaderboard_c", "htdemucs", "htdemucs_ft"):
        assert name in listed
    shown = run("ensembles", "show", "leaderboard_c", "--svg", "graph.svg").out
    for text in (
        "10 networks",
        "research only",
        "none stated",
        "segments of 7.7 s, overlap 0.85",
        "x − 0.8·V.vocals − 0.2·M.vocals",
    ):
        assert text in shown
    assert (tmp_path / "graph.svg").read_text("utf-8").startswith("<svg")
    assert "4 networks" in run("ensembles", "show", "leaderboard_c", "--stems", "vocals").out
    assert "6 networks" in run("ensembles", "show", "leaderboard_c", "--stems", "bass").out
    assert "not stated" in run("ensembles", "show", leaderboard).out
    assert run("ensembles", "show", "nope").code == 2
    assert (
        "cannot be written" in run("ensembles", "show", "htdemucs", "--svg", "no/such/folder.svg").errors[0]
    )


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_and_cut_no_names(width: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMDX_MODELS", "models")
    monkeypatch.setattr(cli.out, "width", width)
    for command, names in (
        (["models", "list"], [*weights.known(), *weights.checkpoints()]),
        (["ensembles"], plan_file.names()),
    ):
        lines = run(*command).out.splitlines()
        table = [line for line in lines if "  " in line]
        assert {*names} <= {line.split()[0] for line in table}
        assert max(map(len, table)) <= width
        assert "…" not in "".join(table)


def test_nothing_is_to_be_downloaded_for_weights_that_are_here(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    rows = {line.split()[0]: line.split()[1:3] for line in run("ensembles").out.splitlines()}
    assert rows["mini"][0] == "none"
    assert rows["htdemucs"] == ["84", "MB"]


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("compose.yaml", "version: 3", "line 1: unknown key 'version'"),
        ("cut.yaml", "stems: [", "line 2: not valid YAML"),
        ("mini_copy.yaml", "", "the file is empty"),
    ],
)
def test_a_foreign_or_broken_file_in_the_models_folder_does_not_hide_the_ensembles(
    file: str, text: str, reason: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))
    (tmp_path / file).write_text(text, "utf-8")
    listed = run("ensembles")
    assert listed.code == 0
    assert {*plan_file.names()} <= {line.split()[0] for line in listed.out.splitlines()}
    (warning,) = listed.err.splitlines()
    assert warning.startswith(f"warning: {tmp_path / file} is not an ensemble: {reason}")


def test_a_broken_list_of_trained_weights_does_not_hide_the_others(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))
    (tmp_path / weights.TRAINED).write_text("mine: 3", "utf-8")
    assert run("ensembles").err == ""
    listed = run("models", "list")
    assert (listed.code, "mini_bass" in listed.out) == (0, True)
    (warning,) = listed.err.splitlines()
    assert str(tmp_path / weights.TRAINED) in warning


def test_the_drawn_graph_of_the_documentation_is_current() -> None:
    loaded = plan_file.load("leaderboard_c")
    drawn = Path(__file__).parents[1] / "docs" / "leaderboard_c.svg"
    assert drawn.read_text("utf-8") == drawing.svg(loaded, loaded.stems)


def test_models_are_listed_verified_and_located(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    assert run("models", "where").out.strip() == str(tmp_path / "models")
    listed = run("models", "list").out
    assert "htdemucs_ft_vocals" in listed
    assert "research only" in listed
    missing = run("models", "verify", "htdemucs", "mini")
    assert missing.code == 2
    assert "htdemucs             missing: looked for 955717e8-8726e21a.th, " in missing.out
    assert missing.errors == [
        "error: of 5 weights, 1 missing (htdemucs); `kmdx models pull htdemucs` downloads the missing ones (about 84 MB)"
    ]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "955717e8.safetensors").write_bytes(b"broken")
    broken = run("models", "verify", "htdemucs", "kim_vocal_1")
    assert broken.code == 2
    assert "1 missing (kim_vocal_1) and 1 damaged or for another network (htdemucs)" in broken.errors[0]
    whole = run("models", "verify", "mini")
    assert (whole.code, whole.err) == (0, "all 4 weights are present and intact\n")
    assert run("models", "verify", "nope").errors == [
        "error: " + run("models", "pull", "nope").errors[0].removeprefix("error: ")
    ]


def test_a_mistyped_ensemble_is_suggested(run: Run) -> None:
    result = run("models", "pull", "leaderbord_c")
    assert result.code == 2
    assert len(result.errors) == 1
    assert result.errors[0].endswith(" (did you mean 'leaderboard_c'?)")


def test_verify_without_names_checks_every_weight(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    result = run("models", "verify")
    count = len(weights.published())
    assert result.code == 2
    assert len(result.errors) == 1
    assert f"of {count + 4} weights, {count} missing (" in result.errors[0]
    assert (
        f"`kmdx models pull {' '.join(weights.published())}` downloads the missing ones" in result.errors[0]
    )
    assert len(result.out.splitlines()) == count + 4


def test_pulled_weights_are_shown_with_their_license_and_failed_ones_with_the_reasons(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))

    def pull(weight: Any, folder: Path, *more: Any) -> Path:
        if weight.name == "htdemucs_ft_bass":
            raise DownloadError("htdemucs_ft_bass could not be pulled: here and there: no")
        return folder / weight.name

    monkeypatch.setattr(pulling, "_pull", pull)
    result = run("models", "pull", "htdemucs_ft", "955717e8", "kim_vocal_1")
    assert result.code == 2
    assert result.errors == ["error: htdemucs_ft_bass could not be pulled: here and there: no"]
    there = ["htdemucs_ft_vocals", "htdemucs_ft_drums", "htdemucs_ft_other", "htdemucs"]
    assert result.out.splitlines() == [
        *(f"{name}: {tmp_path / name} (license: research only)" for name in there),
        f"kim_vocal_1: {tmp_path / 'kim_vocal_1'} (license: none stated)",
    ]
    assert result.err.count("Meta publishes the code under MIT") == 1
    assert f"license of {', '.join(there)}: research only. Meta publishes" in result.err
    assert "license of kim_vocal_1: none stated. The release" in result.err


def test_pulling_an_ensemble_without_a_connection_is_a_one_line_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody is there
    result = run("models", "pull", "leaderboard_c")
    assert result.code == 2
    (line,) = result.errors
    assert line.startswith("error: 10 of 10 weight files could not be pulled: no connection to ")
    assert "huggingface.co through the proxy" in line
    assert result.err.splitlines()[-1] == line
    assert len(result.err.splitlines()) < 25
    assert max(map(len, result.err.splitlines())) < 400
