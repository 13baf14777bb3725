"""Read YAML and JSON from users, with limits.

A document consists of mappings, lists, strings, numbers, booleans and null. Its size, depth and number of
nodes are limited; an alias counts as much as the nodes it refers to. Whatever the text contains, the only
error is a :class:`~kmdx.errors.DocumentError` with a one-line message.

YAML is version 1.1 as PyYAML reads it, with three exceptions: dates are strings, duplicate keys are errors,
and so are numbers that versions 1.1 and 1.2 read differently (``010``, ``1:30``).
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
BIGGEST = 2**63  # integers must be below it
MAX_KEY = 201  # bytes of a key: two names of 100 bytes with a dot between them

_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float")}
_MERGE = f"{_TAG}merge"
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*:.*")  # octal and sexagesimal in YAML 1.1, but not in 1.2


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    r"""Read a UTF-8 text file of at most ``limit`` bytes; all line ends become ``\n``.

    Raises :class:`DocumentError` if it is missing, too large, not a regular file or not UTF-8. The message
    does not name the path.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):  # reading a pipe could block, and a device may have no end
            with path.open("rb") as file:
                content = file.read(limit + 1)
    except OSError as error:
        raise DocumentError(error.strerror or str(error)) from error
    except ValueError as error:  # a path with a null character
        raise DocumentError(f"not a valid path: {error}") from error
    if not stat.S_ISREG(mode):
        found = "folder" if stat.S_ISDIR(mode) else "device or pipe"
        raise DocumentError(f"expected a file, found a {found}")
    if len(content) > limit:
        raise DocumentError(f"larger than the limit of {limit} bytes")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DocumentError("expected UTF-8, found UTF-16 or UTF-32: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DocumentError(
            f"expected UTF-8, found the byte 0x{error.object[error.start]:02x} in line {line}: "
            "save it as UTF-8"
        ) from error
    return io.StringIO(text, newline=None).read()


def read_yaml(path: Path, limit: int = MAX_BYTES, nodes: int = MAX_NODES) -> Any:
    """Read a YAML file as plain values.

    Raises :class:`DocumentError` as for :func:`read_text` and :func:`compose`.
    """
    return load_yaml(read_text(path, limit), nodes)


def load_yaml(text: str, nodes: int = MAX_NODES, tuples: bool = False) -> Any:
    """Return the plain values of a YAML text, ``None`` if it is empty; errors as for :func:`compose`.

    With ``tuples``, Python's tag for tuples is supported, too; they become lists.
    """
    root = compose(text, nodes)
    return None if root is None else value(root, tuples)


def read_json(path: Path) -> Any:
    """Read a JSON file as plain values.

    Raises :class:`DocumentError` as for :func:`read_text`, or if it is not JSON or is nested too deeply for
    Python.
    """
    text = read_text(path, MAX_JSON_BYTES)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(f"not valid JSON: {error.msg}", error.lineno) from error
    except ValueError as error:  # a number with thousands of digits
        raise DocumentError("the JSON cannot be read: a number is too large") from error
    except RecursionError as error:
        raise DocumentError("the JSON cannot be read: it is nested too deeply") from error


def parse(text: str) -> YamlPart:
    """Return the root of a YAML text; errors as for :func:`compose`, and if the text is empty."""
    root = compose(text)
    if root is None:
        raise DocumentError("the file is empty")
    return YamlPart(root)


def compose(text: str, nodes: int = MAX_NODES) -> yaml.Node | None:
    """Return the root of a YAML text's graph of nodes, ``None`` if the text is empty.

    Merges (``<<``) are resolved. Keys are scalars without duplicates. Raises :class:`DocumentError` if the
    text is not a single YAML document, is too large or too deep, or has too many nodes.
    """
    if len(text) > MAX_BYTES:
        raise DocumentError(f"longer than the limit of {MAX_BYTES} characters")
    if found := Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise DocumentError(f"not valid YAML: the character {quoted(found[0])} is not allowed", line)
    try:
        return _Composer(text, nodes).get_single_node()
    except yaml.YAMLError as error:
        raise _failure(error) from error


@dataclass(frozen=True)
class Number:
    """Annotates numbers in [low, high): ``Annotated[int, Number(1, 9)]`` accepts integers from 1 to 8."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: type, handler: Any) -> Any:
        """The schema with which pydantic checks such a number."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(partial(self.check, source))

    def check(self, kind: type, value: Any) -> float:
        """Return a value as such a number; raise :class:`ValueError` if it is not one."""
        if isinstance(value, dict | list):
            raise ValueError("expected a number, not a mapping or list")
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)  # 1e-3, which is a string in YAML 1.1
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("expected a number")
        if not self.low <= value < self.high or (kind is int and value != int(value)):
            whole = "whole " if kind is int else ""
            raise ValueError(f"expected a {whole}number of at least {self.low:.9g} and below {self.high:.9g}")
        return int(value) if kind is int else value


@dataclass(frozen=True)
class YamlPart:
    """A part of a YAML document that knows its line and key."""

    node: yaml.Node
    """A node of the graph that :func:`compose` returns."""
    keys: tuple[str | int, ...] = ()  # the keys and list positions that lead to it

    def below(self, *keys: str | int) -> YamlPart:
        """Return the part that keys lead to; if it does not exist, the last part on the way that does."""
        node = self.node
        for key in keys:
            found = dict(_children(node))
            if key not in found:
                break
            node = found[key]
        return YamlPart(node, (*self.keys, *keys))

    def error(self, problem: str, *below: str | int) -> DocumentError:
        """Return an error that names the line and key of this part, or of a part below it."""
        part = self.below(*below)
        where = ".".join(map(shown, part.keys))
        return DocumentError(f"{where}: {problem}" if where else problem, part.node.start_mark.line + 1)

    def entries(self, allowed: Collection[str] = ()) -> dict[str, YamlPart]:
        """Return the parts of a mapping by their keys.

        Raises :class:`DocumentError` if it is not a mapping, or a key is not allowed, not printable or longer
        than :data:`MAX_KEY`.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("expected a mapping of names to values")
        for node, _ in self.node.value:
            name, place = node.value, YamlPart(node, self.keys)
            if not name.isprintable() or not 0 < len(name.encode()) <= MAX_KEY:
                raise place.error(f"expected a name of 1 to {MAX_KEY} bytes, found {quoted(name)}")
            if allowed and name not in allowed:
                known = ", ".join(sorted(allowed))
                raise place.error(f"unknown key {quoted(name)}{suggest(name, allowed)}; allowed: {known}")
        return {str(name): YamlPart(node, (*self.keys, name)) for name, node in _children(self.node)}

    def elements(self) -> list[YamlPart]:
        """Return the parts of a list; raises :class:`DocumentError` if it is not a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("expected a list")
        return [YamlPart(node, (*self.keys, place)) for place, node in _children(self.node)]

    def text(self) -> str:
        """Return a scalar as it is written: ``1:30`` is a string if a string is expected."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error("expected a string")
        return str(self.node.value).strip()

    def plain(self) -> Any:
        """Return plain values; raises :class:`DocumentError` if one cannot be read."""
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

        Raises :class:`DocumentError` if a key is unknown or missing, a value does not match, or the target
        raises :class:`ValueError`.

        Parameters
        ----------
        target : callable
            Its annotations define what is expected: strings, :class:`YamlPart` for parts that it reads
            itself, and anything else that pydantic can check.
        *given
            Positional arguments that do not come from the document.
        **known
            Keyword arguments that override those of the document.
        """
        function = getattr(target, "__func__", target)
        taken = len(given) + (function is not target)  # a bound method's first argument is taken
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
            if get_origin(kind) is UnionType:  # `T | None`, for an optional key
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
    """Check plain values with pydantic and return its result; ``part`` is their place in the document.

    Raises :class:`DocumentError` if they do not match; names the first wrong key and, if a part is given, its
    line.
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
    if first["type"] == "extra_forbidden":
        keys, name = keys[:-1], keys[-1]
        hint = "" if keys else suggest(str(name), getattr(kind, "model_fields", ()))
        problem = f"unknown key {quoted(name)}{hint}"
    node = part.below(*keys).node if part else None
    if isinstance(node, yaml.ScalarNode) and (isinstance(found, bool) or found is None or found != found):
        found = node.value  # as it is written
    is_value = first["type"] != "extra_forbidden" and not isinstance(found, dict)
    if (keys or part) and is_value and ", not " not in problem:
        problem += f", not {quoted(found)}"
    if part:
        raise part.error(problem, *keys)
    raise DocumentError(": ".join(filter(None, (".".join(map(shown, keys)), problem))))


@cache
def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target, eval_str=True).parameters


@cache
def _adapter(kind: Any) -> Any:
    """The pydantic adapter of a type: a model follows its own rules, other types are strict."""
    from pydantic import BaseModel, TypeAdapter

    is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
    return TypeAdapter(kind, config=None if is_model else {"strict": True})


def _children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node]]:
    """The contents of a mapping or list, by key or position."""
    if isinstance(node, yaml.MappingNode):
        yield from ((key.value, value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)


def value(node: yaml.Node, tuples: bool = False) -> Any:
    """Return the plain values of a node of :func:`compose`; see :func:`load_yaml`.

    Raises :class:`DocumentError` if any part of it has an unsupported tag, or does not match its tag.
    """
    try:
        return (_ValuesWithTuples if tuples else _Values)().construct_document(node)
    except ConstructorError as error:
        raise _failure(error) from error


def _failure(error: yaml.YAMLError) -> DocumentError:
    """A YAML error as one line."""
    if isinstance(error, _Problem):
        return DocumentError(error.message, error.mark.line + 1)
    if isinstance(error, yaml.MarkedYAMLError):
        reason = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
    else:
        reason, mark = getattr(error, "reason", str(error)), None
    short = " ".join(reason.split())[:200]
    return DocumentError(f"not valid YAML: {short}", None if mark is None else mark.line + 1)


class _Plain(Resolver):
    """Resolves plain scalars as in YAML 1.1, except that dates and ``=`` are strings."""


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in {*_SCALARS, _MERGE}]
    for first, resolvers in Resolver.yaml_implicit_resolvers.items()
}


class _Problem(ConstructorError):
    """An error in a node."""

    def __init__(self, message: str, mark: Any) -> None:
        super().__init__(None, None, message, mark)
        self.message = message
        self.mark = mark


class _Values(_Plain, SafeConstructor):
    """Makes plain values from nodes."""

    def __init__(self) -> None:
        _Plain.__init__(self)
        SafeConstructor.__init__(self)

    def scalar(self, node: yaml.Node) -> Any:
        """A number, boolean or null, if the text would also be one without its tag."""
        kind, text = node.tag.removeprefix(_TAG), node.value
        if not isinstance(node, yaml.ScalarNode):
            raise _Problem(f"expected {kind}, not a mapping or list", node.start_mark)
        natural = self.resolve(yaml.ScalarNode, text, (True, False)).removeprefix(_TAG)
        if text.endswith("\n") or (natural != kind and (natural, kind) != ("int", "float")):
            raise _Problem(f"expected {kind}, found {quoted(text)}", node.start_mark)
        if kind in ("int", "float") and _AMBIGUOUS.fullmatch(text):
            raise _Problem(
                f"{quoted(text)} is ambiguous in YAML: write it in decimal, or in quotes", node.start_mark
            )
        try:
            number = getattr(self, f"construct_yaml_{kind}")(node)
        except ValueError as error:  # 0x_, thousands of digits, or a float in another base than 10
            raise _Problem(f"{quoted(text)} cannot be read as a number", node.start_mark) from error
        if kind == "int" and abs(number) >= BIGGEST:
            raise _Problem(f"the number {quoted(text)} is too large", node.start_mark)
        return number

    def other(self, node: yaml.Node) -> Any:
        """A node with any other tag."""
        tag = quoted(node.tag.replace(_TAG, "!!", 1))
        raise _Problem(f"the tag {tag} is not supported", node.start_mark)


_Values.yaml_constructors = {
    **dict.fromkeys(_SCALARS, _Values.scalar),
    f"{_TAG}str": SafeConstructor.construct_yaml_str,
    f"{_TAG}seq": SafeConstructor.construct_yaml_seq,
    f"{_TAG}map": SafeConstructor.construct_yaml_map,
    None: _Values.other,
}


class _ValuesWithTuples(_Values):
    """Makes plain values from nodes, and lists from Python's tuples."""


_ValuesWithTuples.yaml_constructors = {
    **_Values.yaml_constructors,
    f"{_TAG}python/tuple": SafeConstructor.construct_yaml_seq,
}


class _SlowEvents(Reader, yaml.scanner.Scanner, yaml.parser.Parser):
    """The events of a text, if PyYAML was built without libyaml."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)


# Only libyaml's events are used: its composer is recursive in C, to any depth that the text has.
_Events: Any = vars(yaml.cyaml)["CParser"] if yaml.__with_libyaml__ else _SlowEvents


class _Composer(Composer, _Events, _Values):
    """Builds nodes from events, and counts them."""

    def __init__(self, text: str, most: int) -> None:
        _Events.__init__(self, text)
        Composer.__init__(self)
        _Values.__init__(self)
        self.most = most
        self.count = self.depth = 0
        self.sizes: dict[int, int] = {}  # number of nodes in each subtree, by the id of its root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """The next node; an alias counts as much as the nodes it refers to."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _Problem("an anchor contains itself", event.start_mark)
            self.count_nodes(self.sizes[id(node)], event.start_mark)
            return node
        if self.depth == MAX_DEPTH:
            raise _Problem(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        before = self.count
        self.count_nodes(1, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.sizes[id(node)] = self.count - before
        return node

    def count_nodes(self, nodes: int, mark: Any) -> None:
        """Add to the number of nodes, and check it."""
        self.count += nodes
        if self.count > self.most:
            raise _Problem(f"more than {self.most} values, with aliases expanded", mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping with its merges resolved."""
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Problem(f"expected a name as the key, found a {key.id}", key.start_mark)
            if key.value in keys:
                raise _Problem(f"duplicate key {quoted(key.value)}", key.start_mark)
            keys.add(key.value)
        self.flatten_mapping(node)
        node.value = [*{key.value: (key, value) for key, value in node.value}.values()]
        return node
