"""Which number format a network computes in, by what it can bear and what the device is fast at.

Parameters of convolutions and matrix products and what goes through them may be in half precision, in
U-Nets everything between the first and the last convolution. Spectrograms, local attention, sums over windows
and the statistics of normalisations are in float32 always.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch

from kmdx.errors import DeviceError, KmdxWarning

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("auto", *DTYPES)

AMPERE = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16
VOLTA = (7, 0)  # and of the first with tensor cores, for float16


def check(precision: str) -> str:
    """Return the precision's name; raises :class:`DeviceError` if there is none such."""
    if precision not in PRECISIONS:
        raise DeviceError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    return precision


def fast_halves(device: torch.device) -> tuple[torch.dtype, ...]:
    """Half precisions that a device computes sooner than float32, the preferred one first."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= AMPERE:  # as fast at either, and float16 is eight times as exact
            return (torch.float16, torch.bfloat16)
        return (torch.float16,) if capability >= VOLTA else ()
    if device.type == "cpu" and cpu_has_bf16():
        return (torch.bfloat16,)
    return ()


def in_words(precision: str, device: torch.device) -> str:
    """What a choice of precision comes to on a device, such as ``bf16 where a network bears it``."""
    if precision == "auto":
        halves = fast_halves(device)
        precision = next((name for name, dtype in DTYPES.items() if dtype in halves[:1]), "fp32")
    return precision if precision == "fp32" else f"{precision} where a network bears it"


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
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    older = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch's names for them before
    return any(getattr(torch.cpu, name, bool)() for name in older)


def choose(
    precision: str, device: torch.device, bears: Collection[torch.dtype], loose: bool = False
) -> torch.dtype:
    """Choose the number format of a network.

    Parameters
    ----------
    precision : str
        ``auto``: the first half precision that the device is fast at and the network bears, else
        float32. ``fp32``, ``fp16`` or ``bf16``: that one, but float32 for a network that does not bear it.
    device : torch.device
    bears : collection of torch.dtype
        Half precisions that cost the network no more than its estimate can spare.
    loose : bool
        Take every network to bear every half precision.
    """
    check(precision)
    candidates = fast_halves(device) if precision == "auto" else (DTYPES[precision],)
    return next((dtype for dtype in candidates if loose or dtype in bears), torch.float32)
