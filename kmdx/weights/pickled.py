"""Pickles of torch's weight files read as data: nothing that a pickle names is imported or called.

A pickle is a program for a small stack machine. ``pickletools`` of the standard library decodes its
instructions; this module carries out those that torch and ``pickle`` write for data, and refuses the
others. Where a pickle would call a function, the result is a :class:`Call`, which holds the name of the
function and its arguments. So memory and time are bounded by the size of the pickle, which no reader that
calls what it finds can promise: ``bytearray(10**11)`` is nine bytes, and so is a huge tensor.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from kmdx.errors import shown

MAX_INSTRUCTIONS = 500_000  # about 45 for each tensor: 2,000 of them with averages and an optimizer fit
_ALLOWED = re.compile(  # names that torch's own files hold; none is ever looked up
    r"collections\.(OrderedDict|Counter|defaultdict|deque)|_codecs\.encode|fractions\.Fraction"
    r"|pathlib\.\w*Path|datetime\.(datetime|date|time|timedelta|timezone)|argparse\.Namespace|uuid\.UUID"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)|numpy\.dtypes\.\w+"  # best scores
    r"|(builtins|__builtin__)\.(set|frozenset|bytearray|complex|list|dict|tuple|int|float|str|bool)"
    r"|demucs\.(htdemucs\.HTDemucs|hdemucs\.HDemucs)"
    r"|torch\.nn\.parameter\.Parameter|torch\.(Size|Tensor|device)|torch\.serialization\._get_layout"
    r"|torch\.(storage\.)?\w+Storage|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.(q?u?int\d+(x\d+)?|b?float\d\w*|complex\d+|bool|per_(tensor|channel)_\w+)"
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
})  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME")


class PickleError(ValueError):
    """A pickle that is damaged, or holds something else than data."""


class Refused(ValueError):
    """A file that is whole and yet cannot be used; the message goes on after the file's name."""


class Name(str):
    """The dotted name of a class, function or constant."""

    __slots__ = ()


class Reference(NamedTuple):
    """What a pickle refers to outside of itself: a storage, in torch's files."""

    identity: Any


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """What a function would have made of its arguments."""

    name: Name
    arguments: tuple[Any, ...]


@dataclass
class Pickle:
    """What a pickle holds.

    Attributes
    ----------
    content
        Numbers, text, bytes, lists, tuples and dicts of Python; :class:`Name`, :class:`Call` and
        :class:`Reference` for the rest. It may contain itself.
    references : list of Reference
        All that it refers to.
    """

    content: Any = None
    references: list[Reference] = field(default_factory=list)


def read(stream: BinaryIO, most: int = MAX_INSTRUCTIONS) -> Pickle:
    """Read one pickle, and leave the stream behind it.

    Raises
    ------
    PickleError
        If it is damaged, or has more than so many instructions.
    Refused
        If it names a function or class that no file of tensors needs.
    """
    machine = _Machine()
    instructions = pickletools.genops(stream)
    for _ in range(most):
        try:
            code, argument, _ = next(instructions)
        except (ValueError, StopIteration) as error:  # all that pickletools raises of damaged instructions
            raise PickleError("its pickle is damaged") from error
        if code.name == "STOP":
            return Pickle(machine.pop(), machine.references)
        machine.step(code.name, argument)
    raise PickleError(f"its pickle has more than {most:,} instructions")


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.references: list[Reference] = []

    def step(self, code: str, argument: Any) -> None:
        """Carry out one instruction."""
        if code in _LITERALS:
            self.stack.append(argument)
        elif code in _CONSTANTS:
            self.stack.append(_CONSTANTS[code])
        elif code in _TUPLES:
            self.stack.append(tuple(self.take(_TUPLES[code])))
        elif code in _STEPS:
            _STEPS[code](self, argument)
        elif code not in _IGNORED:
            raise PickleError(f"its pickle has the instruction {code}, which torch's files do not have")

    def pop(self) -> Any:
        """Remove and return what is on top."""
        return self.take(1)[0]

    def top(self, kind: type | None = None) -> Any:
        """What is on top, which must be of this type."""
        if not self.stack or not (kind is None or isinstance(self.stack[-1], kind)):
            raise PickleError("its pickle is damaged")
        return self.stack[-1]

    def take(self, count: int) -> list[Any]:
        """Remove and return that many values from the top, the topmost last."""
        if len(self.stack) < count:
            raise PickleError("its pickle is damaged")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def take_marked(self) -> list[Any]:
        """Remove and return all that is above the last mark."""
        if not self.marked:
            raise PickleError("its pickle is damaged")
        taken, self.stack = self.stack, self.marked.pop()
        return taken

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def tuple(self, _: Any) -> None:
        values = self.take_marked()  # which brings back the stack below
        self.stack.append(tuple(values))

    def new_dict(self, _: Any) -> None:
        self.stack.append({})

    def new_list(self, _: Any) -> None:  # a set, too: nothing here needs one, and it would hash what it holds
        self.stack.append([])

    def put(self, index: Any) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError("its pickle is damaged")
        self.stack.append(self.memo[index])

    def append(self, _: Any) -> None:
        value = self.pop()
        self.top(list).append(value)

    def extend(self, _: Any) -> None:
        values = self.take_marked()
        self.top(list).extend(values)

    def set_item(self, _: Any) -> None:
        pair = self.take(2)
        _fill(self.top(dict), pair)

    def set_items(self, _: Any) -> None:
        values = self.take_marked()
        _fill(self.top(dict), values)

    def name(self, argument: str) -> None:
        self.stack.append(_checked_name(argument.replace(" ", ".", 1)))

    def stacked_name(self, _: Any) -> None:
        self.stack.append(_checked_name(".".join(map(str, self.take(2)))))

    def call(self, _: Any) -> None:
        function, arguments = self.take(2)
        if not (isinstance(function, Name) and isinstance(arguments, tuple)):
            raise PickleError("its pickle is damaged")
        self.stack.append(_called(function, arguments))

    def build(self, _: Any) -> None:  # attributes of an object: of no use for data
        self.pop()
        self.top()

    def refer(self, _: Any) -> None:
        reference = Reference(self.pop())
        self.references.append(reference)
        self.stack.append(reference)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple,
    "EMPTY_DICT": _Machine.new_dict,
    "EMPTY_LIST": _Machine.new_list,
    "EMPTY_SET": _Machine.new_list,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stacked_name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.refer,
}


def _fill(target: dict[Any, Any], values: Sequence[Any]) -> None:
    """Put keys and values, by turns, into a dict.

    The hash of a tuple takes as long as the tuple is deep and wide, so keys are text and small numbers only.
    """
    if len(values) % 2:
        raise PickleError("its pickle is damaged")
    for key, value in zip(values[::2], values[1::2], strict=True):
        number = isinstance(key, int | float) and abs(key) < 2**63
        if not (number or key is None or isinstance(key, str | bytes)):
            raise PickleError("its pickle has a dict whose keys are neither text nor numbers")
        target[key] = value


def _checked_name(name: str) -> Name:
    if not _ALLOWED.fullmatch(name):
        raise Refused(
            f"is refused: it is a pickle that could run code (it refers to {shown(name)}); "
            "save the state dict alone"
        )
    return Name(name)


def _called(function: Name, arguments: tuple[Any, ...]) -> Any:
    """What a call gives; only calls that copy nothing are more than noted."""
    match function, arguments:
        case ("collections.OrderedDict", ()) | ("collections.defaultdict", (Name(),) | ()):
            return {}
        case "collections.deque", _:
            return []
        case "torch.Size", (tuple(sizes),):
            return sizes
    return Call(function, arguments)
