"""HTDemucs and HDemucs of the ``demucs`` package as networks of this library."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs
from demucs.transformer import CrossTransformerEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.errors import first_line
from kmdx.networks import fast, types
from kmdx.networks.spectrogram import inverse_stft
from kmdx.networks.state import NoInitialization, load_strictly

CLASSES: dict[str, type[HTDemucs] | type[HDemucs]] = {"htdemucs": HTDemucs, "hdemucs": HDemucs}


class DemucsNetwork(nn.Module):
    """A Demucs network that estimates some or all of its sources.

    Parameters
    ----------
    model : HTDemucs or HDemucs
        The network with its weights. Its ``segment`` must be the length of its windows in seconds.
    dtype : torch.dtype
        Precision of its convolutions and matrix products.
    """

    supported_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def __init__(self, model: HTDemucs | HDemucs, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.training = model.training
        self.sources: tuple[str, ...] = tuple(model.sources)
        # HTDemucs always runs at its segment's full length, HDemucs at the length of its input.
        self.length: int | None = (
            int(model.segment * model.samplerate) if isinstance(model, HTDemucs) else None
        )

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the sources: float32 ``(B, 2, T)`` in, ``(B, len(sources), 2, T)`` out."""
        # Autocast leaves transforms in float32.
        with torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(batch).float()

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Prepare it for inference in a precision, with faster layers if ``tuned``."""
        fast.make_local_attention_exact(self.model)
        if tuned:
            stay_on_device(self.model)
            fast.accelerate(self.model)
            fast.store_others(self.model, dtype)
        self.dtype = dtype
        fast.store_products(self.model, dtype)

    def narrow(self, sources: Sequence[str]) -> DemucsNetwork:
        """Return a network that computes only ``sources`` and shares all weights except the last layers'.

        Sources are separate channels only in the last layer of each branch and in the inverse transform, so
        these keep only the channels of ``sources``. The estimates do not change. Wiener filtering would mix
        the sources, so it is refused; no published network uses it.
        """
        if tuple(sources) == self.sources:
            return self
        indices = fast.source_indices(self.sources, sources)
        if getattr(self.model, "wiener_iters", 0) > 0 and not self.model.cac:
            raise ValueError("a network with Wiener iterations must estimate all of its sources")
        model = fast.shared_copy(self.model)
        model.sources = list(sources)
        for layer in (model.decoder[-1], model.tdecoder[-1]):
            assert isinstance(layer.norm2, nn.Identity), "a normalized last layer would mix the sources"
            fast.keep_sources(layer.conv_tr, indices, len(self.sources))
        return DemucsNetwork(model, self.dtype)


class _Transforms:
    """Transforms of a Demucs network that make no tensors on the host and never wait for the device."""

    hann: Tensor

    def _spec(self: Any, mix: Tensor) -> Tensor:
        """Transform ``(…, n)`` into complex ``(…, bins, n / hop)``."""
        hop, samples = self.hop_length, mix.shape[-1]
        frames, margin = math.ceil(samples / hop), 3 * (hop // 2)
        right = margin + frames * hop - samples
        wave = _extended(mix, margin, right, reflect=not getattr(self, "hybrid_old", False))
        spectrum = _stft(wave.flatten(0, -2), self.nfft, hop, self.hann)
        return spectrum.unflatten(0, mix.shape[:-1])[..., :-1, 2 : 2 + frames]

    def _ispec(self: Any, spectrum: Tensor, length: int) -> Tensor:
        """Transform complex ``(…, bins, T)`` into ``(…, length)``."""
        hop = self.hop_length
        start = 0 if getattr(self, "hybrid_old", False) else 3 * (hop // 2)
        complete = F.pad(spectrum, (2, 2, 0, 1)).flatten(0, -3)
        window = self.hann.to(spectrum.device)  # demucs moves spectra of MPS to the CPU
        wave = inverse_stft(complete, self.nfft, hop, window, start + length, normalized=True)
        return wave[..., start:].unflatten(0, spectrum.shape[:-2])


class _HTDemucs(_Transforms, HTDemucs):  # type: ignore[misc]
    """An HTDemucs with these transforms."""


class _HDemucs(_Transforms, HDemucs):  # type: ignore[misc]
    """An HDemucs with these transforms."""


class _Transformer(CrossTransformerEncoder):
    """Demucs' transformer, which makes its positions on the device."""

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Attend within and between ``(B, C, F, T)`` and ``(B, C, n)``."""
        _, dim, bins, frames = x.shape
        positions = _positions(dim, bins, frames, self.max_period, x.device)
        times = self._get_pos_embedding(xt.shape[-1], xt.shape[0], dim, xt.device).transpose(0, 1)
        if x.dtype == torch.float16:  # sums stay in its precision; see fast.store_others
            positions, times = positions.to(x.dtype), times.to(x.dtype)
        x = self.norm_in(x.permute(0, 3, 2, 1).flatten(1, 2)) + self.weight_pos_embed * positions
        xt = self.norm_in_t(xt.transpose(1, 2)) + self.weight_pos_embed * times
        for index, (layer, layer_t) in enumerate(zip(self.layers, self.layers_t, strict=True)):
            if index % 2 == self.classic_parity:
                x, xt = layer(x), layer_t(xt)
            else:
                x, xt = layer(x, xt), layer_t(xt, x)
        return x.unflatten(1, (frames, bins)).permute(0, 3, 2, 1), xt.transpose(1, 2)


def stay_on_device(model: HTDemucs | HDemucs) -> None:
    """Make a network's windows run without tensors made on the host and without waiting for the device."""
    if getattr(model, "hybrid", True):
        model.__class__ = _HTDemucs if isinstance(model, HTDemucs) else _HDemucs
        model.register_buffer("hann", torch.hann_window(model.nfft), persistent=False)
    for module in model.modules():
        if type(module) is CrossTransformerEncoder and module.emb == "sin":
            module.__class__ = _Transformer


def _stft(wave: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    return torch.stft(wave, n_fft, hop, window=window, normalized=True, return_complex=True)


def _extended(wave: Tensor, left: int, right: int, reflect: bool) -> Tensor:
    """Extend ``(B, C, n)`` by reflection, or with zeros; a wave too short to reflect gets zeros first."""
    if not reflect:
        return F.pad(wave, (left, right))
    lacking = max(left, right) + 1 - wave.shape[-1]
    if lacking > 0:
        after = min(right, lacking)
        before = lacking - after
        wave, left, right = F.pad(wave, (before, after)), left - before, right - after
    return F.pad(wave, (left, right), mode="reflect")


def _positions(dim: int, bins: int, frames: int, period: float, device: torch.device) -> Tensor:
    """The embedding ``(T · F, C)`` of frames in the first half of the channels, and of bins in the second."""
    half = dim // 2
    rates = torch.exp(torch.arange(0.0, half, 2, device=device) * (-math.log(period) / half))

    def embedding(count: int) -> Tensor:
        angles = torch.outer(torch.arange(0.0, count, device=device), rates)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

    of_frames = embedding(frames)[:, None].expand(frames, bins, half)
    of_bins = embedding(bins).expand(frames, bins, half)
    return torch.cat([of_frames, of_bins], -1).flatten(0, 1)


# Arguments that determine whether the layers' sizes match; they do with the package's default values.
STRUCTURE = (
    "nfft", "depth", "growth", "channels_time", "hybrid", "kernel_size", "stride", "time_stride", "context",
    "context_enc", "multi_freqs", "multi_freqs_depth", "dconv_comp", "dconv_attn", "dconv_lstm",
    "wiener_iters",
)  # fmt: skip


def build(
    architecture: Mapping[str, Any], segment: float | None, state: Mapping[str, Tensor]
) -> DemucsNetwork:
    """Build a Demucs network and load its weights strictly.

    Raises :class:`ValueError` if an option is wrong, the network is too large, or a parameter is missing,
    unknown or has the wrong shape.

    Parameters
    ----------
    architecture : mapping
        ``type``, ``htdemucs`` or ``hdemucs``, and constructor arguments of the class, including ``sources``.
        Like demucs, this ignores arguments that the installed version of demucs no longer has; if they
        mattered, the state dict does not fit.
    segment : float or None
        Length of its windows in seconds; None for its own segment.
    state : mapping
        Its state dict, in any floating type.
    """
    kind = architecture["type"]
    known = inspect.signature(CLASSES[kind]).parameters
    own = {key: value for key, value in architecture.items() if key in known}
    types.TYPES[kind].check(own)
    bands, blocks = len(own.get("multi_freqs") or ()) + 1, max(1, abs(own.get("dconv_depth", 2)))
    layers = own.get("depth", 6) * bands * blocks + own.get("t_layers", 5)
    if layers > len(state):  # checked before making a module for each layer
        raise ValueError(f"another network's weights: expected at least {layers} tensors, found {len(state)}")
    try:
        with NoInitialization.for_state(state):
            model = CLASSES[kind](**{**own, "rescale": 0})
    # Inconsistent sizes raise AssertionError in Demucs, and the other errors in torch.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error) if str(error).strip() else "its sizes are inconsistent"
        raise ValueError(f"{kind} cannot be built: {reason}") from error
    seconds = model.segment if segment is None else segment
    types.check_window({**own, "type": kind}, int(seconds * model.samplerate))
    load_strictly(model, state)
    if segment is not None:
        model.segment = segment
    model.requires_grad_(False)
    network = DemucsNetwork(model.eval())
    if any(own.get(key, known[key].default) != known[key].default for key in STRUCTURE if key in known):
        _try(network, int(seconds * model.samplerate))
    return network


@torch.inference_mode()
def _try(network: DemucsNetwork, length: int) -> None:
    """Run one window through a network of unusual structure, whose layers may not match."""
    try:
        network(torch.zeros(1, 2, network.length or length))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the sizes of its layers do not match: {reason or 'different lengths'}") from error
