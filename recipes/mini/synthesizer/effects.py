"""Effects for each stem, drawn at random: equalizer, compressor, saturation, echo and room."""

from __future__ import annotations

import numpy as np
import pedalboard as pb

from kmdx.challenge import RATE


def _apply(samples: np.ndarray, effects: list[pb.Plugin]) -> np.ndarray:
    """Run samples ``(samples, 2)`` through a chain of effects."""
    # pedalboard: (channels, samples)
    return pb.Pedalboard(effects)(np.ascontiguousarray(samples.T), RATE, reset=True).T


def _equalizer(rng: np.random.Generator, reach: float) -> list[pb.Plugin]:
    """Two bells and two shelves, each up to `reach` dB up or down."""
    bells = [
        pb.PeakFilter(
            float(np.exp(rng.uniform(np.log(low), np.log(high)))), float(rng.uniform(-reach, reach)), 0.9
        )
        for low, high in ((150, 700), (700, 4000))
    ]
    low = pb.LowShelfFilter(float(rng.uniform(80, 200)), float(rng.uniform(-reach, reach)))
    high = pb.HighShelfFilter(float(rng.uniform(4000, 9000)), float(rng.uniform(-reach, reach)))
    return [*bells, low, high]


def _room(rng: np.random.Generator, wet: tuple[float, float]) -> pb.Plugin:
    """A reverb with a wet level in this range."""
    return pb.Reverb(
        room_size=float(rng.uniform(0.1, 0.85)),
        damping=float(rng.uniform(0.2, 0.8)),
        wet_level=float(rng.uniform(*wet)),
        dry_level=0.8,
        width=1.0,
    )


def _compressor(rng: np.random.Generator, samples: np.ndarray, attack: tuple[float, float]) -> pb.Plugin:
    """A compressor whose threshold is near the samples' RMS, so that it acts at any level."""
    rms = 10 * np.log10(np.mean(np.square(samples)) + 1e-12)
    return pb.Compressor(
        threshold_db=float(rms + rng.uniform(-6, 6)),
        ratio=float(rng.uniform(2, 8)),
        attack_ms=float(rng.uniform(*attack)),
        release_ms=float(rng.uniform(50, 250)),
    )


def drums(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Compressed and bright, in a small room."""
    samples = samples / np.abs(samples).max() * np.float32(0.5)
    chain = [pb.LowShelfFilter(90, float(rng.uniform(0, 6))), *_equalizer(rng, 4)]
    chain += [_compressor(rng, samples, (3, 30))]
    if rng.random() < 0.35:
        chain.append(pb.Distortion(float(rng.uniform(2, 12))))
    if rng.random() < 0.7:
        chain.append(_room(rng, (0.02, 0.25)))
    return _apply(samples, chain)


def bass(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Centered and compressed, sometimes driven."""
    samples = np.repeat(samples.mean(axis=1, keepdims=True), 2, axis=1)
    samples = samples / np.abs(samples).max() * np.float32(0.5)
    chain: list[pb.Plugin] = [_compressor(rng, samples, (5, 40)), *_equalizer(rng, 4)]
    if rng.random() < 0.35:
        chain.append(pb.Distortion(float(rng.uniform(3, 18))))
    if rng.random() < 0.3:
        chain.append(pb.LowpassFilter(float(rng.uniform(800, 4000))))
    if rng.random() < 0.15:
        chain.append(pb.Chorus(rate_hz=float(rng.uniform(0.3, 1.2)), depth=0.2, mix=0.4))
    return _apply(samples, chain)


def guitars(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Through an overdriven amplifier and a loudspeaker without highs."""
    samples = samples / np.abs(samples).max() * np.float32(0.5)
    chain: list[pb.Plugin] = [
        pb.HighpassFilter(90),
        pb.Distortion(float(rng.uniform(8, 36))),
        pb.LowpassFilter(float(rng.uniform(3500, 6500))),
        pb.LowpassFilter(6500),
    ]
    return _apply(samples, chain)


def other(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Wide and reverberant."""
    samples = samples / np.abs(samples).max() * np.float32(0.5)
    chain: list[pb.Plugin] = [pb.HighpassFilter(float(rng.uniform(40, 160))), *_equalizer(rng, 5)]
    if rng.random() < 0.5:
        chain.append(_compressor(rng, samples, (5, 40)))
    if rng.random() < 0.3:
        chain.append(pb.Chorus(rate_hz=float(rng.uniform(0.3, 1.5)), depth=0.25, mix=0.5))
    if rng.random() < 0.25:
        chain.append(pb.Delay(float(rng.uniform(0.15, 0.5)), feedback=0.25, mix=float(rng.uniform(0.1, 0.3))))
    chain.append(_room(rng, (0.03, 0.3)))
    return _apply(samples, chain)


def vocals(rng: np.random.Generator, samples: np.ndarray, beat: float) -> np.ndarray:
    """Up front: compressed, bright, with room, and an echo in time with the song's ``beat`` in seconds."""
    samples = samples / np.abs(samples).max() * np.float32(0.5)
    chain: list[pb.Plugin] = [pb.HighpassFilter(float(rng.uniform(70, 140))), *_equalizer(rng, 4)]
    chain += [pb.HighShelfFilter(5000, float(rng.uniform(0, 6))), _compressor(rng, samples, (2, 15))]
    if rng.random() < 0.4:
        chain.append(pb.Distortion(float(rng.uniform(2, 12))))
    if rng.random() < 0.4:
        time = beat * float(rng.choice((0.5, 0.75, 1)))
        chain.append(
            pb.Delay(min(time, 1.0), feedback=float(rng.uniform(0, 0.35)), mix=float(rng.uniform(0.05, 0.25)))
        )
    if rng.random() < 0.85:
        chain.append(_room(rng, (0.02, 0.3)))
    return _apply(samples, chain)


def placed(samples: np.ndarray, position: float) -> np.ndarray:
    """Pan one channel ``(samples, 1)`` to stereo: position -1 is left, 1 is right."""
    angle = (position + 1) * np.pi / 4
    return samples * np.array((np.cos(angle), np.sin(angle)), np.float32)


def doubled(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Add two late copies of a channel ``(samples, 1)`` at the sides, as if it were sung three times."""
    sides = []
    for position in (-0.8, 0.8):
        voice = pb.Pedalboard(
            [pb.Chorus(rate_hz=float(rng.uniform(0.1, 0.4)), depth=0.15, centre_delay_ms=12, mix=1.0)]
        )(np.ascontiguousarray(samples.T), RATE, reset=True).T
        late = int(rng.uniform(0.012, 0.035) * RATE)
        sides.append(placed(np.pad(voice, ((late, 0), (0, 0)))[: len(samples)], position))
    return placed(samples, 0) + np.float32(rng.uniform(0.2, 0.5)) * (sides[0] + sides[1])
