"""Predict an ensemble's speed on GPUs that were not measured, from counted work: a roofline.

    python -m benchmarks.roofline leaderboard_c [--networks ft_drums mmi] [--batch 4] [--measured FILE]

Each network computes a batch of windows on torch's fake CUDA tensors, which have shapes and types but no
values, so no GPU and no weights are needed. Every kernel's operations and bytes are counted. Its time is the
larger of operations / peak and bytes / bandwidth, plus :data:`LAUNCH` for each launch. ``--measured`` adds a
card with the peaks that ``python -m benchmarks.gpu --json FILE`` measured. What is assumed:

- Peaks and bandwidths are the data sheets'. Cards reach less, so real times are longer.
- Every tensor is read from memory and written to it once per kernel; nothing stays in a cache.
- Kernels are those of eager torch: convolutions add their bias in another kernel, group normalization reads
  its input twice in three kernels, fused attention does not store its weights, and each step of an LSTM
  layer reads the weights in one launch.
- Kernels that cuDNN adds to change a tensor's layout, work between windows, and copies from and to the host
  are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kmdx import benchmark, plan_file, precisions, terminal
from kmdx.benchmark import Machine
from kmdx.challenge import TIME_FACTOR
from kmdx.errors import KmdxError
from kmdx.networks import types
from kmdx.networks.network import Network
from kmdx.plan import NetworkUse, Plan
from kmdx.separator import DEFAULT_ENSEMBLE
from kmdx.stand_in import PUBLISHED_GRAPH

GPU = torch.device("cuda", 0)
HALVES = (torch.float16, torch.bfloat16)
LAUNCH = 5e-6  # seconds from one launch to the next that are not spent on work: an assumption
BATCH = 4  # windows at once
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class Card:
    """A GPU's peaks, in operations and bytes per second."""

    name: str
    single: float  # float32 without tensor cores and TF32
    half: float  # float16 on tensor cores, dense, added in float32
    bandwidth: float
    source: str


CARDS = (
    Card("T4", 8.1e12, 65e12, 320e9, "NVIDIA T4 data sheet; bandwidth: its product brief"),
    Card("L4", 30.3e12, 121e12, 300e9, "NVIDIA L4 data sheet (half of its figure with sparsity)"),
    Card("A10", 31.2e12, 125e12, 600e9, "NVIDIA A10 data sheet"),
    Card("RTX 4090", 82.6e12, 165.2e12, 1008e9, "NVIDIA Ada architecture white paper, appendix A"),
    Card("H100 SXM", 67e12, 989e12, 3350e9, "NVIDIA H100 data sheet (half of its figure with sparsity)"),
)


@dataclass(frozen=True)
class Kernel:
    """The work of one operation on the GPU."""

    name: str
    group: str  # one of :data:`GROUPS`
    moved: int  # bytes read and written
    flops: int = 0  # of products; other kernels are limited by memory
    half: bool = False  # whether it multiplies in half precision
    launches: int = 1

    def work(self, card: Card) -> float:
        """Seconds of work on a card, without launches."""
        return max(self.flops / (card.half if self.half else card.single), self.moved / card.bandwidth)

    def seconds(self, card: Card) -> float:
        """Seconds on a card."""
        return self.work(card) + self.launches * LAUNCH


GROUPS = ("products", "norms", "elementwise", "casts", "copies", "transforms")
"""Convolutions, matrix products, attention and LSTMs; normalizations; activations and other elementwise
operations; changes of precision; copies, padding and concatenation; Fourier transforms."""
NORMS = ("norm", "var", "std", "mean")
COPIES = (
    "clone", "copy_", "cat", "stack", "constant_pad_nd", "reflection_pad1d", "index_select", "gather", "roll",
    "index", "zeros", "zero_", "new_zeros", "zeros_like", "full", "fill_", "ones", "arange", "repeat", "flip",
)  # fmt: skip
SHAPES_ONLY = (
    "empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "transpose_", "t_", "squeeze_",
    "unsqueeze_", "as_strided_",
)  # fmt: skip
WRITE_ONLY = ("copy_", "fill_", "zero_")  # do not read the tensor that they write


def size(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: expanded axes and overlapping frames count once."""
    axes = [(count, step) for count, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    span = 1 + sum((count - 1) * step for count, step in axes)
    return min(math.prod(count for count, _ in axes), span) * tensor.element_size() if tensor.numel() else 0


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has a layout that convolutions accept; otherwise they copy it."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last or tensor.is_contiguous()


def sizes(tree: Any) -> int:
    """Bytes of all tensors of a tree."""
    return sum(size(each) for each in tree_leaves(tree) if isinstance(each, Tensor))


class Counter(TorchDispatchMode):
    """Lists the kernels of all operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        name = function.overloadpacket.__name__
        if name == "convolution" and not is_dense(args[0]):
            copy = torch.ops.aten.contiguous(args[0])
            self.kernels.append(Kernel("clone", "copies", sizes((args[0], copy))))
            args = (copy, *args[1:])
        result = function(*args, **(kwargs or {}))
        is_view = any(each.alias_info and not each.alias_info.is_write for each in function._schema.returns)
        if not is_view and name not in SHAPES_ONLY and sizes(result):
            self.kernels += kernels_of(function, name, args, kwargs or {}, result)
        return result


def kernels_of(function: Any, name: str, args: Any, kwargs: Any, result: Any) -> Iterator[Kernel]:
    """The kernels that eager torch runs for an operation on a GPU."""
    read = sizes(args[1:] if name in WRITE_ONLY else (args, kwargs))
    moved = read + sizes(result)
    if count := flop_registry.get(function.overloadpacket):
        flops = count(*args, **kwargs, out_val=result)
        bias = args[2] if name == "convolution" else None
        yield Kernel(name, "products", moved, flops, args[1].dtype in HALVES)
        if bias is not None:
            yield Kernel("bias", "elementwise", 2 * sizes(result) + size(bias))
    elif name == "native_group_norm":
        yield Kernel(name, "norms", moved + size(args[0]), launches=3)
    else:
        yield Kernel(name, group_of(name, args, result), moved)


def group_of(name: str, args: Any, result: Any) -> str:
    """The group of an operation that is not a product."""
    if name.startswith("_fft"):
        return "transforms"
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        return "copies" if source.dtype == result.dtype else "casts"
    if name in COPIES:
        return "copies"
    return "norms" if any(part in name for part in NORMS) else "elementwise"


def indexed(tensor: Tensor, key: Any) -> Tensor:
    """``tensor[key]``."""
    keys = key if isinstance(key, tuple) else (key,)
    skipped = tensor.dim() - sum(each is not None and each is not Ellipsis for each in keys)
    axis = 0
    for each in keys:
        if isinstance(each, int):
            tensor = tensor.select(axis, each)
            continue
        if each is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(each, slice):
            tensor = torch.ops.aten.slice(tensor, axis, each.start, each.stop, each.step or 1)
        elif each is not Ellipsis:
            tensor = tensor.index_select(axis, each)
        axis += skipped if each is Ellipsis else 1
    return tensor


def assigned(tensor: Tensor, key: Any, value: Any) -> None:
    """``tensor[key] = value``, which does nothing after ``tensor[key] += …``."""
    target = indexed(tensor, key)
    if not isinstance(value, Tensor):
        torch.ops.aten.fill_(target, value)
    elif place(value) != place(target):
        torch.ops.aten.copy_(target, value)


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor is in memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def converted(tensor: Tensor, *given: Any, **options: Any) -> Tensor:
    """``tensor.to(…)``; the device stays, because all are on the same one."""
    dtypes = [getattr(each, "dtype", each) for each in (*given, *options.values())]
    dtype = next((each for each in dtypes if isinstance(each, torch.dtype)), tensor.dtype)
    form = options.get("memory_format")
    result: Tensor = torch.ops.aten.to.dtype(tensor, dtype, memory_format=form)
    return result


WITHOUT_GUARD: dict[str, Callable[..., Any]] = {
    "__getitem__": indexed,
    "__setitem__": assigned,
    "to": converted,
    "float": lambda tensor: converted(tensor, torch.float32),
    "half": lambda tensor: converted(tensor, torch.float16),
    "copy_": torch.ops.aten.copy_,
    "contiguous": torch.ops.aten.contiguous,
}
"""Operations whose Python bindings fail without a driver for a fake tensor's device."""


class OnGpu(TorchFunctionMode):
    """Counts fused attention and LSTMs as a GPU runs them, and makes torch without CUDA run fake tensors."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace some operations."""
        name = getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self.attend(*args, **(kwargs or {}))
        if name == "lstm":
            return self.lstm(*args)
        return WITHOUT_GUARD.get(name, function)(*args, **(kwargs or {}))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Attend from ``(…, T, D)`` to ``(…, S, D)``, ``(…, S, V)``."""
        query, key, value = (in_autocast(each) for each in (query, key, value))
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        steps = query.shape[:-1].numel() * key.shape[-2]
        flops = 2 * steps * (query.shape[-1] + value.shape[-1])
        moved = sizes((query, key, value, mask, result))
        self.counter.kernels.append(Kernel("attention", "products", moved, flops, query.dtype in HALVES))
        return result

    def lstm(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], biases: bool, layers: int,
        dropout: float, training: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Run layers over ``(T, B, C)``; both directions run at once."""
        x = in_autocast(x)
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
        ways = 2 if bidirectional else 1
        weights = [in_autocast(each) for each in weights]
        per_way = len(weights) // (layers * ways)
        for layer in range(layers):
            inputs, hidden = weights[layer * ways * per_way : layer * ways * per_way + 2]
            gates, states = hidden.shape
            out = ways * steps * batch * states * x.element_size()
            flops = 2 * ways * steps * batch * gates * (inputs.shape[1] + states)
            moved = size(x) + 2 * out * gates // states + ways * (size(inputs) + steps * size(hidden)) + out
            self.counter.kernels.append(
                Kernel("lstm", "products", moved, flops, x.dtype in HALVES, steps + 1)
            )
            x = x.new_empty(*x.shape[:2], ways * states)
        last = x.new_empty(layers * ways, batch, states)
        return x, last, last


def in_autocast(tensor: Tensor) -> Tensor:
    """A tensor in autocast's precision, if autocast is active."""
    return tensor.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else tensor


@contextmanager
def counting() -> Iterator[Counter]:
    """Make tensors fake ones, and list the kernels that a GPU would run."""
    counter = Counter()
    with ExitStack() as stack:
        # Without a GPU, autocast does nothing, also not to tensors that stand for those on one.
        absent = "torch.cuda.amp.common.amp_definitely_not_available"
        stack.enter_context(mock.patch(absent, return_value=False))
        for mode in (FakeTensorMode(), torch.no_grad(), OnGpu(counter), counter):
            stack.enter_context(mode)
        yield counter


def kernels(network: Any, batch: int, length: int) -> list[Kernel]:
    """The kernels of a network on a batch of windows; its parameters are replaced by fake ones."""
    with counting() as counter:
        for module in network.modules():
            for name, tensor in [*module._parameters.items()]:
                if tensor is not None:
                    setattr(module, name, nn.Parameter(_on_gpu(tensor), requires_grad=False))
            for name, tensor in [*module._buffers.items()]:
                if tensor is not None:
                    module._buffers[name] = _on_gpu(tensor)
        windows = torch.empty(batch, 2, length, device=GPU)
        counter.kernels.clear()
        network(windows)
    return counter.kernels


def _on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


def build(use: NetworkUse, sources: Sequence[str], precision: str) -> Network:
    """A network of a plan with random weights, prepared as for a GPU."""
    architecture, segment = use.weight.architecture, use.chunking.segment
    kind = types.type_of(architecture)
    graph = kind.file == "graph"
    stated = {**(PUBLISHED_GRAPH if graph else {}), **architecture}
    make = types.function(kind.stand_in)
    level = f"{make.__module__}.gain_to_level"  # which runs the network, to set a level that does not matter
    with mock.patch(level, return_value=torch.ones(())):
        module = make(stated, "roofline")
    network: Any = module
    if not graph:
        state = {name: tensor.float() for name, tensor in module.state_dict().items()}
        network = types.function(kind.build)(architecture, segment, state)
    network.accelerate(precisions.choose(precision, GPU, network.supported_dtypes))
    narrowed: Network = network.narrow(sources)
    return narrowed


@dataclass(frozen=True)
class Run:
    """One pass of a signal through a network: the kernels of a batch of windows."""

    network: str
    kernels: Sequence[Kernel]
    windows_per_second: float  # per second of audio
    batch: int

    def per_second(self, measure: Callable[[Kernel], float]) -> float:
        """A sum over kernels, per second of audio."""
        return sum(map(measure, self.kernels)) / self.batch * self.windows_per_second


def sizes_of(use: NetworkUse, sources: Sequence[str]) -> str:
    """A text that is the same for networks of the same sizes that estimate as many sources."""
    sizes = {key: value for key, value in use.weight.architecture.items() if key not in ("gflops", "sources")}
    return json.dumps(
        [sizes, len(use.sources), len(sources), use.chunking.length], sort_keys=True, default=list
    )


def count(plan: Plan, precision: str, batch: int = BATCH, networks: Sequence[str] = ()) -> list[Run]:
    """Count all runs of a plan's networks, or of some; networks of the same sizes are counted once."""
    names = benchmark.check_networks(plan, networks)
    used = plan.sources_used(plan.stems)
    known: dict[str, list[Kernel]] = {}
    runs = []
    for node, name in plan.runs(plan.stems).items():
        use = plan.networks[name]
        sizes = sizes_of(use, used[node])
        if name in names:
            if sizes not in known:
                known[sizes] = kernels(build(use, used[node], precision), batch, use.chunking.length)
            runs.append(Run(name, known[sizes], use.windows_per_second(plan.sample_rate), batch))
    return runs


def seconds(runs: Iterable[Run], card: Card) -> float:
    """Predicted seconds of work per second of audio."""
    return sum(run.per_second(lambda kernel: kernel.seconds(card)) for run in runs)


def shares(runs: Sequence[Run], card: Card) -> dict[str, float]:
    """The share of each group of kernels in the predicted time, and of launches."""
    total = seconds(runs, card)
    found: defaultdict[str, float] = defaultdict(float)
    for run in runs:
        for group in GROUPS:
            found[group] += run.per_second(lambda kernel: (kernel.group == group) * kernel.work(card))  # noqa: B023
        found["launches"] += run.per_second(lambda kernel: kernel.launches * LAUNCH)
    return {group: time / total for group, time in found.items()}


def row(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def totals(counted: Mapping[str, Sequence[Run]], cards: Iterable[Card]) -> Iterator[str]:
    """The lines of a table with one row per card and precision."""
    head = (
        "prediction",
        "precision",
        "seconds per second of audio",
        f"share of the limit of {TIME_FACTOR:g}",
    )
    yield row((*head, *GROUPS, "launches"))
    yield "|---" * (len(head) + len(GROUPS) + 1) + "|"
    for card in cards:
        for precision, runs in counted.items():
            time = seconds(runs, card)
            parts = (f"{share:.0%}" for share in shares(runs, card).values())
            yield row((card.name, precision, f"{time:.3g}", f"{time / TIME_FACTOR:.1%}", *parts))


def networks(counted: Mapping[str, Sequence[Run]], card: Card) -> Iterator[str]:
    """The lines of a table with one row per run of a network and precision."""
    head = ("prediction", "precision", "GFLOP per window", "GB", "FLOP per byte", "operations per batch")
    yield row((*head, f"ms per window, {card.name}", "seconds per second of audio"))
    yield "|---" * (len(head) + 2) + "|"
    for precision, runs in counted.items():
        for run in runs:
            flops = sum(each.flops for each in run.kernels) / run.batch
            moved = sum(each.moved for each in run.kernels) / run.batch
            time = seconds([run], card)
            cells = (
                f"{flops / 1e9:.0f}",
                f"{moved / 1e9:.2f}",
                f"{flops / moved:.0f}",
                f"{len(run.kernels)}",
            )
            window = f"{1e3 * time / run.windows_per_second:.3g}"
            yield row((f"`{run.network}`", precision, *cells, window, f"{time:.3g}"))


def measured_card(file: Path) -> Card:
    """The card of a report of ``python -m benchmarks.gpu``; raises :class:`KmdxError` if it is not one."""
    try:
        report = json.loads(file.read_text("utf-8"))
        peaks, name = report["peak_gflops"], Machine(**report["machine"]).name
        half = max(peaks.get(precision, 0.0) for precision in ("fp32", "fp16", "bf16"))
        bandwidth = 1e9 * report["gpu"]["copies"]["memory"]
        return Card(name, 1e9 * peaks["fp32"], 1e9 * half, bandwidth, f"measured, {file.name}")
    except (ValueError, KeyError, TypeError) as error:
        raise KmdxError(f"{file} is not a report of `python -m benchmarks.gpu`: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ensemble", nargs="?", default=DEFAULT_ENSEMBLE)
    parser.add_argument("--networks", nargs="+", default=(), help="names in the plan; by default all")
    parser.add_argument("--batch", type=int, default=BATCH, help="windows at once")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="also a card that benchmarks.gpu measured"
    )
    options = parser.parse_args(arguments)
    cards = (*CARDS, measured_card(options.measured)) if options.measured else CARDS
    plan = plan_file.load(options.ensemble)
    counted = {name: count(plan, name, options.batch, options.networks) for name in PRECISIONS}
    print(
        f"{plan.name}: a prediction from counted work, not a measurement; {options.batch} windows at once\n"
    )
    shown = cards[-1] if options.measured else CARDS[0]
    print(*totals(counted, cards), "", *networks(counted, shown), "", sep="\n")
    for card in cards:
        print(
            f"{card.name}: {card.single / 1e12:.3g} TFLOP/s in fp32, {card.half / 1e12:.3g} in half, "
            f"{card.bandwidth / 1e9:.4g} GB/s ({card.source})"
        )


if __name__ == "__main__":
    terminal.run(main, quiet=True)
