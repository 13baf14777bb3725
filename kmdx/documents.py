"""YAML and JSON that users write, read within bounds.

A document is data of six kinds: mappings, lists, texts, numbers, truth values and nothing. Its size, its
depth and its number of nodes are bounded, where an alias counts as much as what it stands for. Whatever
is in the text, the only error is a :class:`~kmdx.errors.DocumentError`, of one line.

YAML is version 1.1 as PyYAML reads it, but for what surprises: dates are texts, a key that is given twice
is an error, and so are numbers that versions 1.1 and 1.2 read differently (``010``, ``1:30``).
"""

from __future__ import annotations

import inspect
import io
import json
import math
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.reader import Reader
from yaml.resolver import Resolver

from kmdx.errors import DocumentError, quoted, shown, suggest

T = TypeVar("T")

MAX_BYTES = 2**20  # leaderboard C has 2,833
MAX_NODES = 25_000  # leaderboard C has 315
MAX_DEPTH = 50  # leaderboard C has 5
MAX_JSON_BYTES = 2**24
BIGGEST = 2**63  # whole numbers are below it
MAX_KEY = 201  # bytes of a key that becomes a name: two names of 100 bytes and a dot between them

_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float")}
_MERGE = f"{_TAG}merge"
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*:.*")  # octal and sexagesimal in YAML 1.1, not so in 1.2


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Read a text file of at most ``limit`` bytes: UTF-8, with any line ends, which become Unix's.

    Raises
    ------
    DocumentError
        If it is missing, no regular file, larger, or in another encoding; does not name the path.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):  # a pipe would block, a device has no end
            with path.open("rb") as file:
                content = file.read(limit + 1)
    except OSError as error:
        raise DocumentError(error.strerror or str(error)) from error
    except ValueError as error:  # a path with a null character
        raise DocumentError(f"not a path of a file: {error}") from error
    if not stat.S_ISREG(mode):
        raise DocumentError(f"a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}, expected a file")
    if len(content) > limit:
        raise DocumentError(f"larger than {limit} bytes, the most that is read")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DocumentError("text in UTF-16 or UTF-32: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DocumentError(
            f"not a text file in UTF-8 (line {line} has the byte 0x{error.object[error.start]:02x}): "
            "save it as UTF-8"
        ) from error
    return io.StringIO(text, newline=None).read()


def read_yaml(path: Path, limit: int = MAX_BYTES, nodes: int = MAX_NODES) -> Any:
    """Read a YAML file as plain values.

    Raises
    ------
    DocumentError
        As for :func:`read_text` and :func:`compose`.
    """
    return load_yaml(read_text(path, limit), nodes)


def load_yaml(text: str, nodes: int = MAX_NODES) -> Any:
    """Return the plain values of a YAML text, ``None`` where it is empty; errors as for :func:`compose`."""
    root = compose(text, nodes)
    return None if root is None else value(root)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file as plain values.

    Raises
    ------
    DocumentError
        As for :func:`read_text`, or if it is no JSON, or nested too deeply for Python.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error.msg}", error.lineno) from error
    except ValueError as error:  # a number of thousands of digits
        raise DocumentError("not JSON that can be read: a number is too large") from error
    except RecursionError as error:
        raise DocumentError("not JSON that can be read: nested too deeply") from error


def parse(text: str) -> YamlPart:
    """Return the root of a YAML text; errors as for :func:`compose`, and where the text is empty."""
    root = compose(text)
    if root is None:
        raise DocumentError("the file is empty")
    return YamlPart(root)


def compose(text: str, nodes: int = MAX_NODES) -> yaml.Node | None:
    """Return the root of a YAML text's graph of nodes, ``None`` where the text is empty.

    Merges (``<<``) are done. Keys are scalars, each given once.

    Raises
    ------
    DocumentError
        If the text is no YAML of one document, is too large, too deep or of too many nodes.
    """
    if len(text) > MAX_BYTES:
        raise DocumentError(f"longer than {MAX_BYTES} characters, the most that is read")
    if found := Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise DocumentError(f"not YAML: the character {quoted(found[0])} is not allowed", line)
    try:
        return _Composer(text, nodes).get_single_node()
    except yaml.YAMLError as error:
        raise _failure(error) from error


@dataclass(frozen=True)
class Number:
    """Annotates numbers from ``low`` and below ``high``: ``Annotated[int, Number(1, 9)]`` for whole ones."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: type, handler: Any) -> Any:
        """What pydantic checks such a number with."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(partial(self.check, source))

    def check(self, kind: type, value: Any) -> float:
        """Return a value as such a number; raise :class:`ValueError` if it is none."""
        if isinstance(value, dict | list):
            raise ValueError("expected a number, not a mapping or list")
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)  # 1e-3, which is a text in YAML 1.1
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("expected a number")
        if not self.low <= value < self.high or (kind is int and value != int(value)):
            whole = "whole " if kind is int else ""
            raise ValueError(f"expected a {whole}number from {self.low:.9g} and below {self.high:.9g}")
        return int(value) if kind is int else value


@dataclass(frozen=True)
class YamlPart:
    """A part of a YAML document, which knows its line and its key.

    Attributes
    ----------
    node : yaml.Node
        A node of the graph that :func:`compose` returns.
    keys : tuple
        The keys and positions that lead to it.
    """

    node: yaml.Node
    keys: tuple[str | int, ...] = ()

    def below(self, *keys: str | int) -> YamlPart:
        """Return the part that keys lead to from here, as far as it exists."""
        node = self.node
        for key in keys:
            found = dict(_children(node))
            if key not in found:
                break
            node = found[key]
        return YamlPart(node, (*self.keys, *keys))

    def error(self, problem: str, *below: str | int) -> DocumentError:
        """Return an error that names the line and the key of this part, or of what is below it."""
        part = self.below(*below)
        where = ".".join(map(shown, part.keys))
        return DocumentError(f"{where}: {problem}" if where else problem, part.node.start_mark.line + 1)

    def entries(self, allowed: Collection[str] = ()) -> dict[str, YamlPart]:
        """Return the parts of a mapping by their keys.

        Raises
        ------
        DocumentError
            If it is no mapping, or a key is not allowed, not printable or longer than :data:`MAX_KEY`.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("expected a mapping of names to values")
        for node, _ in self.node.value:
            name, place = node.value, YamlPart(node, self.keys)
            if not name.isprintable() or not 0 < len(name.encode()) <= MAX_KEY:
                raise place.error(f"{quoted(name)} is no name of 1 to {MAX_KEY} bytes")
            if allowed and name not in allowed:
                known = ", ".join(sorted(allowed))
                raise place.error(f"unknown key {quoted(name)}{suggest(name, allowed)}; allowed: {known}")
        return {str(name): YamlPart(node, (*self.keys, name)) for name, node in _children(self.node)}

    def elements(self) -> list[YamlPart]:
        """Return the parts of a list; raises :class:`DocumentError` if it is none."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("expected a list")
        return [YamlPart(node, (*self.keys, place)) for place, node in _children(self.node)]

    def text(self) -> str:
        """Return a scalar as it is written: ``1:30`` is a text where a text is expected."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error("expected a text")
        return str(self.node.value).strip()

    def plain(self) -> Any:
        """Return plain values; raises :class:`DocumentError` where one cannot be read."""
        if self.node.tag == f"{_TAG}map":
            return {name: part.plain() for name, part in self.entries().items()}
        if self.node.tag == f"{_TAG}seq":
            return [part.plain() for part in self.elements()]
        try:
            return value(self.node)
        except DocumentError as error:
            raise self.error(f"cannot be read: {error.problem}") from error

    def read(self, target: Callable[..., T], *given: Any, **known: Any) -> T:
        """Call a class or function with the entries of a mapping as its keyword arguments.

        Parameters
        ----------
        target : callable
            Its annotations show what is expected: texts, :class:`YamlPart` for what it reads itself, and
            whatever else pydantic can check.
        *given
            Arguments that do not come from the document; they are the first.
        **known
            Further arguments, which replace what the document has for them.

        Raises
        ------
        DocumentError
            If a key is unknown or missing, a value is not what is expected, or the target raises
            :class:`ValueError`.
        """
        function = getattr(target, "__func__", target)
        taken = len(given) + (function is not target)  # with what a method is bound to
        expected = dict([*_parameters(function).items()][taken:])
        entries = self.entries(expected)
        for name, parameter in expected.items():
            if parameter.default is parameter.empty and name not in {**entries, **known}:
                raise self.error(f"the key {name!r} is missing")
        arguments: dict[str, Any] = dict(known)
        for name, part in entries.items():
            if name in known:
                continue
            kind = expected[name].annotation
            if get_origin(kind) is UnionType:  # with None, for a key that may be left out
                (kind,) = set(get_args(kind)) - {NoneType}
            if kind is YamlPart:
                arguments[name] = part
            else:
                arguments[name] = part.text() if kind is str else checked(kind, part.plain(), part)
        try:
            return target(*given, **arguments)
        except DocumentError:
            raise
        except ValueError as error:
            raise self.error(str(error)) from error


def checked(kind: Callable[..., T], value: Any, part: YamlPart | None = None) -> T:
    """Return plain values as what pydantic makes of them; ``part`` is where they are from.

    Raises
    ------
    DocumentError
        If they are not what is expected; names the first wrong key and, with a part, its line.
    """
    from pydantic import ValidationError

    try:
        result: T = _adapter(kind).validate_python(value)
        return result
    except ValidationError as error:
        first = error.errors()[0]
    keys, found, problem = first["loc"], first["input"], first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    if first["type"] in ("dict_type", "model_type"):
        problem = "expected a mapping of names to values"
    node = part.below(*keys).node if part else None
    if isinstance(node, yaml.ScalarNode) and (isinstance(found, bool) or found is None or found != found):
        found = node.value  # as it is written
    if (keys or part) and not isinstance(found, dict) and ", not " not in problem:
        problem += f", not {quoted(found)}"
    if part:
        raise part.error(problem, *keys)
    raise DocumentError(": ".join(filter(None, (".".join(map(shown, keys)), problem))))


@cache
def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target, eval_str=True).parameters


@cache
def _adapter(kind: Any) -> Any:
    """What checks values of a kind: a pydantic model by its own rules, anything else strictly."""
    from pydantic import BaseModel, TypeAdapter

    is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
    return TypeAdapter(kind, config=None if is_model else {"strict": True})


def _children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node]]:
    """What a mapping or list contains, by key or position."""
    if isinstance(node, yaml.MappingNode):
        yield from ((key.value, value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)


def value(node: yaml.Node) -> Any:
    """Return what a node of :func:`compose` stands for, as plain values.

    Raises
    ------
    DocumentError
        If it, or a part of it, has a tag of another kind or is not what its tag says.
    """
    try:
        return _Values().construct_document(node)
    except ConstructorError as error:
        raise _failure(error) from error


def _failure(error: yaml.YAMLError) -> DocumentError:
    """What a reader of YAML complains of, in one line."""
    if isinstance(error, _Problem):
        return DocumentError(error.message, error.mark.line + 1)
    if isinstance(error, yaml.MarkedYAMLError):
        reason = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
    else:
        reason, mark = getattr(error, "reason", str(error)), None
    short = " ".join(reason.split())[:200]
    return DocumentError(f"not YAML: {short}", None if mark is None else mark.line + 1)


class _Plain(Resolver):
    """Which plain scalars are no texts: as in YAML 1.1, but for dates and ``=``."""


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in {*_SCALARS, _MERGE}]
    for first, resolvers in Resolver.yaml_implicit_resolvers.items()
}


class _Problem(ConstructorError):
    """What is wrong with a node."""

    def __init__(self, message: str, mark: Any) -> None:
        super().__init__(None, None, message, mark)
        self.message = message
        self.mark = mark


class _Values(_Plain, SafeConstructor):
    """Makes plain values of nodes."""

    def __init__(self) -> None:
        _Plain.__init__(self)
        SafeConstructor.__init__(self)

    def scalar(self, node: yaml.Node) -> Any:
        """A number, truth value or nothing, if that is what the text would be without its tag."""
        kind, text = node.tag.removeprefix(_TAG), node.value
        if not isinstance(node, yaml.ScalarNode):
            raise _Problem(f"expected {kind}, not a mapping or list", node.start_mark)
        natural = self.resolve(yaml.ScalarNode, text, (True, False)).removeprefix(_TAG)
        if text.endswith("\n") or (natural != kind and (natural, kind) != ("int", "float")):
            raise _Problem(f"{quoted(text)} is no {kind}", node.start_mark)
        if kind in ("int", "float") and _AMBIGUOUS.fullmatch(text):
            raise _Problem(
                f"{quoted(text)} is read in two ways: write it in decimal, or in quotes", node.start_mark
            )
        try:
            number = getattr(self, f"construct_yaml_{kind}")(node)
        except ValueError as error:  # 0x_, thousands of digits, or a float in another base than 10
            raise _Problem(f"{quoted(text)} is no number that can be read", node.start_mark) from error
        if kind == "int" and abs(number) >= BIGGEST:
            raise _Problem(f"{quoted(text)} is too large a number", node.start_mark)
        return number

    def other(self, node: yaml.Node) -> Any:
        """What has any other tag."""
        tag = quoted(node.tag.replace(_TAG, "!!", 1))
        raise _Problem(f"the tag {tag} has no meaning here", node.start_mark)


_Values.yaml_constructors = {
    **dict.fromkeys(_SCALARS, _Values.scalar),
    f"{_TAG}str": SafeConstructor.construct_yaml_str,
    f"{_TAG}seq": SafeConstructor.construct_yaml_seq,
    f"{_TAG}map": SafeConstructor.construct_yaml_map,
    None: _Values.other,
}


class _SlowEvents(Reader, yaml.scanner.Scanner, yaml.parser.Parser):
    """The events of a text, where PyYAML was built without libyaml."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)


# Of libyaml the events alone: its own composer calls itself in C, as deep as a text wants.
_Events: Any = vars(yaml.cyaml)["CParser"] if yaml.__with_libyaml__ else _SlowEvents


class _Composer(Composer, _Events, _Values):
    """Puts nodes together from events, and counts them."""

    def __init__(self, text: str, most: int) -> None:
        _Events.__init__(self, text)
        Composer.__init__(self)
        _Values.__init__(self)
        self.most = most
        self.count = self.depth = 0
        self.sizes: dict[int, int] = {}  # nodes below each node, itself included, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """The next node; an alias counts as what it stands for."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _Problem("an anchor that holds itself", event.start_mark)
            self.counted(self.sizes[id(node)], event.start_mark)
            return node
        if self.depth == MAX_DEPTH:
            raise _Problem(f"more than {MAX_DEPTH} levels deep", event.start_mark)
        before = self.count
        self.counted(1, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.sizes[id(node)] = self.count - before
        return node

    def counted(self, nodes: int, mark: Any) -> None:
        """Count nodes that are there once more."""
        self.count += nodes
        if self.count > self.most:
            raise _Problem(f"more than {self.most} values, aliases written out", mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping with its merges done."""
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Problem(f"a {key.id} as a key: expected a name", key.start_mark)
            if key.value in keys:
                raise _Problem(f"the key {quoted(key.value)} is there twice", key.start_mark)
            keys.add(key.value)
        self.flatten_mapping(node)
        node.value = [*{key.value: (key, value) for key, value in node.value}.values()]
        return node
