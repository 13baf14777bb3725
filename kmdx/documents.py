"""YAML and JSON that users write, read within bounds.

A document is data of six kinds: mappings, lists, texts, numbers, truth values and nothing. Its size, its
depth and its number of nodes are bounded, where an alias counts as much as what it stands for. Whatever
is in the text, the only error is a :class:`~kmdx.errors.DocumentError`, of one line.

YAML is version 1.1 as PyYAML reads it, but for what surprises: dates are texts, a key that is given twice
is an error, and so are numbers that versions 1.1 and 1.2 read differently (``010``, ``1:30``).
"""

from __future__ import annotations

import io
import json
import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.reader import Reader
from yaml.resolver import Resolver

from kmdx.errors import DocumentError, quoted

MAX_BYTES = 2**20  # leaderboard C has 2,833
MAX_NODES = 25_000  # leaderboard C has 315
MAX_DEPTH = 50  # leaderboard C has 5
MAX_JSON_BYTES = 2**24
BIGGEST = 2**63  # whole numbers are below it

_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float")}
_MERGE = f"{_TAG}merge"
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
