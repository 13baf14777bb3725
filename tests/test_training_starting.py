"""Training that starts from existing weights, with parts frozen, and runs that are extended."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import training_cases as cases
import yaml
from conftest import noise
from rich.console import Console

from kmdx import weights
from kmdx.networks.tfc_tdf import TfcTdf
from training import budget, command, export, freezing, songs, starting, trainer, validation
from training.config import Config, TrainingError
from training.module import Averaging, Unmixing
from training.run import Run

data = cases.data
NORMS = {**cases.NETWORK, "norm_groups": None}
FIRST = "first_conv.0.weight"


@pytest.fixture
def fit(data: Path, tmp_path: Path) -> Callable[..., Run]:
    """Train in this process, in a folder of that name; ``source`` is what it starts from."""

    def run(name: str = "run", source: object = None, with_optimizer: bool = False, **changes: object) -> Run:
        config = cases.small(**changes)
        start = None if source is None else starting.read(str(source), config, with_optimizer)
        return trainer.fit(
            config,
            [data],
            tmp_path / name,
            console=Console(file=tmp_path.joinpath("printed").open("a")),
            decoded=tmp_path / "decoded",
            hardware=cases.HERE,
            start=start,
        )

    return run


def module(config: Config, start: starting.Start | None = None) -> Unmixing:
    return Unmixing(config, songs.Songs((), ()), start=start)


def author_file(path: Path, prefix: str = "", **wrapped: object) -> TfcTdf:
    """A published weight file of a network with random weights."""
    config = cases.small()
    torch.manual_seed(7)
    made = TfcTdf(config.network.unet(), "vocals")
    state = {prefix + name: tensor for name, tensor in export.author_state(made).items()}
    torch.save({**wrapped, "state_dict": state} if wrapped else state, path)
    return made


def refused(source: object, **changes: object) -> str:
    with pytest.raises(TrainingError) as caught:
        starting.read(str(source), cases.small(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a run starts from


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
@pytest.mark.parametrize("wrapped", [{}, {"epoch": 3}])
def test_a_run_starts_from_a_weight_file(tmp_path: Path, wrapped: dict[str, Any], prefix: str) -> None:
    network = author_file(tmp_path / "published.pt", prefix=prefix, **wrapped)
    config = cases.small()
    made = module(config, starting.read(str(tmp_path / "published.pt"), config))
    assert cases.same(dict(made.network.state_dict()), dict(network.state_dict()))


def test_a_run_starts_from_the_best_averaged_weights_of_another(fit: Callable[..., Run]) -> None:
    other = fit("other")
    config = cases.small(source="drums")
    start = starting.read(str(other.folder), config)
    assert cases.same(dict(start.state), dict(trainer.trained(other).state_dict()))
    assert (start.step, start.moments) == (other.checkpoint()[0]["global_step"], {})
    assert cases.same(dict(starting.read(str(other.best), config).state), dict(start.state))


@pytest.mark.parametrize("half", [False, True])
def test_a_run_starts_from_what_was_exported(fit: Callable[..., Run], tmp_path: Path, half: bool) -> None:
    other = fit("other", network=NORMS)
    made = export.write_weights(other, "mine", tmp_path / "models", half=half)
    expected = torch.load(made.state, weights_only=True)
    for file in (made.state, made.graph):
        start = starting.read(str(file), cases.small(network=NORMS))
        error = [
            (start.state[name] - expected[name].float()).abs().max() for name in (FIRST, "us.0.0.weight")
        ]
        assert max(error) < 1e-6 or file == made.graph  # whose convolutions contain the norms
    wrong = refused(made.state, network={**NORMS, "n_fft": 1024})
    assert wrong.endswith("another network's weights: n_fft 512; the config has n_fft 1024")


def test_the_record_of_a_start_is_in_the_run_and_in_what_it_exports(
    fit: Callable[..., Run], tmp_path: Path
) -> None:
    author_file(tmp_path / "published.pt")
    digest = weights.file_sha256(tmp_path / "published.pt")
    run = fit(source=tmp_path / "published.pt", steps=2)
    assert run.data()["start"]["sha256"] == digest
    export.write_weights(run, "mine", tmp_path / "models")
    entry = yaml.safe_load((tmp_path / "models" / "trained.yaml").read_text("utf-8"))["mine"]
    assert entry["started_from"] == {"path": str(tmp_path / "published.pt"), "sha256": digest}
    assert "from published.pt" in weights.trained(tmp_path / "models")["mine"].licence_note


def test_the_training_songs_of_weights_are_inherited_by_runs_started_from_them(
    fit: Callable[..., Run], tmp_path: Path
) -> None:
    author_file(tmp_path / "x.pt")
    config = cases.small()
    weights.register(
        tmp_path,
        "x",
        title="x",
        file="x.pt",
        architecture=config.network.architecture("vocals"),
        trained="today",
        trained_with="MUSDB18's test songs",
    )
    first = fit("first", source=tmp_path / "x.pt", steps=2)
    assert starting.read(str(first.best), config).trained_with == "MUSDB18's test songs"
    second = fit("second", source=first.folder, steps=2)
    made = export.write_weights(second, "y", tmp_path / "models")
    assert weights.trained(tmp_path / "models")[made.name].trained_with == "MUSDB18's test songs"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"growth": 6}, r"first_conv\.0\.weight has the shape \(4, 4, 1, 1\), expected \(6, 4, 1, 1\)"),
        ({"layers": 5}, r"another network's weights: of \d+ tensors \d+ missing \(encoding_blocks\.1\."),
        ({"norm_groups": None}, r"missing \(first_conv\.1\.running_mean\)"),
        ({"n_fft": 1024}, "its window is not the periodic Hann window of 1024 samples"),
    ],
)
def test_weights_of_another_network_are_a_one_line_error(
    network: dict[str, object], message: str, tmp_path: Path
) -> None:
    author_file(tmp_path / "x.pt")
    line = refused(tmp_path / "x.pt", network={**cases.NETWORK, **network})
    assert line.startswith(f"--from {tmp_path / 'x.pt'}: ")
    assert re.search(message, line)


def test_an_unusable_start_is_a_one_line_error(fit: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights", "utf-8")
    (tmp_path / "empty").mkdir()
    assert "is not a weight file" in refused(tmp_path / "text.pt")
    assert "it has no config.yaml" in refused(tmp_path / "empty")
    assert "not found; expected a weight file, the folder of a run" in refused(tmp_path / "nothing")
    assert "another network's weights" in refused("mini_vocals")
    other = fit("other", steps=2)
    assert "growth 4; the config has growth 6" in refused(
        other.folder, network={**cases.NETWORK, "growth": 6}
    )
    with pytest.raises(TrainingError, match="its optimizer is adamw, not rmsprop"):
        starting.read(str(other.folder), cases.small(optimizer={"kind": "rmsprop"}), with_optimizer=True)
    with pytest.raises(TrainingError, match="all 44 parameter tensors are frozen"):
        starting.read(str(other.folder), cases.small(freeze=["*"]), with_optimizer=True)
    with pytest.raises(TrainingError, match="a weight file has no optimizer state"):
        starting.read(str(other.best), cases.small(), with_optimizer=True)


def test_a_run_whose_optimizer_was_removed_starts_another_run_without_it(
    fit: Callable[..., Run], tmp_path: Path
) -> None:
    other = fit("other")
    bare = {key: value for key, value in other.checkpoint()[0].items() if key != "optimizer_states"}
    torch.save(bare, tmp_path / "bare.ckpt")
    (tmp_path / "bare.ckpt").replace(other.weights)  # the checkpoint's tensors are read from the old file
    assert not starting.read(str(other.folder), cases.small()).moments
    with pytest.raises(TrainingError, match="its optimizer has no state for the parameters"):
        starting.read(str(other.folder), cases.small(), with_optimizer=True)


def test_the_optimizer_state_of_a_run_is_loaded_on_request(fit: Callable[..., Run]) -> None:
    other = fit("other", freeze=["final_conv"])
    config = cases.small(freeze=["first_conv.0.*"])
    made = module(config, starting.read(str(other.folder), config, with_optimizer=True))
    optimizer = made.configure_optimizers()["optimizer"]
    names = {parameter: name for name, parameter in made.network.named_parameters()}
    moments = {names[parameter]: state["exp_avg"] for parameter, state in optimizer.state.items()}
    frozen = {name for name in names.values() if name.startswith(("final_conv", "first_conv.0"))}
    assert moments.keys() == {*names.values()} - frozen
    before = [state["exp_avg"] for state in other.checkpoint()[0]["optimizer_states"][0]["state"].values()]
    assert torch.equal(moments["first_conv.1.weight"], before[2])
    without = fit("without", source=other.folder)
    taken = fit("taken", source=other.folder, with_optimizer=True)
    assert not cases.same(cases.state(without), cases.state(taken))
    assert taken.data()["start"]["optimizer"]


def test_a_resumed_run_must_have_started_from_the_same_weights(
    fit: Callable[..., Run], tmp_path: Path
) -> None:
    author_file(tmp_path / "one.pt")
    author_file(tmp_path / "two.pt", seed=0)
    fit(source=tmp_path / "one.pt", steps=2)
    with pytest.raises(TrainingError, match=r"started from .*one\.pt \(\w+\), not .*two\.pt"):
        fit(source=tmp_path / "two.pt", steps=4)
    (tmp_path / "one.pt").rename(tmp_path / "moved.pt")
    fit(source=tmp_path / "moved.pt", steps=4)
    assert fit(steps=6).data()["start"]["path"].endswith("moved.pt")
    fit("random", steps=2)
    with pytest.raises(TrainingError, match=r"started from random weights, not .*moved\.pt"):
        fit("random", source=tmp_path / "moved.pt", steps=2)


def test_a_run_without_a_checkpoint_still_needs_what_it_starts_from(
    fit: Callable[..., Run], tmp_path: Path
) -> None:
    author_file(tmp_path / "one.pt")
    run = fit(source=tmp_path / "one.pt", steps=2)
    run.last.unlink()
    with pytest.raises(TrainingError, match=r"has no checkpoint yet: add --from .*one\.pt"):
        fit(steps=2)


def test_the_command_starts_from_a_run(
    data: Path,
    fit: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = fit("other", steps=2)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cases.CONFIG), "utf-8")
    arguments = ["run", str(config), "--data", str(data), "-o", str(tmp_path / "run"), "--device", "cpu"]
    arguments += ["--workers", "0", "--decoded", str(tmp_path / "decoded"), "--set", "steps=2"]
    arguments += ["--from", str(other.folder), "--with-optimizer", "--set", "freeze=first_conv"]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert not caught.value.code
    printed = capsys.readouterr().err
    assert f"starting from {other.folder} (" in printed
    assert re.search(r"training [\d,]+ of [\d,]+ parameters", printed)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert f"Started from <code>{other.folder}</code>, step 2, with the state of its optimizer" in page


# What is frozen


def test_frozen_weights_stay_bit_for_bit_while_the_rest_learns(fit: Callable[..., Run]) -> None:
    changes: dict[str, Any] = {"network": NORMS, "optimizer": {"rate": 0.01, "weight_decay": 0.1}}
    patterns = ["encoding_blocks.*", "first_conv", "*.bias"]
    config = cases.small(**changes, freeze=patterns)
    before = {name: tensor.clone() for name, tensor in module(config).state_dict().items()}
    checkpoint = torch.load(fit(**changes, freeze=patterns).last, weights_only=True)
    frozen = {name for name in before if name.startswith(("network.enc", "network.first"))}
    assert any(name.endswith("running_mean") for name in frozen)
    for key in ("state_dict", "current_model_state"):
        changed = {name for name, tensor in checkpoint[key].items() if not torch.equal(tensor, before[name])}
        biases = {name for name in before if name.endswith(".bias")}
        assert changed == before.keys() - frozen - biases
    trained = [name for name, parameter in module(config).named_parameters() if parameter.requires_grad]
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained) < len(before)


def test_the_average_of_unchanged_weights_has_the_same_bits() -> None:
    average = Averaging(0.999)._kwargs["avg_fn"]
    for value in (torch.tensor([-0.0, 0.1, 1e-40]), torch.tensor([2**40 + 1])):
        kept = average(value, value, torch.tensor(5))
        assert kept.dtype == value.dtype
        assert kept.numpy().tobytes() == value.numpy().tobytes()


def test_validation_leaves_frozen_modules_as_they_were(data: Path) -> None:
    config = cases.small(network=NORMS, freeze=["first_conv"])
    made = module(config).train()
    song = cases.found(data, config).validation[0]
    validation.estimate(config, made.network, None, song, torch.device("cpu"))
    assert not made.network.first_conv.training
    assert made.network.final_conv.training


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["encoder.*"], "no parameter matches encoder.*; their names begin with first_conv, encoding_blocks"),
        (["*"], "all 44 parameter tensors are frozen"),
    ],
)
def test_invalid_patterns_are_one_line_errors(
    fit: Callable[..., Run], tmp_path: Path, patterns: list[str], message: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        fit(freeze=patterns)
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_start_of_a_run_reports_how_much_is_trained(fit: Callable[..., Run], tmp_path: Path) -> None:
    fit(steps=2, freeze=["encoding_blocks"])
    network = module(cases.small()).network
    total = sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(parameter.numel() for parameter in network.encoding_blocks.parameters())
    assert f"training {total - frozen:,} of {total:,} parameters" in (tmp_path / "printed").read_text()
    assert freezing.freeze(network, []) == freezing.Trained(total, total)


def test_frozen_weights_need_less_memory() -> None:
    whole, part = (budget.measure(cases.small(freeze=patterns)) for patterns in ([], ["encoding_blocks"]))
    frozen = sum(
        parameter.numel() for parameter in module(cases.small()).network.encoding_blocks.parameters()
    )
    assert whole.parameters == part.parameters
    assert whole.fixed - part.fixed == 4 * 3 * frozen  # a gradient and two moments each


# Runs that are extended


CONSTANT = {"rate": 0.01, "warm_up": 2, "schedule": "constant"}


@pytest.mark.parametrize(("first", "epoch"), [(4, 2), (5, 4), (3, 4)])
def test_an_extended_run_equals_a_run_of_that_many_steps_bit_for_bit(
    fit: Callable[..., Run], first: int, epoch: int
) -> None:
    changes: dict[str, Any] = {"optimizer": CONSTANT, "epoch": epoch, "network": NORMS}
    whole = fit("whole", steps=12, **changes)
    fit("parts", steps=first, **changes)
    parts = fit("parts", steps=12, **changes)
    assert cases.same(cases.state(parts), cases.state(whole))
    expected = {int(row["step"]): row for row in cases.rows(whole.validation)}
    scores = {int(row["step"]): row for row in cases.rows(parts.validation)}
    assert {step: row for step, row in scores.items() if step != first} == {
        step: row for step, row in expected.items() if step != first
    }
    assert parts.data()["extensions"] == [{"done": first, "before": first, "steps": 12}]
    assert parts.ended()


def test_the_rate_of_an_extended_run_follows_the_longer_cosine(
    fit: Callable[..., Run], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"optimizer": {"rate": 0.01}, "epoch": 5}
    fit(steps=5, **changes)
    run = fit(steps=20, **changes)
    rates = {int(row["step"]): float(row["learning_rate"]) for row in cases.rows(run.steps)}
    whole = module(cases.small(steps=20, **changes))
    assert rates[10] == pytest.approx(0.01 * whole.rate(10), rel=1e-4)
    assert (
        "step 5 of 20 steps instead of 5: the learning rate continues" in (tmp_path / "printed").read_text()
    )


def test_fewer_steps_than_are_complete_is_a_one_line_error(fit: Callable[..., Run]) -> None:
    fit(steps=6)
    with pytest.raises(TrainingError, match="6 steps are complete, but steps is 4; expected at least 6"):
        fit(steps=4)


def test_more_patience_extends_a_run_that_ended_early(fit: Callable[..., Run]) -> None:
    still: dict[str, Any] = {"optimizer": {"rate": 1e-30}, "steps": 20, "average": None}
    run = fit(patience=1, **still)
    done = run.done()
    assert done < 20
    assert fit(patience=1, **still).done() == done
    assert done < fit(patience=3, **still).done() < 20


# Warnings about songs


@pytest.mark.filterwarnings("always::kmdx.errors.KmdxWarning")
def test_warnings_about_songs_are_in_the_runs_page(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "songs" / "short <b>"
    short.mkdir(parents=True)
    for stem, samples in (("vocals", 88_200), ("drums", 44_100)):
        soundfile.write(short / f"{stem}.wav", 0.1 * noise(samples, seed=1), 44100)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**cases.CONFIG, "steps": 2}), "utf-8")
    arguments = [
        "run",
        str(config),
        "--data",
        str(data),
        "--data",
        str(tmp_path / "songs"),
        "--device",
        "cpu",
    ]
    arguments += ["-o", str(tmp_path / "run"), "--workers", "0", "--decoded", str(tmp_path / "decoded")]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert not caught.value.code
    printed = capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    for line in Run(tmp_path / "run").data()["warnings"]:
        assert printed.count(f"warning: {line}") == 1
        assert line.replace("<", "&lt;").replace(">", "&gt;") in page
    assert "short &lt;b&gt;: no bass, other" in page
