"""Command lines as users of demucs and audio-separator write them.

``kmdx SONG`` means ``kmdx separate SONG``. :data:`OPTIONS` is the table of those two programs' options: each
is replaced by own options of the same meaning, or left out with a note if it changes no stem, or refused with
a line that explains what to type instead.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kmdx.challenge import WITHOUT
from kmdx.errors import KmdxError, quoted, shown, suggest

TEMPLATE = "{track}/{stem}.{ext}"
KARAOKE = "karaoke"
NO_KARAOKE = (
    "unknown stem 'karaoke': `--stems instrumental` is the song without any vocals; to keep the backing "
    "vocals, `kmdx models pull karaoke_anvuew` and use `-e karaoke_anvuew`"
)
SEPARATE = "separate"
OWN_GLOBAL = ("--version", "--help", "-h", "--install-completion", "--show-completion")

LEVELS = "stems keep their level, so that they add up to the song; --format float32 avoids clipping"
PLAN = "the ensemble states it (`kmdx ensembles show NAME`); --speed balanced and --speed fast overlap less"
OWN_PLAN = "a plan (.yaml) combines networks: docs/ensembles.md; `kmdx ensembles` lists those of the package"
MEMORY = "windows and batches adapt to the memory of the device"
VR = "VR networks are not supported"


@dataclass(frozen=True)
class Familiar:
    """An option of another program: exactly one of ``own``, ``note`` and ``refusal`` applies.

    Attributes
    ----------
    names : str
        Its names, separated by spaces; an underscore equals a hyphen.
    own : tuple of str or callable, optional
        The own options of the same meaning, or what returns them for the option's value. ``{}`` stands for
        the value.
    command : tuple of str, optional
        The own command of the same meaning, which replaces the whole line.
    note : str, optional
        Why it is left out: it does not change what is written.
    refusal : str, optional
        What to type instead.
    takes_value : bool
    harmless : tuple of str
        Values with which a refused option has no effect.
    """

    names: str
    own: tuple[str, ...] | Callable[[str], tuple[str, ...]] | None = None
    command: tuple[str, ...] | None = None
    note: str | None = None
    refusal: str | None = None
    takes_value: bool = True
    harmless: tuple[str, ...] = ()


def _two_stems(stem: str) -> tuple[str, ...]:
    stem = stem.lower()
    return "--stems", f"{stem},{WITHOUT}{stem}"


def _format(name: str) -> tuple[str, ...]:
    formats = {"wav": "wav16", "flac": "flac", "mp3": "mp3"}
    if name.lower() not in formats:
        raise KmdxError(
            f"--output_format {shown(name)}: kmdx writes {', '.join(formats)}; convert with ffmpeg"
        )
    return "--format", formats[name.lower()]


def _names(text: str) -> tuple[str, ...]:
    """Custom names; one name for each stem is not a template."""
    try:
        stems = [str(stem).lower() for stem in json.loads(text)]
    except (ValueError, TypeError):
        stems = []
    hint = f" --stems {','.join(stems)}" if stems else ""
    raise KmdxError(
        "--custom_output_names is not an option of kmdx; use --output-template, such as "
        f"--output-template '{{track}} {{stem}}.{{ext}}'{hint}"
    )


def _ensemble_of(model: str) -> tuple[str, ...]:
    return "--ensemble", ensemble_of_file(model)


OPTIONS = (
    # demucs 4.1
    Familiar("-n --name", own=lambda name: ("--ensemble", _demucs_model(name))),
    Familiar(
        "-s --sig", refusal="-e NAME chooses an ensemble; a plan (.yaml) can name a weight by its signature"
    ),
    Familiar("--repo", refusal="set KMDX_MODELS to the folder, or give the path of a plan with -e PLAN.yaml"),
    Familiar("-v --verbose", note="every message is always shown", takes_value=False),
    Familiar("--out", own=("--output", "{}")),
    Familiar("--filename", own=("--output-template", "{}")),
    Familiar("-d", own=("--device", "{}")),
    Familiar("--overlap", refusal=PLAN, harmless=("0.25",)),
    Familiar(
        "--no-split", refusal="songs of any length are processed in windows; leave it out", takes_value=False
    ),
    Familiar("--segment", note=MEMORY),
    Familiar("--two-stems", own=_two_stems),
    Familiar("--int24", own=("--format", "wav24"), takes_value=False),
    Familiar("--float32", own=("--format", "float32"), takes_value=False),
    Familiar("--clip-mode", refusal=LEVELS, harmless=("clamp",)),
    Familiar("--flac", own=("--format", "flac"), takes_value=False),
    Familiar("--mp3", own=("--format", "mp3"), takes_value=False),
    Familiar(
        "--mp3-bitrate --output-bitrate",
        refusal="mp3 stems have 320 kbit/s; for another rate, write wav and use ffmpeg -i STEM.wav -b:a RATE",
        harmless=("320", "320k", "320K"),
    ),
    Familiar("--mp3-preset", note="mp3 is always encoded with the highest quality"),
    Familiar("-j --jobs", note="all cores are used; --workers N separates N songs at once"),
    Familiar("--list_models", command=("models", "list"), takes_value=False),  # audio-separator's
    Familiar("--list-models --list-presets", command=("ensembles", "list"), takes_value=False),
    # audio-separator 0.47 (-m, -l and others that demucs does not have)
    Familiar("-m --model-filename", own=_ensemble_of),
    Familiar("--extra-models --ensemble-algorithm --ensemble-weights", refusal=OWN_PLAN),
    Familiar("--ensemble-preset", refusal=OWN_PLAN),
    Familiar("-l", command=("models", "list"), takes_value=False),
    Familiar("--list-filter --list-limit --list-format", refusal="`kmdx models list` lists all models"),
    Familiar("--env-info", command=("doctor",), takes_value=False),
    Familiar("--debug", note="every message is always shown", takes_value=False),
    Familiar("--log-level", note="every message is always shown"),
    Familiar("--output-format", own=_format),
    Familiar("--output-dir", own=("--output", "{}")),
    Familiar(
        "--model-file-dir", refusal="set KMDX_MODELS to the folder; `kmdx models where` shows the present one"
    ),
    Familiar(
        "--invert-spect",
        refusal="no_STEM is the exact mixture minus the stem; leave it out",
        takes_value=False,
    ),
    Familiar("--normalization", refusal=LEVELS, harmless=("1", "1.0")),
    Familiar("--amplification", refusal=LEVELS, harmless=("0", "0.0")),
    Familiar("--single-stem", own=lambda stem: ("--stems", stem.lower())),
    Familiar(
        "--sample-rate",
        refusal="stems keep the song's sample rate; resample with ffmpeg -i STEM.wav -ar RATE",
    ),
    Familiar("--use-soundfile", note="files of any size are written", takes_value=False),
    Familiar("--use-autocast --use-native-fp16", own=("--precision", "auto"), takes_value=False),
    Familiar("--use-torch-compile --compile", own=("--engine", "compiled"), takes_value=False),
    Familiar(
        "--use-directml", refusal="networks run on CUDA, MPS or the CPU; leave it out", takes_value=False
    ),
    Familiar("--chunk-duration", note="long songs are kept on disk, not in memory"),
    Familiar("--custom-output-names", own=_names),
    Familiar("--mdx-segment-size --mdx-batch-size --mdxc-segment-size --mdxc-batch-size", note=MEMORY),
    Familiar("--demucs-segment-size", note=MEMORY),
    Familiar("--mdxc-override-model-segment-size", note=MEMORY, takes_value=False),
    Familiar("--mdx-overlap --mdx-hop-length --mdxc-overlap --demucs-overlap", refusal=PLAN),
    Familiar("--demucs-segments-enabled", note="songs of any length are processed in windows"),
    Familiar("--demucs-shifts", own=lambda number: ("--shifts", "1" if number == "0" else number)),
    Familiar(
        "--mdx-enable-denoise",
        refusal="--tta averages with inverted polarity, as it does, and with swapped channels",
        takes_value=False,
    ),
    Familiar("--mdxc-pitch-shift", refusal="kmdx does not shift the pitch; leave it out", harmless=("0",)),
    Familiar("--vr-enable-tta", own=("--tta",), takes_value=False),
    Familiar("--vr-batch-size --vr-window-size --vr-aggression --vr-post-process-threshold", refusal=VR),
    Familiar("--vr-high-end-process --vr-enable-post-process", refusal=VR, takes_value=False),
)
_BY_NAME = {name: option for option in OPTIONS for name in option.names.split()}
# Options that mean something only together with another one.
OTHER_METHOD, DOWNLOAD = "--other-method", "--download-model-only"
WAV = ("wav24", "float32")


@dataclass(frozen=True)
class Line:
    """A command line of ``kmdx``, and notes about options that were left out."""

    arguments: list[str]
    notes: tuple[str, ...] = ()


def translate(arguments: Sequence[str], commands: Collection[str]) -> Line:
    """A command line in own options.

    Raises :class:`KmdxError` if an option of another program has no own option of the same meaning; the
    message explains what to type instead.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name.
    commands : collection of str
        The own commands.
    """
    given = list(arguments)
    if not given or given[0] in OWN_GLOBAL or (given[0] in commands and given[0] != SEPARATE):
        return Line(given)
    if given[0] == SEPARATE:
        given = given[1:]
    elif not _means_separate(given[0]):
        return Line(given)
    return _translated(given)


def _means_separate(first: str) -> bool:
    """Whether the first argument is an option, a song, or what could be one, but not a mistyped command."""
    from kmdx.inputs import EXTENSIONS  # only now, because `kmdx --help` does not need it

    looks_like_song = "/" in first or glob.has_magic(first) or Path(first).suffix.lower() in EXTENSIONS
    return first.startswith("-") or looks_like_song or Path(first).exists()


def _translated(given: list[str]) -> Line:
    own: list[str] = []
    notes: list[str] = []
    wav: list[str] = []  # of demucs: applies only if no other format is requested
    downloads = False
    for option, name, value, words in _parsed(given):
        if name == OTHER_METHOD:
            continue
        if name == DOWNLOAD:
            downloads = True
        elif option is None:
            own += words
        elif option.command is not None:
            return Line([*option.command])
        elif option.note is not None or value in option.harmless:
            notes += [f"{name} has no effect: {option.note}"] if option.note else []
        elif option.refusal is not None:
            raise KmdxError(f"{name} is not an option of kmdx: {option.refusal}")
        else:
            found = option.own(value) if callable(option.own) else option.own or ()
            words = [value if word == "{}" else word for word in found]
            (wav if words[0] == "--format" and words[-1] in WAV else own).extend(words)
    if _value_of(given, OTHER_METHOD) == "none":  # only the stem itself
        own = [
            word.partition(f",{WITHOUT}")[0] if before == "--stems" else word
            for before, word in zip(["", *own], own, strict=False)
        ]
    if downloads:
        return Line(["models", "pull", *_chosen_ensemble(own)], tuple(notes))
    return Line([SEPARATE, *wav, *own], tuple(notes))


def _parsed(given: list[str]) -> Iterator[tuple[Familiar | None, str, str, list[str]]]:
    """Each option of the table, as typed, with its value; other words with None."""
    words = iter(given)
    for word in words:
        if word == "--":
            yield None, "", "", [word, *words]
            return
        typed, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = typed.replace("_", "-") if typed.startswith("--") else typed
        option = _BY_NAME.get(typed) or _BY_NAME.get(name)
        if option is None and len(word) > 2 and word[0] == "-" != word[1] and word[:2] in _BY_NAME:
            typed, value, option = word[:2], word[2:], _BY_NAME[word[:2]]  # -nhtdemucs
            if not option.takes_value:
                yield None, "", "", [word]
                continue
            equals = "="
        takes_value = name == OTHER_METHOD or (option is not None and option.takes_value)
        if takes_value and not equals:
            try:
                value = next(words)
            except StopIteration:
                raise KmdxError(f"{typed} needs a value") from None
        if option is None and name not in (OTHER_METHOD, DOWNLOAD):
            yield None, "", "", [word]
        else:
            yield option, name if option is None else typed, value, []


def _value_of(given: list[str], wanted: str) -> str | None:
    return next((value for _, name, value, _ in _parsed(given) if name == wanted), None)


def _chosen_ensemble(own: list[str]) -> list[str]:
    """The ensemble to download."""
    for option, name in pairwise(own):
        if option in ("--ensemble", "-e"):
            return [name]
    raise KmdxError(
        "--download_model_only: `kmdx models pull NAME` downloads an ensemble; `kmdx ensembles` lists them"
    )


def _demucs_model(name: str) -> str:
    """The ensemble with demucs' name of a model."""
    from kmdx import plan_file, weights

    if name in weights.published() and name not in plan_file.names():
        raise KmdxError(f"-n {name}: {_as_part(name)}")
    return name


def ensemble_of_file(file: str) -> str:
    """The ensemble that runs a published model file alone, by the file's name.

    Raises :class:`KmdxError` if there is none; the message explains how to use the file.
    """
    from kmdx import plan_file, weights

    name = Path(file).name
    stem = name.removesuffix(".yaml")
    if stem in plan_file.names():  # audio-separator's names of demucs models
        return stem
    files: dict[str, str] = {}
    for checkpoint in weights.checkpoints().values():
        files |= {source.file.casefold(): checkpoint.name for source in checkpoint.sources}
    for weight in weights.published().values():
        files |= {Path(source.file).name.casefold(): weight.name for source in weight.sources}
    files |= {f"{weight}.yaml": weight for weight in weights.published()}
    found = files.get(name.casefold())
    if found is None:
        hint = suggest(name, files) or "; `kmdx models list` lists the published models"
        raise KmdxError(
            f"unknown model file {quoted(name)}{hint}; `kmdx models add NAME --checkpoint FILE --config "
            "FILE.yaml` imports a checkpoint of BS-RoFormer, Mel-Band RoFormer, MDX23C or SCNet"
        )
    if found in weights.checkpoints():
        return found
    for ensemble in plan_file.names():
        if {use.weight.name for use in plan_file.load(ensemble).networks.values()} == {found}:
            return ensemble
    raise KmdxError(f"{name}: {_as_part(found)}")


def _as_part(weight: str) -> str:
    """What to do with a weight that is not an ensemble of its own."""
    from kmdx import plan_file

    users = [
        name
        for name in plan_file.names()
        if weight in {use.weight.name for use in plan_file.load(name).networks.values()}
    ]
    part = f", a part of {' and '.join(users)}" if users else ""
    return f"{weight} is a weight{part}, not an ensemble; a plan (.yaml) can use it alone: docs/ensembles.md"
