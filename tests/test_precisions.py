"""Which number format a network computes in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from kmdx import precisions
from kmdx.errors import DeviceError, KmdxWarning

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "halves"),
    [
        ((9, 0), (FP16, BF16)),
        ((8, 0), (FP16, BF16)),
        ((7, 5), (FP16,)),  # T4
        ((7, 0), (FP16,)),
        ((6, 1), ()),
    ],
)
def test_fast_half_precisions_of_gpus(
    capability: tuple[int, int], halves: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precisions.fast_halves(GPU) == halves


@pytest.mark.parametrize(
    ("capabilities", "halves"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, (BF16,)),
        ({"avx512_bf16": False, "amx_bf16": True}, (BF16,)),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True, "avx512_fp16": True}, ()),
        ({}, ()),
        (None, ()),
        (None, (BF16,)),
    ],
)
def test_fast_half_precisions_of_cpus(
    capabilities: dict | None, halves: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capabilities is None:  # torch before 2.6
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(halves), raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", bool, raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precisions.fast_halves(CPU) == halves


@pytest.mark.parametrize(
    ("name", "device", "speed", "fast", "words"),
    [
        ("auto", CPU, "fast", (), "fp32"),
        ("auto", CPU, "leaderboard", (BF16,), "fp32"),
        ("auto", CPU, "balanced", (BF16,), "bf16 where a network supports it"),
        ("auto", CPU, "fast", (BF16,), "bf16 where a network supports it"),
        ("auto", GPU, "leaderboard", (FP16, BF16), "fp16 where a network supports it"),
        ("auto", GPU, "leaderboard", (), "fp32"),
        ("fp32", CPU, "fast", (BF16,), "fp32"),
        ("bf16", CPU, "leaderboard", (), "bf16 where a network supports it"),
    ],
)
def test_the_precision_is_described_in_words(
    name: str, device: torch.device, speed: str, fast: tuple, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "fast_halves", lambda device: fast)
    assert precisions.in_words(name, device, speed) == words


def test_other_devices_have_no_fast_half_precision() -> None:
    assert precisions.fast_halves(torch.device("mps")) == ()


@pytest.mark.parametrize(
    ("name", "device", "speed", "fast", "supported_dtypes", "chosen"),
    [
        ("auto", CPU, "leaderboard", (BF16,), (BF16, FP16), FP32),
        ("auto", CPU, "balanced", (BF16,), (BF16, FP16), BF16),
        ("auto", CPU, "balanced", (BF16,), (FP16,), FP32),
        ("auto", CPU, "balanced", (), (BF16, FP16), FP32),
        ("auto", CPU, "fast", (BF16,), (BF16,), BF16),
        ("auto", CPU, "fast", (BF16,), (FP16,), BF16),
        ("auto", CPU, "fast", (), (BF16, FP16), FP32),
        ("auto", GPU, "leaderboard", (FP16, BF16), (BF16, FP16), FP16),
        ("auto", GPU, "leaderboard", (FP16, BF16), (BF16,), BF16),
        ("auto", GPU, "leaderboard", (FP16,), (), FP32),
        ("auto", GPU, "fast", (FP16,), (), FP16),
        ("auto", GPU, "leaderboard", (), (BF16, FP16), FP32),
        ("fp32", GPU, "fast", (BF16, FP16), (BF16, FP16), FP32),
        ("bf16", CPU, "leaderboard", (), (BF16, FP16), BF16),  # asked for by name, also where it is slow
        ("bf16", CPU, "leaderboard", (BF16,), (FP16,), FP32),
        ("bf16", CPU, "fast", (BF16,), (FP16,), BF16),
        ("fp16", CPU, "leaderboard", (BF16,), (FP16,), FP16),
        ("fp16", GPU, "leaderboard", (FP16,), (), FP32),
    ],
)
def test_the_precision_of_a_network_follows_from_device_speed_and_support(
    name: str,
    device: torch.device,
    speed: str,
    fast: tuple,
    supported_dtypes: tuple,
    chosen: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precisions, "fast_halves", lambda device: fast)
    assert precisions.choose(name, device, supported_dtypes, speed) == chosen


@pytest.mark.parametrize("name", ["fp64", "", "FP32", None, 16])
def test_an_unknown_precision_is_a_one_line_error(name: object) -> None:
    for refuse in (precisions.check, lambda name: precisions.choose(name, CPU, ())):
        with pytest.raises(DeviceError) as caught:
            refuse(name)
        assert str(caught.value).startswith(f"unknown precision {name!r}")
        assert str(caught.value).endswith("; available: auto, fp32, fp16, bf16")


@pytest.mark.parametrize(
    ("name", "fast", "warned"),
    [
        ("bf16", (), True),
        ("fp16", (BF16,), True),
        ("bf16", (BF16,), False),
        ("auto", (), False),
        ("fp32", (), False),
    ],
)
def test_emulated_half_precision_gives_a_warning(
    name: str, fast: tuple, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "fast_halves", lambda device: fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        precisions.warn_if_slow(name, CPU)
    assert [warning.category for warning in caught] == [KmdxWarning] * warned


# float32 as it is

BACKENDS: Any = torch.backends
MATMUL = torch.backends.cuda.matmul
NEWER = pytest.mark.skipif(not precisions._operations(), reason="needs torch 2.9 or newer")


def read(setting: Callable[[], object]) -> object:
    try:
        return setting()
    except RuntimeError:
        return "a mix"


def settings() -> dict[str, object]:
    found: dict[str, object] = {
        str(number): operation.fp32_precision for number, operation in enumerate(precisions._operations())
    }
    found["cudnn"] = read(lambda: BACKENDS.cudnn.allow_tf32)
    found["cublas"] = read(lambda: MATMUL.allow_tf32)
    found["products"] = read(torch.get_float32_matmul_precision)
    found["benchmark"] = BACKENDS.cudnn.benchmark
    found["deterministic"] = BACKENDS.cudnn.deterministic
    return found | {name: precisions._reduction(name) for name in precisions.REDUCTIONS}


@pytest.fixture
def untouched() -> Iterator[None]:
    """Restore torch's settings to those at the start of a process."""
    yield
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cudnn.benchmark = BACKENDS.cudnn.deterministic = False
    torch.set_float32_matmul_precision("highest")
    for name in precisions.REDUCTIONS:
        setattr(MATMUL, name, True)
    if precisions._operations():
        BACKENDS.fp32_precision = BACKENDS.cudnn.fp32_precision = BACKENDS.mkldnn.fp32_precision = "none"
        for operation in precisions._operations():
            operation.fp32_precision = "none"
        BACKENDS.cudnn.conv.fp32_precision = BACKENDS.cudnn.rnn.fp32_precision = "tf32"


def allow(owner: Any, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


SET = {
    "nothing": lambda: None,
    "older: products": allow(MATMUL, "allow_tf32", True),
    "older: no convolutions": allow(BACKENDS.cudnn, "allow_tf32", False),
    "older: medium": lambda: torch.set_float32_matmul_precision("medium"),
    "trying out": allow(BACKENDS.cudnn, "benchmark", True),
    "reductions": allow(MATMUL, precisions.REDUCTIONS[0], False),
    "newer: all": allow(BACKENDS, "fp32_precision", "tf32"),
    "newer: cuDNN": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "newer: products": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "newer: convolutions": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "a mix": lambda: (torch.set_float32_matmul_precision("high"), setattr(MATMUL, "fp32_precision", "ieee")),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("name", "api"),
    [(name, "older") for name in SET if not name.startswith(("newer", "a mix"))]
    + [pytest.param(name, "newer", marks=NEWER) for name in SET],
)
def test_float32_is_exact_whatever_torch_settings_are(
    name: str, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if api == "older":
        monkeypatch.setattr(precisions, "_operations", list)
    SET[name]()
    before = settings()
    with suppress(ValueError), precisions.exact():
        inside = settings()
        with precisions.exact():
            assert settings() == inside
        assert settings() == inside
        raise ValueError
    assert settings() == before
    formats = [value for key, value in inside.items() if key.isdigit()]
    assert set(formats) == ({"ieee"} if api == "newer" else set())
    assert (inside["cudnn"], inside["cublas"], inside["products"]) == (False, False, "highest")
    assert (inside["benchmark"], inside["deterministic"]) == (False, True)
    for reduction in precisions.REDUCTIONS:
        value = inside[reduction]
        assert not (value[0] if isinstance(value, tuple) else value)
