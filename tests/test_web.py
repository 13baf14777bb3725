"""The web app: songs are submitted, wait, are separated, and their results are downloaded."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import pytest
import soundfile
import web_cases
from web_cases import Site, serving, sound

from kmdx import Separator, catalog
from kmdx.encoding import FORMATS
from kmdx.web.app import disposition
from kmdx.web.jobs import Job, Limits, Queue, State, Wish

models = web_cases.models
STEMS = ["bass", "drums", "other", "vocals"]
TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("jobs")) as made:
        yield made


@pytest.fixture(scope="module")
def idle(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server where songs only wait."""
    with serving(tmp_path_factory.mktemp("waiting"), works=False) as made:
        yield made


def test_a_song_is_separated_and_its_stems_are_those_of_the_library(
    site: Site, models: Path, tmp_path: Path
) -> None:
    reply = site.submit(sound(), "My Song.wav")
    assert reply.status_code == 201
    job = site.finished(reply.json()["id"])
    assert (job["state"], job["title"], job["error"]) == ("done", "My Song", None)
    assert reply.headers["location"] == f"/api/jobs/{job['id']}"
    assert sorted(job["files"]) == STEMS
    (tmp_path / "song.wav").write_bytes(sound())
    made = Separator("small", device="cpu").separate_file(tmp_path / "song.wav")
    made.save(tmp_path)
    for stem, address in job["files"].items():
        answer = site("GET", address)
        assert answer.content == (tmp_path / f"{stem}.wav").read_bytes()
        assert f'filename="My Song ({stem}).wav"' in answer.headers["content-disposition"]


def test_a_zip_archive_has_all_stems(site: Site) -> None:
    job = site.finished(
        site.submit(sound(), "Ärger 歌.wav", stems="drums,instrumental", format="flac").json()["id"]
    )
    answer = site("GET", job["zip"])
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["Ärger 歌/drums.flac", "Ärger 歌/instrumental.flac"]
        alone = site("GET", job["files"]["drums"]).content
        assert archive.read("Ärger 歌/drums.flac") == alone
    assert soundfile.info(io.BytesIO(alone)).subtype == "PCM_24"


def test_the_listening_page_has_the_songs_title_and_a_policy(site: Site) -> None:
    job = site.finished(site.submit(sound(), "<b>R&D</b>.wav", stems="vocals").json()["id"])
    page = site("GET", job["page"])
    assert "<h1>&lt;b&gt;R&amp;D&lt;/b&gt;</h1>" not in page.text  # a name before a slash is a folder
    assert "<h1>b&gt;</h1>" in page.text
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts;")


def test_parts_of_a_stem_can_be_requested(site: Site) -> None:
    job = site.finished(site.submit(sound(), stems="vocals").json()["id"])
    part = site("GET", job["files"]["vocals"], headers={"range": "bytes=100-199"})
    assert part.status_code == 206
    assert part.content == site("GET", job["files"]["vocals"]).content[100:200]


def test_an_ensemble_is_shown_with_score_time_and_license(site: Site) -> None:
    shown = {each["name"]: each for each in site("GET", "/api/ensembles").json()}
    for summary in catalog.summaries():
        each = shown[summary.name]
        assert (each["score"] or "", each["license"], each["is_here"]) == (
            summary.score,
            summary.license,
            summary.is_here,
        )
    assert shown["mini"]["is_here"]
    assert not shown["htdemucs"]["is_here"]
    assert shown["htdemucs"]["download"] > 80e6


def test_the_time_of_an_ensemble_is_measured_by_its_songs_and_estimated_for_others() -> None:
    from kmdx.web.app import _times

    def job(ensemble: str, worked: float, stems: tuple[str, ...] = ("a", "b")) -> Job:
        facts = {"number": 1, "title": "t", "format": "wav16", "bytes": 1, "submitted": 0.0}
        return Job(
            id="0" * 24, ensemble=ensemble, stems=stems, seconds=10.0, worked=worked, ended=worked, **facts
        )

    def summary(name: str, gflops: float | None) -> catalog.Summary:
        return catalog.Summary(name, "", "", ("a", "b"), "", "", gflops, 0, True)

    known = [
        summary(name, gflops)
        for name, gflops in (("small", 4.0), ("large", 40.0), ("huge", 50.0), ("unknown", None))
    ]
    assert _times([], known) == {}
    found = _times([job("small", 5.0), job("large", 1.0, ("a",))], known)
    assert found == {"small": (0.5, True), "large": (5.0, False)}


def test_a_job_is_cancelled_while_it_waits_and_then_deleted(idle: Site) -> None:
    first, second = (idle.submit(sound()).json() for _ in range(2))
    assert second["position"] == first["position"] + 1
    assert idle("GET", f"/api/jobs/{first['id']}/zip").status_code == 409
    assert idle("POST", f"/api/jobs/{first['id']}/cancel").json()["state"] == "cancelled"
    assert idle("POST", f"/api/jobs/{first['id']}/cancel").status_code == 409
    assert idle.job(second["id"])["position"] == first["position"]
    assert idle("DELETE", f"/api/jobs/{first['id']}").status_code == 204
    assert idle("GET", f"/api/jobs/{first['id']}").status_code == 404
    assert first["id"] not in idle.left()


def test_a_running_job_is_cancelled_and_the_next_one_begins(site: Site) -> None:
    long = site.submit(sound(60)).json()["id"]
    short = site.submit(sound()).json()["id"]
    site.wait(long, lambda job: bool(job["progress"]))
    assert site("DELETE", f"/api/jobs/{long}").status_code == 409
    assert site("POST", f"/api/jobs/{long}/cancel").status_code == 200
    job = site.finished(long)
    assert (job["state"], job["files"], job["page"]) == ("cancelled", {}, None)
    assert site.finished(short)["state"] == "done"
    assert sorted(path.name for path in (site.queue.folder / long).iterdir()) == ["job.json"]


def test_twenty_uploads_at_once_are_all_separated_in_their_order(site: Site) -> None:
    with ThreadPoolExecutor(20) as pool:
        replies = list(
            pool.map(lambda seed: site.submit(sound(0.6, seed), f"{seed}.wav", stems="vocals"), range(20))
        )
    assert {reply.status_code for reply in replies} == {201}
    jobs = [site.finished(reply.json()["id"]) for reply in replies]
    assert {job["state"] for job in jobs} == {"done"}
    ours = {job["id"] for job in jobs}
    order = [job["ended"] for job in site("GET", "/api/jobs").json() if job["id"] in ours]
    assert order == sorted(order)
    stems = {site("GET", job["files"]["vocals"]).content for job in jobs}
    assert len(stems) == 20


def test_a_damaged_song_is_separated_with_a_warning_that_names_its_title(site: Site) -> None:
    whole = sound(10, format="FLAC")
    middle = len(whole) // 2
    job = site.finished(
        site.submit(
            whole[:middle] + bytes(200) + whole[middle + 200 :], "old tape.flac", stems="vocals"
        ).json()["id"]
    )
    assert job["state"] == "done"
    assert any("old tape: damaged" in text for text in job["warnings"])


def test_the_interface_describes_itself(idle: Site) -> None:
    described = idle("GET", "/api/openapi.json").json()
    assert {"post", "get"} <= described["paths"]["/api/jobs"].keys()
    page = idle("GET", "/docs")
    for address in re.findall(r'(?:href|src)="([^"]+)"', page.text):
        assert address.startswith("/"), "nothing is loaded from elsewhere"
        assert idle("GET", address).status_code == 200


def test_results_are_deleted_when_they_are_too_old(tmp_path: Path) -> None:
    now = [1000.0]
    queue = Queue(tmp_path, Limits(keep=60), lambda path, title: 1.0, lambda: now[0])
    wish = Wish("mini", ("vocals",), "wav16")
    old, waiting = (queue.add(io.BytesIO(b"sound"), "song.wav", wish) for _ in range(2))
    queue.cancel(old.id)
    now[0] += 59
    queue.expire()
    assert queue.all()[0].id == old.id
    now[0] += 1
    queue.expire()
    assert queue.all() == [waiting]
    assert [path.name for path in tmp_path.iterdir()] == [waiting.id]


def test_a_restart_keeps_the_queue_and_forgets_interrupted_uploads(tmp_path: Path) -> None:
    queue = Queue(tmp_path, Limits(), lambda path, title: 1.0)
    wish = Wish("mini", ("vocals",), "wav16")
    first, second, third = (queue.add(io.BytesIO(b"sound"), f"{name}.wav", wish) for name in "abc")
    assert [job.id for job in queue.take(0)] == [first.id]
    queue.cancel(third.id)
    (tmp_path / ("f" * 24)).mkdir()
    (tmp_path / ("f" * 24) / ".song.1234.partial").write_bytes(b"half")
    again = Queue(tmp_path, Limits(), lambda path, title: 1.0)
    assert [(job.id, job.state) for job in again.all()] == [
        (first.id, State.queued),
        (second.id, State.queued),
        (third.id, State.cancelled),
    ]
    assert not (tmp_path / ("f" * 24)).exists()


def test_a_song_that_ends_the_server_again_and_again_fails(tmp_path: Path) -> None:
    wish = Wish("mini", ("vocals",), "wav16")
    Queue(tmp_path, Limits(), lambda path, title: 1.0).add(io.BytesIO(b"sound"), "a.wav", wish)
    for _ in range(3):
        assert Queue(tmp_path, Limits(), lambda path, title: 1.0).take(0)
    (job,) = Queue(tmp_path, Limits(), lambda path, title: 1.0).all()
    assert job.state is State.failed
    assert job.error == "the server ended 3 times while it separated this song"


def test_jobs_with_the_same_wish_are_taken_together_for_a_cluster(tmp_path: Path) -> None:
    queue = Queue(tmp_path, Limits(), lambda path, title: 1.0)
    wishes = [Wish("mini", (stem,), "wav16") for stem in ("vocals", "drums", "vocals")]
    jobs = [queue.add(io.BytesIO(b"sound"), "a.wav", wish) for wish in wishes]
    assert [job.id for job in queue.take(0, alike=True)] == [jobs[0].id, jobs[2].id]
    assert [job.id for job in queue.take(0, alike=True)] == [jobs[1].id]
    assert queue.take(0) == []


@pytest.mark.parametrize(
    ("name", "plain"),
    [("song.wav", "song.wav"), ("Ärger 歌.wav", "_rger _.wav"), ('a"b\\c;d%41.wav', "a_b_c_d_41.wav")],
)
def test_download_names_are_also_stated_in_ascii(name: str, plain: str) -> None:
    header = disposition(name)
    assert header.isascii()
    assert f'filename="{plain}"' in header
    assert unquote(header.rpartition("''")[2]) == name


def test_formats_have_names_on_the_page() -> None:
    script = (Path(web_cases.app.PAGE) / "app.js").read_text("utf-8")
    assert all(f"{format}:" in script for format in FORMATS)
