"""Plans as data: the published numbers, pruning, and a one-line error for each mistake."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kmdx import documents, drawing, plan_file
from kmdx.errors import PlanError
from kmdx.networks import architecture
from kmdx.nodes import Estimate, Normalize, Sum
from kmdx.plan import NetworkUse
from kmdx.windows import OverlapAdd, TrimAndJoin

SMALL = """\
networks:
  net: {weights: htdemucs, overlap_add: {overlap: 0.25}}
signals:
  x: {normalize: mixture}
  V: {network: net, hears: x}
  rest: {sum: {x: 1, V.vocals: -1}}
stems:
  vocals: {sum: {V.vocals: 1}, denormalize: x}
  other: {sum: {rest: 1}, denormalize: x}
"""


def test_leaderboard_c_is_the_published_ensemble() -> None:
    loaded = plan_file.load("leaderboard_c")
    assert loaded.stems == ("bass", "drums", "other", "vocals")
    assert loaded.sample_rate == 44100
    chunkings = {name: use.chunking for name, use in loaded.networks.items()}
    assert chunkings == {
        "mdx_vocals": TrimAndJoin(261120, 1500),
        "mdx_drums": TrimAndJoin(261120, 1754),
        "mdx_other": TrimAndJoin(261120, 1754),
        "mdx_bass": TrimAndJoin(261120, 1350),
        "ft_vocals": OverlapAdd(0.85, 7.7, 339570),
        "ft_drums": OverlapAdd(0.85, 7.8, 343980),
        "ft_bass": OverlapAdd(0.85, 7.8, 343980),
        "ft_other": OverlapAdd(0.80, 7.8, 343980),
        "mmi": OverlapAdd(0.85, 44, 1940400),
        "extra": OverlapAdd(0.80, 40, 1764000),
    }
    assert [chunkings[name].stride for name in ("ft_vocals", "ft_drums", "ft_other", "mmi", "extra")] == [
        50935, 51597, 68795, 291060, 352799,
    ]  # fmt: skip
    assert loaded.nodes["x1"] == Sum({"x": 1, "V.vocals": -0.8, "M.vocals": -0.2})
    assert loaded.nodes["demucs_other"] == Sum({"x3": 0.68, "M.other": 0.04, "O.other": 0.28}, "x")
    assert loaded.nodes["vocals"] == Sum({"mdx_vocals": 0.88, "demucs_vocals": 0.12})


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        (
            "leaderboard_c",
            {
                "mdx_vocals": "mdx_vocals",
                "mdx_drums": "mdx_drums",
                "mdx_other": "mdx_other",
                "mdx_bass": "mdx_bass",
                "ft_vocals": "htdemucs_ft_vocals",
                "ft_drums": "htdemucs_ft_drums",
                "ft_bass": "htdemucs_ft_bass",
                "ft_other": "htdemucs_ft_other",
                "mmi": "hdemucs_mmi",
                "extra": "mdx_extra_a1d90b5c",
            },
        ),
        (
            "htdemucs_ft",
            {
                "ft_vocals": "htdemucs_ft_vocals",
                "ft_drums": "htdemucs_ft_drums",
                "ft_bass": "htdemucs_ft_bass",
                "ft_other": "htdemucs_ft_other",
            },
        ),
        ("htdemucs", {"htdemucs": "htdemucs"}),
    ],
)
def test_each_network_has_its_own_weights(name: str, weights: dict[str, str]) -> None:
    assert {key: use.weight.name for key, use in plan_file.load(name).networks.items()} == weights


def test_htdemucs_ft_is_the_same_staging_with_four_networks() -> None:
    nodes = plan_file.load("htdemucs_ft").nodes
    assert nodes["V"] == Estimate("ft_vocals", "x")
    assert nodes["D"] == Estimate("ft_drums", "x1")
    assert nodes["B"] == Estimate("ft_bass", "x2")
    assert nodes["O"] == Estimate("ft_other", "x")
    assert nodes["x3"] == Sum({"x2": 1, "B.bass": -1})
    assert nodes["other"] == Sum({"x3": 0.71, "O.other": 0.29}, "x")


def test_the_arithmetic_is_the_sum_over_the_networks_that_run() -> None:
    loaded = plan_file.load("leaderboard_c")
    assert loaded.gflops(loaded.stems) == pytest.approx(1781, abs=1)
    halves = loaded.gflops(["mdx_bass", "mdx_drums", "mdx_other", "mdx_vocals"])
    assert halves == pytest.approx(463, abs=1)
    assert loaded.gflops(["mdx_vocals"]) == pytest.approx(128.17 * 261120 / 258120)


@pytest.mark.parametrize(
    ("stems", "networks"),
    [
        (["vocals"], {"mdx_vocals", "ft_vocals", "mmi", "extra"}),
        (["bass"], {"mdx_vocals", "mdx_bass", "ft_vocals", "mmi", "ft_drums", "ft_bass"}),
        (["drums"], {"mdx_vocals", "mdx_drums", "ft_vocals", "mmi", "extra", "ft_drums"}),
        (["other"], {"mdx_vocals", "mdx_other", "ft_vocals", "mmi", "ft_drums", "ft_bass", "ft_other"}),
    ],
)
def test_only_what_a_stem_needs_is_run(stems: list[str], networks: set[str]) -> None:
    assert set(plan_file.load("leaderboard_c").networks_used(stems)) == networks


def test_networks_compute_only_the_sources_that_are_used() -> None:
    loaded = plan_file.load("leaderboard_c")
    everything = loaded.sources_used(loaded.stems)
    assert everything["V"] == ("vocals",)
    assert everything["A"] == ("drums", "vocals")
    assert everything["M"] == ("drums", "bass", "other", "vocals")
    assert loaded.sources_used(["vocals"]) == {
        "mdx_v": ("vocals",), "V": ("vocals",), "M": ("vocals",), "A": ("vocals",),
    }  # fmt: skip


@pytest.mark.parametrize("name", plan_file.names())
def test_every_plan_of_the_package_uses_all_that_it_names(name: str) -> None:
    loaded = plan_file.load(name)
    assert set(loaded.networks_used(loaded.stems)) == set(loaded.networks)
    assert loaded.title != name
    assert loaded.description


def test_a_stage_counts_the_networks_on_the_longest_path() -> None:
    loaded = plan_file.load("leaderboard_c")
    stages = {
        name: loaded.stage(name) for name in ("mixture", "x", "V", "x1", "D", "B.bass", "other", "vocals")
    }
    assert stages == {"mixture": 0, "x": 0, "V": 1, "x1": 1, "D": 2, "B.bass": 3, "other": 3, "vocals": 1}


@pytest.mark.parametrize("cap", [0.82, 0.5, 0.0])
def test_a_capped_plan_differs_only_in_overlap(cap: float) -> None:
    published = plan_file.load("leaderboard_c")
    before = repr(published)
    capped = published.capped(cap)
    assert {**vars(capped), "networks": None} == {**vars(published), "networks": None}
    assert list(capped.networks) == list(published.networks)
    for name, use in published.networks.items():
        how = use.chunking
        if isinstance(how, OverlapAdd):
            how = OverlapAdd(min(how.overlap, cap), how.segment, how.length)
        assert capped.networks[name] == NetworkUse(use.weight, how)
    assert repr(published) == before
    assert published.capped(0.85) == published


def test_a_users_plan_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL, "utf-8")
    loaded = plan_file.load(path)
    assert loaded.name == "mine"
    assert loaded.nodes["x"] == Normalize("mixture")
    assert loaded.nodes["V"] == Estimate("net", "x")
    assert loaded.networks["net"].chunking == OverlapAdd(0.25, 7.8, 343980), "the network's own segment"
    assert loaded.digest != plan_file.parse(SMALL + "\n", "mine").digest


def test_the_example_of_the_documentation_is_a_plan() -> None:
    text = (Path(__file__).parents[1] / "docs" / "ensembles.md").read_text("utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    loaded = plan_file.parse(example, "mine")
    assert loaded.stems == ("vocals", "drums")
    assert loaded.networks_used(["drums"]) == ["demucs"]
    assert text.split("```mermaid\n")[1].split("```")[0] == drawing.mermaid(loaded, loaded.stems)


def test_nodes_may_be_in_any_order() -> None:
    content = yaml.safe_load(SMALL)
    content["signals"] = dict(reversed(content["signals"].items()))
    loaded = plan_file.parse(yaml.safe_dump(content, sort_keys=False), "small")
    assert loaded.order(["other"]) == ["x", "V", "rest", "other"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hears: x}", "hears: rest}", "line 5: signals.V: a cycle: V → rest → V"),
        ("V: {network: net,", "V: {network: nett,", "line 5: signals.V.network: unknown network 'nett' (did you mean 'net'?)"),
        ("V.vocals: -1", "V.vocals: lots", "line 6: signals.rest.sum.V.vocals: expected a number, not 'lots'"),
        ("V.vocals: -1", "V.vocals: .nan", "expected a number, not '.nan'"),
        ("V.vocals: -1", "V.vocals: true", "expected a number, not 'true'"),
        ("V.vocals: -1", "V.vocals: [1]", "expected a number, not a mapping or list"),
        ("V.vocals: -1", "V.guitar: -1", "line 6: signals.rest: unknown signal 'V.guitar'"),
        ("V.vocals: -1", "V: -1", "name a source: V.drums, V.bass, V.other, V.vocals"),
        ("weights: htdemucs", "weights: htdemucz", "line 2: networks.net.weights: unknown weight 'htdemucz'"),
        ("overlap: 0.25", "overlap: 1.5", "networks.net.overlap_add.overlap: expected a number of at least 0 and below 1"),
        ("overlap: 0.25", "overlap: 0.9999999", "leaves no stride"),
        ("overlap: 0.25", "overlap: 0.25, segmnt: 7", "unknown key 'segmnt' (did you mean 'segment'?)"),
        ("overlap_add: {overlap: 0.25}", "trim_and_join: {chunk: 10, trim: 5}", "leave nothing of a chunk of 10"),
        ("overlap_add: {overlap: 0.25}", "trim_and_join: {chunk: 10.5, trim: 5}", "expected a whole number"),
        (", overlap_add: {overlap: 0.25}", "", "expected one of overlap_add, trim_and_join, fade_and_add"),
        ("denormalize: x}\n  other", "denormalize: rest}\n  other", "'rest' is not a normalized signal"),
        ("{normalize: mixture}", "{normalise: mixture}", "unknown key 'normalise' (did you mean 'normalize'?)"),
        ("{normalize: mixture}", "{}", "expected the keys {network, hears}"),
        ("x: {normalize", "x.y: {normalize", "a name may contain only letters, digits, '_' and '-'"),
        ("  other: {sum", "  /tmp/other: {sum", "a name may contain only letters, digits, '_' and '-'"),
        ("  other: {sum", "  a,b: {sum", "a name may contain only letters, digits, '_' and '-'"),
        ("  other: {sum", "  accompaniment: {sum", "the name 'accompaniment' is reserved"),
        ("  other: {sum", "  mixture: {sum", "the name 'mixture' is reserved"),
        ("overlap: 0.25", "overlap: !foo 0.2", "line 2: networks.net.overlap_add.overlap: cannot be read"),
        ("overlap: 0.25", "overlap: !!int abc", "line 2: networks.net.overlap_add.overlap: cannot be read"),
        ("weights: htdemucs", "weights: {file: a, architecture: {type: [a]}}", "the architecture of a: unknown type ['a']; available: htdemucs, hdemucs, onnx, tfc_tdf"),
        ("weights: htdemucs", "weights: {file: a, architecture: {x: !foo 1}}", "architecture.x: cannot be read"),
        (
            "weights: htdemucs",
            "weights: {file: a, architecture: {type: htdemucs, sources: [vocals], segment: abc}}",
            "the architecture of a: segment must be a number from 0.001 to 3600, not 'abc'",
        ),
        (
            "weights: htdemucs",
            "weights: {file: a, architecture: {type: htdemucs, sources: [vocals], gflops: 0}}",
            "gflops must be a number from 1e-06 to 1e+06, not 0",
        ),
        ("rest: {", "V: {", "duplicate key 'V'"),
        ("normalize: mixture", "combine: [mixture, mixture], mode: max_ftt", "unknown mode 'max_ftt' (did you mean 'max_fft'?)"),
        ("normalize: mixture", "combine: [mixture], mode: max_fft", "signals.x: expected 2 to 50 signals to combine, found 1"),
        ("normalize: mixture", "combine: mixture, mode: max_fft", "combine: "),
        ("normalize: mixture", "combine: [mixture, mixtur], mode: max_fft", "unknown signal 'mixtur'"),
        ("stems:", "stem:", "unknown key 'stem'"),
        ("vocals: {sum: {V.vocals: 1}, denormalize: x}", "vocals: {network: net, hears: x}", "a stem must be a sum"),
        ("signals:\n", "signals: 3\nsignal:\n", "unknown key 'signal'"),
        ("networks:\n", "networks: [\n", "not valid YAML"),
        ("networks:\n", "sample_rate: 44100.5\nnetworks:\n", "expected a whole number"),
        ("networks:\n", "sample_rate: 044100\nnetworks:\n", "line 1: sample_rate: cannot be read: '044100' is ambiguous"),
        ("networks:\n", "sample_rate: 10000000\nnetworks:\n", "of at least 1000 and below 384001, not 10000000"),
        ("V.vocals: -1", "V.vocals: 1e400", "expected a number, not '1e400'"),
        ("V.vocals: -1", "V.vocals: 1.0e+300", "expected a number of at least -1000000 and below 1000000"),
        ("V.vocals: -1", "V.vocals: !!bool abc", "line 6: signals.rest.sum.V.vocals: cannot be read: expected bool, found 'abc'"),
        ("V.vocals: -1", f"V.vocals: {'9' * 400}", "the number '9999"),
        ("V.vocals: -1", '"V.vo\\ncals": -1', r"signals.rest.sum: expected a name of 1 to 201 bytes, found 'V.vo\ncals'"),
        ("  net: {", '  "a\\0": {', r"networks: expected a name of 1 to 201 bytes, found 'a\x00'"),
        ("weights: htdemucs", 'weights: "a\\nb"', r"unknown weight 'a\nb'"),
        ("weights: htdemucs", f"weights: {'w' * 90_000}", "unknown weight 'www"),
        ("weights: htdemucs", 'weights: {file: "a\\0", architecture: {}}', r"expected the path of a file, not 'a\x00'"),
        ("weights: htdemucs", f"weights: {{file: {'a' * 300}, architecture: {{}}}}", "expected the path of a file"),
        ("overlap: 0.25", "overlap: 0.99999", "needs 1.47e+04 windows and is processed 1.147e+05 times; at most 200 windows and 200 times are allowed"),
        ("overlap: 0.25", "overlap: 0.25, segment: 0.001", "each second of audio needs 1336 windows"),
        ("overlap: 0.25", "overlap: 0.25, segment: 600", "windows of 26460000 samples are too long; expected at most 8388608"),
        ("overlap_add: {overlap: 0.25}", "trim_and_join: {chunk: 2147483647, trim: 5}", "of at least 1 and below 8388609"),
        ("overlap_add: {overlap: 0.25}", "trim_and_join: {chunk: 100, trim: 49}", "needs 2.205e+04 windows and is processed 50 times"),
        ("  other: {sum", "  Vocals: {sum", "'vocals' would be the same file on systems that ignore case"),
        ("  other: {sum", "  Accompaniment: {sum", "'accompaniment' would be the same file"),
        ("  other: {sum", "  con: {sum", "Windows does not allow this file name"),
        ("  other: {sum", "  LPT²: {sum", "Windows does not allow this file name"),
        ("  other: {sum", f"  {'v' * 101}: {{sum", "a name may have at most 100 bytes"),
        ("  other: {sum", "  ../other: {sum", "a name may contain only letters"),
    ],
)  # fmt: skip
def test_mistakes_name_the_line_and_the_key(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(PlanError) as caught:
        plan_file.parse(SMALL.replace(old, new, 1), "small")
    assert message in str(caught.value)
    assert str(caught.value).startswith("small:")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("", "the file is empty"), ("- 1", "expected a mapping"), ("a: 1", "unknown key")]
)
def test_files_that_are_not_plans_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_file.parse(text, "broken")


def test_unknown_ensembles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError,
        match=r"unknown ensemble 'nope'; available: bs_roformer_4stem, htdemucs, htdemucs_ft, leaderboard_c",
    ):
        plan_file.load("nope")
    with pytest.raises(
        PlanError, match="not imported yet; `kmdx models pull melband_deux` downloads and imports it"
    ):
        plan_file.load("melband_deux")
    with pytest.raises(PlanError, match="cannot read the ensemble"):
        plan_file.load(tmp_path / "nope.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(PlanError, match="cannot read the ensemble"):
        plan_file.load(tmp_path / "folder.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="found UTF-16 or UTF-32"):
        plan_file.load(tmp_path / "binary.yaml")


def test_a_chunk_that_the_network_does_not_accept_is_refused() -> None:
    text = SMALL.replace(
        "weights: htdemucs, overlap_add: {overlap: 0.25}",
        "weights: mdx_bass, trim_and_join: {chunk: 1000, trim: 5}",
    )
    text = text.replace("V.vocals", "V.bass")
    with pytest.raises(PlanError, match="mdx_bass accepts only chunks of 261120 samples, not 1000"):
        plan_file.parse(text, "small")
    joined = text.replace("trim_and_join: {chunk: 1000, trim: 5}", "overlap_add: {overlap: 0.5}")
    assert plan_file.parse(joined, "small").networks["net"].chunking.length == 261120


def test_stems_are_checked() -> None:
    loaded = plan_file.load("htdemucs")
    assert loaded.check_stems(None) == ("bass", "drums", "other", "vocals")
    assert loaded.check_stems(["vocals", "vocals", "accompaniment"]) == ("vocals", "accompaniment")
    with pytest.raises(PlanError, match="unknown stem 'guitar'; available: bass, drums, other, vocals"):
        loaded.check_stems(["guitar"])
    with pytest.raises(PlanError, match="no stem selected"):
        loaded.check_stems([])
    with pytest.raises(PlanError, match="unknown signal 'V.guitar'"):
        loaded.check_wanted(["V.guitar"])


def chain(length: int, order: str) -> str:
    """A plan whose stem is at the end of a chain of sums."""
    rows = [f"  s{number}: {{sum: {{s{number + 1}: 1}}}}\n" for number in range(length)]
    rows.append(f"  s{length}: {{sum: {{mixture: 1}}}}\n")
    if order == "random":
        random.Random(0).shuffle(rows)
    joined = "".join(reversed(rows) if order == "forward" else rows)
    return f"networks: {{}}\nsignals:\n{joined}stems: {{vocals: {{sum: {{s0: 1}}}}}}\n"


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_long_chains_are_allowed(order: str) -> None:
    plan = plan_file.parse(chain(2000, order), "chain")
    assert plan.order(["vocals"]) == [*(f"s{number}" for number in range(2000, -1, -1)), "vocals"]
    assert plan.stage("vocals") == 0
    assert plan.held(plan.stems) == 2


def test_all_of_a_long_chain_is_drawn() -> None:
    plan = plan_file.parse(chain(1100, "forward"), "chain")
    drawn = drawing.mermaid(plan, plan.stems)
    assert re.findall(r"s(\d+) = ", drawn) == [str(number) for number in range(1100, -1, -1)]
    assert drawing.svg(plan, plan.stems).count("<rect") == 1 + 1103


def test_names_that_mermaid_cannot_read_are_numbered() -> None:
    text = "networks: {}\nsignals: {end: {sum: {mixture: 1}}, a--b: {sum: {end: 1, mixture: 1}}}\nstems: {voix: {sum: {a--b: 2}}}"
    plan = plan_file.parse(text, "names")
    assert drawing.mermaid(plan, plan.stems).splitlines() == [
        "graph LR",
        '    mixture --> 0["end = mixture"]',
        '    0 & mixture --> 1["a--b = end + mixture"]',
        '    1 --> voix(["voix = 2·a--b"])',
    ]


def test_the_order_of_a_plan_made_in_python_has_no_bound() -> None:
    nodes = {f"s{number}": Sum({f"s{number + 1}": 1.0}) for number in range(20_000)}
    plan = replace(plan_file.load("mini"), nodes={**nodes, "s20000": Sum({"mixture": 1.0})})
    assert plan.order(["s0"]) == [f"s{number}" for number in range(20_000, -1, -1)]


def test_long_cycles_are_reported_in_a_short_line() -> None:
    text = chain(2000, "backward").replace("s2000: {sum: {mixture", "s2000: {sum: {s0")
    with pytest.raises(
        PlanError, match=r"line 3: signals.s0: a cycle: s0 → s1 → s2 .* and 1992 more$"
    ) as caught:
        plan_file.parse(text, "long")
    assert len(str(caught.value)) < 200


def test_signals_held_at_once_are_bounded() -> None:
    assert [plan_file.load(name).held(plan_file.load(name).stems) for name in ("leaderboard_c", "mini")] == [
        15,
        7,
    ]
    rows = "".join(f"  s{number}: {{sum: {{mixture: 1}}}}\n" for number in range(300))
    blend = ", ".join(f"s{number}: 1" for number in range(300))
    text = f"networks: {{}}\nsignals:\n{rows}stems: {{vocals: {{sum: {{{blend}}}}}}}\n"
    with pytest.raises(PlanError, match="needs 301 signals in memory at once; at most 200 are allowed"):
        plan_file.parse(text, "fan")


def test_the_documented_bounds_are_enforced() -> None:
    text = (Path(__file__).parents[1] / "docs" / "ensembles.md").read_text("utf-8")
    loaded = plan_file.load("leaderboard_c")
    windows, load = loaded.windows_per_second(loaded.stems), loaded.load(loaded.stems)
    networks = [use.chunking for use in loaded.networks.values()]
    for figure in (
        f"{documents.MAX_BYTES >> 20} MiB, {documents.MAX_NODES:,} values",
        f"{documents.MAX_DEPTH} levels",
        f"{plan_file.RATES[0]:,} to {plan_file.RATES[1] - 1:,} Hz",
        f"{plan_file.MAX_WINDOWS} windows for a second of audio, {plan_file.MAX_LOAD:g} s of signal",
        f"{max(each.per_second(44100) for each in networks):.2g} and {max(each.load for each in networks):.2g} |",
        f"| {windows:.2g} and {load:.2g} |",
        f"| {plan_file.MAX_HELD} | {loaded.held(loaded.stems)} |",
        f"{architecture.MAX_NAME} bytes",
        f"10⁹ ({4 * architecture.MAX_PARAMETERS / 1e9:g} GB in float32)",
        f"2²⁹ values ({4 * architecture.MAX_VALUES / 1e9:.1f} GB)",
        f"2²³ samples, {architecture.MAX_LENGTH / 44100:.0f} s at 44.1 kHz",
    ):
        assert figure in text, figure


def test_all_networks_together_are_bounded() -> None:
    rows = "".join(f"  N{number}: {{network: net, hears: mixture}}\n" for number in range(25))
    text = SMALL.replace("overlap: 0.25", "overlap: 0.99").replace("signals:\n", f"signals:\n{rows}")
    blend = ", ".join(f"N{number}.vocals: 1" for number in range(25))
    assert plan_file.parse(text, "unused").load(["vocals"]) == pytest.approx(100, rel=0.01), "one that runs"
    with pytest.raises(
        PlanError, match="all networks together: each second of audio .* is processed 2601 times"
    ):
        plan_file.parse(text.replace("{V.vocals: 1}", f"{{V.vocals: 1, {blend}}}"), "all")


def test_merge_keys_are_supported() -> None:
    text = SMALL.replace("  net: {", "  first: &a {").replace(
        "signals:", "  net: {<<: *a, overlap_add: {overlap: 0.5}}\nsignals:"
    )
    networks = plan_file.parse(text, "merged").networks
    assert networks["first"].weight is networks["net"].weight
    assert networks["net"].chunking == OverlapAdd(0.5, 7.8, 343980)


def test_numbers_may_have_an_exponent_without_a_decimal_point() -> None:
    plan = plan_file.parse(SMALL.replace("V.vocals: -1", "V.vocals: -25e-2"), "small")
    assert plan.nodes["rest"] == Sum({"x": 1, "V.vocals": -0.25})


def test_titles_are_one_printable_line() -> None:
    plan = plan_file.parse('title: "a\\e[31m\\0\\nb"\n' + SMALL, "small")
    assert plan.title == "a[31m b"
