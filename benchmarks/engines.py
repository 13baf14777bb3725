"""Compare engines for networks on a CPU: torch, the project's kernels, and libraries that compile a network.

    python -m benchmarks.engines leaderboard_c [--networks ft_drums mmi] [--precisions fp32 bf16]
        [--engines tuned openvino] [--rounds 5] [--threads 2] [--seconds 12] [--json FOLDER]

Networks have random weights. Each engine runs in a process of its own, beside another one with plain torch in
float32; the two compute the same window in turns. Printed are the seconds per window (median), plain torch's
time relative to it (median of the pairs), the difference from plain torch's result in dB, the seconds from
the network as built to its first result, and the peak memory. Compilers get the part between the Fourier
transforms, which stay in torch. Run this on an idle machine; the load is printed with the result.

``openvino``, ``onnxruntime`` (with ``onnxscript``) and a C++ compiler (``compile``) must be installed; an
engine that fails is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baseline import decibels
from kmdx import benchmark, files, host, plan_file, stand_in, terminal
from kmdx.build import load_for_inference
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.network import Network
from kmdx.networks.roformer import Roformer
from kmdx.precisions import DTYPES
from kmdx.windows import OverlapAdd

PLAIN = "plain"
SECONDS = 12.0  # of a window of a network that accepts any length
Core = Callable[..., Sequence[Tensor]]


class DemucsCore(nn.Module):
    """A Demucs network between its Fourier transforms."""

    def __init__(self, network: DemucsNetwork) -> None:
        super().__init__()
        model: Any = network.model
        self.network = model
        self.transform, self.inverse, self.mask = model._spec, model._ispec, model._mask
        self.magnitude = model._magnitude
        model._spec = lambda mix: None
        model._magnitude = lambda spectrum: self.given
        model._mask = self._keep
        model._ispec = lambda spectrum, length: torch.zeros(())

    def _keep(self, spectrum: None, estimate: Tensor) -> None:
        self.estimate = estimate

    def forward(self, magnitude: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the sources' spectra and waves."""
        self.given = magnitude
        waves = self.network(mix)
        return self.estimate, waves

    def run(self, core: Core, mix: Tensor) -> Tensor:
        """Estimate the sources of ``(B, 2, T)`` with any engine's core."""
        spectrum = self.transform(mix)
        spectra, waves = core(self.magnitude(spectrum), mix)
        return waves.float() + self.inverse(self.mask(spectrum, spectra.float()), mix.shape[-1])


class UnetCore(nn.Module):
    """The U-Net of an MDX-Net, MDX23C or SCNet."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.unet = network, network.unet

    def forward(self, spectrum: Tensor) -> tuple[Tensor]:
        """Map a spectrum."""
        return (self.unet(spectrum),)

    def run(self, core: Core, mix: Tensor) -> Tensor:
        """Estimate the sources of ``(B, 2, T)`` with any engine's core."""
        self.network.unet = lambda spectrum: core(spectrum.contiguous())[0]
        estimate: Tensor = self.network(mix)
        return estimate


class RoformerCore(nn.Module):
    """A RoFormer between its Fourier transforms."""

    def __init__(self, network: Roformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Map a spectrum, as pairs of real numbers, to masks."""
        x = self.network.features(torch.view_as_complex(numbers))
        return tuple(torch.view_as_real(mask(x)) for mask in self.network.mask_estimators)

    def run(self, core: Core, mix: Tensor) -> Tensor:
        """Estimate the sources of ``(1, 2, T)`` with any engine's core."""
        spectrum = self.network._transform(mix)
        masks = core(torch.view_as_real(spectrum).contiguous())
        waves = [
            self.network._inverse(spectrum * torch.view_as_complex(mask), mix.shape[-1]) for mask in masks
        ]
        return torch.stack(waves)[None]


def core_of(network: Any) -> Any:
    """The part of a network between its transforms."""
    if isinstance(network, DemucsNetwork):
        return DemucsCore(network)
    return RoformerCore(network) if isinstance(network, Roformer) else UnetCore(network)


def inputs_of(core: Any, mix: Tensor) -> tuple[Tensor, ...]:
    """What a core gets for a window."""

    class Seen(Exception):
        """Ends the run at the core."""

    seen: list[tuple[Tensor, ...]] = []

    def look(*given: Tensor) -> Sequence[Tensor]:
        seen.append(given)
        raise Seen

    with suppress(Seen):
        core.run(look, mix)
    return seen[0]


def openvino_core(core: nn.Module, given: tuple[Tensor, ...], half: bool) -> Core:
    """A core compiled by OpenVINO."""
    import openvino  # type: ignore[import-untyped, import-not-found, unused-ignore]

    model = openvino.convert_model(core, example_input=given)
    model.reshape({place: openvino.PartialShape([*tensor.shape]) for place, tensor in enumerate(given)})
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(*given: Tensor) -> list[Tensor]:
        found = request.infer([each.numpy() for each in given], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(np.array(found[place])) for place in range(len(found))]

    return run


def onnxruntime_core(core: nn.Module, given: tuple[Tensor, ...], half: bool) -> Core:
    """A core in ONNX Runtime."""
    import onnxruntime

    if half:
        raise NotImplementedError("ONNX Runtime has no bfloat16 on CPUs")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "core.onnx"
        torch.onnx.export(core, given, path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*given: Tensor) -> list[Tensor]:
        feed = {name: each.numpy() for name, each in zip(names, given, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, feed)]

    return run


def compiled_core(core: nn.Module, given: tuple[Tensor, ...], half: bool) -> Core:
    """A core compiled by torch."""
    return torch.compile(core, dynamic=False)


def frozen_core(core: nn.Module, given: tuple[Tensor, ...], half: bool) -> Core:
    """A core compiled by torch, with its weights as constants."""
    torch._inductor.config.freezing = True
    return torch.compile(core, dynamic=False)


COMPILERS = {
    "openvino": openvino_core,
    "onnxruntime": onnxruntime_core,
    "compile": compiled_core,
    "frozen": frozen_core,
}
ENGINES = ("tuned", *COMPILERS)


@contextmanager
def autocast(network: Network, half: bool) -> Iterator[None]:
    """What a Demucs network's own ``forward`` does around its core in half precision."""
    enabled = half and isinstance(network, DemucsNetwork)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        yield


class Engine:
    """A network in an engine."""

    def __init__(self, plan: Path, name: str, engine: str, precision: str, seconds: float) -> None:
        loaded = plan_file.load(plan)
        use = loaded.networks[name]
        compiler, self.half = COMPILERS.get(engine), precision != "fp32"
        # OpenVINO chooses what it computes in half precision itself.
        given = "fp32" if engine == "openvino" else precision
        self.network: Any = load_for_inference(
            use,
            loaded.sample_rate,
            torch.device("cpu"),
            engine="tuned" if engine == "tuned" else PLAIN,
            precision=given,
            speed="fast",
        )
        if self.network.dtype != DTYPES[given]:
            raise NotImplementedError(f"the network does not support {precision}")
        length = use.chunking.length
        if self.network.length is None and isinstance(use.chunking, OverlapAdd):
            length = min(length, int(seconds * loaded.sample_rate))
        torch.manual_seed(0)
        self.window = 0.1 * torch.randn(1, 2, length)
        self.compute: Callable[[Tensor], Tensor] = self.network
        self.half &= given != "fp32"
        if compiler:
            core = core_of(self.network)
            with autocast(self.network, self.half):
                shapes = inputs_of(core, self.window)
            with torch.no_grad():
                run = compiler(core, shapes, precision != "fp32")
            self.compute = lambda window: core.run(run, window)

    def __call__(self) -> Tensor:
        """Estimate the sources of the window."""
        with autocast(self.network, self.half), torch.inference_mode():
            return self.compute(self.window)


def serve(pipe: Connection, threads: int, *given: Any) -> None:
    """Run an engine in this process: send its first result, then the seconds of each window asked for."""
    torch.set_num_threads(threads)
    try:
        with host.warm_heap():
            host.reset_peak_memory()
            began = time.perf_counter()
            engine = Engine(*given)
            estimate = engine()
            pipe.send((time.perf_counter() - began, estimate.float().numpy()))
            while pipe.recv():
                began = time.perf_counter()
                engine()
                pipe.send((time.perf_counter() - began, host.peak_memory()))
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        pipe.send(f"{type(error).__name__}: {text[0][:200]}")


class Process:
    """An engine in a process of its own."""

    def __init__(self, *given: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *given), daemon=True)
        self.process.start()
        other.close()

    def receive(self) -> Any:
        """What it sends; raises :class:`RuntimeError` with the reason if the engine failed."""
        try:
            found = self.pipe.recv()
        except EOFError:
            self.process.join()
            found = f"the process ended with code {self.process.exitcode}"
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def window(self) -> tuple[float, int]:
        """Seconds of one more window, and peak memory in bytes so far."""
        self.pipe.send(True)
        seconds, memory = self.receive()
        return seconds, memory

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.join()


def compare(engine: str, precision: str, rounds: int, threads: int, given: tuple[Path, str, float]) -> Any:
    """An engine's figures for a network, beside plain torch in float32."""
    plan, name, seconds = given
    both = []
    try:
        for own in ((PLAIN, "fp32"), (engine, precision)):
            both.append(Process(threads, plan, name, *own, seconds))
            startup, estimate = both[-1].receive()
            if len(both) == 1:
                reference = estimate
        pairs = [[process.window() for process in both] for _ in range(rounds)]
    except (RuntimeError, OSError) as error:  # the latter if a process ended between two windows
        return {"failure": str(error)}
    finally:
        for process in both:
            process.close()
    return {
        "seconds": round(statistics.median(ours[0] for _, ours in pairs), 3),
        "plain_seconds": round(statistics.median(plain[0] for plain, _ in pairs), 3),
        "ratio": round(statistics.median(plain[0] / ours[0] for plain, ours in pairs), 3),
        "difference": round(decibels(reference, estimate), 1),
        "startup_seconds": round(startup, 1),
        "peak_memory": max(ours[1] for _, ours in pairs),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ensemble")
    parser.add_argument("--networks", nargs="+", help="names in the plan; by default all")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=host.usable_cores())
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    benchmark.check_place(args.json, is_folder=True)
    published = plan_file.load(args.ensemble)
    names = benchmark.check_networks(published, args.networks or ())
    found: dict[str, Any] = {}
    load = os.getloadavg()[0]
    print(f"load {load:.2f}, {args.threads} threads, {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        plan = stand_in.write(args.ensemble, Path(folder))
        for name in names:
            for precision in args.precisions:
                for engine in args.engines:
                    given = (plan, name, args.seconds)
                    row = compare(engine, precision, args.rounds, args.threads, given)
                    found.setdefault(name, {}).setdefault(precision, {})[engine] = row
                    print(name, precision, engine, row, flush=True)
    if args.json:
        date = datetime.now(timezone.utc)
        content = {
            "date": date.isoformat(timespec="seconds"),
            "machine": vars(benchmark.describe()),
            "load": load,
            "threads": args.threads,
            "rounds": args.rounds,
            "networks": found,
        }
        files.write_text(args.json / f"{published.name}.json", json.dumps(content, indent=1))


if __name__ == "__main__":
    terminal.run(main)
