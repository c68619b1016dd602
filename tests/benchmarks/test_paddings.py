"""Where a padding moved, a network computes more: what the benchmark of that prints."""

import sys

import paddings

from tests.benchmarks.tiny import rows_of


def test_multiply_accumulates_are_those_of_the_original_but_where_paddings_moved(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paddings", "--batch", "1", "--samples", "2"])
    paddings.main()
    rows = rows_of(capsys.readouterr().out)
    assert rows.pop("network") == ["multiply-accumulates", "time"]
    ratios = {name: ratio for name, (ratio, _) in rows.items() if name.strip("-: ")}
    assert set(ratios.values()) == {"1.000", "1.042"}
    assert {name for name, ratio in ratios.items() if ratio != "1.000"} == {
        "a third linear, paddings moved", "the same, collapsed, paddings moved",
    }  # fmt: skip
