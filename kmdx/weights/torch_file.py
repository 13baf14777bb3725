"""Files that ``torch.save`` wrote, read as data: nothing that a file names is imported or called.

``torch.load`` allocates what a file declares and calls what its pickle names before it looks at the file's
size. Here sizes come first: the parts of a file are located and must be inside it, the pickle is read as
data, and a tensor is a view of the mapped file. Both of torch's formats are read: the zip archive and the
older sequence of pickles.

A pickle is a program for a small stack machine. ``pickletools`` of the standard library decodes its
instructions. :class:`_Machine` executes those that torch and ``pickle`` write for data and refuses all
others. Where a pickle would call a function, the result is a :class:`Call` with the function's name and
arguments. Memory and time are therefore bounded by the size of the pickle, which no reader that calls what
it finds can promise: ``bytearray(10**11)`` is nine bytes, and so is a huge tensor.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from kmdx.errors import Refused, shown

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

_MAX_PICKLE = 1 << 26  # bytes
_MAX_DIRECTORY = 1 << 23  # bytes of a zip archive's list of entries; 30,000 tensors need two
_MAX_AXES = 16
_MAX_NESTED = 4  # wrappers around a tensor, such as a parameter of a custom type
_LOCAL_HEADER = 30  # bytes, before the entry's name
_ENCRYPTED = 1  # flag of an entry
_FEW = 1000  # instructions of the first pickles of the older format
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older format
_ITEM_BYTES = {  # by the names of the storages' classes
    "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8,
    "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16, "QUInt8": 1, "QInt8": 1, "QInt32": 4, "Untyped": 1,
}  # fmt: skip
_DTYPES = {
    "Byte": "uint8", "Char": "int8", "Bool": "bool", "Short": "int16", "Half": "float16",
    "BFloat16": "bfloat16", "Int": "int32", "Float": "float32", "Long": "int64", "Double": "float64",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_REFUSED = {  # functions that rebuild tensors of kinds that no network here has
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "on torch's meta device, without values",
    "torch._utils._rebuild_nested_tensor": "nested",
}

_MAX_INSTRUCTIONS = 2_000_000  # about 45 for each tensor: enough for 13,600, with averages and momentum
_ALLOWED = re.compile(  # names in torch's own files; none is ever looked up
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
    """A pickle that is damaged, or contains something other than data."""

    def __init__(self, message: str = "its pickle is damaged") -> None:
        super().__init__(message)


class Name(str):
    """The dotted name of a class, function or constant."""

    __slots__ = ()


class Reference(NamedTuple):
    """What a pickle refers to outside itself: a storage, in torch's files."""

    identity: Any


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """A call of a function, in place of its result."""

    name: Name
    arguments: tuple[Any, ...]


class Pickle(NamedTuple):
    """The content of a pickle, which may contain itself, and everything outside of it that it refers to.

    Content is numbers, text, bytes, lists, tuples and dicts of Python, and :class:`Name`, :class:`Call` and
    :class:`Reference` for everything else.
    """

    content: Any
    references: list[Reference]


def is_tensor(value: Any) -> bool:
    """Whether a part of what was saved is a tensor of any kind."""
    return isinstance(value, Call) and value.name.startswith(
        ("torch._utils._rebuild", "torch._tensor._rebuild")
    )


@dataclass(frozen=True)
class TorchFile:
    """A file that ``torch.save`` wrote."""

    content: Any
    """What was saved, with a :class:`Call` for each tensor."""
    storages: Mapping[str, ndarray]  # the bytes of each storage, mapped from the file

    def tensor(self, call: Call) -> Tensor:
        """Return the tensor that a call rebuilds: a view of the mapped file, or a copy if it is not aligned.

        Raises :class:`ValueError` if it is of a kind that no network has, or extends beyond its storage.
        """
        for _ in range(_MAX_NESTED):
            match call.name, call.arguments:
                case (
                    "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                    (Call() as inner, *_),
                ):
                    call = inner
                case "torch._tensor._rebuild_from_type_v2", (Name() as function, _, tuple(arguments), *_):
                    call = Call(function, arguments)
                case (
                    "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                    (Reference(storage), offset, size, stride, *rest),
                ) if not any(rest[2:]):  # these flags mean that the stored values are changed
                    return self._view(storage, _dtype(storage), offset, size, stride)
                case (
                    "torch._utils._rebuild_tensor_v3",
                    (Reference(storage), offset, size, stride, _, _, Name() as dtype, *rest),
                ) if not any(rest):
                    return self._view(storage, dtype.removeprefix("torch."), offset, size, stride)
                case _:
                    break
        raise ValueError(f"is {_REFUSED.get(call.name, 'not a plain tensor')}")

    def _view(self, storage: Any, dtype: str, offset: Any, size: Any, stride: Any) -> Tensor:
        import torch

        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"has the unknown type {dtype}")
        _check_view(size, stride, offset)
        stored = self.storages[storage[2]]
        elements = len(stored) // kind.itemsize
        reach = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True)) + 1
        count = math.prod(size)
        if count > elements or (count and reach > elements):
            raise ValueError(f"declares {count:,} values, but the file has {elements:,} for it")
        if stored.ctypes.data % kind.itemsize:
            stored = stored.copy()
        values = torch.from_numpy(stored[: elements * kind.itemsize]).view(kind)
        return values.as_strided(size, stride, offset) if count else values.new_empty(size)


def read(path: Path) -> TorchFile:
    """Read a file that ``torch.save`` wrote.

    Raises
    ------
    Refused
        If its pickle would run code, or its entries are compressed.
    ValueError
        If it is damaged, or not such a file; the message is the reason.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return _read_zip(path)
    return _read_legacy(path)


class _DirectoryReader(io.FileIO):
    """A file from which ``zipfile`` reads a list of entries of bounded size, whatever size is declared."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"it declares {size:,} bytes")
        return super().read(_MAX_DIRECTORY if size is None or size < 0 else size)


def _read_zip(path: Path) -> TorchFile:
    memory = _mapped(path)
    entries = _entries(path, memory)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive, but not one of torch's: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and order.tobytes() != sys.byteorder.encode():
        raise ValueError(f"its numbers are in another byte order than this machine's, {sys.byteorder}")
    content = entries[pickles[0]]
    if len(content) > _MAX_PICKLE:
        raise PickleError(f"its pickle has {len(content):,} bytes")
    tree = read_pickle(io.BytesIO(content.tobytes()))
    storages = {}
    for reference in tree.references:
        key, needed = _storage(reference)
        storages[key] = entries.get(f"{root}data/{key}", content[:0])
        if len(storages[key]) < needed:
            raise ValueError(f"its storage {shown(key)} is missing or cut off")
    return TorchFile(tree.content, storages)


def _entries(path: Path, memory: ndarray) -> dict[str, ndarray]:
    """The bytes of each entry of a zip archive, which torch stores uncompressed."""
    try:
        with _DirectoryReader(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    # If damaged: BadZipFile, an unknown version, a name that is not UTF-8, a position before the file.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"its list of entries is damaged: {error}") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError("it is a TorchScript program: save the state dict of its network instead")
    found: dict[str, ndarray] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = shown(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused("is refused: its entries are compressed; expected a file as torch.save writes it")
        if entry.filename in found:
            raise ValueError(f"it has two entries with the name {name}")
        header = memory[entry.header_offset : entry.header_offset + _LOCAL_HEADER].tobytes()
        if entry.header_offset < end or not header.startswith(b"PK\x03\x04") or entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"its entry {name} is damaged")
        lengths = (
            int.from_bytes(header[at : at + 2], "little") for at in (26, 28)
        )  # of name and extra field
        start = entry.header_offset + _LOCAL_HEADER + sum(lengths)
        end = start + entry.file_size
        if end > len(memory):
            raise ValueError(f"its entry {name} is cut off")
        found[entry.filename] = memory[start:end]
    return found


def _read_legacy(path: Path) -> TorchFile:
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(_MAX_PICKLE))
    if [read_pickle(stream, _FEW).content for _ in range(2)] != [_MAGIC, _PROTOCOL]:
        raise ValueError("it is a pickle, but not one that torch.save wrote")
    match read_pickle(stream, _FEW).content:
        case {"little_endian": bool(little)} if little == (sys.byteorder == "little"):
            pass
        case _:
            raise ValueError(f"its numbers are in another byte order than this machine's, {sys.byteorder}")
    tree = read_pickle(stream)
    keys = read_pickle(stream).content
    if not isinstance(keys, list):
        raise PickleError
    return TorchFile(tree.content, _storages_in_turn(_mapped(path), stream.tell(), keys, tree.references))


def _storages_in_turn(
    memory: ndarray, position: int, keys: Iterable[Any], references: Iterable[Reference]
) -> dict[str, ndarray]:
    """The storages of the older format from a position on, each preceded by its number of elements."""
    sizes: dict[str, int] = {}
    items: dict[str, int] = {}
    for reference in references:
        key, sizes[key] = _storage(reference)
        items[key] = _ITEM_BYTES[_kind(reference.identity)]
    storages: dict[str, ndarray] = {}
    for key in keys:
        if not isinstance(key, str) or key not in sizes or key in storages:
            raise ValueError("its list of storages is damaged")
        elements = int.from_bytes(memory[position : position + 8].tobytes(), "little")
        start, position = position + 8, position + 8 + elements * items[key]
        if elements * items[key] != sizes[key] or position > len(memory):
            raise ValueError(f"its storage {shown(key)} is cut off")
        storages[key] = memory[start:position]
    if storages.keys() != sizes.keys():
        raise ValueError("some of its storages are missing")
    return storages


def _storage(reference: Reference) -> tuple[str, int]:
    """Key and bytes of a storage."""
    match reference.identity:
        case ("storage", Name(), str(key), str() | bytes(), int(elements)) | (
            "storage", Name(), str(key), str() | bytes(), int(elements), None,
        ) if 0 <= elements < 2**48:  # fmt: skip
            return key, elements * _ITEM_BYTES[_kind(reference.identity)]
    raise PickleError


def _kind(identity: Any) -> str:
    """``Half`` of a storage whose class is ``torch.HalfStorage``."""
    kind = identity[1].rpartition(".")[2].removesuffix("Storage")
    if kind not in _ITEM_BYTES:
        raise PickleError(f"its pickle has the unknown type {shown(identity[1])}")
    return kind


def _dtype(identity: Any) -> str:
    kind = _kind(identity)
    if kind not in _DTYPES:
        raise ValueError("is quantized" if kind.startswith("Q") else "has no type")
    return _DTYPES[kind]


def _check_view(size: Any, stride: Any, offset: Any) -> None:
    """Check that size, stride and offset are whole numbers and describe the same axes."""
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_AXES
    if not (
        shaped
        and isinstance(offset, int)
        and all(isinstance(number, int) and 0 <= number < 2**48 for number in (*size, *stride, offset))
        and math.prod(max(1, number) for number in size) < 2**48  # also if one of them is 0
    ):
        raise ValueError("has a shape that is damaged")


def _mapped(path: Path) -> ndarray:
    """The bytes of a file, mapped copy on write."""
    import numpy as np

    return np.asarray(np.memmap(path, np.uint8, "c"))


def read_pickle(stream: BinaryIO, most: int = _MAX_INSTRUCTIONS) -> Pickle:
    """Read one pickle of at most ``most`` instructions, and leave the stream after its end.

    Raises
    ------
    PickleError
        If it is damaged or longer.
    Refused
        If it names a function or class that no file of tensors needs.
    """
    machine = _Machine()
    instructions = pickletools.genops(stream)
    for _ in range(most):
        try:
            code, argument, _ = next(instructions)
        except (ValueError, StopIteration) as error:  # what pickletools raises if damaged
            raise PickleError from error
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
        """Execute one instruction."""
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
        """Remove and return the topmost value."""
        return self.take(1)[0]

    def top(self, kind: type | None = None) -> Any:
        """The topmost value, which must be of this type."""
        if not self.stack or not (kind is None or isinstance(self.stack[-1], kind)):
            raise PickleError
        return self.stack[-1]

    def take(self, count: int) -> list[Any]:
        """Remove and return ``count`` values from the top, the topmost last."""
        if len(self.stack) < count:
            raise PickleError
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def take_marked(self) -> list[Any]:
        """Remove and return everything above the last mark."""
        if not self.marked:
            raise PickleError
        taken, self.stack = self.stack, self.marked.pop()
        return taken

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def tuple(self, _: Any) -> None:
        values = self.take_marked()  # this restores the stack below
        self.stack.append(tuple(values))

    def new_dict(self, _: Any) -> None:
        self.stack.append({})

    def new_list(self, _: Any) -> None:  # also for a set, which would hash its elements
        self.stack.append([])

    def put(self, index: Any) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError
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
            raise PickleError
        self.stack.append(_called(function, arguments))

    def build(self, _: Any) -> None:  # attributes of an object, which data does not need
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
    """Put alternating keys and values into a dict.

    Hashing a nested tuple can take forever, so keys are only text and small numbers.
    """
    if len(values) % 2:
        raise PickleError
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
    """The result of a call: its value where that copies nothing, else a :class:`Call`."""
    match function, arguments:
        case ("collections.OrderedDict", ()) | ("collections.defaultdict", (Name(),) | ()):
            return {}
        case "collections.deque", _:
            return []
        case "torch.Size", (tuple(sizes),):
            return sizes
    return Call(function, arguments)
