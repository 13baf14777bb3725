"""Community checkpoints: the list is consistent, and each is pulled and imported, or refused in a line."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_cases
import pytest
import weight_cases
from cli_cases import Run
from conftest import SHARED
from weight_cases import Server

from evaluator import results
from kmdx import catalog, plan_file, weights
from kmdx.weights.registry import HttpSource

module = importlib.import_module("kmdx.weights.checkpoints")  # its function has the same name
server, alone, run = weight_cases.server, weight_cases.alone, cli_cases.run
TINY = SHARED / "golden-today" / "bs_roformer" / "tiny_vocals.safetensors"
needs_golden = pytest.mark.skipif(not TINY.is_file(), reason="needs ../shared/golden-today")
Offer = Callable[..., weights.CommunityCheckpoint]


@pytest.fixture
def offer(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Publish a tiny checkpoint and its config on a local server, and list it under a name."""
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    listed: dict[str, weights.CommunityCheckpoint] = {}
    monkeypatch.setattr(weights, "checkpoints", lambda: listed)
    content = TINY.read_bytes()
    server.files |= {
        "/tiny.safetensors": content,
        "/copies/tiny.safetensors": content,
        "/tiny.yaml": TINY.with_suffix(".yaml").read_bytes(),
    }

    def publish(name: str, **changes: Any) -> weights.CommunityCheckpoint:
        source = HttpSource(
            url=f"{server.url}/tiny.safetensors",
            file=f"{name}_file.safetensors",
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        facts: dict[str, Any] = {
            "title": "A tiny network",
            "type": "bs_roformer",
            "stems": ("vocals", "other"),
            "licence": "GPL-3.0",
            "sources": (source,),
            "config": f"{server.url}/tiny.yaml",
            "score": "1 dB on MUSDB18-HQ's test songs",
        }
        listed[name] = weights.CommunityCheckpoint(name=name, **{**facts, **changes})
        return listed[name]

    return publish


def asked(server: Server) -> list[str]:
    return [path for _, path, _ in server.asked]


@needs_golden
def test_what_is_published_about_a_checkpoint_is_in_the_ensemble(
    offer: Offer, run: Run, server: Server
) -> None:
    offer("bs_tiny")
    pulled = run("models", "pull", "bs_tiny")
    assert pulled.code == 0
    assert "stems: vocals; other is the rest of the mixture" in pulled.out
    assert asked(server) == ["/tiny.yaml", "/tiny.safetensors"]
    plan = plan_file.load("bs_tiny")
    weight = plan.networks["net"].weight
    assert (plan.title, plan.score) == ("A tiny network", "1 dB on MUSDB18-HQ's test songs*")
    assert (weight.licence, weight.trained_with) == ("GPL-3.0", module.NOT_STATED)
    assert plan_file.parse(plan_file.dump(plan), "copy", weights.models_folder()).networks == plan.networks
    (row,) = (line for line in run("ensembles").out.splitlines() if line.startswith("bs_tiny"))
    assert "none" in row
    assert "GPL-3.0" in row
    assert "1 dB on MUSDB18-HQ's test songs*" in row
    run_of_it = {"isolation": [], "data": {"warnings": [], "songs": 0}, "weights": []}
    (warning,) = results._warnings(run_of_it, plan, [])
    assert warning.endswith("may contain MUSDB18-HQ's test songs: its scores on them are optimistic")


@needs_golden
def test_an_imported_checkpoint_is_pulled_again_only_if_its_file_is_gone(
    offer: Offer, run: Run, server: Server
) -> None:
    offer("mine")
    run("models", "pull", "mine")
    server.asked.clear()
    assert run("models", "pull", "mine").err == "mine: already imported\n"
    assert asked(server) == []
    (weights.models_folder() / "mine_file.safetensors").unlink()
    assert run("models", "pull", "mine").code == 0
    assert asked(server) == ["/tiny.safetensors"]
    (weights.models_folder() / "mine_file.safetensors").write_bytes(b"half")
    seen: list[tuple[int, int | None]] = []
    paths = catalog.pull("mine", progress=lambda done, total: seen.append((done, total)))
    assert paths == {"mine": weights.models_folder() / "mine_file.safetensors"}
    assert paths["mine"].read_bytes() == TINY.read_bytes()
    assert seen[-1][0] == len(TINY.read_bytes())
    (weights.models_folder() / "mine.yaml").write_text("model: {}", "utf-8")
    broken = run("models", "pull", "mine")
    assert (broken.code, len(broken.errors)) == (2, 1)


@needs_golden
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": ""}, "needs a config, and none is published: if you have it, add --config FILE"),
        ({"config": "http://127.0.0.1:9/no.yaml"}, "127.0.0.1.*; if you have it, add --config FILE"),
        ({"config_sha256": "0" * 64}, "wrong content: sha256"),
        ({"unsupported": "it has other modules"}, "mine cannot be run: it has other modules"),
    ],
)
def test_without_a_config_no_checkpoint_is_downloaded(
    changes: dict[str, Any], message: str, offer: Offer, run: Run, server: Server
) -> None:
    offer("mine", **changes)
    refused = run("models", "pull", "mine")
    assert refused.code == 2
    assert refused.out == ""
    (error,) = refused.errors
    assert re.search(message, error)
    assert "/tiny.safetensors" not in asked(server)
    assert not [path for path in weights.models_folder().rglob("*") if path.is_file()]


@needs_golden
def test_a_config_of_the_user_replaces_the_published_one(offer: Offer, run: Run, server: Server) -> None:
    offer("mine", config="")
    offer("other")
    own = str(TINY.with_suffix(".yaml"))
    assert "name it, and nothing else" in run("models", "pull", "mine", "other", "--config", own).errors[0]
    assert run("models", "pull", "mine", "--config", own).code == 0
    (again,) = run("models", "pull", "mine", "--config", own).errors
    assert "mine.yaml exists already; choose another name, or delete it first" in again
    assert plan_file.imported() == ["mine"]


@needs_golden
def test_a_checkpoint_that_does_not_fit_its_config_is_kept_and_the_others_are_pulled(
    offer: Offer, run: Run, server: Server
) -> None:
    offer("odd", config=f"{server.url}/odd.yaml")
    offer("fine")
    server.files["/odd.yaml"] = b"model: {dim: 3}\n"
    result = run("models", "pull", "odd", "fine")
    kept = weights.models_folder() / "odd_file.safetensors"
    assert result.code == 2
    assert len(result.errors) == 1
    assert "odd could not be imported: " in result.errors[0]
    assert result.errors[0].endswith(f"the download is kept as {kept}")
    assert kept.read_bytes() == TINY.read_bytes()
    assert plan_file.imported() == ["fine"]


@needs_golden
def test_a_copy_is_pulled_if_the_publisher_is_gone(
    offer: Offer, run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIRROR", f"{server.url}/copies")
    (source,) = offer("mine").sources
    offer("mine", sources=(replace(source, url="http://127.0.0.1:9/gone"),), mirror="tiny.safetensors")
    assert run("models", "pull", "mine").code == 0
    assert asked(server)[-1] == "/copies/tiny.safetensors"


@needs_golden
def test_checkpoints_are_listed_verified_and_suggested_by_name(offer: Offer, run: Run) -> None:
    offer("bs_tiny")
    assert "1 missing (bs_tiny); `kmdx models pull bs_tiny`" in run("models", "verify", "bs_tiny").errors[0]
    for command in ("pull", "verify"):
        mistyped = run("models", command, "bs_tinny")
        assert mistyped.errors == ["error: unknown weight or ensemble 'bs_tinny' (did you mean 'bs_tiny'?)"]
        unknown = run("models", command, "§").errors[0]
        assert unknown.endswith("; `kmdx models list` and `kmdx ensembles` list the known names")
    run("models", "pull", "bs_tiny")
    verified = run("models", "verify", "bs_tiny")
    assert (verified.code, "known content, intact" in verified.out) == (0, True)
    (row,) = (line for line in run("models", "list").out.splitlines() if line.startswith("bs_tiny"))
    assert row.split(maxsplit=4)[3:] == ["yes", "GPL-3.0  vocals, other; 1 dB on MUSDB18-HQ's test songs*"]


LATER = {
    "bs_viperx_1297": "5b84f37e8d444c8cb30c79d77f613a41c05868ff9c9ac6c7049c00aefae115aa",
    "bs_viperx_1296": "f6c94864adfb73bbb0ca58ec14d58dd0b364549e9fb61433ae51916f3e2f8d0b",
    "scnet_large_msst": "fe550315a76e8f4aed8475d7d5952137504a3b6c63b3adcef2443bfe73aac540",
    "drumsep_6": "d2a4aa53eb584d21eead358a4e66d1882ad182911be018f052b5da73be9096d0",
}
"""Checksums that others published for files of the same size, and that the collected facts lack."""


@pytest.mark.parametrize("each", weights.checkpoints().values(), ids=lambda each: each.name)
def test_a_listed_checkpoint_is_complete(each: weights.CommunityCheckpoint) -> None:
    assert each.name not in {*weights.published(), *plan_file.names()}
    assert each.title
    assert each.licence in ("none stated", "not known", "GPL-3.0")
    assert bool(each.score) == bool(each.score_source)
    assert each.unsupported or (each.sources and each.config.startswith("https://"))
    assert len({weight.file for weight in each.weight().sources}) == len(each.sources)


@pytest.mark.parametrize("each", weights.checkpoints().values(), ids=lambda each: each.name)
def test_a_listed_checkpoint_has_the_published_facts(each: weights.CommunityCheckpoint) -> None:
    facts = SHARED / "networks.md"
    if not facts.is_file():
        pytest.skip(f"{facts} is not there")
    text = facts.read_text("utf-8")
    for source in each.sources:
        assert source.sha256 in (None, LATER.get(each.name)) or source.sha256 in text
        assert source.bytes is None or str(source.bytes) in text
        name = source.file.replace("MDX23C-8KFFT-InstVoc_HQ_2", "_HQ_2")
        assert name in text or each.name == "bs_hyperace_v2"


def test_scores_on_songs_that_may_be_known_are_marked() -> None:
    found = weights.checkpoints()
    assert {name for name, each in found.items() if each.unsupported} == {"bs_hyperace_v2", "polarformer"}
    assert not found["scnet_xl_msst"].marked_score.endswith("*")
    assert found["bs_anvuew_vocals"].marked_score == "vocals 12.43 dB on MUSDB18-HQ's test songs*"
    assert replace(found["bs_revive"], score="").marked_score == ""
