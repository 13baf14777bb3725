"""HTDemucs and HDemucs of the ``demucs`` package as networks of this library."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs
from torch import Tensor, nn

from kmdx.errors import first_line
from kmdx.networks import fast, types
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
        # Autocast leaves transforms and normalizations in float32.
        with torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(batch).float()

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Prepare it for inference in a precision, with faster layers if ``tuned``."""
        fast.make_local_attention_exact(self.model)
        if tuned:
            fast.accelerate(self.model)
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
