"""MDX-Net networks as ONNX graphs: ONNX Runtime runs the graph, torch the transforms around it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kmdx.errors import KmdxWarning, WeightsError, first_line
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import SPECTRUM_CHANNELS, TfcTdf

OPSET = 13  # of the published graph

INSTALL_HINT = "install ONNX Runtime: onnxruntime-gpu on a CUDA machine, onnxruntime elsewhere, never both"


class OnnxNetwork(nn.Module):
    """An ONNX Runtime session as a network of this library; it estimates one source.

    Raises :class:`ValueError` if the graph cannot be loaded.

    Parameters
    ----------
    path : Path
        The exported graph, checked by :func:`kmdx.weights.check_graph`: one input and one output of shape
        ``(batch, 4, bins, frames)``.
    spectrogram : SpectrogramConfig
        The transform around it.
    source : str
        Name of the source it estimates.
    device : torch.device
        The device to run on. On a CUDA device, if ONNX Runtime's CUDA provider is missing, the network runs
        on the CPU with a warning.
    """

    supported_dtypes: tuple[torch.dtype, ...] = ()
    dtype: torch.dtype = torch.float32

    def __init__(self, path: Path, spectrogram: SpectrogramConfig, source: str, device: torch.device) -> None:
        super().__init__()
        self.sources: tuple[str, ...] = (source,)
        self.length: int | None = spectrogram.chunk
        self.spectrogram = spectrogram.build()
        self.path = path
        self.session = _session(path, device)
        self.providers: tuple[str, ...] = tuple(self.session.get_providers())

        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.input_name, self.output_name = inputs[0].name, outputs[0].name
        # A dynamic axis has a name instead of a number.
        self.batch_size: int | None = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the source: float32 ``(B, 2, T)`` in, ``(B, 1, 2, T)`` out, ``T`` one chunk."""
        spectrum = self.spectrogram(batch)
        groups = spectrum.split(self.batch_size) if self.batch_size else (spectrum,)
        estimate = torch.cat([self._run(group) for group in groups])
        return self.spectrogram.inverse(estimate.to(batch.device))[:, None]

    @torch.compiler.disable
    def _run(self, spectrum: Tensor) -> Tensor:
        """Run the session on ``(b, 4, bins, frames)``, padded with zeros to a fixed batch size."""
        count = len(spectrum)
        if self.batch_size and count < self.batch_size:
            spectrum = torch.cat([spectrum, spectrum.new_zeros(self.batch_size - count, *spectrum.shape[1:])])
        inputs = np.ascontiguousarray(spectrum.cpu().numpy())
        try:
            (estimate,) = self.session.run([self.output_name], {self.input_name: inputs})
        except _runtime_errors() as error:
            reason = first_line(error)
            if "allocate memory" in str(error) or "out of memory" in str(error).lower():
                raise torch.OutOfMemoryError(reason) from error
            raise WeightsError(f"ONNX Runtime cannot run {self.path}: {reason}") from error
        if np.shape(estimate) != inputs.shape:
            shape = list(np.shape(estimate))
            raise WeightsError(
                f"{self.path}: the graph returned the shape {shape}, expected {list(inputs.shape)}"
            )
        return torch.from_numpy(estimate)[:count]

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Do nothing: ONNX Runtime optimizes the graph itself."""

    def narrow(self, sources: Sequence[str]) -> OnnxNetwork:
        """Return itself, because it has only one source."""
        if tuple(sources) != self.sources:
            raise ValueError(f"this network estimates {self.sources[0]}, not {', '.join(sources)}")
        return self


def write_graph(network: TfcTdf, path: Path, frames: int) -> None:
    """Export a U-Net as the published training code does: ``(batch, 4, bins, frames)`` in and out."""
    torch.onnx.export(
        _Unet(network).eval(),
        (torch.zeros(1, SPECTRUM_CHANNELS, network.config.spectrogram.bins, frames),),
        str(path),
        input_names=["input"],
        output_names=["output"],
        opset_version=OPSET,
        dynamo=False,
        dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
    )


class _Unet(nn.Module):
    """A network without its transforms."""

    def __init__(self, network: TfcTdf) -> None:
        super().__init__()
        self.network = network

    def forward(self, spectrum: Tensor) -> Tensor:
        return self.network.unet(spectrum)


@functools.cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises for graphs.

    It has one class for each status code, without a common base. Its C++ exceptions become the last two.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = [value for value in vars(state).values() if isinstance(value, type)]
    return (*(each for each in classes if issubclass(each, Exception)), RuntimeError, MemoryError)


def _session(path: Path, device: torch.device) -> Any:
    """Open the graph on the providers for ``device``, and check which of them are actually used."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"an ONNX graph needs ONNX Runtime; {INSTALL_HINT}") from error

    wanted: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        # By default, it would choose convolutions by timing, and results would vary in their last bits.
        chosen = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        wanted.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, **chosen}))
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds the CUDA libraries that come with torch
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # the check below reports missing providers in one line
    available = set(onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            options,
            providers=[p for p in wanted if (p if isinstance(p, str) else p[0]) in available],
        )
    except _runtime_errors() as error:
        raise ValueError(f"ONNX Runtime cannot load it: {first_line(error)}") from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        warnings.warn(
            f"{path.name} runs on the CPU instead of {device}, many times slower: "
            f"ONNX Runtime {onnxruntime.__version__} offers only {sorted(available)}; {INSTALL_HINT}",
            KmdxWarning,
            stacklevel=2,
        )
    return session
