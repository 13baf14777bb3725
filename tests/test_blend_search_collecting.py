"""Inner products collected from files: exact, resumable, and only for the same songs and plan."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blend_cases as cases
import numpy as np
import pytest
import soundfile
import tiny
import torch
from blend_cases import COLLECT, SONGS, STEMS, Result
from conftest import noise

from evaluator.blend_search import collecting, inner_products
from evaluator.blend_search.collection import load
from evaluator.metrics import global_sdr
from evaluator.scoring import score_song
from kmdx import Separator, audio, cli, ensemble
from kmdx.errors import KmdxError
from kmdx.signals import Signal

collected, copied, data, plan_of_two, ran, run = (
    cases.collected,
    cases.copied,
    cases.data,
    cases.plan_of_two,
    cases.ran,
    cases.run,
)


def separated(plan: Path, data: Path, output: Path) -> None:
    """Make the package's own command write 16-bit stems of all songs."""
    arguments = [
        "separate",
        str(data),
        "-o",
        str(output),
        "-e",
        str(plan),
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kmdx", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code


def measured(data: Path, output: Path) -> dict[str, dict[str, float]]:
    """The evaluator's scores of each song's stems, computed from files."""
    return {
        name: score_song(
            {stem: data / "test" / name / f"{stem}.wav" for stem in STEMS},
            {stem: output / "test" / name / f"{stem}.wav" for stem in STEMS},
        ).scores["global_sdr"]
        for name in SONGS
    }


def test_predicted_scores_match_the_evaluator_on_16_bit_files(
    run: Callable[..., Result], plan_of_two: Path, collected: Path, data: Path, tmp_path: Path
) -> None:
    found = tmp_path / "found.yaml"
    done = run(
        "solve", collected, "-o", found, "--anyway", "--prior", "0.01", "--json", tmp_path / "all.json"
    )
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "all.json").read_text("utf-8"))["stems"]
    for plan, key in ((plan_of_two, "published_sdr"), (found, "fitted_sdr")):
        output = tmp_path / key
        separated(plan, data, output)
        scores = measured(data, output)
        for stem in STEMS:
            for song, sdr in said[stem][key].items():
                # Of stems of a few steps of 16 bits, rounding errors are not quite those of noise.
                few = "quiet" in song and stem != "vocals"
                assert sdr == pytest.approx(scores[song][stem], abs=0.1 if few else 0.01), (key, song, stem)
    assert set(said["bass"]["published_sdr"]) == set(SONGS) - {"c, no bass"}
    assert min(said["vocals"]["fitted_sdr"].values()) > 10, "vocals prevail, and errors are small"


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_the_effect_of_16_bits_on_a_very_quiet_stem_is_predicted(offset: float, tmp_path: Path) -> None:
    """Also if the true stem was itself rounded down, so that half a step is not an error."""
    truth, error = noise(40_000, level=1e-3), noise(40_000, seed=1, level=1e-4)
    truth += np.float32(offset * inner_products.STEP)
    estimate = truth + error - np.float32(offset * inner_products.STEP)
    audio.write(tmp_path / "estimate.wav", estimate, 44100)
    scored = global_sdr(truth, soundfile.read(tmp_path / "estimate.wav", dtype="float32")[0])
    (foretold,) = inner_products.measure(truth, [estimate]).sdr(np.ones(1))
    assert foretold == pytest.approx(scored, abs=0.01)
    assert abs(global_sdr(truth, estimate) - scored) > 0.02


def test_inner_products_match_those_of_whole_signals(
    collected: Path, plan_of_two: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(collected)
    song = data / "test" / "d"
    mixture = soundfile.read(song / "mixture.wav", dtype="float32")[0]
    truth = soundfile.read(song / "drums.wav", dtype="float32")[0]
    stem = next(stem for stem in whole.stems if stem.name == "drums")
    separator = Separator(collected / "plan.yaml", device="cpu", precision="fp32")
    found = separator.signals(mixture, 44100, stem.signals)
    exact = np.stack([found[name].ravel() for name in stem.signals], dtype=np.float64)
    number = whole.songs.index("d")
    assert stem.products.gram[number] == pytest.approx(exact @ exact.T, rel=1e-5, abs=1e-7)
    assert stem.products.cross[number] == pytest.approx(
        exact @ (truth.astype(float).ravel() + inner_products.STEP / 2), rel=1e-4, abs=1e-6
    )
    assert stem.products.energy[number] == pytest.approx(np.square(truth.astype(float)).sum())
    assert stem.published == pytest.approx([0.6, 0.2, 0.2])
    assert whole.costs.keys() == {"V", "W", "D"}
    assert all(cost > 0 for cost in whole.costs.values())
    monkeypatch.setattr("kmdx.signals.BLOCK", 1000)
    rows = [truth, *(found[name] for name in stem.signals)]
    for name, value in vars(inner_products.measure(rows[0], rows[1:])).items():
        assert value[0] == pytest.approx(getattr(stem.products, name)[number], rel=1e-6, abs=1e-9), name


def test_a_collection_is_resumed_with_the_relative_path_of_its_plan(
    run: Callable[..., Result], plan_of_two: Path, data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plan_of_two.parent)
    done = run("collect", plan_of_two.name, data, "-o", copied, *COLLECT)
    assert done.err.count("already collected") == len(SONGS)


def test_a_plan_and_its_weights_may_be_at_a_url(
    run: Callable[..., Result],
    plan_of_two: Path,
    data: Path,
    collected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    for file in plan_of_two.parent.iterdir():
        memory.pipe_file(f"/plans/{file.name}", file.read_bytes())
    plan = f"memory://plans/{plan_of_two.name}"
    done = run("collect", plan, data, "-o", tmp_path / "new", *COLLECT)
    assert done.code == 0, done.err
    assert load(tmp_path / "new").songs == load(collected).songs


def test_each_network_runs_once_per_song(
    run: Callable[..., Result], plan_of_two: Path, data: Path, tmp_path: Path, ran: list[str]
) -> None:
    arguments = ("collect", plan_of_two, data, "-o", tmp_path / "new", *COLLECT)
    assert run(*arguments, "--tracks", "a").code == 0
    assert sorted(ran) == ["one", "two", "two"]
    assert run(*arguments).code == 0
    assert len(ran) == 3 * len(SONGS), "the first song was there"
    done = run(*arguments)
    assert done.err.count("already collected") == len(SONGS)
    assert len(ran) == 3 * len(SONGS)


def test_a_collection_resumes_after_an_interruption(
    run: Callable[..., Result], collected: Path, plan_of_two: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    measure = collecting.measure_song

    def interrupted(separator: Separator, own: Any, track: Any) -> Any:
        if track.name == SONGS[2]:
            raise KeyboardInterrupt
        return measure(separator, own, track)

    monkeypatch.setattr(collecting, "measure_song", interrupted)
    arguments = ("collect", plan_of_two, data, "-o", tmp_path / "new", *COLLECT)
    done = run(*arguments)
    assert done.code == 130
    assert "repeat the command to resume" in done.err
    assert load(tmp_path / "new").songs == SONGS[:2]
    monkeypatch.setattr(collecting, "measure_song", measure)
    assert run(*arguments).code == 0
    for again, before in zip(load(tmp_path / "new").stems, load(collected).stems, strict=True):
        assert np.array_equal(again.products.gram, before.products.gram)


def test_a_collection_with_other_settings_is_refused(
    run: Callable[..., Result], plan_of_two: Path, data: Path, copied: Path, small: Path, tmp_path: Path
) -> None:
    for plan, options, difference in (
        (small, COLLECT, "ensemble was two, is small"),
        (plan_of_two, COLLECT[1:], "all_estimates was True, is False"),
        (plan_of_two, (*COLLECT, "--speed", "fast"), "speed was leaderboard, is fast"),
        (plan_of_two, (*COLLECT, "--engine", "plain"), "engine was tuned, is plain"),
    ):
        done = run("collect", plan, data, "-o", copied, *options)
        assert (done.code, done.out) == (2, "")
        assert difference in done.err
    other = shutil.copytree(plan_of_two.parent, tmp_path / "other")
    torch.save({"state": tiny.demucs(tiny.HTDEMUCS, 9).state_dict()}, other / "two.ckpt")
    done = run("collect", other / "two.yaml", data, "-o", copied, *COLLECT)
    assert done.code == 2
    assert "weights." in done.err


def test_a_song_that_changed_is_collected_again(
    run: Callable[..., Result], plan_of_two: Path, data: Path, copied: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(data, tmp_path / "data")
    for stem in (*STEMS, "mixture"):
        path = changed / "test" / "a" / f"{stem}.wav"
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples * 0.5, rate)
    before = load(copied).stems[0].products.energy
    done = run("collect", plan_of_two, changed, "-o", copied, *COLLECT)
    assert done.code == 0
    assert done.err.count("already collected") == 3
    after = load(copied).stems[0].products.energy
    assert after[0] == pytest.approx(before[0] / 4, rel=1e-2)
    assert np.array_equal(after[1:], before[1:])


def test_signals_are_kept_on_request(
    run: Callable[..., Result], plan_of_two: Path, data: Path, copied: Path
) -> None:
    arguments = ("collect", plan_of_two, data, "-o", copied, *COLLECT, "--tracks", "d", "--keep")
    assert not (copied / "signals").exists()
    assert run(*arguments).code == 0
    stem = next(stem for stem in load(copied).stems if stem.name == "vocals")
    rows = [soundfile.read(copied / "signals" / "d" / "vocals" / f"{name}.wav")[0] for name in stem.signals]
    exact = np.stack([row.ravel() for row in rows])
    assert stem.products.gram[SONGS.index("d")] == pytest.approx(exact @ exact.T, rel=1e-9)
    assert "already collected" in run(*arguments).err


def test_what_a_kill_left_among_the_signals_is_removed(
    run: Callable[..., Result], plan_of_two: Path, data: Path, copied: Path
) -> None:
    left = copied / "signals" / "d" / "vocals" / ".V.vocals.wav.0123abcd.partial"
    left.parent.mkdir(parents=True)
    left.touch()
    arguments = ("collect", plan_of_two, data, "-o", copied, *COLLECT, "--tracks", "d", "--keep")
    assert run(*arguments).code == 0
    assert not left.exists()
    assert any(left.parent.iterdir())


def test_a_record_is_saved_even_if_its_signals_cannot_be_kept(
    run: Callable[..., Result], plan_of_two: Path, data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied / "songs" / "d.json").read_text("utf-8")
    arguments = ("collect", plan_of_two, data, "-o", copied, *COLLECT, "--tracks", "d", "--keep")

    def full(*_: Any) -> None:
        raise KmdxError("no space left on device")

    monkeypatch.setattr(audio, "write_all", full)
    done = run(*arguments)
    assert done.code == 1
    assert "1 of 1 songs are in" in done.out
    assert "d: collected, but its signals could not be kept: no space left" in done.err
    assert "warning: not all signals were kept" in done.err
    record = json.loads((copied / "songs" / "d.json").read_text("utf-8"))
    assert record["status"] == "ok"
    assert record["stems"] == json.loads(before)["stems"]

    def broken(*_: Any) -> None:
        raise KmdxError("the network is gone")

    monkeypatch.setattr(collecting, "measure_song", broken)
    unchanged = (copied / "songs" / "d.json").read_text("utf-8")
    assert run(*arguments).code == 1
    assert (copied / "songs" / "d.json").read_text("utf-8") == unchanged


def test_a_song_with_nan_is_reported_and_left_out(
    run: Callable[..., Result], plan_of_two: Path, data: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(data, tmp_path / "data")
    samples, rate = soundfile.read(spoilt / "test" / "a" / "drums.wav", dtype="float32")
    samples[100] = np.nan
    soundfile.write(spoilt / "test" / "a" / "drums.wav", samples, rate, "FLOAT")
    done = run("collect", plan_of_two, spoilt, "-o", tmp_path / "new", *COLLECT)
    assert done.code == 1
    assert "3 of 4 songs are in" in done.out
    assert "a: NaN or infinity in its samples, left out" in done.err
    solved = run("solve", tmp_path / "new", "--json", tmp_path / "all.json")
    assert "a is left out: NaN or infinity" in solved.err
    assert json.loads((tmp_path / "all.json").read_text("utf-8"))["songs"] == [*SONGS[1:]]
    alone = run("collect", plan_of_two, spoilt, "-o", tmp_path / "alone", *COLLECT, "--tracks", "a")
    assert alone.code == 2
    assert "none of 1 songs can be used; a: NaN" in alone.err


def test_a_network_that_returns_nan_fails_the_song(
    run: Callable[..., Result], plan_of_two: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = ensemble.SongSignals.estimate

    def spoilt(song: ensemble.SongSignals, name: str, network: str, reference: str) -> dict[str, Signal]:
        estimates = estimate(song, name, network, reference)
        next(iter(estimates.values())).tensor[0, 5] = math.nan
        return estimates

    monkeypatch.setattr(ensemble.SongSignals, "estimate", spoilt)
    done = run("collect", plan_of_two, data, "-o", tmp_path / "new", *COLLECT, "--tracks", "a")
    assert done.code == 1
    assert "NaN" in done.err
    solved = run("solve", tmp_path / "new")
    assert solved.code == 2
    assert "none of its 1 songs was collected; a: " in solved.err
