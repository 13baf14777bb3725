"""Checkpoints of Music-Source-Separation-Training: imported in any form, run as it does, or refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import SHARED, decibels
from safetensors.torch import load_file, save_file

from kmdx import Separator, cli, msst, plan_file
from kmdx.errors import KmdxError
from kmdx.networks import mdx23c, types
from kmdx.nodes import Estimate, Sum
from kmdx.plan import Plan
from kmdx.windows import FadeAndAdd

GOLDEN = SHARED / "golden-today"
NETWORKS = {
    "bs_roformer": "tiny_vocals",
    "mel_band_roformer": "tiny_four",
    "mdx23c": "tiny_two",
    "scnet": "tiny_four",
    "scnet_masked": "tiny_four",
}
SONGS = sorted(GOLDEN.glob("*/*.demix_*.npz"))
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden-today")
pytestmark = needs_golden


def files_of(family: str) -> tuple[Path, Path]:
    place = GOLDEN / family / NETWORKS[family]
    return place.with_suffix(".safetensors"), place.with_suffix(".yaml")


def config_of(family: str) -> dict[str, Any]:
    return {
        section: dict(content) for section, content in vars(msst.read_config(files_of(family)[1])).items()
    }


def without_normalization(plan: Plan) -> Plan:
    nodes = {name: node for name, node in plan.nodes.items() if name != "x"}
    nodes["E"] = Estimate("net", "mixture")
    return replace(
        plan, nodes={n: Sum(node.terms) if isinstance(node, Sum) else node for n, node in nodes.items()}
    )


@pytest.mark.parametrize("song", SONGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_whole_song_equals_the_reference(song: Path, tmp_path: Path) -> None:
    made = msst.add("mine", *files_of(song.parent.name), folder=tmp_path)
    content = np.load(song)
    settings = json.loads(str(content["settings"]))
    plan = plan_file.load(made.plan)
    use = replace(
        plan.networks["net"],
        chunking=FadeAndAdd(settings["chunk_size"], settings["num_overlap"]),
        shifts=2 if settings["extra"] == "bigshifts2" else 1,
        tta=settings["extra"] == "tta",
    )
    plan = replace(plan, networks={"net": use})
    if not settings["normalize"] and "x" in plan.nodes:
        plan = without_normalization(plan)
    mixture = np.ascontiguousarray(content["mixture"].T)
    stems = Separator(plan, device="cpu", precision="fp32").separate(mixture, plan.sample_rate)
    expected = {
        name.removeprefix("stem_"): content[name].T for name in content.files if name.startswith("stem_")
    }
    for stem, samples in expected.items():
        assert decibels(samples, stems[stem]) > 100, stem
    for rest in stems.keys() - expected.keys():
        assert np.allclose(stems[rest], mixture - stems["vocals"], atol=1e-6)


@pytest.mark.parametrize("family", NETWORKS)
def test_the_plan_runs_the_network_as_the_config_says(family: str, tmp_path: Path) -> None:
    checkpoint, config = files_of(family)
    made = msst.add("mine", checkpoint, config, tmp_path)
    settings = config_of(family)
    plan = plan_file.load(made.plan)
    use = plan.networks["net"]
    assert use.chunking == FadeAndAdd(settings["audio"]["chunk_size"], settings["inference"]["num_overlap"])
    assert use.weight.path == tmp_path / "mine.safetensors"
    assert use.weight.path.read_bytes() == checkpoint.read_bytes()
    assert plan.sample_rate == 44100
    assert ("x" in plan.nodes) == bool(settings["inference"].get("normalize"))
    assert set(plan.stems) == set(settings["training"]["instruments"])
    assert made.assumed == ()
    assert ("zero_dc" in made.plan.read_text()) == ("roformer" in family)


WRAPPERS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "bare": lambda state: state,
    "state": lambda state: {"state": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "nested": lambda state: {"state": {"state_dict": state}},
    "module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "model": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
    "float16": lambda state: {n: t.half() if t.is_floating_point() else t for n, t in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", NETWORKS)
def test_checkpoints_in_any_wrapper_are_recognized_with_and_without_a_config(
    family: str, wrapper: str, tmp_path: Path
) -> None:
    checkpoint, config = files_of(family)
    suffix = {"bare": ".pt", "state": ".th", "float16": ".bin"}.get(wrapper, ".ckpt")
    path = tmp_path / f"saved{suffix}"
    torch.save(WRAPPERS[wrapper](load_file(checkpoint)), path)
    made = msst.add("mine", path, config, tmp_path / "models")
    assert plan_file.load(made.plan).networks["net"].weight.architecture["type"] == family
    if family == "mdx23c":
        with pytest.raises(
            KmdxError, match="does not state n_fft, hop_length.*: add its YAML file with --config"
        ):
            msst.add("other", path, None, tmp_path / "models")
    else:
        assumed = msst.add("other", path, None, tmp_path / "models").assumed
        assert len(set(assumed)) == len(assumed)
        assert any(line.startswith("stems: ") for line in assumed)
        assert "overlap: 2" in assumed
        assert len({*assumed}) == len(assumed)


def test_a_mono_mdx23c_is_imported(tmp_path: Path) -> None:
    settings = config_of("mdx23c")
    settings["audio"]["num_channels"] = 1
    sizes = {**settings["audio"], **settings["model"]}
    mono = {key: value for key, value in sizes.items() if key in types.TYPES["mdx23c"].sizes}
    sources = settings["training"]["instruments"]
    network = mdx23c.stand_in({"type": "mdx23c", "sources": sources, **mono, "stereo": False}, "seed")
    checkpoint, config = tmp_path / "x.pt", tmp_path / "c.yaml"
    torch.save(network.state_dict(), checkpoint)
    config.write_text(yaml.safe_dump(settings), "utf-8")
    made = msst.add("mine", checkpoint, config, tmp_path / "models")
    assert plan_file.load(made.plan).networks["net"].weight.architecture["stereo"] is False


def test_stems_without_names_have_those_of_the_model_and_the_rest_another_than_the_target(
    tmp_path: Path,
) -> None:
    config = tmp_path / "c.yaml"
    settings = config_of("scnet")
    del settings["training"]["instruments"]
    settings["model"]["sources"] = ["piano", "guitar", "voice", "choir"]
    config.write_text(yaml.safe_dump(settings), "utf-8")
    made = msst.add("scnet", files_of("scnet")[0], config, tmp_path / "models")
    assert plan_file.load(made.plan).stems == ("piano", "guitar", "voice", "choir")
    settings = config_of("bs_roformer")
    settings["training"] = {"target_instrument": "residual"}
    config.write_text(yaml.safe_dump(settings), "utf-8")
    made = msst.add("bs", files_of("bs_roformer")[0], config, tmp_path / "models")
    assert plan_file.load(made.plan).stems == ("residual", "other")


def test_stems_may_have_the_names_of_the_plans_own_signals(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    settings = config_of("bs_roformer")
    for number, (target, others) in enumerate(
        [("E", "target"), ("target", "x"), ("x", "E"), ("net", "target")]
    ):
        settings["training"] = {"target_instrument": target, "instruments": [target, others]}
        settings["inference"] = {"normalize": True}
        config.write_text(yaml.safe_dump(settings), "utf-8")
        made = msst.add(f"bs{number}", files_of("bs_roformer")[0], config, tmp_path / "models")
        assert plan_file.load(made.plan).stems == (target, others)


def test_averaged_weights_are_not_counted_as_parameters(tmp_path: Path) -> None:
    checkpoint, config = files_of("bs_roformer")
    state = load_file(checkpoint)
    torch.save(state | {f"ema_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "x.pt")
    made = msst.add("mine", tmp_path / "x.pt", config, tmp_path / "models")
    assert "0.7 million parameters" in made.found[0]


def test_a_link_needs_no_copy(tmp_path: Path) -> None:
    checkpoint, config = files_of("bs_roformer")
    made = msst.add("mine", checkpoint, config, tmp_path, link=True)
    assert made.weight_file.is_symlink()
    assert made.weight_file.resolve() == checkpoint.resolve()
    Separator(made.plan, device="cpu")


def imported_with_normalize(kind: str, folder: Path) -> Path:
    """The plan of a golden network that normalizes its input."""
    checkpoint, _ = files_of(kind)
    settings = config_of(kind)
    settings["inference"]["normalize"] = True
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(settings), "utf-8")
    return msst.add("mine", checkpoint, config, folder / "models").plan


def test_the_rest_of_a_normalized_mixture_is_taken_at_its_level(tmp_path: Path) -> None:
    made = imported_with_normalize("bs_roformer", tmp_path)
    song = (0.2 + 0.05 * np.random.default_rng(0).standard_normal((50_000, 2))).astype(np.float32)
    stems = Separator(made, device="cpu", precision="fp32").separate(song, 44100)
    assert set(stems) == {"vocals", "other"}
    assert decibels(song, stems["vocals"] + stems["other"]) > 120


def test_even_a_short_song_is_normalized_as_numpy_does_it(tmp_path: Path) -> None:
    made = imported_with_normalize("mdx23c", tmp_path)
    song = (0.2 + 0.05 * np.random.default_rng(0).standard_normal((3000, 2))).astype(np.float32)
    mean, std = song.mean(1).mean(), song.mean(1).std()
    plan = plan_file.load(made)
    stems = Separator(plan, device="cpu", precision="fp32").separate(song, 44100)
    plain = Separator(without_normalization(plan), device="cpu", precision="fp32")
    for stem, expected in plain.separate((song - mean) / std, 44100).items():
        assert decibels(expected * std + mean, stems[stem]) > 110


def changed(section: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config[section][key] = value

    return change


CONFIG_MISTAKES: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("bs_roformer", changed("model", "dim", 32), "dim is 16 in the weights, but 32 in the architecture"),
    ("bs_roformer", changed("model", "depth", 3), "depth is 2 in the weights"),
    ("bs_roformer", changed("model", "depth", "two"), "depth"),
    ("bs_roformer", changed("model", "heads", 4), "heads is 2 in the weights"),
    ("bs_roformer", changed("model", "freqs_per_bands", [2, 3]), "freqs_per_bands"),
    ("bs_roformer", changed("model", "freqs_per_bands", 3), "freqs_per_bands must be a list"),
    ("bs_roformer", changed("model", "mask_estimator_depth", 3), "mask_estimator_depth is 2 in the weights"),
    ("bs_roformer", changed("model", "use_pope", True), "model.use_pope is not supported by BS-RoFormer"),
    ("bs_roformer", changed("model", "num_residual_streams", 4), "model.num_residual_streams is not supported"),
    ("bs_roformer", changed("model", "stft_hop_length", 0), "stft_hop_length must be a whole number"),
    ("bs_roformer", changed("training", "target_instrument", ""), "names 2 stems, but the checkpoint estimates 1"),
    ("bs_roformer", changed("training", "instruments", "vocals"), "training.instruments must be a list of names"),
    ("bs_roformer", changed("training", "instruments", [1, 2]), "training.instruments must be a list of names"),
    ("bs_roformer", changed("training", "target_instrument", "mixture"), "'mixture' cannot be the name of a stem"),
    ("bs_roformer", changed("training", "target_instrument", ["vocals"]), "target_instrument must be a name, not"),
    ("bs_roformer", changed("training", "target_instrument", 5), "target_instrument must be a name, not 5"),
    ("bs_roformer", changed("training", "model_type", "scnet"), "training.model_type is 'scnet', but the checkpoint is of type bs_roformer"),
    ("bs_roformer", changed("audio", "chunk_size", "8 s"), "chunk_size must be a number of samples, not '8 s'"),
    ("bs_roformer", changed("audio", "chunk_size", -1), "chunk: expected a whole number"),
    ("bs_roformer", changed("audio", "sample_rate", 7), "sample_rate must be a whole number from 1000"),
    ("bs_roformer", changed("inference", "num_overlap", 0), "overlap: expected a whole number of at least 1"),
    ("bs_roformer", changed("inference", "num_overlap", 2.5), "num_overlap must be a whole number, not 2.5"),
    ("mel_band_roformer", changed("training", "instruments", ["a", "b"]), "names 2 stems, but the checkpoint estimates 4"),
    ("mel_band_roformer", changed("training", "instruments", ["a", "a", "b", "c"]), "names a stem twice"),
    ("mel_band_roformer", changed("audio", "sample_rate", 48000), "audio.sample_rate is 48000, but model.sample_rate is 44100"),
    ("mdx23c", changed("model", "norm", "LayerNorm"), "norm"),
    ("mdx23c", changed("model", "num_subbands", 2), "num_subbands is 4 in the weights"),
    ("scnet", changed("model", "dims", [4, 32, 64, 128]), "dims is"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change", "message"), CONFIG_MISTAKES, ids=[m for *_, m in CONFIG_MISTAKES]
)
def test_a_config_that_does_not_fit_is_a_one_line_error_and_nothing_is_written(
    family: str, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    settings = config_of(family)
    change(settings)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings), "utf-8")
    with pytest.raises(KmdxError, match=message) as caught:
        msst.add("mine", files_of(family)[0], config, tmp_path / "models")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "models").exists()


def add_hyperace(state: dict[str, torch.Tensor]) -> None:
    state["layers.0.hyperace.conv.weight"] = torch.zeros(3)


def remove_one(state: dict[str, torch.Tensor]) -> None:
    del state["final_norm.gamma"]


def reshape_one(state: dict[str, torch.Tensor]) -> None:
    state["layers.0.0.layers.0.0.to_qkv.weight"] = torch.zeros(5, 16)


def only_lora(state: dict[str, torch.Tensor]) -> None:
    state.clear()
    state["layers.0.0.layers.0.0.to_qkv.lora_A"] = torch.zeros(2, 16)


def with_nan(state: dict[str, torch.Tensor]) -> None:
    state["final_norm.gamma"][0] = torch.nan


STATE_MISTAKES: list[tuple[Callable[[dict[str, torch.Tensor]], None], str]] = [
    (add_hyperace, "parts that are not supported.*hyperace"),
    (remove_one, "norms|missing"),
    (reshape_one, "dim_head is 0 in the weights"),
    (only_lora, "not a network that can be recognized"),
    (with_nan, "NaN"),
    (lambda state: state.clear(), "no state dict"),
]


@pytest.mark.parametrize(("change", "message"), STATE_MISTAKES)
def test_a_checkpoint_that_cannot_be_run_is_a_one_line_error(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    state = load_file(files_of("bs_roformer")[0])
    change(state)
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    with pytest.raises(KmdxError, match=message) as caught:
        msst.add("mine", path, files_of("bs_roformer")[1], tmp_path / "models")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dim: 16}\nx: !!python/object/apply:os.system [touch owned]\n", "python/object/apply:os.system.*not supported"),
        ("model: !!python/name:os.system\n", "not supported"),
        ("model: htdemucs\n", "networks of type 'htdemucs' cannot be imported"),
        ("just text", "expected a config with the sections"),
        ("model: 3\n", "expected a config with the sections"),
        ("model: {dim: 16}\naudio: [1]\n", "audio: expected a mapping"),
        ("model: {dim: [\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_config_that_runs_code_or_is_none_is_a_one_line_error(
    text: str, message: str, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text, "utf-8")
    with pytest.raises(KmdxError, match=message) as caught:
        msst.add("mine", files_of("bs_roformer")[0], config, tmp_path / "models")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name",
    ["", "a b", "../x", "mini", ".hidden", "x" * 200, "trained", "con", "melband_deux", "kim_vocal_2"],
)
def test_a_name_that_cannot_be_an_ensemble_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(KmdxError, match="name"):
        msst.add(name, *files_of("bs_roformer"), folder=tmp_path)


def test_an_ensemble_is_not_replaced_and_a_missing_or_cut_file_is_reported(tmp_path: Path) -> None:
    checkpoint, config = files_of("bs_roformer")
    msst.add("mine", checkpoint, config, tmp_path)
    with pytest.raises(KmdxError, match="exists already"):
        msst.add("mine", checkpoint, config, tmp_path)
    with pytest.raises(KmdxError, match="missing|No such file|not exist"):
        msst.add("two", tmp_path / "none.ckpt", config, tmp_path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(KmdxError, match="damaged|cut off"):
        msst.add("two", cut, config, tmp_path)
    with pytest.raises(KmdxError, match="expected a checkpoint"):
        msst.add("two", config, config, tmp_path)


def test_an_imported_ensemble_is_listed_and_separates_a_song(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    checkpoint, config = files_of("bs_roformer")
    run = in_process.run

    added = run(
        capsys, cli.main, "kmdx", "models", "add", "mine", "--checkpoint", checkpoint, "--config", config
    )
    assert added.code == 0
    assert "network: BS-RoFormer, 0.7 million parameters, 44100 Hz" in added.out
    assert "stems: vocals; other is the rest of the mixture" in added.out
    guessed = run(capsys, cli.main, "kmdx", "models", "add", "guess", "--checkpoint", checkpoint)
    assert guessed.code == 0
    assert "assumed, because the checkpoint does not state it: " in guessed.err
    assert "mine" in run(capsys, cli.main, "kmdx", "ensembles").out
    wrong = run(capsys, cli.main, "kmdx", "models", "add", "mine", "--checkpoint", checkpoint)
    assert (wrong.code, len(wrong.errors)) == (2, 1)

    song = 0.1 * np.random.default_rng(0).standard_normal((60_000, 2))
    soundfile.write("song.wav", song, 44100, subtype="FLOAT")
    done = run(
        capsys, cli.main, "kmdx", "separate", "song.wav", "-e", "mine", "-o", "out", "--format", "float32"
    )
    assert done.code == 0
    vocals, other = (soundfile.read(f"out/song/{stem}.wav")[0] for stem in ("vocals", "other"))
    assert decibels(song, vocals + other) > 120
