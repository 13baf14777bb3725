"""What machine this is, how fast its matrix products are, and what memory this process took at most.

Sizes are in bytes. What a system does not tell is ``None``.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kmdx import limits, processor
from kmdx.networks import product
from kmdx.precision import DTYPES, fast_halves

CPU_SIZE, CUDA_SIZE = 2048, 8192  # rows and columns of the matrices whose product is timed
PRODUCTS = 4  # timed: the first is for warming up
CPU_FEATURES = {  # what torch calls it: what it does for the networks
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_fp16": "AMX-FP16",
    "neon": "NEON",
    "bf16": "BF16",
    "fp16_arith": "FP16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Machine:
    """A machine, as far as speed depends on it.

    Attributes
    ----------
    cpu : str
        Name of its model.
    cores : int
        Those that this process may use.
    threads : int
        Those that torch uses.
    memory : int or None
        What this process may use.
    features : tuple of str
        What the CPU offers for arithmetic.
    gpu : str or None
        Name of the GPU that was asked for.
    gpu_memory : int or None
    compute_capability : str or None
        Such as ``8.0``.
    system, python, torch : str
        Versions.
    onnxruntime : str or None
        Version; ``None`` where it is not installed.
    """

    cpu: str
    cores: int
    threads: int
    memory: int | None
    features: tuple[str, ...]
    gpu: str | None
    gpu_memory: int | None
    compute_capability: str | None
    system: str
    python: str
    torch: str
    onnxruntime: str | None

    @property
    def name(self) -> str:
        """The GPU's name where there is one, else the CPU's with its widest units and its cores."""
        widest = f" ({self.features[-1]})" if self.features else ""
        return self.gpu or f"{self.cpu}{widest}, {self.cores} core{'s' if self.cores > 1 else ''}"


def describe(device: torch.device | str = "cpu") -> Machine:
    """Look at the machine that this process runs on, with its GPU where ``device`` is one."""
    device = torch.device(device)
    gpu: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Machine(
        cpu=cpu_name(),
        cores=limits.usable_cores(),
        threads=torch.get_num_threads(),
        memory=limits.memory(),
        features=cpu_features(),
        gpu=gpu and gpu.name,
        gpu_memory=gpu and gpu.total_memory,
        compute_capability=gpu and f"{gpu.major}.{gpu.minor}",
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        onnxruntime=_onnxruntime(),
    )


def cpu_name() -> str:
    """Name of the CPU's model, or at least of its architecture."""
    return _name_from_the_system() or platform.processor() or platform.machine() or "unknown CPU"


def _name_from_the_system() -> str | None:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    if sys.platform == "win32":
        import winreg

        try:
            with winreg.OpenKey(
                winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            ) as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        except OSError:
            return None
    return processor.field(processor.CPUINFO, "model name") or processor.capabilities().get("cpu_name")


def cpu_features() -> tuple[str, ...]:
    """What the CPU offers for arithmetic, the widest units last."""
    found = processor.features()
    return tuple(name for key, name in CPU_FEATURES.items() if key in found)


def _onnxruntime() -> str | None:
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def peak_gflops(device: torch.device | str = "cpu") -> dict[str, float]:
    """Measure the matrix products of a device, in GFLOP/s by precision; takes about a second.

    ``fp32`` is always there (on CUDA without TF32), ``fp16`` and ``bf16`` where the hardware has them.
    """
    device = torch.device(device)
    size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
    return {name: _product_gflops(device, DTYPES[name], size) for name in precisions(device)}


def precisions(device: torch.device) -> list[str]:
    """The precisions that the hardware multiplies in fast, ``fp32`` first."""
    return ["fp32", *(name for name, dtype in DTYPES.items() if dtype in fast_halves(device))]


def _product_gflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best of some products of two square matrices, by the faster of torch's libraries."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    with torch.inference_mode():
        for _ in range(PRODUCTS):
            synchronize(device)
            began = time.perf_counter()
            product.linear(left, right)
            synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory() -> int | None:
    """Bytes of host memory that this process took at most, since it began or since the last reset."""
    if peak := processor.field(Path("/proc/self/status"), "VmHWM"):
        return int(peak.split()[0]) * 1024  # "12345 kB"
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_size * (1 if sys.platform == "darwin" else 1024)


def peak_device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that torch took at most, with what it keeps for later; ``None`` elsewhere."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def reset_peaks(device: torch.device) -> bool:
    """Measure memory anew from here on, where the system can: Linux for the host's, CUDA for the GPU's.

    Returns
    -------
    bool
        Whether the host's peak begins anew; where not, it stays that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
