"""The weights that later stages hear, searched by coordinates: only networks that hear a change run again."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from evaluator import dataset, metrics
from evaluator.blend_search.collecting import as_16_bit, blended, run_networks
from evaluator.blend_search.inner_products import is_silent
from evaluator.blend_search.search import NOTHING
from evaluator.blend_search.stage_moves import TRIES, Cost, Search, changes, weight
from evaluator.blend_search.tables import count, gain
from evaluator.bootstrap import COVERAGE
from evaluator.dataset import Track
from kmdx.challenge import MIXTURE
from kmdx.errors import KmdxError
from kmdx.plan import Plan, node_of
from kmdx.separator import Separator

Report = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """What a search came to: SDR in dB, ``(songs,)``, means over stems.

    Attributes
    ----------
    plan : Plan
    before, after : ndarray
        Of the songs that were searched.
    held_out_before, held_out_after : ndarray
        Of the songs that were held out; none where nothing better was found.
    scored : tuple of str
        Their names.
    """

    plan: Plan
    before: np.ndarray
    after: np.ndarray
    held_out_before: np.ndarray
    held_out_after: np.ndarray
    scored: tuple[str, ...]

    @property
    def gains(self) -> np.ndarray:
        """What held-out songs gained, in dB: ``(songs,)``."""
        return self.held_out_after - self.held_out_before

    @property
    def recommended(self) -> bool:
        """Whether held-out songs gained."""
        return bool(len(self.gains)) and float(self.gains.mean()) > NOTHING


def tune(search: Search, separator: Separator, folder: Path, on_done: Report = lambda line: None) -> Tuned:
    """Search.

    Parameters
    ----------
    search : Search
    separator : Separator
        Of the search's plan.
    folder : Path
        For the estimates of songs, as many bytes as the search's cost says.
    on_done : callable
        Called with a line after each try.

    Raises
    ------
    KmdxError
        If a song cannot be read or separated, or there is no room for its estimates.
    """
    check_room(search, folder)
    songs = [_Song(track, folder / str(number)) for number, track in enumerate(search.songs)]
    plan = search.plan
    before = np.array([song.play(separator, search.stems) for song in songs])
    for song in songs:
        song.keep()
    best = before
    on_done(f"as it is: {best.mean():.3f} dB")
    step = search.step
    for number in range(search.rounds):
        score = best.mean()
        for move in search.moves:
            direction = step
            for _ in range(TRIES):
                tried = move.applied(plan, direction)
                again = search.behind(move)
                sdr = np.array([song.play(separator.under(tried), search.stems, again) for song in songs])
                better = sdr.mean() > best.mean() + NOTHING
                said = ", ".join(f"{name} {weight(tried, move.node, name):g}" for name, _ in move.changes)
                on_done(f"{move.node}: {said}: {sdr.mean():.3f} dB{', taken' if better else ''}")
                if better:
                    plan, best = tried, sdr
                    for song in songs:
                        song.keep()
                else:
                    direction = -direction
                    for song in songs:
                        song.reject()
        if best.mean() <= score + NOTHING:
            step /= 2
        on_done(f"round {number + 1} of {search.rounds}: {best.mean():.3f} dB")
    for song in songs:
        song.drop()
    pairs, scored = [], []
    for number, track in enumerate(search.held_out if plan.nodes != search.plan.nodes else []):
        song = _Song(track, folder / f"held out {number}")
        changed = [move for move in search.moves if plan.nodes[move.node] != search.plan.nodes[move.node]]
        again = list({run for move in changed for run in search.behind(move)})
        try:
            first = song.play(separator, search.stems)
            song.keep()
            pairs.append((first, song.play(separator.under(plan), search.stems, again)))
        except KmdxError as error:  # what was found is not lost by it
            on_done(f"held out, {track.name}: left out: {error}")
            continue
        finally:
            song.drop()
        scored.append(track.name)
        on_done(f"held out, {track.name}: {pairs[-1][0]:.3f} dB, now {pairs[-1][1]:.3f} dB")
    held = np.array(pairs).reshape(-1, 2)
    return Tuned(plan, before, best, held[:, 0], held[:, 1], tuple(scored))


class _Song:
    """A song whose estimates lie in a folder, each until another is taken in its place."""

    def __init__(self, track: Track, folder: Path) -> None:
        self.track = track
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.tried: dict[str, Path] = {}
        with room_in(folder):
            folder.mkdir()

    def play(self, separator: Separator, stems: Sequence[str], again: Sequence[str] = ()) -> float:
        """Mean SDR over stems that are not silent in truth; runs that are not made ``again`` are known."""
        mixture = dataset.read(self.track, MIXTURE)
        known = {
            name: np.load(path, mmap_mode="r")
            for name, path in self.files.items()
            if node_of(name) not in again
        }
        estimates, _ = run_networks(separator, mixture, stems, known)
        self.reject()
        for name, samples in estimates.items():
            if name not in known:
                path = self.tried[name] = self.folder / f"{name}.{secrets.token_hex(4)}.npy"
                with room_in(self.folder):
                    np.save(path, samples)
        found = blended(separator, mixture, stems, estimates)
        truths = {stem: dataset.read(self.track, stem).samples for stem in stems}
        sdr = [
            metrics.global_sdr(truth, as_16_bit(found[stem]))
            for stem, truth in truths.items()
            if not is_silent(np.square(truth, dtype=np.float64).sum(), np.float64(truth.size))
        ]
        if not sdr:
            raise KmdxError(f"{self.track.name}: every true stem is silent; leave the song out")
        return float(np.mean(sdr))

    def keep(self) -> None:
        """Take what was tried last for what is known."""
        for name, path in self.tried.items():
            if name in self.files:
                self.files[name].unlink()
            self.files[name] = path
        self.tried = {}

    def reject(self) -> None:
        """Let go of what was tried last."""
        for path in self.tried.values():
            path.unlink(missing_ok=True)
        self.tried = {}

    def drop(self) -> None:
        """Let go of everything."""
        self.reject()
        for path in self.files.values():
            path.unlink()
        self.files = {}


def check_room(search: Search, folder: Path) -> None:
    """Raise :class:`KmdxError` if a search's estimates have no room in a folder."""
    wanted = search.cost().disk
    with room_in(folder):
        free = shutil.disk_usage(folder).free
    if wanted > free:
        raise KmdxError(
            f"{folder}: {wanted / 1e9:.2f} GB of estimates go there, but only {free / 1e9:.2f} GB are free; "
            "name another folder with --scratch, or search fewer songs (--search)"
        )


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Raise :class:`KmdxError` where what is done cannot write to a folder."""
    try:
        yield
    except OSError as error:
        raise KmdxError(
            f"{folder}: estimates cannot be written there ({error.strerror or error}); "
            "name another folder with --scratch"
        ) from error


def cost(search: Search, most: Cost) -> str:
    """What a search of stages takes, before it begins."""
    parts = [
        f"at most {count(most.runs, 'network run')} on {count(len(search.songs), 'song')}"
        + (f" and, for the result, {len(search.held_out)} held out" if search.held_out else ""),
        f"{most.audio:.0f} s of audio through networks",
    ]
    if most.gflop is not None:
        parts.append(f"{most.gflop:.0f} GFLOP")
    parts.append(f"{most.disk / 1e9:.2f} GB of disk")
    took = "time not known: give --collected" if most.seconds is None else f"about {_minutes(most.seconds)}"
    return "; ".join([*parts, took])


def weights(before: Plan, after: Plan) -> Table:
    """Weights that were changed."""
    table = Table(title="weights", title_justify="left", box=None, pad_edge=False)
    for heading in ("sum", "signal"):
        table.add_column(heading)
    for heading in ("published", "found"):
        table.add_column(heading, justify="right")
    for name, reference, old, new in changes(before, after):
        table.add_row(name, reference, f"{old:g}", f"{new:g}")
    return table


def scores(tuned: Tuned) -> Table:
    """Scores of songs that were searched, and of those held out."""
    title = "global SDR (dB, mean over stems and songs)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("songs")
    for heading in ("", "published", "found", "gain", f"{COVERAGE:.0%} interval"):
        table.add_column(heading, justify="right")
    for name, before, after in (
        ("searched", tuned.before, tuned.after),
        ("held out", tuned.held_out_before, tuned.held_out_after),
    ):
        if len(before):
            table.add_row(
                name,
                str(len(before)),
                f"{before.mean():.3f}",
                f"{after.mean():.3f}",
                *gain(after - before),
            )
    return table


def origin(search: Search, before: Plan, after: Plan, tuned: Tuned) -> Iterator[str]:
    """Lines that say where a plan's stage weights came from and what they promise."""
    yield (
        f"Weights that later stages hear were found by evaluator.blend_search on "
        f"{count(len(search.songs), 'song')}, from {before.name} ({before.digest[:12]})."
    )
    yield "Songs: " + ", ".join(track.name for track in search.songs) + "."
    for name, reference, old, new in changes(before, after):
        yield f"{name}: {reference} {old:g}, now {new:g}."
    yield f"Global SDR on them: {tuned.before.mean():.3f} dB published, {tuned.after.mean():.3f} now."
    if len(tuned.gains):
        names = ", ".join(tuned.scored)
        mean, ends = gain(tuned.gains)
        between = f" ({COVERAGE:.0%}: {ends})" if ends else ""
        yield (
            f"Held out: {names}: {tuned.held_out_before.mean():.3f} dB published, "
            f"{tuned.held_out_after.mean():.3f} now, gain {mean}{between}."
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
