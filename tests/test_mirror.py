"""What is at an output URL, whatever happens while stems are uploaded."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import stems

from kmdx import files, manifest, mirror, urls
from kmdx.mirror import Mirror
from kmdx.urls import Url, UrlError

SONG = Path("song.wav")
PLACE = "album/song"
STEMS = ("bass", "vocals")
MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def song(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    SONG.write_text("a song")
    yield
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]


def pulled() -> Mirror:
    made = Mirror.of(Url("memory://out"))
    made.pull()
    return made


def wanted(made: Mirror, *names: str, **settings: Any) -> manifest.Wanted:
    return stems.wanted(made.folder / PLACE, SONG, *(names or STEMS), **settings)


def upload(level: float = 0.5, **settings: Any) -> None:
    """Separate the song as a process of its own would."""
    made = pulled()
    asked = wanted(made, **settings)
    made.pull(PLACE)
    with made.uploading(asked):
        stems.write(asked, level)


def missing(**settings: Any) -> list[str]:
    return manifest.status(wanted(pulled(), **settings), lambda name: name.endswith(".wav")).missing


def stored() -> dict[str, bytes]:
    return {name.removeprefix("/out/"): MEMORY.cat_file(name) for name in MEMORY.find("/out")}


def check_records() -> int:
    """Every record describes the content of its stem; returns how many there are."""
    found = stored()
    records = [json.loads(content) for name, content in found.items() if name.endswith(".json")]
    for record in records:
        path = Path(f"{PLACE}/{record['file']}")
        copy = Path("copy")
        copy.write_bytes(found[path.as_posix()])
        assert files.sha256(copy) == record["sha256"]
    return len(records)


class Killed(BaseException):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> list[int]:
    """Act before one of the steps of an upload; returns a list with an element for each step."""
    steps: list[int] = []
    store, remove = urls.store, urls.remove

    def count() -> None:
        steps.append(step)
        if len(steps) == step:
            act()

    def counted_store(path: Path, url: Url) -> None:
        count()
        store(path, url)

    def counted_remove(chosen: Collection[Url]) -> None:
        count()
        remove(chosen)

    monkeypatch.setattr(urls, "store", counted_store)
    monkeypatch.setattr(urls, "remove", counted_remove)
    return steps


def die() -> None:
    raise Killed


def test_stems_are_uploaded_with_their_records() -> None:
    upload()
    assert [*stored()] == [
        f"{PLACE}/.kmdx/.bass.wav.json",
        f"{PLACE}/.kmdx/.vocals.wav.json",
        f"{PLACE}/bass.wav",
        f"{PLACE}/vocals.wav",
    ]
    assert check_records() == 2
    assert missing() == []
    assert missing(speed="fast", overwrite=True) == ["bass", "vocals"]
    assert manifest.owner(pulled().folder / PLACE) is not None


def test_a_mirror_holds_no_content_of_stems() -> None:
    upload()
    made = pulled()
    path = made.folder / PLACE / "vocals.wav"
    assert path.stat().st_size == len(stored()[f"{PLACE}/vocals.wav"])
    assert set(path.read_bytes()) == {0}


@pytest.mark.parametrize("settings", [{}, {"speed": "fast", "overwrite": True}])
def test_a_kill_at_any_step_leaves_no_record_of_other_content(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    for step in range(1, 20):
        MEMORY.store.clear()
        if settings:
            upload(0.25)
        with monkeypatch.context() as patch:
            counted = interrupt(patch, step, die)
            try:
                upload(**settings)
            except Killed:
                pass
            else:
                break
        check_records()
        upload(**settings)
        assert check_records() == len(STEMS)
        assert missing(**{**settings, "overwrite": False}) == []
    assert step == len(counted) + 1 == 6
    assert not [name for name in stored() if ".bak" in name]


def test_two_processes_never_leave_a_record_of_the_other_ones_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []
    for step in range(1, 6):
        MEMORY.store.clear()
        with monkeypatch.context() as patch:
            store, remove = urls.store, urls.remove

            def other(patch: pytest.MonkeyPatch = patch, store: Any = store, remove: Any = remove) -> None:
                patch.setattr(urls, "store", store)
                patch.setattr(urls, "remove", remove)
                upload(0.25)

            interrupt(patch, step, other)
            try:
                upload(0.5)
            except UrlError as error:
                refused.append(str(error))
        assert check_records() == (len(STEMS) if step == 1 else 0)
        upload(overwrite=True)
        assert check_records() == len(STEMS)
        assert missing() == []
    what = "memory://out/album/song: meanwhile, another process stored other stems there"
    assert refused == [f"{what}; run the command again"] * 4


def test_a_file_without_a_record_is_kept() -> None:
    MEMORY.pipe_file(f"/out/{PLACE}/vocals.wav", b"mine")
    upload()
    assert stored()[f"{PLACE}/vocals.wav.bak"] == b"mine"
    assert check_records() == 2


def test_names_that_are_not_paths_below_a_folder_are_not_mirrored(tmp_path: Path) -> None:
    for name in ("../../x", "a//b", "./c", "..", "d/../e", "f\\g"):
        MEMORY.store[f"/out/{name}"] = fsspec.implementations.memory.MemoryFile(MEMORY, f"/out/{name}", b"x")
    made = pulled()
    assert [*made.folder.rglob("*")] == []


def test_files_that_cannot_lie_next_to_each_other_are_no_problem() -> None:
    upload()
    for name in ("file", "file/.kmdx/.a.wav.json", "file/a.wav", f"{'long' * 99}/.kmdx/.a.wav.json"):
        MEMORY.store[f"/out/{name}"] = fsspec.implementations.memory.MemoryFile(MEMORY, f"/out/{name}", b"x")
    assert missing() == []


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    upload()

    def fail(path: Path, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UrlError, match=r"^memory://out/album/song/bass.wav: cannot be mirrored .*: no space"):
        pulled()


def test_a_place_is_pulled_without_the_places_below_it() -> None:
    upload()
    MEMORY.pipe_file(f"/out/{PLACE}/below/vocals.wav", b"x")
    made = Mirror.of(Url("memory://out"))
    made.pull(PLACE)
    assert (made.folder / PLACE / "vocals.wav").is_file()
    assert not (made.folder / PLACE / "below").exists()
    MEMORY.rm(f"/out/{PLACE}", recursive=True)
    made.pull(PLACE)
    assert not [path for path in made.folder.rglob("*") if path.is_file()]


def test_an_output_must_be_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = mirror.opened("memory://out")
    assert made is not None
    assert folder == made.folder
    assert stored() == {}
    assert mirror.opened("out") == (Path("out"), None)
    assert mirror.opened(f"file://{Path.cwd()}/out") == (Path.cwd() / "out", None)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(type(MEMORY), "put_file", refuse)
    with pytest.raises(UrlError, match=r"^memory://out: access denied"):
        mirror.opened("memory://out")
    with pytest.raises(UrlError, match="a web server does not store stems"):
        mirror.opened("https://host/out")
