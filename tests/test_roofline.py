"""Predicted speed: the counted work equals that computed by hand, and becomes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_types import EXAMPLES
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import count_arithmetic, roofline
from benchmarks.roofline import CARDS, GROUPS, LAUNCH, Card, Kernel
from kmdx import plan_file
from kmdx.errors import KmdxError
from kmdx.networks import types
from kmdx.networks.types import TYPES

B, T = 2, 16  # windows, and samples of each


class Layers(nn.Module):
    """Layers in a precision, on windows (B, 2, T)."""

    def __init__(self, *layers: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers, self.dtype = nn.Sequential(*layers), dtype

    def forward(self, batch: Tensor) -> Any:
        with torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.layers(batch)


class Function(nn.Module):
    """A layer that computes a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def counted(*layers: nn.Module, dtype: torch.dtype = torch.float32) -> list[Kernel]:
    return roofline.kernels(Layers(*layers, dtype=dtype), B, T)


def test_convolution_activation_and_matrix_product_are_counted_as_by_hand() -> None:
    found = counted(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Linear(T, 4, bias=False))
    output = 4 * B * 8 * T
    assert found == [
        Kernel("convolution", "products", 4 * (B * 2 * T + 8 * 2 * 3 + 8) + output, 2 * B * 8 * T * 2 * 3),
        Kernel("bias", "elementwise", 2 * output + 4 * 8),
        Kernel("relu", "elementwise", 2 * output),
        Kernel("mm", "products", output + 4 * (T * 4 + B * 8 * 4), 2 * B * 8 * T * 4),
    ]


def test_half_precision_casts_products_and_computes_norms_in_float32() -> None:
    found = counted(nn.Conv1d(2, 8, 1, bias=False), nn.GroupNorm(2, 8), dtype=torch.float16)
    output = B * 8 * T
    assert [each.group for each in found] == ["casts", "casts", "products", "casts", "norms"]
    product, norm = found[2], found[4]
    assert sorted(each.moved for each in found[:2]) == [6 * 8 * 2, 6 * B * 2 * T], "the weight and the input"
    assert found[3].moved == 6 * output
    assert product == Kernel(
        "convolution", "products", 2 * (B * 2 * T + 8 * 2 + output), 2 * output * 2, True
    )
    statistics = 2 * B * 2  # a mean and a deviation per group
    assert norm.moved == 4 * (3 * output + 2 * 8 + statistics)
    assert norm.launches == 3


def test_attention_is_one_kernel_that_does_not_store_its_weights() -> None:
    def attend(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)  # (B, 4 heads, 2 steps, 4)
        return F.scaled_dot_product_attention(heads, heads, heads)

    (found,) = counted(Function(attend))
    assert found == Kernel("attention", "products", 4 * 4 * B * 2 * T, 4 * B * 4 * 2 * 2 * 4)


def test_an_lstm_reads_its_weights_in_every_step() -> None:
    layers = counted(nn.LSTM(T, 8, num_layers=2, bidirectional=True))  # on (2 steps, 2 windows, 16 values)
    found = [each for each in layers if each.group == "products"]  # and zeros for the first states
    sizes = torch.Size((2, 2, T)), torch.Size((32, T)), torch.Size((32, 8))
    assert [each.name for each in found] == ["lstm", "lstm"]
    assert [each.launches for each in found] == [3, 3]
    assert found[0].flops == 2 * count_arithmetic.lstm_flops(*sizes), (
        "both directions; the second layer alike"
    )
    weights, inputs, output, gates = 32 * T + 2 * 32 * 8, 2 * 2 * T, 2 * 2 * 8, 2 * 2 * 32
    assert found[0].moved == 4 * (inputs + 2 * (weights + output + 2 * gates))


def test_views_and_memory_that_is_read_twice_cost_nothing() -> None:
    (found,) = counted(Function(lambda x: x[:, None, :, 3:].transpose(-1, -2).expand(-1, 5, -1, -1) * 2))
    assert (found.name, found.moved) == ("mul", 4 * (B * 2 * 13 + 5 * B * 2 * 13))
    (found,) = counted(Function(lambda x: x.unfold(-1, 4, 2) * 2))  # 7 frames of 4 samples
    assert (found.name, found.moved) == ("mul", 4 * (B * 2 * T + B * 2 * 7 * 4))


def test_a_convolution_copies_an_input_in_another_layout() -> None:
    found = counted(Function(lambda x: x.transpose(1, 2)), nn.Conv1d(T, 4, 1, bias=False))
    assert [each.group for each in found] == ["copies", "products"]
    assert found[0].moved == 2 * 4 * B * 2 * T


def test_adding_to_a_part_of_a_tensor_writes_it_once() -> None:
    def add(x: Tensor) -> Tensor:
        x[:, :, 4:] += 1
        x[:, 0] = 0
        return x

    added, zeroed = counted(Function(add))
    assert (added.name, added.moved) == ("add_", 2 * 4 * B * 2 * 12)
    assert (zeroed.group, zeroed.moved) == ("copies", 4 * B * T)


@pytest.mark.parametrize("name", ["htdemucs", "hdemucs"])
def test_arithmetic_equals_that_counted_on_the_cpu(name: str) -> None:
    example = {"htdemucs": tiny.HTDEMUCS, "hdemucs": tiny.HDEMUCS}[name]
    state = types.function(TYPES[name].stand_in)(example, "seed").float().state_dict()
    network = types.function(TYPES[name].build)(example, example["segment"], state)
    network.accelerate(torch.float32)
    found = roofline.kernels(network, 1, int(example["segment"] * 44_100))
    expected = count_arithmetic.demucs_gflops(example, example["segment"]) * example["segment"]
    assert sum(each.flops for each in found) / 1e9 == pytest.approx(expected, rel=0.03)


def test_arithmetic_of_a_published_network_equals_the_registrys() -> None:
    plan = plan_file.load("leaderboard_c")
    (run,) = roofline.count(plan, "fp16", 1, ["mdx_drums"])
    use = plan.networks["mdx_drums"]
    flops = run.per_second(lambda kernel: kernel.flops)
    assert use.gflops is not None
    assert flops / 1e9 == pytest.approx(use.gflops, rel=0.03)
    assert all(kernel.half for kernel in run.kernels if kernel.flops > 1e10)


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.file != "graph"])
def test_every_type_of_network_is_counted(name: str) -> None:
    kind, example = TYPES[name], EXAMPLES[name]
    state = types.function(kind.stand_in)(example, "seed").state_dict()
    network = types.function(kind.build)(example, 0.5, {key: value.float() for key, value in state.items()})
    network.accelerate(torch.float16)
    found = roofline.kernels(network, 2, network.length or 22_050)
    products = [each for each in found if each.group == "products"]
    assert {each.group for each in found} <= set(GROUPS)
    assert sum(each.half for each in products) > len(products) / 3
    assert any(each.group == "transforms" for each in found)


def test_a_kernel_takes_as_long_as_its_slower_half_and_its_launches() -> None:
    card = Card("any", single=10.0, half=100.0, bandwidth=4.0, source="")
    assert Kernel("mm", "products", 8, 400).seconds(card) == pytest.approx(40 + LAUNCH)
    assert Kernel("mm", "products", 8, 400, half=True).seconds(card) == pytest.approx(4 + LAUNCH)
    assert Kernel("mm", "products", 80, 400, True, launches=3).seconds(card) == pytest.approx(20 + 3 * LAUNCH)


@pytest.mark.parametrize(
    "key", [0, -1, None, ..., slice(1, -1), (..., 2), (slice(None), None, slice(0, 3, 2)), (..., None, 1)]
)
def test_fake_tensors_are_indexed_like_real_ones(key: Any) -> None:
    ours, torchs = torch.zeros(2, 4, 5, 3), torch.arange(120.0).view(2, 4, 5, 3)
    torch.testing.assert_close(roofline.indexed(torchs, key), torchs[key])
    roofline.assigned(ours, key, torchs[key])
    expected = torch.zeros(2, 4, 5, 3)
    expected[key] = torchs[key]
    torch.testing.assert_close(ours, expected)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A report of the GPU benchmark."""
    machine = {
        "cpu": "", "cores": 1, "threads": 1, "memory": None, "features": [], "gpu": "A card", "gpu_memory": 1,
        "compute_capability": "7.5", "system": "", "python": "", "torch": "", "onnxruntime": None,
    }  # fmt: skip
    report = {
        "machine": machine,
        "peak_gflops": {"fp32": 4000, "fp16": 30_000},
        "gpu": {"copies": {"memory": 240}},
    }
    (tmp_path / "card.json").write_text(json.dumps(report))
    return tmp_path / "card.json"


def test_the_command_prints_predictions_that_add_up(
    small: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline.main([str(small), "--batch", "2", "--measured", str(measured)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small: a prediction from counted work, not a measurement; 2 windows at once"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    names = [*(card.name for card in CARDS), "A card"]
    cards = [row for row in rows if row[0] in names]
    networks = [row for row in rows if row[0] == "`htdemucs`"]
    assert [row[:2] for row in cards] == [
        [name, precision] for name in names for precision in ("fp32", "fp16")
    ]
    heads = [row for row in rows if row not in cards + networks]
    assert [row[0] for row in heads] == ["prediction", "prediction"]
    assert "ms per window, A card" in heads[1]
    for row in cards:
        assert sum(int(cell.rstrip("%")) for cell in row[4:]) == pytest.approx(100, abs=4), "rounded"
    for total, precision in zip(cards[-2:], ("fp32", "fp16"), strict=True):
        parts = [float(row[-1]) for row in networks if row[1] == precision]
        assert float(total[2]) == pytest.approx(sum(parts), rel=0.01)
    assert [line.partition(":")[0] for line in lines[-len(names) :]] == names


def test_a_card_that_was_measured_has_its_peaks(measured: Path, tmp_path: Path) -> None:
    assert roofline.measured_card(measured) == Card("A card", 4e12, 3e13, 2.4e11, "measured, card.json")
    measured.write_text('{"machine": {}}')
    with pytest.raises(
        KmdxError, match=r"card.json is not a report of `python -m benchmarks.gpu`: 'peak_gflops'"
    ):
        roofline.measured_card(measured)
