"""The ensemble in its simplest form: Demucs' own ``apply_model``, one chunk at a time, nothing pruned.

A second reading of the published computation that shares no code with the library but the networks;
what the library computes is held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from demucs.apply import apply_model
from torch import Tensor


def mdx(network: Callable[[Tensor], Tensor], signal: Tensor, chunk: int, trim: int) -> Tensor:
    """One MDX-Net network on ``(2, n)``: chunks of zeros-padded signal, ends trimmed, pieces joined."""
    n = signal.shape[-1]
    keep = chunk - 2 * trim
    pad = keep - n % keep
    padded = torch.cat([torch.zeros(2, trim), signal, torch.zeros(2, pad + trim)], 1)
    out = []
    i = 0
    while i < n + pad:
        out.append(network(padded[None, :, i : i + chunk])[0, 0, :, trim:-trim])
        i += keep
    return torch.cat(out, 1)[:, :n]


def fades(network: Callable[[Tensor], Tensor], signal: Tensor, chunk: int, overlap: int) -> Tensor:
    """Chunks of ``(2, n)`` with linear fades, ``(sources, 2, n)``: the whole song in memory, sample by sample."""
    step = chunk // overlap
    border = chunk - step
    if border == 0 or signal.shape[-1] <= 2 * border:
        border = 0
    song = torch.nn.functional.pad(signal[None], (border, border), mode="reflect")[0] if border else signal
    n = song.shape[-1]
    total, weight = 0.0, torch.zeros(n, dtype=torch.float64)
    for start in range(0, n, step):
        part = song[:, start : start + chunk]
        size = part.shape[-1]
        if size > chunk // 2:
            part = torch.cat([part, part.flip(-1)[:, 1 : 1 + chunk - size]], 1)
        part = torch.cat([part, torch.zeros(2, chunk - part.shape[-1])], 1)
        ramp = (
            [place / (chunk // 10 - 1) for place in range(chunk // 10)]
            if chunk >= 20
            else [0.0] * (chunk // 10)
        )
        weights = torch.ones(chunk, dtype=torch.float64)
        for place, value in enumerate(ramp):
            if start > 0:
                weights[place] = value
            if start + step < n or start == 0:
                weights[chunk - 1 - place] = value
        estimate = network(part[None])[0].double()[..., :size]
        weights = weights[:size].clamp(min=1e-9)
        placed = torch.zeros(*estimate.shape[:-1], n, dtype=torch.float64)
        placed[..., start : start + size] = weights * estimate
        weight[start : start + size] += weights
        total = total + placed
    return (total / weight).float()[..., border : n - border]


def leaderboard_c(
    demucs: Mapping[str, torch.nn.Module],
    overlaps: Mapping[str, float],
    nets: Mapping[str, Callable[[Tensor], Tensor]],
    trims: Mapping[str, int],
    chunk: int,
    mixture: Tensor,
) -> dict[str, Tensor]:
    """All stems and both halves of them, ``(2, n)`` each, for a mixture ``(2, n)``."""

    def net(name: str, signal: Tensor) -> dict[str, Tensor]:
        out = apply_model(demucs[name], signal[None], shifts=0, split=True, overlap=overlaps[name])[0]
        return dict(zip(("drums", "bass", "other", "vocals"), out, strict=True))

    with torch.no_grad():
        half = {"vocals": mdx(nets["vocals"], mixture, chunk, trims["vocals"])}
        rest = mixture - half["vocals"]
        for stem in ("drums", "other", "bass"):
            half[stem] = mdx(nets[stem], rest, chunk, trims[stem])

        mono = mixture.mean(0)
        mean, std = mono.mean(), mono.std()
        x = (mixture - mean) / std
        v, m, a, o = net("ft_vocals", x), net("mmi", x), net("extra", x), net("ft_other", x)
        x1 = x - (0.8 * v["vocals"] + 0.2 * m["vocals"])
        d = net("ft_drums", x1)
        x2 = x1 - (0.7 * d["drums"] + 0.3 * m["drums"])
        b = net("ft_bass", x2)
        x3 = x2 - b["bass"]
        other_half = {
            "drums": 0.60 * d["drums"] + 0.26 * m["drums"] + 0.14 * a["drums"],
            "bass": 0.89 * b["bass"] + 0.11 * m["bass"],
            "other": 0.68 * x3 + 0.04 * m["other"] + 0.28 * o["other"],
            "vocals": 0.73 * v["vocals"] + 0.21 * m["vocals"] + 0.06 * a["vocals"],
        }
    other_half = {stem: signal * std + mean for stem, signal in other_half.items()}
    share = {"bass": 0.08, "drums": 0.08, "other": 0.40, "vocals": 0.88}
    signals = {stem: w * half[stem] + (1 - w) * other_half[stem] for stem, w in share.items()}
    signals.update({f"mdx_{stem}": signal for stem, signal in half.items()})
    signals.update({f"demucs_{stem}": signal for stem, signal in other_half.items()})
    return signals
