"""Songs and other tasks on a Ray cluster of several nodes on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import cli_cases
import cluster_cases
import fsspec
import object_store
import psutil
import pytest
from cli_cases import Run, files_in, write
from cluster_cases import Work
from conftest import noise
from object_store import Store

pytest.importorskip("ray", reason="the cluster needs Ray")

from ray import cloudpickle
from ray.cluster_utils import Cluster

from kmdx import cluster, devices, mirror
from kmdx.cluster import ClusterError, ClusterOptions, Finished, Notice, Pool, Worker
from kmdx.urls import Url

pytestmark = pytest.mark.slow

run, running, store = cli_cases.run, object_store.running, object_store.store
cloudpickle.register_pickle_by_value(cluster_cases)
SONGS = 6
MINI = ("separate", "music", "-e", "mini")


@pytest.fixture(scope="module")
def nodes(running: Store) -> Iterator[Cluster]:
    """A cluster of two nodes with one core each, which can access an object store."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture
def music(tmp_path: Path) -> Path:
    for number in range(SONGS):
        write(tmp_path / "music" / f"song {number}.wav", noise(20_000 + 1000 * number, seed=number))
    return tmp_path / "music"


def do(
    nodes: Cluster, folder: Path, tasks: list[str], seconds: float = 0.0
) -> tuple[dict[str, Finished], list[str]]:
    """Each task's result, and the notices."""
    done: dict[str, Finished] = {}
    notices = []
    options = ClusterOptions(nodes.address)
    with cluster.connected(options):
        for event in Pool(tasks, Work(folder, seconds), folder, [], options).run():
            if isinstance(event, Notice):
                notices.append(event.text)
            else:
                assert tasks[event.number] not in done
                done[tasks[event.number]] = event
    return done, notices


def test_a_cluster_writes_the_same_bytes_as_one_process(
    run: Run, nodes: Cluster, music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = [sys.executable, "-m", "kmdx.cli", *MINI, "-o", "alone"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    many = run(*MINI, "-o", "many", "--cluster", nodes.address, "--log-json", "log")
    assert many.code == 0, many.err
    assert sorted(many.out.splitlines()) == [
        f"music/song {number}.wav → many/song {number} (bass, drums, other, vocals)"
        for number in range(SONGS)
    ]
    alone, on_cluster = files_in(tmp_path / "alone"), files_in(tmp_path / "many")
    assert alone == on_cluster
    for name in alone:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    events = [json.loads(line) for line in (tmp_path / "log").read_text("utf-8").splitlines()]
    songs = [event for event in events if event["event"] == "song"]
    assert [event["status"] for event in songs] == ["separated"] * SONGS
    assert all(event["node"] for event in songs)
    again = run(*MINI, "-o", "alone", "--cluster", nodes.address)
    assert (again.code, again.out) == (0, "")
    assert again.err.count("use --overwrite to separate it again") == SONGS
    assert not list(tmp_path.glob("alone/*/.kmdx/claim")), "finished songs are left as they are"


def test_workers_fetch_songs_from_a_store_and_upload_their_stems(
    run: Run, nodes: Cluster, store: Store, music: Path, tmp_path: Path
) -> None:
    store.files.put(str(music), "music/songs", recursive=True)
    store.files.pipe_file("music/songs/song 1.wav", b"no sound")
    songs = ("separate", "s3://music/songs", "-e", "mini", "--stems", "vocals")
    many = run(*songs, "-o", "s3://music/many", "--cluster", nodes.address)
    alone = run(*songs, "-o", "s3://music/alone")
    assert (many.code, alone.code) == (1, 1)
    assert sorted(many.out.splitlines()) == sorted(alone.out.replace("/alone/", "/many/").splitlines())
    assert many.errors == alone.errors
    assert "error: s3://music/songs/song 1.wav: not a sound file" in many.errors[0]
    assert store.content("music/many").keys() == store.content("music/alone").keys()
    assert not [name for name in store.files.find("music") if "partial" in name]
    again = run(*songs, "-o", "s3://music/many", "--cluster", nodes.address)
    assert (again.code, again.out, again.err.count("already in")) == (1, "", SONGS - 1)


@pytest.mark.parametrize(("song", "output"), [("memory://music/a.wav", "out"), ("music", "memory://out")])
def test_a_url_that_a_node_cannot_access_is_named(
    run: Run, nodes: Cluster, music: Path, song: str, output: str
) -> None:
    fsspec.filesystem("memory").pipe_file("/music/a.wav", b"of this process only")
    result = run("separate", song, "-e", "mini", "-o", output, "--cluster", nodes.address)
    assert (result.code, result.out) == (2, "")
    assert "it cannot access memory://" in result.errors[0]


def test_a_song_that_cannot_be_separated_fails_alone(
    run: Run, nodes: Cluster, music: Path, tmp_path: Path
) -> None:
    (music / "song 1.wav").write_text("no sound")
    result = run(*MINI, "--cluster", nodes.address)
    assert result.code == 1
    assert len(result.out.splitlines()) == SONGS - 1
    (error,) = result.errors
    assert "song 1.wav" in error


def test_songs_are_separated_from_python(nodes: Cluster, music: Path, tmp_path: Path) -> None:
    results = list(
        cluster.separate([music], tmp_path / "out", "mini", address=nodes.address, stems=["vocals"])
    )
    assert sorted(result.song.name for result in results) == [f"song {number}.wav" for number in range(SONGS)]
    assert {(result.stems, result.error, bool(result.node)) for result in results} == {
        (("vocals",), None, True)
    }
    assert all((result.folder / "vocals.wav").is_file() for result in results)


def test_a_task_that_ends_its_worker_twice_has_failed_and_the_others_are_done(
    nodes: Cluster, tmp_path: Path
) -> None:
    tasks = ["a", "kills its worker", "b", "c", "d", "e"]
    done, notices = do(nodes, tmp_path, tasks)
    failed = done.pop("kills its worker")
    assert failed.value is None
    assert failed.failure.startswith("it was given up, because its worker ended twice; a worker on ")
    assert {task: each.value for task, each in done.items()} == {task: task.upper() for task in "abcde"}
    did = [path.name.split(".")[0] for path in tmp_path.glob("did *")]  # again, if a worker died too early
    assert {*did} == {f"did {task}" for task in "abcde"}
    assert len(list(tmp_path.glob("began kills*"))) == 2
    assert sum("a worker on " in notice for notice in notices) == 2


def test_a_fault_fails_its_task_alone_and_warnings_come_back(nodes: Cluster, tmp_path: Path) -> None:
    done, _ = do(nodes, tmp_path, ["raises an error", "warns", "a"])
    assert done["raises an error"].failure == "RuntimeError: out of ideas"
    assert done["warns"].warnings == ("too loud",)
    assert done["a"].warnings == ()


@pytest.mark.parametrize(("own", "expected"), [("3", "3"), (None, "1")])
def test_workers_have_the_threads_of_the_command_or_as_many_as_their_cores(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, expected: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    options = ClusterOptions(nodes.address, cpus=1)
    with cluster.connected(options):
        events = list(
            Pool(["a"], lambda: lambda *_: os.environ["OMP_NUM_THREADS"], tmp_path, [], options).run()
        )
    assert [event.value for event in events if isinstance(event, Finished)] == [expected]


@pytest.mark.parametrize(("gpus", "part"), [(0.5, 0.5), (1, None), (0, None)])
def test_a_worker_with_a_part_of_a_gpu_uses_only_this_part(
    monkeypatch: pytest.MonkeyPatch, gpus: float, part: float | None
) -> None:
    monkeypatch.setattr(os, "environ", {})
    with warnings.catch_warnings():
        cluster._Actor(cloudpickle.dumps(lambda: None), None, False, gpus)
    assert devices.stated_part() == part


def test_a_task_that_another_process_works_on_is_tried_again(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RETRY_DELAY", 0.1)
    done, _ = do(nodes, tmp_path, ["is busy"])
    assert done["is busy"].value == "IS BUSY"
    assert len(list(tmp_path.glob("began *"))) == 2


def test_the_loss_and_the_arrival_of_a_node_change_nothing(nodes: Cluster, tmp_path: Path) -> None:
    lost = nodes.add_node(num_cpus=1)
    tasks = [f"task {number}" for number in range(24)]
    done: dict[int, Finished] = {}
    options = ClusterOptions(nodes.address)
    with cluster.connected(options):
        for event in Pool(tasks, Work(tmp_path, 0.5), tmp_path, [], options).run():
            if isinstance(event, Finished):
                assert event.number not in done
                done[event.number] = event
                if len(done) == 4:
                    nodes.remove_node(lost, allow_graceful=False)
                    nodes.add_node(num_cpus=1)
    assert {number: each.value for number, each in done.items()} == {
        number: task.upper() for number, task in enumerate(tasks)
    }


def test_a_node_that_does_not_see_a_folder_is_named_and_not_used(nodes: Cluster, tmp_path: Path) -> None:
    options = ClusterOptions(nodes.address)
    with cluster.connected(options), pytest.raises(ClusterError) as caught:
        list(Pool(["a"], Work(tmp_path), tmp_path, [tmp_path / "elsewhere"], options).run())
    assert str(caught.value).startswith("no node can be used; ")
    assert str(caught.value).endswith(f": it does not see {tmp_path / 'elsewhere'}")
    assert not list(tmp_path.iterdir())


def test_the_trace_of_a_killed_command_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "0"]) as ended:
        ended.wait()
    for pid in (ended.pid, os.getppid()):
        (tmp_path / f".kmdx-{socket.gethostname()}-{pid}.partial").touch()
    with cluster._token(tmp_path) as own:
        assert own.exists()
    (left,) = tmp_path.iterdir()
    assert f"-{os.getppid()}." in left.name


def test_the_trace_of_a_killed_command_at_a_url_is_removed() -> None:
    place = f"memory://{os.urandom(4).hex()}"
    system = fsspec.filesystem("memory")
    with subprocess.Popen(["sleep", "0"]) as ended:
        ended.wait()
    system.pipe_file(f"{place}/.kmdx-{socket.gethostname()}-{ended.pid}.partial", b"")
    _, made = mirror.opened(place)
    assert made is not None
    with cluster._token(made) as own:
        assert isinstance(own, Url)
        (left,) = system.find(place)
        assert left.endswith(own.location.name)
    assert not system.find(place)


def test_a_node_whose_workers_do_not_start_gets_no_more_but_keeps_those_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[object] = []
    monkeypatch.setattr(cluster.ray, "kill", killed.append)
    monkeypatch.setattr(cluster, "_is_alive", lambda _: True)
    pool: Pool[str, str] = Pool(["a", "b"], Work(tmp_path), tmp_path, [], ClusterOptions())
    busy = Worker("busy", "node", "id", is_ready=True, tasks={"reference": 0})
    starting = [Worker(f"starting {number}", "node", "id") for number in range(3)]
    pool.workers = [busy, *starting]
    notices = [
        each.text
        for worker in starting[:2]
        for each in pool._reassign_tasks(worker, RuntimeError("no driver"))
    ]
    assert notices[-1].startswith(
        "node is not used: its workers do not start: its process crashed or was killed"
    )
    assert pool.workers == [busy]
    assert killed == ["starting 0", "starting 1", "starting 2"]


@pytest.mark.parametrize(("alive", "given_up"), [({"one", "two"}, True), ({"two"}, False), (set(), False)])
def test_a_lost_node_is_not_blamed_on_its_task_although_its_worker_ended_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: set[str], given_up: bool
) -> None:
    monkeypatch.setattr(cluster.ray, "kill", lambda _: None)
    monkeypatch.setattr(cluster, "_is_alive", lambda _: True)
    pool: Pool[str, str] = Pool(["a"], Work(tmp_path), tmp_path, [], ClusterOptions())
    pool.workers = [Worker("actor", id, id, is_ready=True, tasks={"reference": 0}) for id in ("one", "two")]
    pool._waiting.clear()
    for worker in list(pool.workers):
        list(pool._reassign_tasks(worker, RuntimeError("ended")))
        pool._waiting.clear()
    pool._alive = {"one", "two"}
    assert not list(pool._settle(time.monotonic())), "a node may still turn out to be lost"
    pool._alive = alive
    settled = list(pool._settle(time.monotonic() + cluster.GRACE))
    assert bool(settled) == given_up
    assert list(pool._waiting) == ([] if given_up else [0])
    if given_up:
        assert "its worker ended twice" in str(settled[0].failure)
        assert pool.left == 0


def test_tasks_that_may_have_ended_a_worker_run_alone_and_one_at_a_time_on_a_node(tmp_path: Path) -> None:
    pool: Pool[str, str] = Pool(["a", "b", "c", "d"], Work(tmp_path), tmp_path, [], ClusterOptions())
    pool._deaths.update([0, 1])
    first, second, far = (Worker("actor", "node", id, is_ready=True) for id in ("near", "near", "far"))
    pool.workers = [first, second, far]
    given = []
    for worker in (first, first, second, second, far):
        number = pool._next(worker)
        given.append(number)
        if number is not None:
            pool._waiting.remove(number)
            worker.tasks[f"reference {number}"] = number
    assert given == [0, None, 2, 3, 1]


def test_two_commands_share_the_songs_of_one_output_folder(
    nodes: Cluster, music: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "kmdx.cli", *MINI, "-o", "out"]
    running = [
        subprocess.Popen(
            [*command, "--cluster", nodes.address, "--workers", "1", "--log-json", f"log {number}"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    assert [each.wait(300) for each in running] == [0, 0], [each.communicate()[1] for each in running]
    lines = [line for number in range(2) for line in (tmp_path / f"log {number}").read_text().splitlines()]
    songs = [event for line in lines if (event := json.loads(line))["event"] == "song"]
    assert len(songs) == 2 * SONGS
    assert len([event for event in songs if event["status"] == "separated"]) == SONGS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_a_command_that_is_stopped(music: Path, tmp_path: Path, number: int) -> None:
    command = [
        sys.executable,
        "-m",
        "kmdx.cli",
        *MINI,
        "-o",
        "out",
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()  # the first song is done
        below = psutil.Process(running.pid).children(recursive=True)
        (worker,) = (each for each in below if "_Actor" in each.name())
        worker.kill()
        assert "→" in running.stdout.readline(), "another worker goes on, and Ray prints nothing"
        below += psutil.Process(running.pid).children(recursive=True)
        os.kill(running.pid, number)
        printed = running.communicate()[1].splitlines()
    assert all(line.startswith(("warning: a worker on", "error: stopped")) for line in printed), printed
    _, alive = psutil.wait_procs(below, 60)
    assert not alive
    assert not list(tmp_path.glob("out/.kmdx-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "127.0.0.1:1"], "--cluster 127.0.0.1:1 cannot be reached: connection refused"),
        (["--cluster", "nowhere"], "--cluster nowhere: expected auto, or the address of a head node, HOST:PORT"),
        (["--workers", "1", "--device", "cuda:1"], "--device cuda:1: Ray chooses the GPU of each worker"),
        (["--workers", "1", "--gpus-per-worker", "99"], "a worker needs more cores or GPUs than this machine has"),
        (["--workers", "1", "--log-json", "no/such/folder"], "--log-json no/such/folder: No such file or directory"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_errors(run: Run, music: Path, options: list[str], message: str) -> None:
    result = run(*MINI, *options)
    assert result.code == 2
    (error,) = result.errors
    assert message in error


def test_a_cluster_that_is_found_but_does_not_answer_is_an_error(
    run: Run, music: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (error,) = run(*MINI, "--cluster", "auto").errors
    assert re.search(r"--cluster auto \(.*:1\) cannot be reached: connection refused", error)


@pytest.mark.parametrize(
    ("nodes", "options", "room", "share"),
    [
        ([{"CPU": 16, "GPU": 8}], ClusterOptions(), [8], {"num_cpus": 2, "num_gpus": 1}),
        ([{"CPU": 16, "GPU": 8}], ClusterOptions(gpus=0.5), [16], {"num_cpus": 1, "num_gpus": 0.5}),
        ([{"CPU": 16, "GPU": 1}], ClusterOptions(workers=2), [2], {"num_cpus": 8, "num_gpus": 0.5}),
        ([{"CPU": 16, "GPU": 8}], ClusterOptions(gpus=0), [1], {"num_cpus": 16, "num_gpus": 0}),
        ([{"CPU": 16}], ClusterOptions(), [1], {"num_cpus": 16, "num_gpus": 0}),
        ([{"CPU": 16}], ClusterOptions(workers=4), [4], {"num_cpus": 4, "num_gpus": 0}),
        ([{"CPU": 16}], ClusterOptions(cpus=3), [5], {"num_cpus": 3, "num_gpus": 0}),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 64}], ClusterOptions(), [2, 0], {"num_cpus": 8, "num_gpus": 1}),
        ([{"CPU": 2}, {"CPU": 2}], ClusterOptions(workers=2), [1, 1], {"num_cpus": 2, "num_gpus": 0}),
        ([{"CPU": 4}, {}], ClusterOptions(), [1, 0], {"num_cpus": 4, "num_gpus": 0}),
        ([{"GPU": 2}], ClusterOptions(), [2], {"num_cpus": 0, "num_gpus": 1}),
    ],
)  # fmt: skip
def test_workers_share_the_gpus_or_the_cores_of_a_node(
    nodes: list[dict[str, float]], options: ClusterOptions, room: list[int], share: dict[str, float]
) -> None:
    found = cluster._shares([{"Resources": each} for each in nodes], options)
    assert [found.room(each) for each in nodes] == room
    assert found.resources(nodes[0]) == share
