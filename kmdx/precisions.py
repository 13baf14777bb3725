"""Choose the precision of a network by the speed level, the device and the network.

With ``auto``, a GPU that is fast at float16 computes in float16; the largest measured change of a score was
0.007 dB. A CPU computes in float32, unless the speed level trades accuracy for time. Its half precision is
bfloat16, which changed scores of the real htdemucs by −0.070 to +0.114 dB.

Half precision applies to the parameters and inputs of convolutions and matrix products. In float16, and in
U-Nets, it also applies to the norms, activations and sums between them. Spectrograms, masks, local attention,
sums over windows and the statistics of normalizations are always in float32.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from kmdx import host, speeds
from kmdx.errors import DeviceError, KmdxWarning, quoted, suggest

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECISIONS = ("auto", *DTYPES)

AMPERE = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16
VOLTA = (7, 0)  # compute capability of the first with tensor cores, for float16


def check(precision: str) -> str:
    """Return the precision's name; raises :class:`DeviceError` if it is unknown."""
    if precision not in PRECISIONS:
        hint = suggest(str(precision), PRECISIONS)
        raise DeviceError(f"unknown precision {quoted(precision)}{hint}; available: {', '.join(PRECISIONS)}")
    return precision


def fast_halves(device: torch.device) -> tuple[torch.dtype, ...]:
    """Half precisions in which a device is faster than in float32, the preferred one first."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= AMPERE:  # both are equally fast, and float16 is eight times as accurate
            return (torch.float16, torch.bfloat16)
        return (torch.float16,) if capability >= VOLTA else ()
    if device.type == "cpu" and cpu_has_bf16():
        return (torch.bfloat16,)
    return ()


def candidates(precision: str, device: torch.device, speed: str) -> tuple[torch.dtype, ...]:
    """Half precisions that a precision option allows on a device, the preferred one first.

    Raises :class:`DeviceError` if the precision is unknown, and :class:`PlanError` if the speed level is.
    """
    level = speeds.get(speed)
    if check(precision) == "auto":
        return fast_halves(device) if device.type != "cpu" or level.cpu_half else ()
    return () if precision == "fp32" else (DTYPES[precision],)


def in_words(precision: str, device: torch.device, speed: str = speeds.DEFAULT) -> str:
    """The result of a precision option on a device, such as ``bf16 where a network supports it``."""
    found = candidates(precision, device, speed)[:1]
    return f"{NAMES[found[0]]} where a network supports it" if found else "fp32"


def warn_if_slow(precision: str, device: torch.device) -> None:
    """Warn about an explicit half precision that the device does not support in hardware."""
    known = device.type in ("cpu", "cuda")
    if known and precision not in ("auto", "fp32") and DTYPES[precision] not in fast_halves(device):
        warnings.warn(
            f"{device} emulates {precision} in software, which is many times slower than fp32; "
            "--precision auto chooses a fast one",
            KmdxWarning,
            stacklevel=3,
        )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX."""
    return not host.features().isdisjoint({"avx512_bf16", "amx_bf16"})


def choose(
    precision: str,
    device: torch.device,
    supported_dtypes: Collection[torch.dtype],
    speed: str = speeds.DEFAULT,
) -> torch.dtype:
    """Choose the precision of a network.

    Parameters
    ----------
    precision : str
        ``auto``: the first half precision that the device is fast at and the network supports, else
        float32; on a CPU, float32 unless the speed level allows half precision. ``fp32``, ``fp16`` or
        ``bf16``: this precision, or float32 for a network that does not support it.
    supported_dtypes : collection of torch.dtype
        Half precisions in which the network's estimates stay accurate.
    speed : str
        Speed level; with ``fast``, all networks use half precision.
    """
    force_half = speeds.get(speed).force_half
    found = candidates(precision, device, speed)
    return next((dtype for dtype in found if force_half or dtype in supported_dtypes), torch.float32)


REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


_entering = threading.Lock()
_entered = 0  # how many threads and nested blocks are in `exact`
_settings = ExitStack()  # restores the settings from before the first of them


@contextmanager
def exact() -> Iterator[None]:
    """Use exact float32 and accumulate half precision in float32, whatever the program has set in torch.

    Inside this context, convolutions, recurrent layers and matrix products do not use TF32 (or bfloat16 on
    the CPU), products in half precision are accumulated in float32, and cuDNN chooses deterministic kernels,
    not by timing. The settings apply to the whole process. The previous ones are restored when the last of
    several threads has left the context.
    """
    global _entered
    with _entering:
        if _entered == 0:
            _settings.enter_context(_exact())
        _entered += 1
    try:
        yield
    finally:
        with _entering:
            _entered -= 1
            if _entered == 0:
                _settings.close()


@contextmanager
def _exact() -> Iterator[None]:
    """Change the settings of the process, and restore them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    operations = _operations()
    formats = [operation.fp32_precision for operation in operations]
    _set_formats(operations, ["ieee"] * len(operations))
    # torch refuses to read an older setting that contradicts the newer ones. Since the newer ones are now
    # "ieee", it refuses only if the older one allows TF32.
    convolutions = _value_or(lambda: cudnn.allow_tf32, True)
    products = _value_or(torch.get_float32_matmul_precision, "high")
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
    """The operations with their own float32 setting; none in torch before 2.9."""
    backends: Any = torch.backends
    kinds = [(backends.cudnn, "conv"), (backends.cudnn, "rnn"), (backends.cuda, "matmul")]
    kinds += [(backends.mkldnn, name) for name in ("conv", "rnn", "matmul")]
    found = [getattr(owner, name, None) for owner, name in kinds]
    return [operation for operation in found if hasattr(operation, "fp32_precision")]


def _set_formats(operations: Collection[Any], formats: Collection[str]) -> None:
    for operation, value in zip(operations, formats, strict=True):
        operation.fp32_precision = value


def _value_or(read: Callable[[], Any], default: Any) -> Any:
    try:
        return read()
    except RuntimeError:
        return default


def _reduction(name: str) -> Any:
    """Whether sums may be in half precision and, in newer torch, whether they may be split."""
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, f"{name}_split_k"):
        return getattr(matmul, name)
    return getattr(matmul, name), getattr(matmul, f"{name}_split_k")
