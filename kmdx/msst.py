"""Import checkpoints in the format of ZFTurbo's Music-Source-Separation-Training (MSST).

A checkpoint is a state dict, often with a config in YAML next to it. The network's type and most of its sizes
come from the state dict, the others from the config's ``model`` and ``audio`` sections. The result is a plan
that passes songs through the network as MSST does: chunks that overlap and fade, one stem per instrument, and
the rest of the mixture for the other instruments of a network with one target.

Two defects of MSST are not reproduced: it sets samples at the joins of chunks without overlap to 0, and takes
the rest of a normalized mixture before it restores the level.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kmdx import documents, files, plan_file, weights
from kmdx.challenge import ACCOMPANIMENT, MIXTURE
from kmdx.errors import (
    DocumentError,
    DownloadError,
    KmdxError,
    PlanError,
    WeightsError,
    listed,
    quoted,
    shown,
)
from kmdx.file_names import is_reserved
from kmdx.networks import types
from kmdx.plan import Plan
from kmdx.weights import CommunityCheckpoint, Progress

if TYPE_CHECKING:
    from torch import Tensor

SECTIONS = ("audio", "model", "training", "inference")
# Settings of a model that have no effect on its estimates.
WITHOUT_EFFECT = re.compile(
    r".*dropout|multi_stft_.*|flash_attn|use_torch_checkpoint|dim_freqs_in|sage_attention|lora.*|audio_channels"
    r"|match_input_audio_length|normalized|num_stems|sources|name"
)
CHUNK = 352_800  # samples, if neither a config nor the network states it
OVERLAP = 2
USUAL_STEMS = {
    1: ("vocals",),
    2: ("vocals", "other"),
    4: ("drums", "bass", "other", "vocals"),
    6: ("bass", "drums", "other", "vocals", "guitar", "piano"),
}
"""Stems of networks with this number of outputs, if there is no config."""
SUFFIXES = (".ckpt", ".pt", ".th", ".bin", ".safetensors", ".chpt", ".pth")
ZERO_DC = """\
# zero_dc: true sets the lowest frequency of every estimate to zero, as MSST does by default since September
# 2025. An older network was trained without this; false restores it. Only an offset of the signal changes.
"""


@dataclass(frozen=True)
class MsstConfig:
    """The sections of a config that matter for separation."""

    audio: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    inference: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """An imported checkpoint."""

    plan: Path
    weight_file: Path
    """``plan`` and ``weight_file``: the files that were written."""
    found: tuple[str, ...]  # what was found, in words, one fact per line
    assumed: tuple[str, ...]  # what neither the checkpoint nor the config states, in words


def add(
    name: str,
    checkpoint: Path,
    config: Path | None = None,
    folder: Path | None = None,
    *,
    link: bool = False,
    known: CommunityCheckpoint | None = None,
) -> Imported:
    """Import a checkpoint into the models folder, as an ensemble of this name.

    Parameters
    ----------
    name : str
        Name of the new ensemble.
    config : Path, optional
        MSST's YAML file.
    folder : Path, optional
        By default the models folder.
    link : bool
        Whether to link the checkpoint instead of copying it; one in the models folder stays where it is.
    known : CommunityCheckpoint, optional
        What is published about it: its title, score, license and training data are added to the ensemble.

    Raises
    ------
    KmdxError
        If the name is taken or unusable, a file cannot be read or written, the checkpoint belongs to an
        unsupported network, or the config does not fit it.
    """
    folder = weights.models_folder(folder)
    _check_name(name, folder)
    if known is None and name in (weights.checkpoints().keys() | weights.published().keys()):
        raise PlanError(f"{name} is what `kmdx models pull {name}` downloads; choose another name")
    if checkpoint.suffix.lower() not in SUFFIXES:
        raise WeightsError(f"{checkpoint}: expected a checkpoint ({', '.join(SUFFIXES)})")
    read = MsstConfig() if config is None else read_config(config)
    state = weights.load(checkpoint).state
    assert state is not None  # only ONNX files have none
    in_place = checkpoint.resolve().parent == folder.resolve()
    file = checkpoint if in_place else folder / f"{name}{checkpoint.suffix.lower()}"
    path = folder / f"{name}.yaml"
    if file.exists() and not in_place:
        raise WeightsError(f"{file} exists already; choose another name, or delete it first")
    try:
        made = _Import(read, state, config is not None)
        network = types.function(made.kind.build)(made.architecture, None, state)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        del network
        text = made.plan(file.name, checkpoint.name, known)
        plan = plan_file.parse(text, name, folder)
    except ValueError as error:
        where = checkpoint if config is None else f"{checkpoint} with {config}"
        raise WeightsError(f"{where}: {error}") from error
    try:
        with files.folder(folder):
            if not in_place:
                _place(checkpoint, file, link)
            files.write_text(path, text)
    except OSError as error:
        raise WeightsError(f"{error.filename or folder} cannot be written: {error.strerror}") from error
    return Imported(path, file, made.facts(plan, parameters), tuple(made.assumed))


def pull(
    name: str, config: Path | None = None, folder: Path | None = None, progress: Progress | None = None
) -> Imported:
    """Pull a community checkpoint and its config, and import them as an ensemble of the same name.

    The config comes first, because without it the checkpoint would be useless.

    Parameters
    ----------
    config : Path, optional
        By default the published one.
    progress : callable, optional
        As for :func:`kmdx.weights.pull`.

    Raises
    ------
    KmdxError
        If it is not supported, or it cannot be pulled or imported. A complete checkpoint is kept.
    """
    checkpoint = weights.checkpoints()[name]
    if checkpoint.unsupported:
        raise WeightsError(f"{name} cannot be run: {checkpoint.unsupported}")
    folder = weights.models_folder(folder)
    _check_name(name, folder)
    if config is None:
        config = folder / f"{name}.config.yaml"
        if not checkpoint.config:
            raise WeightsError(
                f"{name} needs a config, and none is published: if you have it, add --config FILE"
            )
        try:
            weights.pull_text(checkpoint.config, config, checkpoint.config_sha256)
        except DownloadError as error:
            raise WeightsError(f"{name}: its config {error}; if you have it, add --config FILE") from error
    read_config(config)
    path = weights.pull(checkpoint.weight(), folder, progress=progress)
    try:
        return add(name, path, config, folder, known=checkpoint)
    except KmdxError as error:
        raise WeightsError(
            f"{name} could not be imported: {error}; the download is kept as {path}"
        ) from error


def _place(checkpoint: Path, file: Path, link: bool) -> None:
    """Copy a checkpoint or link to it."""
    with files.atomic(file) as partial:
        if link:
            partial.symlink_to(checkpoint.resolve())
        else:
            shutil.copyfile(checkpoint, partial)


def read_config(path: Path) -> MsstConfig:
    """Read the sections of a config that matter.

    It may contain tuples as ``!!python/tuple``, and no other tags of Python objects. Raises
    :class:`DocumentError` if it cannot be read, or has another structure.
    """
    try:
        content = documents.load_yaml(documents.read_text(path), tuples=True)
    except DocumentError as error:
        raise DocumentError(f"{path}: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, str):  # HTDemucs and others
        raise DocumentError(f"{path}: networks of type {quoted(model)} cannot be imported")
    if not isinstance(model, dict):
        raise DocumentError(f"{path}: expected a config with the sections {', '.join(SECTIONS)}")
    sections = {name: content.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise DocumentError(f"{path}: {name}: expected a mapping of names to values")
    return MsstConfig(**sections)


class _Import:
    """What a config and a state dict say of a network and how songs pass through it."""

    def __init__(self, config: MsstConfig, state: Mapping[str, Tensor], has_config: bool) -> None:
        self.config = config
        self.has_config = has_config
        self.assumed: list[str] = []
        self.sizes = types.infer(state, self._stated(None))
        self.kind = types.TYPES[self.sizes["type"]]
        self._check_type()
        self.stated = self._stated(self.kind)
        self.outputs = int(self.sizes["num_stems"])
        self.stems, self.others = self._stems()

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The network's architecture, as in a plan."""
        if lacking := [key for key in self.kind.needed if key not in {**self.sizes, **self.stated}]:
            raise ValueError(
                f"the checkpoint does not state {listed(lacking)}: add its YAML file with --config"
            )
        defaults = {key: value for key, value in self.kind.defaults.items() if key not in self.sizes}
        if not self.has_config:
            size = self.sizes.get("stft_n_fft")
            for key in ("stft_hop_length", "stft_win_length"):
                if size and key in defaults:  # in the usual proportion
                    defaults[key] = defaults[key] * size // self.kind.defaults["stft_n_fft"]
            self.assumed += [f"{key}: {value}" for key, value in defaults.items()]
        complete = {**defaults, **self.sizes, **self.stated, "sources": [*self.stems]}
        return {key: [*value] if isinstance(value, tuple) else value for key, value in complete.items()}

    def plan(self, file: str, origin: str, known: CommunityCheckpoint | None) -> str:
        """The text of the plan."""
        taken = {*self.stems, self.others}
        normalized, estimate, restored = (_free(name, taken) for name in ("x", "E", "target"))
        signal = normalized if self.config.inference.get("normalize") else MIXTURE
        back = {"denormalize": signal} if signal != MIXTURE else {}
        stems: dict[str, Any] = {stem: {"sum": {f"{estimate}.{stem}": 1}, **back} for stem in self.stems}
        if self.others:
            (target,) = self.stems
            stems[self.others] = {"sum": {MIXTURE: 1, restored if back else f"{estimate}.{target}": -1}}
        signals: dict[str, Any] = {normalized: {"standardize": MIXTURE}} if back else {}
        signals[estimate] = {"network": "net", "hears": signal}
        if back and self.others:
            signals[restored] = stems[target]
            stems[target] = {"sum": {restored: 1}}
        facts = {"license": known.licence, "trained_with": known.trained_with} if known else {}
        content = {
            "title": known.title if known else f"{self.kind.title}: {', '.join(stems)}",
            "description": f"Imported from {origin}.",
            **({"score": known.marked_score} if known and known.score else {}),
            "sample_rate": types.read(self.architecture).sample_rate,
            "networks": {
                "net": {
                    "weights": {"file": file, **facts, "architecture": self.architecture},
                    "fade_and_add": {"chunk": self._chunk(), "overlap": self._overlap()},
                }
            },
            "signals": signals,
            "stems": stems,
        }
        text = yaml.safe_dump(
            content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
        )
        return (ZERO_DC if "zero_dc" in self.architecture else "") + text

    def facts(self, plan: Plan, parameters: int) -> tuple[str, ...]:
        """What was found, in words."""
        use = plan.networks["net"]
        rest = f"; {self.others} is the rest of the mixture" if self.others else ""
        normalized = ", normalized mixture" if self.config.inference.get("normalize") else ""
        seconds = use.chunking.length / plan.sample_rate
        return (
            f"network: {self.kind.title}, {parameters / 1e6:.1f} million parameters, {plan.sample_rate} Hz",
            f"stems: {listed(self.stems)}{rest}",
            f"passes: {use.how()} ({seconds:.1f} s){normalized}",
        )

    def _check_type(self) -> None:
        """Check the config's type of model against the state dict."""
        stated = self.config.training.get("model_type")
        if stated is not None and stated != self.kind.name:
            raise ValueError(
                f"training.model_type is {quoted(stated)}, but the checkpoint is of type {self.kind.name}"
            )

    def _stated(self, kind: types.NetworkType | None) -> dict[str, Any]:
        """The sizes of one type, or of any, that the config states; other settings must have no effect."""
        kinds = [kind] if kind else [*types.TYPES.values()]
        known = {key for each in kinds for key in each.sizes}
        model = self.config.model
        foreign = [
            key for key, value in model.items()
            if key not in known and value not in (None, False, 0) and not WITHOUT_EFFECT.fullmatch(str(key))
        ]  # fmt: skip
        if kind and foreign:
            raise ValueError(
                f"model.{shown(foreign[0])} is not supported by {kind.title}; is it the right config?"
            )
        rates = [part["sample_rate"] for part in (self.config.audio, model) if part.get("sample_rate")]
        if len(rates) == 2 and rates[0] != rates[1]:
            raise ValueError(f"audio.sample_rate is {rates[0]}, but model.sample_rate is {rates[1]}")
        found = {**self.config.audio, **model}
        if self.config.audio.get("num_channels") == 1:
            found.setdefault("stereo", False)
        stated = {key: found[key] for key in found if key in known and found[key] is not None}
        return {**stated, "type": kind.name} if kind else stated

    def _stems(self) -> tuple[tuple[str, ...], str | None]:
        """The names of the network's outputs, and of the rest of the mixture if it is a stem."""
        instruments = self.config.training.get("instruments") or self.config.model.get("sources")
        target = self.config.training.get("target_instrument") or None
        if instruments is None and target is None:
            names = USUAL_STEMS.get(self.outputs) or tuple(f"stem_{i + 1}" for i in range(self.outputs))
            self.assumed.append(f"stems: {listed(names)}")
            return names, ("other" if self.outputs == 1 else None)
        if not isinstance(target, str | None):
            raise ValueError(f"training.target_instrument must be a name, not {quoted(target)}")
        listed_names = [target] if instruments is None else instruments
        if not isinstance(listed_names, list) or not all(isinstance(name, str) for name in listed_names):
            raise ValueError(f"training.instruments must be a list of names, not {quoted(instruments)}")
        names = tuple(map(_stem_name, listed_names if target is None else [target]))
        if (count := len(names)) != self.outputs:
            key = "training.instruments" if target is None else "training.target_instrument"
            raise ValueError(
                f"{key} names {count} stem{'s' * (count != 1)}, but the checkpoint estimates {self.outputs}"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"training.instruments names a stem twice: {listed(names)}")
        rest = [stem for stem in map(_stem_name, listed_names) if stem not in names]
        if target is None:
            return names, None
        if len(rest) == 1:
            return names, rest[0]
        return names, "other" if names[0] in ("vocals", "residual") else "residual"

    def _chunk(self) -> int:
        """Samples of a chunk."""
        chunk = self.config.inference.get("chunk_size") or self.config.audio.get("chunk_size")
        if chunk is None:
            self.assumed.append(f"chunk: {CHUNK} samples")
            return CHUNK
        if not isinstance(chunk, int):
            raise ValueError(f"audio.chunk_size must be a number of samples, not {quoted(chunk)}")
        return chunk

    def _overlap(self) -> int:
        """The number of chunks that process each sample."""
        overlap = self.config.inference.get("num_overlap")
        if overlap is None:
            self.assumed.append(f"overlap: {OVERLAP}")
            return OVERLAP
        if not isinstance(overlap, int):
            raise ValueError(f"inference.num_overlap must be a whole number, not {quoted(overlap)}")
        return overlap


def _free(name: str, taken: Collection[str | None]) -> str:
    """The name of a signal, with underscores added if a stem has this name."""
    return _free(f"{name}_", taken) if name in taken else name


def _stem_name(instrument: str) -> str:
    """An instrument's name as that of a stem, which is also a file name."""
    name = re.sub(r"[^\w-]+", "_", instrument.strip()).strip("_")
    if not name or name.casefold() in (MIXTURE, ACCOMPANIMENT):
        raise ValueError(
            f"training.instruments: {quoted(instrument)} cannot be the name of a stem; rename it"
        )
    return name


def _check_name(name: str, folder: Path) -> None:
    """Raise PlanError if a new ensemble cannot have this name."""
    if not re.fullmatch(r"\w[\w-]{0,99}", name):
        raise PlanError(
            f"{quoted(name)} cannot be the name of an ensemble: use up to 100 letters, digits, '_' and '-'"
        )
    if is_reserved(name) or f"{name}.yaml".casefold() == weights.TRAINED:
        raise PlanError(f"{name} cannot be the name of an ensemble: it is reserved; choose another")
    taken: Sequence[str] = plan_file.names()
    if name in taken:
        raise PlanError(f"{name} is the name of an ensemble of the package; choose another")
    if (folder / f"{name}.yaml").exists():
        raise PlanError(f"{folder / name}.yaml exists already; choose another name, or delete it first")
