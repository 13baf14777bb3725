"""Which number format a network computes in, by the speed level, the device and what the network can bear.

With ``auto``, a GPU computes in float16 where it is fast at it (measured: at most 0.007 dB of a score), and a
CPU in float32 unless the speed level trades exactness for time: its half precision is bfloat16, which changed
scores of the real htdemucs by −0.070 to +0.114 dB.

Parameters of convolutions and matrix products and what goes through them may be in half precision, in
U-Nets everything between the first and the last convolution. Spectrograms, local attention, sums over windows
and the statistics of normalisations are in float32 always.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kmdx import host
from kmdx import speed as speeds
from kmdx.errors import DeviceError, KmdxWarning

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECISIONS = ("auto", *DTYPES)

AMPERE = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16
VOLTA = (7, 0)  # and of the first with tensor cores, for float16


def check(precision: str) -> str:
    """Return the precision's name; raises :class:`DeviceError` if there is none such."""
    if precision not in PRECISIONS:
        raise DeviceError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    return precision


def fast_halves(device: torch.device) -> tuple[torch.dtype, ...]:
    """Half precisions that a device computes faster than float32, the preferred one first."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= AMPERE:  # as fast at either, and float16 is eight times as exact
            return (torch.float16, torch.bfloat16)
        return (torch.float16,) if capability >= VOLTA else ()
    if device.type == "cpu" and cpu_has_bf16():
        return (torch.bfloat16,)
    return ()


def candidates(precision: str, device: torch.device, speed: str = speeds.DEFAULT) -> tuple[torch.dtype, ...]:
    """Half precisions that a choice of precision allows on a device, the preferred one first.

    Raises
    ------
    DeviceError
        If there is no such precision.
    PlanError
        If there is no such speed level.
    """
    level = speeds.get(speed)
    if check(precision) == "auto":
        return fast_halves(device) if device.type != "cpu" or level.cpu_half else ()
    return () if precision == "fp32" else (DTYPES[precision],)


def in_words(precision: str, device: torch.device, speed: str = speeds.DEFAULT) -> str:
    """What a choice of precision comes to on a device, such as ``bf16 where a network supports it``."""
    found = candidates(precision, device, speed)[:1]
    return f"{NAMES[found[0]]} where a network supports it" if found else "fp32"


def warn_if_slow(precision: str, device: torch.device) -> None:
    """Warn of a half precision that was asked for by name and that the device has no hardware for."""
    known = device.type in ("cpu", "cuda")
    if known and precision not in ("auto", "fp32") and DTYPES[precision] not in fast_halves(device):
        warnings.warn(
            f"{device} computes {precision} in software here, many times slower than fp32; "
            "--precision auto chooses what is fast",
            KmdxWarning,
            stacklevel=3,
        )


def cpu_has_bf16() -> bool:
    """Tell whether the CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX."""
    return not host.features().isdisjoint({"avx512_bf16", "amx_bf16"})


def choose(
    precision: str,
    device: torch.device,
    supported_dtypes: Collection[torch.dtype],
    speed: str = speeds.DEFAULT,
) -> torch.dtype:
    """Choose the number format of a network.

    Parameters
    ----------
    precision : str
        ``auto``: the first half precision that the device is fast at and the network supports, else float32;
        on a CPU float32, unless the speed level allows half precision there. ``fp32``, ``fp16`` or
        ``bf16``: that one, but float32 for a network that does not bear it.
    device : torch.device
    supported_dtypes : collection of torch.dtype
        Half precisions that cost the network no more than its estimate can spare.
    speed : str
        Speed level; with ``fast`` every network is taken to bear every half precision.

    Raises
    ------
    DeviceError
        If there is no such precision.
    PlanError
        If there is no such speed level.
    """
    force_half = speeds.get(speed).force_half
    found = candidates(precision, device, speed)
    return next((dtype for dtype in found if force_half or dtype in supported_dtypes), torch.float32)


REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@contextmanager
def exact() -> Iterator[None]:
    """Compute float32 as float32 and add up half precisions in it, whatever the program has set for torch.

    Inside, neither convolutions nor recurrent layers nor matrix products use TF32 (or bfloat16 on the CPU),
    sums of half-precision products are in float32, and cuDNN chooses no kernel by timing and none that adds
    up in an order of chance. Afterwards all is as it was. The settings are those of the whole process.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    operations = _operations()
    formats = [operation.fp32_precision for operation in operations]
    _set_formats(operations, ["ieee"] * len(operations))
    # torch refuses to tell the older settings where the newer ones say something else. As the newer ones
    # are now, it refuses only if the older one allows TF32.
    convolutions = _told(lambda: cudnn.allow_tf32, True)
    products = _told(torch.get_float32_matmul_precision, "high")
    reductions = {name: _reduction(name) for name in REDUCTIONS}
    choices = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        _set_formats(operations, ["ieee"] * len(operations))  # the older settings change the newer ones
        for name, value in reductions.items():
            setattr(matmul, name, (False, value[1]) if isinstance(value, tuple) else False)
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = choices
        for name, value in reductions.items():
            setattr(matmul, name, value)
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        _set_formats(operations, formats)


def _operations() -> list[Any]:
    """What has a setting of its own for float32; nothing in torch before 2.9."""
    backends: Any = torch.backends
    kinds = [(backends.cudnn, "conv"), (backends.cudnn, "rnn"), (backends.cuda, "matmul")]
    kinds += [(backends.mkldnn, name) for name in ("conv", "rnn", "matmul")]
    found = [getattr(owner, name, None) for owner, name in kinds]
    return [operation for operation in found if hasattr(operation, "fp32_precision")]


def _set_formats(operations: Collection[Any], formats: Collection[str]) -> None:
    for operation, value in zip(operations, formats, strict=True):
        operation.fp32_precision = value


def _told(read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except RuntimeError:
        return otherwise


def _reduction(name: str) -> Any:
    """Whether sums may be in half precision; with whether they may be split up, where torch tells that."""
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, f"{name}_split_k"):
        return getattr(matmul, name)
    return getattr(matmul, name), getattr(matmul, f"{name}_split_k")
