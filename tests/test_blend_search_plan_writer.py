"""The plans that a blend search writes, and the files that it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import blend_cases as cases
import numpy as np
import pytest
from blend_cases import SONGS, STEMS, Result, known_best

from kmdx import plan_file

collected, copied, data, plan_of_two, run, staged = (
    cases.collected,
    cases.copied,
    cases.data,
    cases.plan_of_two,
    cases.run,
    cases.staged,
)


def test_the_written_plan_states_its_origin_and_is_complete(
    run: Callable[..., Result], collected: Path, plan_of_two: Path, tmp_path: Path
) -> None:
    path = tmp_path / "found.yaml"
    done = run("solve", collected, "-o", path, "--non-negative", "--sum-to-one", "--anyway", "--folds", "2")
    assert done.code == 0, done.err
    assert "cross-validated" in done.out
    assert str(path) in done.out.replace("\n", "")
    text = path.read_text("utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert plan_file.load(plan_of_two).digest[:12] in head
    for said in (
        "4 songs",
        *SONGS,
        "2 folds",
        "weights sum to one",
        "none is negative",
        "Expected",
        "fitted",
    ):
        assert said in head, said
    plan = plan_file.load(path)
    assert "found by evaluator.blend_search" in plan.description
    for stem in STEMS:
        terms = plan.nodes[stem].terms
        assert sum(terms.values()) == pytest.approx(1, abs=1e-5)
        assert all(weight > 0 for weight in terms.values())
    assert set(plan.networks) == set(plan.networks_used(plan.stems)), "no network that nothing needs"
    again = tmp_path / "again.yaml"
    run("solve", collected, "-o", again, "--non-negative", "--sum-to-one", "--anyway", "--folds", "2")
    assert again.read_text("utf-8") == text


def test_stems_that_gain_nothing_keep_their_published_weights_in_the_plan(
    run: Callable[..., Result], copied: Path, tmp_path: Path
) -> None:
    idle = known_best(np.array([0.6, 0.2, 0.2]), len(SONGS))
    for number, path in enumerate(sorted((copied / "songs").glob("*.json"))):
        record = json.loads(path.read_text("utf-8"))
        record["stems"]["drums"] |= {
            "energy": idle.energy[number],
                "constant": idle.energy[number], "cross": idle.cross[number].tolist(), "gram": idle.gram[number].tolist(),
        }  # fmt: skip
        path.write_text(json.dumps(record), "utf-8")
    done = run("solve", copied, "-o", tmp_path / "found.yaml")
    assert done.code == 0, done.err
    assert "published: no gain on held-out songs" in done.out
    terms = plan_file.load(tmp_path / "found.yaml").nodes["drums"].terms
    assert terms == pytest.approx({"V_drums": 0.6, "D_drums": 0.2, "W_drums": 0.2})
    assert "predicted" in done.err, "what was rendered is not what these inner products say"


def test_nothing_is_written_when_nothing_gains(
    run: Callable[..., Result], copied: Path, tmp_path: Path
) -> None:
    done = run("solve", copied, "-o", tmp_path / "found.yaml", "--prior", "inf")
    assert done.code == 1
    assert "no weights are recommended" in done.out
    assert not (tmp_path / "found.yaml").exists()


def test_plans_that_the_command_did_not_write_are_not_overwritten(
    run: Callable[..., Result], copied: Path, plan_of_two: Path, staged: Path, data: Path, tmp_path: Path
) -> None:
    source, other = tmp_path / "source.yaml", tmp_path / "other.yaml"
    source.write_bytes(plan_of_two.read_bytes())
    other.write_text("title: mine\n", "utf-8")
    own = (copied / "plan.yaml").read_bytes()
    arguments = ("solve", copied, "--anyway", "--prior", "1", "-o")
    for path, message in (
        (copied / "plan.yaml", "is in the collection"),
        (source, "is the plan that the weights are for"),
    ):
        for force in ((), ("--force",)):
            done = run(*arguments, path, *force)
            assert done.code == 2
            assert message in done.err
    assert (copied / "plan.yaml").read_bytes() == own
    assert source.read_bytes() == plan_of_two.read_bytes()
    done = run("stages", staged, data, "-o", staged, "--force")
    assert "is the plan that the weights are for" in done.err
    done = run(*arguments, other)
    assert done.code == 2
    assert "use --force to overwrite it" in done.err
    assert other.read_text("utf-8") == "title: mine\n"
    assert run(*arguments, other, "--force").code == 0
    assert run(*arguments, other).code == 0, "its own plan is written over"
    assert "title: mine" not in other.read_text("utf-8")


def test_reports_and_pictures_never_overwrite_collections_or_plans(
    run: Callable[..., Result], copied: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for asked, option in (("solve", "--json"), ("members", "--json"), ("members", "--svg")):
        for path, message in (
            (copied / "run.json", "is in the collection"),
            (copied / "songs" / "new.json", "is in the collection"),
            (tmp_path / "x.yaml", "has the file name of a plan"),
        ):
            done = run(asked, copied, option, path)
            assert (done.code, done.out) == (2, "")
            assert message in done.err
    twice = tmp_path / "x"
    assert "given for two outputs" in run("members", copied, "--json", twice, "--svg", twice).err
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
