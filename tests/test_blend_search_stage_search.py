"""The search over the stages of a plan."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blend_cases as cases
import numpy as np
import pytest
import soundfile
import yaml
from blend_cases import SONGS, STEMS, Result
from conftest import noise

from evaluator.blend_search import stage_moves, stage_search
from evaluator.dataset import find_tracks
from evaluator.metrics import global_sdr
from kmdx import Separator, plan_file, signals
from kmdx.challenge import TIME_FACTOR
from kmdx.errors import KmdxError
from kmdx.nodes import Sum

collected, copied, data, plan_of_two, ran, run, staged = (
    cases.collected,
    cases.copied,
    cases.data,
    cases.plan_of_two,
    cases.ran,
    cases.run,
    cases.staged,
)


def test_moves_change_residuals_and_network_inputs() -> None:
    plan = plan_file.load("leaderboard_c")
    found = stage_moves.moves(plan)
    assert {move.node for move in found} == {"mdx_rest", "x1", "x2", "x3"}
    of_x1 = [dict(move.changes) for move in found if move.node == "x1"]
    assert of_x1 == [{"V.vocals": 1}, {"M.vocals": 1}, {"V.vocals": 1, "M.vocals": -1}]
    changed = found[-1].applied(plan, -0.1)
    assert changed.nodes["x3"].terms == {"x2": 1, "B.bass": -1.1}
    search = stage_moves.Search(plan, [], [], found)
    assert search.dependent_runs(next(move for move in found if move.node == "x1")) == ["D", "B"]
    assert search.dependent_runs(next(move for move in found if move.node == "x3")) == []
    assert {move.node for move in stage_moves.moves(plan, ["x2"])} == {"x2"}
    with pytest.raises(KmdxError, match="'x9' is not a sum that later stages take as input; available:"):
        stage_moves.moves(plan, ["x9"])


@pytest.mark.slow
def test_a_stage_search_costs_what_it_announced_and_reruns_only_what_changed(
    run: Callable[..., Result], staged: Path, data: Path, tmp_path: Path, ran: list[str]
) -> None:
    arguments = ("stages", staged, data, "--device", "cpu", "--precision", "fp32", "--search", 3)
    dry = run(*arguments, "--dry-run")
    assert dry.code == 0
    assert ran == []
    # x1 has three moves, each tried twice on three songs, and D takes it as input; rest costs nothing.
    said = 3 * 3 + 3 * 2 * 3 + 1 * (3 + 1)
    assert f"at most {said} network runs on 3 songs, plus 1 held out for the result" in dry.out
    assert "time unknown" in dry.out

    output = tmp_path / "found.yaml"
    done = run(*arguments, "-o", output)
    assert dry.out.strip() in done.out
    assert done.code == 0, done.err
    assert said - 1 <= len(ran) <= said
    assert ran.count("one") == 4, "the first network's input does not change"
    found, published = plan_file.load(output), plan_file.load(staged)
    assert found.nodes["rest"].terms["W.drums"] > -0.4, "less of a random network is better"
    scores = {}
    for plan in (staged, output):
        separator = Separator(plan, device="cpu", precision="fp32")
        for song in SONGS:
            folder = data / "test" / song
            stems = separator.separate(soundfile.read(folder / "mixture.wav", dtype="float32")[0], 44100)
            truths = {stem: soundfile.read(folder / f"{stem}.wav", dtype="float32")[0] for stem in STEMS}
            sdr = [global_sdr(truths[stem], stems[stem]) for stem in STEMS if truths[stem].any()]
            scores[plan, song] = np.mean(sdr)
    held = [song for song in SONGS if f"Held out: {song}" in output.read_text("utf-8")]
    assert len(held) == 1
    searched = [song for song in SONGS if song not in held]
    for songs, name in ((searched, "searched"), (held, "held out")):
        (row,) = [line for line in done.out.splitlines() if line.startswith(name)]
        before, after = (np.mean([scores[plan, song] for song in songs]) for plan in (staged, output))
        said_count, said_before, said_after, said_gain = map(float, row.removeprefix(name).split()[:4])
        assert said_count == len(songs)
        assert said_before == pytest.approx(before, abs=0.02)
        assert said_after == pytest.approx(after, abs=0.02)
        assert said_gain == pytest.approx(said_after - said_before, abs=2e-3)
        assert after > before
    for name, node in published.nodes.items():
        if name not in {move.node for move in stage_moves.moves(published)}:
            assert found.nodes[name] == node, "only sums that stages hear, or residuals, are moved"


def test_a_stage_search_needs_no_more_disk_space_than_it_announced(
    run: Callable[..., Result], staged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("stages", staged, data, "--device", "cpu", "--precision", "fp32", "--only", "x1")
    arguments = (*arguments, "--tracks", "[ad]", "--search", 1, "--scratch", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)  # restored after the test
    most = 0
    stored = stage_search.join

    def watched(*given: Any, **options: Any) -> np.ndarray:
        nonlocal most
        array = stored(*given, **options)
        most = max(most, sum(map(len, signals._mapped.values())))
        return array

    monkeypatch.setattr(stage_search, "join", watched)
    done = run(*arguments)
    assert done.code in (0, 1), done.err
    tracks = find_tracks(data, "test", "[ad]")
    published = plan_file.load(staged)
    search = stage_moves.Search(published, tracks[:1], tracks[1:], stage_moves.moves(published, ["x1"]))
    assert 0.5 * search.cost().disk < most <= search.cost().disk
    assert "GB of disk" in done.out
    assert tempfile.gettempdir() == str(tmp_path)
    assert not [*tmp_path.iterdir()]

    monkeypatch.setattr(stage_search.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    done = run(*arguments)
    assert done.code == 2
    assert "only 0.00 GB are free; choose another folder (--scratch)" in done.err
    assert "no such folder" in run(*arguments[:-1], tmp_path / "no").err


def test_invalid_stage_searches_are_refused(
    run: Callable[..., Result], staged: Path, plan_of_two: Path, data: Path, copied: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat.yaml"
    content = yaml.safe_load(plan_of_two.read_text("utf-8"))
    for network in content["networks"].values():
        network["weights"]["file"] = str(plan_of_two.parent / network["weights"]["file"])
    content["signals"] = {"V": {"network": "one", "hears": "mixture"}}
    content["stems"] = {"bass": {"sum": {"V.bass": 1}}}
    flat.write_text(yaml.safe_dump(content), "utf-8")
    for arguments, message in (
        (("stages", flat, data), "no later stage takes a sum of estimates as input"),
        (("stages", staged, data, "--only", "rust"), "'rust' is not a sum"),
        (("stages", staged, data, "--step", "0"), "--step 0: expected"),
        (("stages", staged, data, "--search", "5"), "--search 5: expected 1 to 4"),
        (("stages", staged, data, "--collected", tmp_path), "is not a collection"),
        (("stages", "leaderboard_c", data, "--collected", copied), "a collection of another plan"),
        (("members", copied, "-o", tmp_path / "found.yaml"), "needs a --budget"),
        (("members", copied, "--budget", "-1"), f"such as {TIME_FACTOR:g}"),
    ):
        done = run(*arguments)
        assert done.code == 2, arguments
        assert message in done.err, (message, done.err)
    for path in sorted((copied / "songs").glob("*.json"))[1:]:
        path.unlink()
    for command_name, message in (
        ("solve", "has one song, so weights found on it cannot be validated on another"),
        ("members", "too few songs to hold one out"),
    ):
        done = run(command_name, copied)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    alone = run(
        "stages",
        staged,
        data,
        "--tracks",
        "a",
        "--only",
        "rest",
        "--device",
        "cpu",
        "-o",
        tmp_path / "x.yaml",
    )
    assert alone.code == 1
    assert "no song was held out" in alone.out
    assert not (tmp_path / "x.yaml").exists()


def test_a_separator_can_run_another_plan_with_the_same_networks(plan_of_two: Path, small: Path) -> None:
    separator = Separator(plan_of_two, device="cpu", precision="fp32")
    plan = plan_file.load(plan_of_two)
    doubled = replace(plan, nodes={**plan.nodes, "bass": Sum({"V.bass": 2.0})})
    song = noise(8000)
    own, other = separator.separate(song, 44100), separator.with_plan(doubled).separate(song, 44100)
    assert other["drums"] == pytest.approx(own["drums"], abs=1e-7)
    assert other["bass"].std() > 1.1 * own["bass"].std()
    assert separator.plan == plan
    with pytest.raises(KmdxError, match="its networks differ from the loaded ones"):
        separator.with_plan(plan_file.load(small))
