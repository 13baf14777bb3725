"""HTDemucs and HDemucs of the ``demucs`` package behind the face of a network."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from demucs.hdemucs import HDecLayer, HDemucs
from demucs.htdemucs import HTDemucs
from torch import Tensor, nn

from kmdx.errors import shown
from kmdx.networks.state import NoInitialization, load_strictly

# Bounds of the options of both classes, far beyond every network that was published. Numbers on which sizes
# and steps depend are at least 1; stereo is all that networks here are given.
BOUNDS: dict[str, tuple[float, float]] = {
    "audio_channels": (2, 2), "channels": (1, 4096), "channels_time": (1, 4096), "growth": (0.5, 8),
    "nfft": (16, 1 << 16), "depth": (1, 16), "multi_freqs": (1e-3, 0.999), "kernel_size": (1, 64),
    "time_stride": (1, 16), "stride": (1, 16), "context": (0, 16), "context_enc": (0, 16),
    "norm_groups": (1, 4096), "dconv_mode": (0, 3), "dconv_depth": (-16, 16), "dconv_comp": (0.125, 4096),
    "wiener_iters": (0, 16), "end_iters": (0, 16), "t_layers": (0, 64), "t_hidden_scale": (0.1, 64),
    "t_heads": (1, 256), "t_max_positions": (1, 1 << 20), "t_max_period": (1e-3, 1e9), "t_dropout": (0, 1),
    "samplerate": (1000, 1_000_000), "segment": (1e-2, 1e4),
}  # fmt: skip
DEFAULT_BOUNDS = (0, 1 << 16)
REAL = ("growth", "emb_scale", "dconv_comp", "segment", "t_lr", "multi_freqs")  # need not be whole
EMBEDDINGS = ("sin", "cape", "scaled")
MAX_BANDS = 16
MAX_CHANNELS = 1 << 16
CLASSES: dict[str, type[HTDemucs] | type[HDemucs]] = {"htdemucs": HTDemucs, "hdemucs": HDemucs}


class DemucsNetwork(nn.Module):
    """A Demucs network that estimates some or all of its sources.

    Parameters
    ----------
    model : HTDemucs or HDemucs
        The network with its weights, its ``segment`` set to the seconds it will be run at.
    dtype : torch.dtype
        What its convolutions and matrix products compute in.
    """

    bears: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def __init__(self, model: HTDemucs | HDemucs, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.training = model.training
        self.sources: tuple[str, ...] = tuple(model.sources)
        # HTDemucs always runs at its segment's full length, HDemucs at whatever it is given.
        self.length: int | None = (
            int(model.segment * model.samplerate) if isinstance(model, HTDemucs) else None
        )

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the sources: float32 ``(B, 2, T)`` in, ``(B, len(sources), 2, T)`` out."""
        # Autocast leaves transforms and normalisations in float32.
        with torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(batch).float()

    def narrow(self, sources: Sequence[str]) -> DemucsNetwork:
        """Return the same network computing only ``sources``, sharing all weights but the last layers'.

        Only the last layer of each branch and the inverse transform tell the sources apart, so
        their channels are cut to those of ``sources``; the estimates stay what they were. Wiener
        filtering would mix the sources again; no published network has it, and it is refused.
        """
        if tuple(sources) == self.sources:
            return self
        unknown = [source for source in sources if source not in self.sources]
        if unknown:
            raise ValueError(f"this network estimates {', '.join(self.sources)}, not {', '.join(unknown)}")
        if getattr(self.model, "wiener_iters", 0) > 0 and not self.model.cac:
            raise ValueError("a network with Wiener iterations estimates all its sources or none")
        indices = [self.sources.index(source) for source in sources]
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        model.sources = list(sources)
        for layer in (model.decoder[-1], model.tdecoder[-1]):
            _keep_sources(layer, indices, len(self.sources))
        return DemucsNetwork(model, self.dtype)


def _keep_sources(layer: HDecLayer, indices: Sequence[int], count: int) -> None:
    """Cut the output channels of a branch's last layer, ``count`` equal groups, to these groups."""
    assert isinstance(layer.norm2, nn.Identity), "a normalised last layer would mix the sources"
    conv = layer.conv_tr
    weight = conv.weight.detach()  # (in, count · channels, kernel …)
    grouped = weight.unflatten(1, (count, -1))[:, indices]
    conv.weight = nn.Parameter(grouped.flatten(1, 2).contiguous(), requires_grad=False)
    if conv.bias is not None:
        conv.bias = nn.Parameter(
            conv.bias.detach().unflatten(0, (count, -1))[indices].flatten().contiguous(), requires_grad=False
        )
    conv.out_channels = conv.weight.shape[1]


def build(
    kind: str, options: Mapping[str, Any], segment: float | None, state: Mapping[str, Tensor]
) -> DemucsNetwork:
    """Build a Demucs network and load its weights strictly.

    Parameters
    ----------
    kind : str
        ``htdemucs`` or ``hdemucs``.
    options : mapping
        Constructor arguments of the class, ``sources`` among them. Those that the installed version
        of demucs no longer has are left out, as demucs does; a wrong guess shows in the state dict.
    segment : float or None
        Seconds it will be run at, in place of its own.
    state : mapping
        Its state dict, in any floating type.

    Raises
    ------
    ValueError
        If an option is wrong, or a parameter is missing, unknown or of another shape.
    """
    own = _checked_options(kind, options)
    bands, blocks = len(own.get("multi_freqs") or ()) + 1, max(1, abs(own.get("dconv_depth", 2)))
    layers = own.get("depth", 6) * bands * blocks + own.get("t_layers", 5)
    if layers > len(state):  # before a module is made for each
        raise ValueError(
            f"another network's weights: it has {layers} layers, and the file {len(state)} tensors"
        )
    try:
        with NoInitialization.for_state(state):
            model = CLASSES[kind](**{**own, "rescale": 0})
    # Sizes that do not fit together: Demucs asserts, and torch raises the others, as it finds them.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) or "its sizes do not fit together"
        raise ValueError(f"{kind} cannot be built: {reason.splitlines()[0]}") from error
    load_strictly(model, state)
    if segment is not None:
        model.segment = segment
    model.requires_grad_(False)
    return DemucsNetwork(model.eval())


def _checked_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the class has, if each is of the type of its default and within bounds."""
    parameters = inspect.signature(CLASSES[kind]).parameters
    own = {name: value for name, value in options.items() if name in parameters}
    sources = own.get("sources")
    if not (isinstance(sources, list | tuple) and sources and all(isinstance(name, str) for name in sources)):
        raise ValueError("its sources must be a list of names")
    for name, value in own.items():
        if name != "sources" and (expected := _mistake(name, value, parameters[name].default)):
            given = shown(str(value)) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
            raise ValueError(f"its {name} must be {expected}, not {given}")
    if own.get("t_sparse_self_attn") or own.get("t_sparse_cross_attn"):
        raise ValueError("it has sparse attention, for which there is no code here")
    if own.get("channels", 48) * max(1, own.get("growth", 2)) ** (own.get("depth", 6) - 1) > MAX_CHANNELS:
        raise ValueError(f"its deepest layer has more than {MAX_CHANNELS} channels")
    return own


def _mistake(name: str, value: Any, default: Any) -> str | None:
    """What an option must be, if it is not of the type of its default or not within its bounds."""
    least, most = BOUNDS.get(name, DEFAULT_BOUNDS)
    real = isinstance(default, float | list) or name in REAL
    kinds = (int, float, Fraction) if real else (int,)

    def is_number(each: Any) -> bool:
        return isinstance(each, kinds) and not isinstance(each, bool) and bool(least <= each <= most)

    if value is None and default is None:
        return None
    if isinstance(default, bool):
        return None if isinstance(value, int) and 0 <= value <= most else "true or false"
    if isinstance(default, str):
        choices = EMBEDDINGS if name == "t_emb" else None
        fits = isinstance(value, str) and (choices is None or value in choices)
        return None if fits else f"one of {', '.join(EMBEDDINGS)}" if choices else "text"
    number = f"{'numbers' if real else 'whole numbers'} from {least:g} to {most:g}"
    if isinstance(default, list) or name == "multi_freqs":
        fits = isinstance(value, list | tuple) and len(value) <= MAX_BANDS and all(map(is_number, value))
        return None if fits else f"a list of at most {MAX_BANDS} {number}"
    return None if is_number(value) else f"one of the {number}"
