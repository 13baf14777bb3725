"""``kmdx separate --budget``: a speed level chosen by measured windows, with a pretended clock."""

from __future__ import annotations

import json
from pathlib import Path

import cli_cases
import pytest
import yaml
from cli_cases import Run, write
from conftest import noise

from kmdx import benchmark, budget, manifest, precisions
from kmdx.errors import DeviceError
from kmdx.separator import Separator

run = cli_cases.run
WINDOW = {"fp32": 0.05, "bf16": 0.02, "fp16": 0.02}  # seconds, of a window of half a second


@pytest.fixture
def overlapping(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small plan with so much overlap that every level takes another time."""
    plan = yaml.safe_load(small.read_text("utf-8"))
    plan["networks"]["htdemucs"]["overlap_add"]["overlap"] = 0.75
    plan["networks"]["htdemucs"]["weights"]["file"] = str(small.parent / "small.ckpt")
    path = tmp_path_factory.mktemp("overlapping") / "overlapping.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")
    return path


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Networks whose windows were timed; the times are pretended, and the CPU is fast at bfloat16."""
    found: list[str] = []

    def seconds(separator: Separator, name: str) -> float:
        found.append(name)
        return WINDOW[separator.precisions[name]]

    monkeypatch.setattr(budget, "window_seconds", seconds)
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    return found


@pytest.fixture
def separate(run: Run, overlapping: Path) -> Run:
    return lambda *arguments: run(
        "separate", *arguments, "-e", overlapping, "-o", "out", "--device", "cpu", "--stems", "vocals"
    )


def slow_down(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    measured = budget.window_seconds
    monkeypatch.setattr(budget, "window_seconds", lambda *given: factor * measured(*given))


def speeds_of(folder: Path) -> dict[str, str]:
    records = folder.glob(f"*/{manifest.FOLDER}/.*.json")
    found = {
        path.parents[1].name: json.loads(path.read_text("utf-8"))["settings"]["speed"] for path in records
    }
    return dict(sorted(found.items()))


@pytest.mark.parametrize(
    ("factor", "speed", "windows"),  # a window each 1/8, 1/4 and 0.45 s, in three runs
    [
        (2.0, "leaderboard", 3 * 0.05 * 8), (1.0, "balanced", 3 * 0.02 * 4), (0.2, "fast", 3 * 0.02 / 0.45),
        (0.1, None, 3 * 0.02 / 0.45),
    ],
)  # fmt: skip
def test_the_level_with_the_most_work_within_the_budget_is_chosen(
    overlapping: Path, timed: list[str], factor: float, speed: str | None, windows: float
) -> None:
    loaded = []

    def load(level: str) -> Separator:
        loaded.append(level)
        return Separator(overlapping, device="cpu", speed=level)

    choice = budget.choose(load, factor)
    assert len(loaded) == len({*loaded}), "loading takes longer than measuring"
    assert choice.speed == (speed or "fast")
    assert choice.fits == (speed is not None)
    assert choice.factor == pytest.approx(windows, rel=2e-3), "of a song of four minutes"


def test_only_the_networks_of_the_requested_stems_count(overlapping: Path, timed: list[str]) -> None:
    one, all_of_them = (
        budget.WindowTimes().factor(Separator(overlapping, device="cpu", stems=stems))
        for stems in (["vocals"], None)
    )
    assert all_of_them == pytest.approx(3 * one)


def test_networks_of_the_same_sizes_are_timed_once(leaderboard: Path, timed: list[str]) -> None:
    budget.WindowTimes().factor(Separator(leaderboard, device="cpu"))
    assert sum(name.startswith("ft_") for name in timed) == 1
    assert len(timed) == len({*timed}) < 10


def test_no_more_windows_are_timed_than_needed_to_exceed_the_budget(
    leaderboard: Path, timed: list[str]
) -> None:
    separator = Separator(leaderboard, device="cpu")
    assert budget.WindowTimes().factor(separator, 0.01) == float("inf")
    assert len(timed) == 1


def test_a_window_is_timed_several_times_after_a_first_one(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    took = iter([0.3, 0.1, 0.2, 9.0])

    def seconds(network: benchmark.TimedNetwork) -> float:
        clock[0] += (found := next(took))
        return found

    monkeypatch.setattr(benchmark.TimedNetwork, "seconds", seconds)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    separator = Separator(small, device="cpu")
    assert budget.window_seconds(separator, "htdemucs") == pytest.approx(0.2)
    assert next(took) == 9.0, "half a second is enough"


def test_a_window_that_does_not_fit_into_memory_is_one_line(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(network: benchmark.TimedNetwork) -> float:
        raise MemoryError

    monkeypatch.setattr(benchmark.TimedNetwork, "seconds", fail)
    with pytest.raises(DeviceError, match="out of memory on cpu with one window of htdemucs"):
        budget.window_seconds(Separator(small, device="cpu"), "htdemucs")


def test_a_damaged_record_does_not_choose_the_level(separate: Run, timed: list[str], tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    assert separate("song.wav", "--speed", "fast").code == 0
    (path,) = (tmp_path / "out").glob(f"*/{manifest.FOLDER}/.*.json")
    content = json.loads(path.read_text("utf-8"))
    content["settings"]["speed"] = ["fast"]
    path.write_text(json.dumps(content), "utf-8")
    result = separate("song.wav", "--budget", 9)
    assert result.err.startswith("speed leaderboard: about")


def test_a_real_window_takes_time(small: Path) -> None:
    assert budget.window_seconds(Separator(small, device="cpu"), "htdemucs") > 0


def test_the_command_prints_and_records_the_level(separate: Run, timed: list[str], tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    result = separate("song.wav", "--budget", 0.1)
    assert result.code == 0, result.err
    assert result.err.splitlines()[0] == "speed balanced: about 0.08 × the duration of a song"
    assert speeds_of(tmp_path / "out") == {"song": "balanced"}
    made = (tmp_path / "out" / "song" / "vocals.wav").read_bytes()
    assert separate("song.wav", "--speed", "balanced").code == 0, "it is the same as without a budget"
    assert separate("song.wav", "--speed", "balanced", "--overwrite").code == 0
    assert (tmp_path / "out" / "song" / "vocals.wav").read_bytes() == made


def test_a_resumed_batch_keeps_its_level_even_if_the_machine_is_slower_now(
    separate: Run, timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "songs" / "a.wav", noise(20_000))
    assert separate("songs", "--budget", 0.1).code == 0
    timed.clear()
    write(tmp_path / "songs" / "b.wav", noise(20_000, seed=1))
    slow_down(monkeypatch, 1.5)
    result = separate("songs", "--budget", 0.1)
    assert (result.code, timed) == (0, []), result.err
    assert result.err.splitlines()[0] == "speed balanced, as finished stems in out"
    assert speeds_of(tmp_path / "out") == {"a": "balanced", "b": "balanced"}

    again = separate("songs", "--budget", 0.1, "--overwrite")
    assert again.err.splitlines()[0].startswith("speed fast: about ")
    assert speeds_of(tmp_path / "out") == {"a": "fast", "b": "fast"}


def test_another_stem_of_a_finished_song_gets_the_same_level(
    run: Run, separate: Run, overlapping: Path, timed: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    assert separate("song.wav", "--speed", "fast").code == 0
    result = run("separate", "song.wav", "-e", overlapping, "-o", "out", "--device", "cpu",
                 "--stems", "drums", "--format", "flac", "--budget", 9)  # fmt: skip
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "song" / "drums.flac").is_file()
    assert timed == []


def test_songs_with_stems_of_two_levels_are_refused_in_one_line(
    separate: Run, timed: list[str], tmp_path: Path
) -> None:
    for name, speed in (("a", "fast"), ("b", "leaderboard")):
        write(tmp_path / "songs" / f"{name}.wav", noise(20_000))
        assert separate(f"songs/{name}.wav", "--speed", speed).code == 0
    result = separate("songs/a.wav", "songs/b.wav", "--budget", 1)
    assert (result.code, timed) == (2, [])
    (error,) = result.errors
    assert "at the speeds leaderboard and fast" in error
    assert "use --speed instead, or --overwrite" in error


def test_stems_made_with_other_settings_do_not_choose_the_level(
    separate: Run, timed: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    assert separate("song.wav", "--speed", "fast", "--duration", 0.2).code == 0
    result = separate("song.wav", "--budget", 9)
    assert result.code == 2
    assert "made with different settings" in result.errors[0]
    assert "speed leaderboard: about" in result.err


def test_a_budget_that_no_level_meets_is_a_warning(separate: Run, timed: list[str], tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    result = separate("song.wav", "--budget", 0.01)
    assert result.code == 0
    expected = "warning: no speed is within --budget 0.01; fast takes about 0.04 × the duration of a song"
    assert result.err.splitlines()[0] == expected
    assert speeds_of(tmp_path / "out") == {"song": "fast"}


def test_without_songs_nothing_is_measured(separate: Run, timed: list[str], tmp_path: Path) -> None:
    assert separate("none.wav", "--budget", 1).code == 2
    assert timed == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget 0: expected seconds of work per second of song, such as 1.57"),
        (["--budget", "nan"], "--budget nan: expected seconds"),
        (["--budget", "inf"], "--budget inf: expected seconds"),
        (["--budget", "-1"], "--budget -1: expected seconds"),
        (["--budget", "1", "--speed", "leaderboard"], "leave out --speed or --budget"),
        (["--budget", "1", "--workers", "2"], "with --cluster or --workers, choose a --speed"),
        (["--budget", "1", "--cluster", "auto"], "with --cluster or --workers, choose a --speed"),
    ],
)
def test_an_impossible_budget_is_one_line(
    separate: Run, tmp_path: Path, options: list[str], message: str
) -> None:
    write(tmp_path / "song.wav", noise(9_000))
    result = separate("song.wav", *options)
    assert result.code == 2
    (error,) = result.errors
    assert message in error
    assert not (tmp_path / "out").exists()
