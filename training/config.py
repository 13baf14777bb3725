"""The config of a training run: one YAML file, read strictly.

``training/configs/`` contains one for each network of the MDX-Net half.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from kmdx import documents
from kmdx.documents import YamlPart
from kmdx.errors import DocumentError, KmdxError, quoted, suggest
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.state import NoInitialization
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig
from training.losses import LOSSES

CONFIGS = Path(__file__).parent / "configs"

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
WindowLength = Annotated[int, Field(ge=4)]


def _check_ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the first value must not be above the second")
    return values


def _as_list(value: Any) -> Any:
    """A single pattern as a list."""
    return [value] if isinstance(value, str) else value


class TrainingError(KmdxError):
    """A training run cannot start or continue."""


class Section(BaseModel):
    """A part of a config; immutable, without unknown keys and infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NetworkConfig(Section):
    """Sizes of the network, as in :class:`~kmdx.networks.tfc_tdf.TfcTdfConfig`, and its trim in samples."""

    n_fft: Count
    hop: Count
    bins: Count
    frames: Count
    layers: Count
    convolutions: Count
    growth: Count
    norm_groups: Count | None
    bottleneck: Count = 8
    trim: Annotated[int, Field(ge=0)]

    @property
    def chunk(self) -> int:
        """Samples of one window."""
        return self.hop * (self.frames - 1)

    @model_validator(mode="after")
    def _fits(self) -> NetworkConfig:
        with torch.device("meta"), NoInitialization():
            TfcTdf(self.unet(), "")  # checks the sizes
        if 2 * self.trim >= self.chunk:
            raise ValueError(f"two trims of {self.trim} samples leave nothing of a chunk of {self.chunk}")
        return self

    def unet(self) -> TfcTdfConfig:
        """The sizes for the network's class."""
        sizes = self.model_dump(include={"layers", "convolutions", "growth", "norm_groups", "bottleneck"})
        return TfcTdfConfig(SpectrogramConfig(self.n_fft, self.hop, self.bins, self.frames), **sizes)

    def architecture(self, source: str) -> dict[str, Any]:
        """The sizes for a plan or the registry."""
        return {"type": "tfc_tdf", "sources": [source], **self.model_dump(exclude={"trim"})}


class Rest(Section):
    """The source of the estimated vocals that are subtracted from the network's input."""

    vocals: str | None = None
    """A run of a vocals network, or the name of a weight. By default, the true vocals plus an error."""
    error: Annotated[tuple[float, float], AfterValidator(_check_ascending)] = (-20.0, -8.0)
    """Range of the error's energy relative to that of the vocals in dB, drawn uniformly. As in real
    separators, half of the error is missing vocals, and half is leakage of other stems."""


class Data(Section):
    """How windows are drawn."""

    mixing: Share = 0.7  # share of windows whose stems come from different songs and positions
    gain: Annotated[tuple[float, float], AfterValidator(_check_ascending)] = (-6.0, 6.0)
    """Range of the gain of each stem in dB, drawn uniformly."""
    swap: Share = 0.5
    invert: Share = 0.5
    """``swap`` and ``invert``: shares of stems with swapped channels, and with inverted polarity."""
    silence: Share = 0.0  # share of windows without the source to be estimated
    weights: dict[str, Positive] = {}
    """Relative frequency of songs, by name or pattern; the first match counts, and the default is 1."""


class Loss(Section):
    """The weight of each term in :data:`training.losses.LOSSES`, by name; 0 disables a term."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0)]] = Field(init=False)

    windows: Annotated[tuple[WindowLength, ...], Field(min_length=1)] = (4096, 2048, 1024, 512, 256)
    """Window lengths in samples for terms that compare spectra; the hop is a quarter of a window."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term, by name."""
        return {name: self.__pydantic_extra__[name] for name in LOSSES}

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        unknown = [name for name in given if name not in LOSSES and name not in cls.model_fields]
        if unknown:
            known = ", ".join((*LOSSES, *cls.model_fields))
            hint = suggest(str(unknown[0]), (*LOSSES, *cls.model_fields))
            raise ValueError(f"unknown term {quoted(unknown[0])}{hint}; available: {known}")
        return {**{name: term.weight for name, term in LOSSES.items()}, **given}

    @model_validator(mode="after")
    def _something(self) -> Loss:
        if not any(self.weights.values()):
            raise ValueError("every term has the weight 0: set at least one above 0")
        return self


class Optimizer(Section):
    """``rate`` is the learning rate after the warm-up of ``warm_up`` steps."""

    kind: Literal["adamw", "rmsprop"] = "adamw"
    rate: Positive = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warm_up: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "cosine"
    final: Share = 0.01  # share of the rate at the end of the cosine
    clip: Positive | None = None  # largest norm of the gradient


class Config(Section):
    """One training run."""

    title: str
    source: Literal["bass", "drums", "other", "vocals"]  # the stem to estimate
    hears: Literal["mixture", "rest"] = "mixture"
    """The network's input: ``mixture``, or ``rest``, the mixture without estimated vocals."""
    network: NetworkConfig
    rest: Rest = Rest()
    data: Data = Data()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    steps: Count
    epoch: Count = 1000
    """``steps`` and ``epoch``: total steps of the optimizer, and steps between two checkpoints."""
    validate_every: Count = 1  # epochs between two validations
    patience: Count | None = None
    """Number of validations without a better score after which the run stops early."""
    batch: Count = 8  # windows in one step
    at_once: Count | Literal["auto"] = "auto"
    """Windows that go through the network together; their gradients are accumulated over the batch. ``auto``
    is as many as fit into a GPU's memory; on a CPU, the whole batch."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """``fp32``, ``fp16`` or ``bf16``; transforms and losses are always in float32."""
    average: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    """Decay of the exponential moving average of the weights, which is validated and exported."""
    checkpointing: bool = False  # recompute activations instead of storing them
    compile: bool = False  # compile the U-Net with torch.compile
    nan: Literal["skip", "stop"] = "skip"  # ``skip`` a step whose loss or gradient is not finite, or ``stop``
    freeze: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Parameters that are not trained, by name or pattern: see :mod:`training.freezing`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    validation: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.hears == "rest" and self.source == "vocals":
            raise ValueError("with hears: rest, the input contains no vocals to estimate")
        kept = self.network.chunk - 2 * self.network.trim
        windowed = any(weight and LOSSES[name].uses_windows for name, weight in self.loss.weights.items())
        if windowed and max(self.loss.windows) > kept:
            raise ValueError(
                f"loss.windows: expected at most the {kept} samples left after trimming, not "
                f"{max(self.loss.windows)}"
            )
        if self.epochs % self.validate_every:
            raise ValueError(
                f"{self.steps} steps are {self.epochs} epochs of {self.epoch}; with validate_every: "
                f"{self.validate_every}, the last would not be validated; use a multiple of "
                f"{self.epoch * self.validate_every} steps, or another validate_every"
            )
        if self.at_once != "auto" and self.batch % self.at_once:
            raise ValueError(f"batch must be a multiple of at_once ({self.at_once}), not {self.batch}")
        return self

    @property
    def epochs(self) -> int:
        """Number of epochs of the whole run."""
        return -(-self.steps // self.epoch)

    def absolute(self) -> Config:
        """A copy that does not depend on the current folder: ``rest.vocals`` becomes an absolute path."""
        name = self.rest.vocals
        if name is None or not Path(name).expanduser().is_dir():
            return self
        place = str(Path(name).expanduser().resolve())
        return self.model_copy(update={"rest": self.rest.model_copy(update={"vocals": place})})


def load(name: str, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a config: one of ``training/configs`` by its name, or a file.

    Raises :class:`TrainingError` if the config does not exist, or a value is wrong; names the line and the
    key.

    Parameters
    ----------
    changes : mapping, optional
        Values that override the file's, by dotted key.
    """
    path = Path(name)
    if not path.is_file():
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(names()))
        hint = suggest(str(name), names())
        raise TrainingError(f"unknown config {quoted(name)}{hint}; available: {known}, or a YAML file")
    try:
        root = documents.parse(documents.read_text(path))
        content = documents.value(root.node)
    except DocumentError as error:
        raise TrainingError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path}: expected a mapping of keys to values")
    for key, value in (changes or {}).items():
        *outer, last = key.split(".")
        part = content
        for step in outer:
            part = part.setdefault(step, {})
            if not isinstance(part, dict):
                raise TrainingError(f"{key}: {step} is a value, not a section with keys")
        part[last] = value
    return parse(content, str(path), None if changes else root)


def parse(content: Mapping[str, Any], place: str, root: YamlPart | None = None) -> Config:
    """Check the content of a config; ``place`` and ``root`` give its source in messages."""
    try:
        return documents.checked(Config, content, root)
    except DocumentError as error:
        raise TrainingError(f"{place}: {error}") from error


def dump(config: Config) -> str:
    """A config as YAML, including default values."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def names() -> list[str]:
    """Names of the configs in ``training/configs``."""
    return [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")]
