"""Torch's two file formats, the zip archive and the older sequence of pickles, read without torch's loader.

``torch.load`` allocates what a file declares, and calls what its pickle names, before it looks at the
file's size. Here sizes come first: the parts of a file are located and must lie in it, the pickle is read
as data (:mod:`kmdx.weights.pickled`), and a tensor is a view into the mapped file.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx.errors import shown
from kmdx.weights import pickled
from kmdx.weights.pickled import Call, Name, PickleError, Reference, Refused

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

_MAX_PICKLE = 1 << 26  # bytes
_MAX_DIRECTORY = 1 << 23  # bytes of a zip archive's list of entries; 10,000 tensors need one
_MAX_AXES = 16
_MAX_NESTED = 4  # a parameter of a type of its own, and the tensor that it is
_LOCAL_HEADER = 30  # bytes, before the entry's name
_ENCRYPTED = 1  # flag of an entry
_FEW = 1000  # instructions of the pickles that come first in the older format
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
_REFUSED = {  # what rebuilds the tensors that no network here has
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "on torch's meta device, without values",
    "torch._utils._rebuild_nested_tensor": "nested",
}


def is_tensor(value: Any) -> bool:
    """Whether a part of what was saved is a tensor, of whatever kind."""
    return isinstance(value, Call) and value.name.startswith(
        ("torch._utils._rebuild", "torch._tensor._rebuild")
    )


@dataclass(frozen=True)
class TorchFile:
    """A file that ``torch.save`` wrote.

    Attributes
    ----------
    content
        What was saved, with a :class:`~kmdx.weights.pickled.Call` for each tensor.
    storages : mapping of str to ndarray
        The bytes of each storage, mapped from the file.
    """

    content: Any
    storages: Mapping[str, ndarray]

    def tensor(self, call: Call) -> Tensor:
        """The tensor that a call rebuilds: a view into the mapped file, or a copy where that is not aligned.

        Raises
        ------
        ValueError
            If it is of a kind that no network has, or reaches beyond its storage.
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
                ) if not any(rest[2:]):  # the last are flags, which say that values are not those stored
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
        If it is damaged, or no such file; the message is the reason.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return _read_zip(path)
    return _read_legacy(path)


class _DirectoryReader(io.FileIO):
    """The file that ``zipfile`` reads a list of entries from, however long the file says that the list is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"it says to have {size:,} bytes")
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
    tree = pickled.read(io.BytesIO(content.tobytes()))
    storages = {}
    for reference in tree.references:
        key, needed = _storage(reference)
        storages[key] = entries.get(f"{root}data/{key}", content[:0])
        if len(storages[key]) < needed:
            raise ValueError(f"its storage {shown(key)} is missing or cut off")
    return TorchFile(tree.content, storages)


def _entries(path: Path, memory: ndarray) -> dict[str, ndarray]:
    """The bytes of each entry of a zip archive, which torch stores as they are."""
    try:
        with _DirectoryReader(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    # A damaged list: BadZipFile, an unknown version, a name that is not UTF-8, a place before the file.
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
    if [pickled.read(stream, _FEW).content for _ in range(2)] != [_MAGIC, _PROTOCOL]:
        raise ValueError("it is a pickle, but not one that torch.save wrote")
    match pickled.read(stream, _FEW).content:
        case {"little_endian": bool(little)} if little == (sys.byteorder == "little"):
            pass
        case _:
            raise ValueError(f"its numbers are in another byte order than this machine's, {sys.byteorder}")
    tree = pickled.read(stream)
    keys = pickled.read(stream).content
    if not isinstance(keys, list):
        raise PickleError("its pickle is damaged")
    return TorchFile(tree.content, _storages_in_turn(_mapped(path), stream.tell(), keys, tree.references))


def _storages_in_turn(
    memory: ndarray, position: int, keys: Iterable[Any], references: Iterable[Reference]
) -> dict[str, ndarray]:
    """The storages of the older format, each behind its number of elements, from a position on."""
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
    raise PickleError("its pickle is damaged")


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
    """Sizes, steps and offset of a tensor are whole numbers, and as many of the one as of the other."""
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_AXES
    if not (
        shaped
        and isinstance(offset, int)
        and all(isinstance(number, int) and 0 <= number < 2**48 for number in (*size, *stride, offset))
        and math.prod(max(1, number) for number in size) < 2**48  # also where one of them is 0
    ):
        raise ValueError("has a shape that is damaged")


def _mapped(path: Path) -> ndarray:
    """The bytes of a file, read when they are needed; what is written to them stays in memory."""
    import numpy as np

    return np.asarray(np.memmap(path, np.uint8, "c"))
