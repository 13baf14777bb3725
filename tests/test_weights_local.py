"""Which file contains which weight, and what verify reports."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kmdx import weights
from kmdx.errors import KmdxWarning, WeightsError
from kmdx.weights import Weight, local
from kmdx.weights import published as real_published
from kmdx.weights.local import PulledFile, add_record, records
from kmdx.weights.registry import HttpSource, HubSource

STATE = {"linear.weight": torch.arange(6.0).reshape(2, 3)}


def published(weight: Weight, content: bytes) -> Weight:
    """The weight as if Meta had published that content for it."""
    sha256 = hashlib.sha256(content).hexdigest()
    file = f"{weight.signature}-{sha256[:8]}.th"
    source = HttpSource(file=file, url=f"http://meta/{file}", bytes=len(content), sha256=sha256)
    others = [source for source in weight.sources if source.kind == "drive"]
    return dataclasses.replace(weight, sources=(source, *others))


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, bytes]:
    """What "Meta published" for bass and for other: two readable files of the same size."""
    made = {}
    for source in ("bass", "other"):
        torch.save({"state": STATE, "of": source.ljust(5)}, tmp_path / "content")
        made[source] = (tmp_path / "content").read_bytes()
    assert len(set(map(len, made.values()))) == 1
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "TFC_TDF_UNet_MDX21").mkdir(parents=True)
    return folder


@pytest.fixture
def small_registry(contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> dict[str, Weight]:
    """The real registry, but with small published files for bass and other."""
    small = dict(real_published())
    for source, content in contents.items():
        name = f"htdemucs_ft_{source}"
        small[name] = published(small[name], content)
    monkeypatch.setattr(local, "published", lambda: small)
    local._warn_of_names.cache_clear()
    return small


def test_the_authors_layout_is_recognized_with_one_warning(folder: Path, small_registry: dict) -> None:
    for name, weight in small_registry.items():
        if weight.author_file:
            (folder / weight.author_file).write_bytes(name.encode())
    with pytest.warns(KmdxWarning, match="bass from demucs_other.ckpt"):
        bass = weights.find(small_registry["htdemucs_ft_bass"], folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = weights.find(small_registry["htdemucs_ft_other"], folder)
        drums = weights.find(small_registry["mdx_drums"], folder)
    assert (bass.path.name, bass.known, bass.how) == ("demucs_other.ckpt", False, "file name")
    assert other.path.name == "demucs_bass.ckpt"
    assert drums.path == folder / "TFC_TDF_UNet_MDX21" / "drums.pt"
    there = weights.find_all(small_registry.values(), folder)
    assert {name for name, found in there.items() if found is None} == {
        name for name, weight in small_registry.items() if not weight.author_file
    }


def test_known_content_takes_precedence_over_the_name(
    folder: Path, small_registry: dict, contents: dict[str, bytes]
) -> None:
    (folder / "demucs_bass.ckpt").write_bytes(contents["bass"])
    (folder / "demucs_other.ckpt").write_bytes(contents["other"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in ("bass", "other"):
            found = weights.find(small_registry[f"htdemucs_ft_{source}"], folder)
            assert (found.path.name, found.known, found.how) == (f"demucs_{source}.ckpt", True, "content")


def test_a_file_known_to_be_another_weight_is_never_identified_by_its_name(
    folder: Path, small_registry: dict, contents: dict[str, bytes]
) -> None:
    (folder / "demucs_bass.ckpt").write_bytes(contents["bass"])
    with pytest.raises(
        weights.MissingWeights, match=r"demucs_bass\.ckpt is known to contain htdemucs_ft_bass"
    ):
        weights.find(small_registry["htdemucs_ft_other"], folder)


@pytest.mark.parametrize("name", ["d12395a8.th", "d12395a8.safetensors"])
def test_a_name_with_the_signature_precedes_the_submissions_names(
    folder: Path, small_registry: dict, name: str
) -> None:
    (folder / "demucs_other.ckpt").write_bytes(b"unknown")
    (folder / name).write_bytes(b"also unknown")
    found = weights.find(small_registry["htdemucs_ft_bass"], folder)
    assert (found.path.name, found.known, found.how) == (name, False, "signature")


def test_a_checksum_in_a_name_must_match_the_content(
    folder: Path, small_registry: dict, contents: dict[str, bytes]
) -> None:
    weight = small_registry["htdemucs_ft_bass"]
    path = folder / weight.published[0].file
    path.write_bytes(contents["bass"])
    assert weights.find(weight, folder).known
    path.write_bytes(contents["bass"][:-1] + b"?")
    with pytest.raises(WeightsError, match=r"is damaged: its sha256 does not begin with"):
        weights.find(weight, folder)
    retrained = folder / f"d12395a8-{hashlib.sha256(b'retrained').hexdigest()[:8]}.th"
    path.rename(retrained)
    retrained.write_bytes(b"retrained")
    assert weights.find(weight, folder).path == retrained


def test_a_file_of_the_hub_is_known_by_its_content_whatever_its_name_and_size(
    folder: Path, small_registry: dict
) -> None:
    save_file(STATE, folder / "d12395a8.safetensors")
    weight = small_registry["htdemucs_ft_bass"]
    assert weights.find(weight, folder).how == "signature", "nobody has published this content"
    sha256 = hashlib.sha256((folder / "d12395a8.safetensors").read_bytes()).hexdigest()
    hub = HubSource(repository="owner/Bag", file="d12395a8.safetensors", sha256=sha256)
    small_registry["htdemucs_ft_bass"] = weight = dataclasses.replace(weight, sources=(hub,))
    for name in ("d12395a8.safetensors", "bass.safetensors", "demucs_bass.ckpt"):
        (folder / "d12395a8.safetensors").replace(folder / name)
        found = weights.find(weight, folder)
        assert (found.path.name, found.known, found.how) == (name, True, "content")
        (folder / name).replace(folder / "d12395a8.safetensors")
    (folder / "d12395a8.safetensors").replace(folder / "92cfc3b6.safetensors")
    with pytest.raises(
        weights.MissingWeights, match=r"92cfc3b6\.safetensors is known to contain htdemucs_ft_bass"
    ):
        weights.find(small_registry["htdemucs_ft_other"], folder)


def test_another_content_under_the_hubs_name_is_unknown_but_not_damaged(
    folder: Path, small_registry: dict
) -> None:
    hub = HubSource(repository="owner/Bag", file="d12395a8.safetensors", sha256="0" * 64)
    weight = dataclasses.replace(small_registry["htdemucs_ft_bass"], sources=(hub,))
    save_file(STATE, folder / "d12395a8.safetensors")
    found = weights.find(weight, folder)
    assert (found.path.name, found.known, found.how) == ("d12395a8.safetensors", False, "signature")
    (status,) = weights.verify(folder, [weight])
    assert status.ok
    assert not status.known


def test_a_missing_weight_is_an_error_with_the_command_to_run(folder: Path) -> None:
    with pytest.raises(
        weights.MissingWeights,
        match=r"looked for d12395a8-e57c48e6\.th, d12395a8\.th, d12395a8\.safetensors or demucs_other\.ckpt "
        r"in .*models; `kmdx models pull htdemucs_ft_bass` downloads it",
    ):
        weights.find(weights.get("d12395a8"), folder)
    with pytest.raises(weights.MissingWeights):
        weights.find(weights.get("d12395a8"), folder / "not there")


def test_a_weight_without_a_checksum_is_found_by_the_name_that_it_is_pulled_to(folder: Path) -> None:
    source = HttpSource(file="a.pt", url="http://here/a.pt")
    weight = dataclasses.replace(weights.get("mdx_bass"), sources=(source,))
    with pytest.raises(weights.MissingWeights, match=r"looked for a\.pt in"):
        weights.find(weight, folder)
    (folder / "a.pt").write_bytes(b"content")
    assert weights.find(weight, folder).path == folder / "a.pt"
    with pytest.raises(weights.MissingWeights, match="its file has no known name"):
        weights.find(dataclasses.replace(weight, sources=()), folder)


def test_a_users_own_weight_is_the_file_that_it_names(tmp_path: Path) -> None:
    weight = weights.own(tmp_path / "mine.pt", {"type": "htdemucs", "sources": ["bass"]})
    with pytest.raises(weights.MissingWeights, match=r"mine\.pt is missing"):
        weights.find(weight, tmp_path / "models")
    torch.save(STATE, tmp_path / "mine.pt")
    assert weights.find(weight, tmp_path / "models").path == tmp_path / "mine.pt"
    (status,) = weights.verify(tmp_path / "models", [weight])
    assert status.ok


def status_of(name: str, folder: Path, small_registry: dict) -> weights.WeightStatus:
    (status,) = weights.verify(folder, [small_registry[name]])
    return status


def test_verify_has_a_row_for_each_weight(folder: Path, small_registry: dict) -> None:
    rows = weights.verify(folder)
    assert [row.weight.name for row in rows] == list(small_registry)
    assert not any(row.path or row.ok for row in rows)
    assert all("kmdx models pull" in row.message for row in rows)


def test_verify_distinguishes_known_unknown_and_damaged(
    folder: Path, small_registry: dict, contents: dict[str, bytes]
) -> None:
    (folder / "demucs_other.ckpt").write_bytes(contents["bass"])
    row = status_of("htdemucs_ft_bass", folder, small_registry)
    assert (row.known, row.intact, row.ok) == (True, True, True)
    torch.save({"state": STATE}, folder / "demucs_drums.ckpt")
    row = status_of("htdemucs_ft_drums", folder, small_registry)
    assert (row.known, row.intact) == (False, True)
    (folder / "demucs_other.ckpt").write_bytes(contents["bass"][:500])
    row = status_of("htdemucs_ft_bass", folder, small_registry)
    assert (row.known, row.intact, row.ok) == (False, False, False)
    assert "damaged" in row.message
    (folder / small_registry["htdemucs_ft_bass"].published[0].file).write_bytes(contents["other"][::-1])
    row = status_of("htdemucs_ft_bass", folder, small_registry)
    assert not row.intact
    assert "does not begin with" in row.message


def test_verify_reports_a_network_that_says_it_was_tuned_for_another_source(
    folder: Path, small_registry: dict
) -> None:
    package = {"state": STATE, "training_args": {"weights": [0.0, 0.0, 1.0, 0.0]}}
    torch.save(package, folder / "demucs_other.ckpt")
    torch.save(package, folder / "demucs_bass.ckpt")
    row = status_of("htdemucs_ft_bass", folder, small_registry)
    assert row.mismatch
    assert not row.ok
    assert (
        row.message
        == "mismatch: identified by file name as bass, but its metadata says it was tuned for other"
    )
    assert status_of("htdemucs_ft_other", folder, small_registry).ok


def test_verify_compares_a_pulled_file_without_published_checksum_with_its_record(
    folder: Path, small_registry: dict
) -> None:
    path = folder / "TFC_TDF_UNet_MDX21" / "bass.pt"
    torch.save(STATE, path)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    record = PulledFile("mdx_bass", sha256, len(content), "the folder", "2024-01-02", known=False)
    add_record(folder, "TFC_TDF_UNet_MDX21/bass.pt", record)
    assert status_of("mdx_bass", folder, small_registry).message.endswith("as pulled on 2024-01-02")
    path.write_bytes(content + b"!")
    row = status_of("mdx_bass", folder, small_registry)
    assert not row.intact
    assert "it has changed since it was pulled on 2024-01-02" in row.message


def test_verify_compares_a_trained_file_with_the_checksum_that_was_recorded(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "mine.pt")
    architecture = {"type": "htdemucs", "sources": ["bass"]}
    weights.register(tmp_path, "mine", title="", file="mine.pt", architecture=architecture, trained="today")
    weight = weights.trained(tmp_path)["mine"]
    assert weight.bytes == (tmp_path / "mine.pt").stat().st_size
    (row,) = weights.verify(tmp_path, [weight])
    assert (row.ok, row.message) == (True, "intact, verified by its sha256 in trained.yaml")
    content = (tmp_path / "mine.pt").read_bytes()
    (tmp_path / "mine.pt").write_bytes(content[:-1] + b"?")
    (row,) = weights.verify(tmp_path, [weight])
    assert not row.ok
    assert row.message.startswith("damaged: its sha256 is not the one in trained.yaml")
    with pytest.raises(
        WeightsError, match=r"mine\.pt is damaged: its sha256 is not the one in trained\.yaml"
    ):
        weights.find(weight, tmp_path)


def test_a_trained_file_without_a_recorded_checksum_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "mine.pt")
    (tmp_path / "trained.yaml").write_text(
        "mine: {title: Mine, file: mine.pt, trained: '2026-01-01', architecture: {type: htdemucs, sources: [bass]}}"
    )
    weight = weights.trained(tmp_path)["mine"]
    (row,) = weights.verify(tmp_path, [weight])
    assert (row.ok, row.message) == (True, "unknown content, readable; identified by plan")
    assert weights.find(weight, tmp_path).path == tmp_path / "mine.pt"


def test_the_weights_that_come_with_the_package_are_verified() -> None:
    rows = weights.verify(None, weights.shipped().values())
    assert {row.message for row in rows} == {"intact, verified by its sha256 in trained.yaml"}


def test_a_pulled_and_verified_file_is_known_under_any_name(folder: Path, small_registry: dict) -> None:
    content = b"of the hub"
    record = PulledFile(
        "hdemucs_mmi", hashlib.sha256(content).hexdigest(), len(content), "hub", "2024-01-02", True
    )
    add_record(folder, "75fc33f5.safetensors", record)
    (folder / "renamed.safetensors").write_bytes(content)
    assert weights.find(small_registry["hdemucs_mmi"], folder).known


def test_an_unreadable_record_is_ignored(folder: Path) -> None:
    (folder / "pulled.json").write_text('{"a.th": {"weight"')
    assert records(folder) == {}


def test_known_tensors_are_known_in_any_container(folder: Path, small_registry: dict) -> None:
    small_registry["htdemucs"] = dataclasses.replace(
        small_registry["htdemucs"], state_sha256=weights.state_sha256(STATE)
    )
    torch.save({name: tensor.half() for name, tensor in STATE.items()}, folder / "955717e8.th")
    row = status_of("htdemucs", folder, small_registry)
    assert row.known
    assert row.intact


def test_the_checksum_of_a_state_ignores_the_precision_but_not_the_values() -> None:
    half = {name: tensor.half() for name, tensor in STATE.items()}
    other = {name: tensor + 1e-6 for name, tensor in STATE.items()}
    assert weights.state_sha256(STATE) == weights.state_sha256(half)
    assert weights.state_sha256(STATE) != weights.state_sha256(other)
    assert weights.state_sha256(STATE) != weights.state_sha256({"linear.weight": STATE["linear.weight"].T})
