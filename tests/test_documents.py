"""YAML and JSON of users: plain values within bounds, or one line that names the line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from kmdx import documents
from kmdx.errors import DocumentError

LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(9))


@pytest.fixture(params=["libyaml", "pure Python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is, and as it is where PyYAML was built without libyaml."""
    if request.param == "libyaml":
        return documents
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    spec = importlib.util.find_spec("kmdx.documents")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: [1, 0x10, -2.5, 1.0e+3, true, ~, text]", {"a": [1, 16, -2.5, 1000.0, True, None, "text"]}),
        ("{!!str 1: !!float 3, !!int '4': !!str yes}", {"1": 3.0, 4: "yes"}),
        ("day: 2026-01-31\neach: =", {"day": "2026-01-31", "each": "="}),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_plain_values_are_read(reader: ModuleType, text: str, value: object) -> None:
    assert reader.load_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n- !!int ''", "line 2: expected int, found ''"),
        ("!!bool abc", "line 1: expected bool, found 'abc'"),
        ('!!bool "yes\\n"', r"expected bool, found 'yes\\n'"),
        ("!!timestamp abc", "line 1: the tag '!!timestamp' is not supported"),
        (
            "!!python/object/apply:os.system [ls]",
            "the tag '!!python/object/apply:os.system' is not supported",
        ),
        ("!!set {a}", "the tag '!!set' is not supported"),
        ("!!int [1]", "expected int, not a mapping or list"),
        ("9" * 400, "the number '9999.*9999' is too large"),
        ("9" * 5000, "cannot be read as a number"),
        ("0x_", "'0x_' cannot be read as a number"),
        ("a: !!float 0x10", "line 1: '0x10' cannot be read as a number"),
        ("!!float -0b1", "'-0b1' cannot be read as a number"),
        ("rate: 044100", "line 1: '044100' is ambiguous"),
        ("length: 1:30", "'1:30' is ambiguous"),
        ("x\0: 1", r"line 1: not valid YAML: the character '\\x00' is not allowed"),
        ("\n\na: \ud800", r"line 3: not valid YAML: the character '\\ud800' is not allowed"),
        ("[" * 60 + "]" * 60, "line 1: nested more than 50 levels deep"),
        ("- " * 60, "line 1: nested more than 50 levels deep"),
        ("? " * 60, "line 1: nested more than 50 levels deep"),
        ("[" * 10_000, "levels deep|nesting"),
        (LAUGHS, "line 5: more than 25000 values, with aliases expanded"),
        ("a: &a [*a]", "an anchor contains itself"),
        ("a: &a {<<: *a}", "an anchor contains itself"),
        ("{a: 1, b: 2,\na: 3}", "line 2: duplicate key 'a'"),
        ("{[a]: 1}", "expected a name as the key, found a sequence"),
        ("--- a\n--- b", "line 2: not valid YAML: expected a single document"),
        ("*" + "a" * 10_000, "found undefined alias"),
        ("x" * 2**20 + "x", "longer than the limit of 1048576 characters"),
    ],
)
def test_unreadable_documents_are_one_line_errors(reader: ModuleType, text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        reader.load_yaml(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("tag", ["", "!!int", "!!float", "!!bool", "!!null", "!!str"])
def test_a_number_in_any_base_and_of_any_tag_is_read_or_refused(reader: ModuleType, tag: str) -> None:
    numbers = [
        "0x10",
        "0xfe",
        "0b1",
        "0o7",
        "017",
        "0x_",
        "_",
        "1_0",
        "1:30.5",
        "1.e+400",
        ".inf",
        ".nan",
        "._",
    ]
    kinds = {"": (str, int, float), "!!int": int, "!!float": float, "!!str": str}.get(tag, ())
    for text in [f"{tag} {sign}{number}" for number in (*numbers, "9" * 5000) for sign in ("", "-", "+")]:
        try:
            assert isinstance(reader.load_yaml(text), kinds)
        except DocumentError as error:
            assert "line 1: " in str(error)  # noqa: PT017 - some can be read, some cannot


def test_aliases_within_the_bounds_are_read() -> None:
    small = "\n".join(LAUGHS.splitlines()[:4])
    assert len(documents.load_yaml(small)["a3"][8][8]) == 9


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("title: café".encode("utf-16"), "UTF-16 or UTF-32: save it as UTF-8"),
        ("x: 1\ntitle: café".encode("latin-1"), r"found the byte 0xe9 in line 2: save it as UTF-8"),
    ],
)
def test_other_encodings_are_named_in_the_error(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(DocumentError, match=message):
        documents.read_text(path)


def test_line_endings_and_a_byte_order_mark_do_not_change_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\rc: 3\n")
    assert documents.read_text(path) == "a: 1\nb: 2\nc: 3\n"


def test_only_files_of_a_bounded_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10 * 2**30)
    for path, message in (
        (tmp_path, "expected a file, found a folder"),
        (tmp_path / "pipe", "a device or pipe"),
        (Path("/dev/zero"), "a device or pipe"),
        (tmp_path / "large", "larger than the limit of 1048576 bytes"),
        (tmp_path / "missing", "No such file"),
        (tmp_path / "a\0b", "not a valid path"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(DocumentError, match=message):
            documents.read_text(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "a number is too large"),
    ],
)
def test_unreadable_json_is_a_one_line_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DocumentError, match=message):
        documents.read_json(path)
