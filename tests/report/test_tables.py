"""What tables look like in a pipe, in 80 and in 160 columns: numbers never break, names lose their middle."""

import json
import re
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lightning_easier.report import CollapseReport, Merge, ModelCost, PruningReport, Refusal, Round, Table
from lightning_easier.report.layout import lay_out, shorten
from lightning_easier.support.timing import Latency

NAMES = [f"network.encoder.layers.{place}.intermediate.activation" for place in range(12)]


def cost(depth=14, macs=4_089_184_256):
    return ModelCost(depth, 25_557_032, macs, 123_000_000, Latency.of([4.2e-3, 4.3e-3, 4.4e-3, 4.5e-3]))


def pruning_report():
    rounds = [Round([], {}, None, 0.9944, True, 0)]
    rounds += [Round([name], {name: 0.25}, 0.99, 0.98, True, 1, [name], reference=0.9944) for name in NAMES]
    return PruningReport("val_accuracy", rounds)


def collapse_report():
    merges = [Merge((NAMES[0], NAMES[1]), NAMES[0], "macs", 221_859_840, 182_538_240)]
    refusals = [Refusal((NAMES[2], NAMES[3]), "one 5×5 would take 812.3 µs instead of 402.1 µs")]
    return CollapseReport(merges, [], [], refusals, cost(), cost(), cost(12), 1e-7, None)


def printed(report, width):
    console = Console(file=StringIO(), width=width)
    console.print(report)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("report", [pruning_report(), collapse_report()], ids=["pruning", "collapse"])
def test_numbers_never_break_and_no_line_is_too_long(report, width):
    text = printed(report, width)
    assert max(len(line) for line in text.splitlines()) <= width
    numbers = {each for each in re.findall(r"\d[\d,]*\.?\d+", report.to_markdown()) if len(each) > 3}
    assert len(numbers) > 3
    assert [each for each in numbers if each not in text] == []


def test_in_80_columns_names_lose_their_middle_and_stay_apart():
    text = printed(pruning_report(), 80)
    shown = set(re.findall(r"network\S*", text))
    assert NAMES[0] not in text
    assert len(shown) == len(NAMES)
    assert all("…" in name for name in shown)
    assert all(name in printed(pruning_report(), 160) for name in NAMES)


def test_what_has_no_room_beside_the_others_is_below_them():
    text = printed(collapse_report(), 80)
    assert "Collapse (the other columns)" in text
    assert "(the other columns)" not in printed(collapse_report(), 160)
    assert text.count("collapsed ") == 2  # the row begins with its name both times


def test_a_pipe_has_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = Console(file=StringIO())
    console.print(pruning_report())
    assert 70 < max(len(line) for line in console.file.getvalue().splitlines()) <= 80


def test_markdown_and_json_have_the_names_whole():
    report = pruning_report()
    assert all(f"| {name} |" in report.to_markdown() for name in NAMES)
    assert [this["chosen"] for this in json.loads(report.to_json())["rounds"][1:]] == [[name] for name in NAMES]


@pytest.mark.parametrize(
    ("word", "width", "short"),
    [("layer1.0.relu", 13, "layer1.0.relu"), ("layer1.0.relu", 7, "la…relu"),
     ("221,859,840", 5, "221,859,840"), ("a.b", 1, "…b")],
)  # fmt: skip
def test_the_middle_is_left_out_of_a_name_and_nothing_of_a_number(word, width, short):
    assert shorten(word, width) == short


def test_a_plus_stays_at_the_end_of_its_line():
    ((column, _),) = lay_out(("operators", "why"), [("first.convolution + second.convolution", "x" * 30)], 60)
    assert column.cells == [["first.convolution +", "second.convolution"]]


def test_a_table_without_rows_is_its_titles():
    assert "activation" in printed(Table("Nothing", ("activation", "why"), []), 80)


@given(
    st.lists(st.tuples(st.from_regex(r"[a-z]{1,60}", fullmatch=True), st.integers(0, 10**9)), min_size=1, max_size=6),
    st.integers(40, 160),
)
def test_any_table_fits_and_has_all_of_its_numbers(pairs, width):
    rows = [(name, f"{value:,}", f"{value / 7:.3f}", name) for name, value in pairs]
    text = printed(Table("Any", ("name", "count", "share", "why"), rows), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert all(f" {row[1]} " in text and f" {row[2]} " in text for row in rows)


def test_json_has_null_for_what_is_not_finite():
    rounds = [Round([], {"a": float("nan")}, None, float("-inf"), None, 0, measured={0: {"a": float("inf"), "b": 0.5}})]

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    (found,) = json.loads(PruningReport("val_acc", rounds).to_json(), parse_constant=refuse)["rounds"]
    assert (found["entropies"], found["score_after"]) == ({"a": None}, None)
    assert found["measured"] == {"0": {"a": None, "b": 0.5}}
