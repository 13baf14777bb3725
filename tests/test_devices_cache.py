"""Which networks are on the device, moved in and out by the budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kmdx import devices
from kmdx.devices import SIGNALS_SHARE, WEIGHTS_SHARE, BatchProfile, NetworkCache

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")  # nothing here computes on it
SHARE = 100  # bytes for weights
BUDGET = int(SHARE / WEIGHTS_SHARE)


class Network:
    """Has a size in bytes; records its moves and what it is narrowed to."""

    length = None

    def __init__(self, name: str, log: list[str], size: int, buffers: int = 0) -> None:
        self.name, self.log = name, log
        self.size, self.buffer_size = size, buffers

    def parameters(self) -> list[Tensor]:
        return [torch.empty(self.size, dtype=torch.uint8)]

    def buffers(self) -> list[Tensor]:
        return [torch.empty(self.buffer_size, dtype=torch.uint8)]

    def to(self, device: torch.device) -> Network:
        assert not torch.is_inference_mode_enabled(), "its parameters could not be moved again"
        self.log.append(f"{self.name} {'out' if device == CPU else 'in'}")
        return self

    def narrow(self, sources: Sequence[str]) -> tuple[str, ...]:
        self.log.append(f"{self.name} narrowed")
        return (self.name, *sources)


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 24 GiB, also on a machine without one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 24 * 2**30))


class Fleet:
    """Networks by name, all on one device, and a log of their moves."""

    def __init__(self, device: torch.device = GPU, budget: int | None = BUDGET, **sizes: int) -> None:
        self.log: list[str] = []
        self.networks = {name: Network(name, self.log, size) for name, size in sizes.items()}
        self.cache = NetworkCache(self.networks, device, budget)

    def moves(self, asked: str) -> list[str]:
        """The moves when these networks are requested in order."""
        self.log.clear()
        with torch.inference_mode():
            for name in asked:
                self.cache.runner(name, ["vocals"])
        return [entry for entry in self.log if not entry.endswith("narrowed")]


def test_networks_that_fit_are_moved_to_the_device_once_on_first_use() -> None:
    fleet = Fleet(a=40, b=40, c=20)
    assert fleet.moves("ab") == ["a in", "b in"]
    assert fleet.moves("abcabc") == ["c in"]


@pytest.mark.parametrize(
    ("asked", "moves"),
    [
        ("abc", ["a in", "b in", "a out", "c in"]),
        ("abac", ["a in", "b in", "b out", "c in"]),
        ("abca", ["a in", "b in", "a out", "c in", "b out", "a in"]),
        ("abbaabc", ["a in", "b in", "a out", "c in"]),
    ],
)
def test_the_least_recently_used_network_is_evicted_first(asked: str, moves: list[str]) -> None:
    assert Fleet(a=40, b=40, c=40).moves(asked) == moves


def test_only_as_many_networks_are_evicted_as_necessary() -> None:
    assert Fleet(a=30, b=30, c=30, d=60).moves("abcd") == [
        "a in", "b in", "c in", "a out", "b out", "d in",
    ]  # fmt: skip


def test_a_network_larger_than_its_share_is_alone_on_the_device() -> None:
    assert Fleet(a=30, b=101, c=30).moves("abc") == ["a in", "a out", "b in", "b out", "c in"]


def test_buffers_count_toward_the_size_of_a_network() -> None:
    fleet = Fleet(a=60, b=10)
    fleet.networks["b"].buffer_size = 31
    assert fleet.moves("ab") == ["a in", "a out", "b in"]


def test_a_network_with_several_names_is_moved_once() -> None:
    fleet = Fleet(a=60, b=30)
    fleet.networks["z"] = fleet.networks["a"]
    assert fleet.moves("azbzab") == ["a in", "b in"]


def test_narrowed_networks_are_kept_until_their_network_is_evicted() -> None:
    fleet = Fleet(a=40, b=40, c=40)
    runner = fleet.cache.runner
    first = runner("a", ["vocals"])
    assert first.network == ("a", "vocals")
    assert first.device == GPU
    assert first.room == int((1 - SIGNALS_SHARE) * BUDGET - SHARE)
    assert runner("a", ("vocals",)).network is first.network
    assert runner("a", ["drums"]).network == ("a", "drums")
    other = runner("b", ["vocals"]).network
    assert fleet.log.count("a narrowed") == 2
    runner("c", ["vocals"])  # a goes
    runner("a", ["vocals"])  # b goes
    assert fleet.log.count("a narrowed") == 3
    runner("c", ["vocals"])
    assert fleet.log.count("c narrowed") == 1
    assert runner("b", ["vocals"]).network is not other


def test_networks_are_never_evicted_from_other_devices() -> None:
    fleet = Fleet(torch.device("meta"), budget=None, a=10**6, b=10**6)
    asked = fleet.cache.runner("a", ["vocals"])
    assert asked.room is None
    assert fleet.moves("abab") == ["b in"], "and a before"


def test_a_network_is_moved_again_after_eviction_if_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(a=30, b=30, c=30)
    fleet.moves("ab")
    full = iter([True, False])
    move = Network.to

    def to(network: Network, device: torch.device) -> Network:
        if device == GPU and next(full):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(network, device)

    monkeypatch.setattr(Network, "to", to)
    assert fleet.moves("c") == ["a out", "b out", "c in"]
    full = iter([True, False])
    alone = Fleet(a=30)
    with pytest.raises(torch.OutOfMemoryError):
        alone.moves("a")
    assert alone.log == ["a out"], "what has arrived of it does not stay"
    assert alone.moves("aa") == ["a in"], "the next song brings it"


def test_on_the_cpu_nothing_is_moved() -> None:
    fleet = Fleet(CPU, budget=None, a=10**6, b=10**6)
    assert fleet.moves("abab") == []
    assert fleet.log == ["a narrowed", "b narrowed"]
    runner = fleet.cache.runner("a", ["vocals"])
    assert runner.room is None
    assert not runner.evict()


def test_the_budget_is_that_of_the_device_if_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(devices, "memory_limit", lambda device, own: 90 - own)
    monkeypatch.setattr(devices, "memory_budget", lambda device, own: asked.append((device, own)) or 80)
    fleet = Fleet(budget=None, a=30, b=30)
    assert asked == [(GPU, 0)]
    assert fleet.moves("ab") == ["a in", "a out", "b in"]
    fleet.cache.refresh_budget()
    assert asked[1:] == [(GPU, 30)], "its own weights are not what others use"
    assert fleet.cache.limit == 60


def test_evict_moves_all_other_networks_off_the_device() -> None:
    fleet = Fleet(a=30, b=30, c=30)
    fleet.moves("abc")
    runner = fleet.cache.runner("b", ["vocals"])
    fleet.log.clear()
    assert runner.evict()
    assert fleet.log == ["a out", "c out"]
    assert not runner.evict(), "there is nothing left to move"
    assert fleet.log == ["a out", "c out"]
    assert fleet.moves("bac") == ["a in", "c in"]
    assert fleet.cache.runner("b", ["vocals"]).network is runner.network


def test_memory_of_an_evicted_network_is_returned_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(a=60, b=60)
    monkeypatch.setattr(devices, "empty_cache", lambda device: fleet.log.append(f"{device} emptied"))
    fleet.cache.runner("a", ["vocals"])
    fleet.cache.runner("b", ["vocals"])
    assert fleet.log == ["a in", "a narrowed", "a out", "cuda:0 emptied", "b in", "b narrowed"]


def test_batch_profiles_are_kept_for_each_network_and_its_sources() -> None:
    cache = Fleet(a=60, b=60).cache
    first = cache.runner("a", ["vocals"])
    first.profile.cost, first.profile.sizes[100] = 7.0, 1
    for others in (cache.runner("a", ["drums"]), cache.runner("b", ["vocals"])):  # a is moved out
        assert others.profile == BatchProfile()
    assert cache.runner("a", ("vocals",)).profile == BatchProfile(7.0, {100: 1})
    cache.refresh_budget()
    assert cache.runner("a", ["vocals"]).profile == BatchProfile(7.0), "the next song tries it again"


def test_the_memory_for_windows_does_not_depend_on_the_loaded_networks() -> None:
    fleet = Fleet(a=30, b=40, c=20)
    fleet.networks["twin"] = fleet.networks["a"]
    room = fleet.cache.room
    assert room == int((1 - SIGNALS_SHARE) * BUDGET - 90)
    fleet.moves("abc")
    assert fleet.cache.room == room
    assert Fleet(a=30, b=80).cache.room == int((1 - SIGNALS_SHARE) * BUDGET - SHARE)


def test_replaced_networks_are_evicted_with_their_profiles() -> None:
    fleet = Fleet(a=30, b=30)
    fleet.cache.runner("a", ["vocals"]).profile.sizes[100] = 1
    fleet.log.clear()
    fleet.cache.replace({"a": Network("other a", fleet.log, 30)})
    assert fleet.log == ["a out"]
    runner = fleet.cache.runner("a", ["vocals"])
    assert fleet.log[1:] == ["other a in", "other a narrowed"]
    assert runner.profile == BatchProfile()
