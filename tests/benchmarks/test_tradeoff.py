"""The picture of accuracy against time shows what was measured: medians, their quartiles, and what belongs together."""

import json
import sys
from functools import partial

import pytest
import tradeoff
import tuning
from matplotlib.figure import Figure

from tests.benchmarks.tiny import Tiny, rows_of


def test_the_picture_of_accuracy_against_time_shows_what_the_table_says(run, tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.json" for number in (1, 2)]
    compare = partial(run, tuning, Tiny, "--weights", str(tmp_path / "tiny.th"), "--before", "1", "--after", "0.1")
    printed = [rows_of(compare("--methods", "dense", "magnitude", "--json", str(file))) for file in files]
    read = [json.loads(file.read_text()) for file in files]
    for table, file in zip(printed, read, strict=True):
        for line in file["lines"]:
            assert table[line["method"]][1] == f"{line['top1'][0]:.2f}"
            assert table[line["method"]][4].startswith(f"{line['faster']['64'][1]:.2f} (")
    read[0]["lines"][1]["faster"]["64"][1], read[1]["lines"][1]["faster"]["64"][1] = 2.0, 1.5
    drawn = tradeoff.points_of(read, 64)
    assert [point.median for point in drawn["magnitude"]] == [1.5, 2.0]  # in the order of speed
    assert drawn["magnitude"][1].top1 == read[0]["lines"][1]["top1"][0]
    picture = tmp_path / "picture.svg"
    monkeypatch.setattr(sys, "argv", ["tradeoff", *map(str, files), "--output", str(picture)])
    tradeoff.main()
    assert picture.read_text().count("magnitude") >= 2  # a legend in each panel


def line_of(method, quartiles, *top1):
    return {"method": method, "top1": list(top1), "faster": {"64": quartiles}}


def drawn_of(files):
    """Return what the panel of batch 64 shows: label -> places of the points, ends of their bars, style of the line."""
    axes = Figure().subplots()
    draw, _ = tradeoff.panel(tradeoff.points_of(files, 64), 64)
    draw(axes)
    shown = {}
    for container in axes.containers:
        line, _, (bars,) = container
        ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
        shown[container.get_label()] = line.get_xydata().tolist(), ends, line.get_linestyle()
    joined = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
    return shown, [line.get_xdata()[0] for line in joined]


def test_a_point_of_one_file_is_joined_to_nothing_and_has_its_quartiles():
    lines = [line_of("dense", [0.9, 1.125, 1.5], 86.0), line_of("compress", [1.5, 1.625, 2.0], 85.0, 86.0)]
    shown, joined = drawn_of([{"lines": lines}])
    assert shown == {
        tradeoff.NAMES["dense"]: ([[1.125, 86.0]], [pytest.approx([0.9, 1.5])], "None"),
        tradeoff.NAMES["compress"]: ([[1.625, 85.5]], [pytest.approx([1.5, 2.0])], "None"),
    }
    assert joined == [1.0]  # the line of what all are compared with


def test_points_of_one_method_in_several_files_are_joined_and_those_of_the_dense_network_are_not():
    files = [
        {"lines": [line_of("dense", [1.0, dense, 1.25], 86.0), line_of("taylor", [speed, speed, speed + 0.25], top1)]}
        for dense, speed, top1 in ((1.125, 2.0, 80.0), (1.0, 1.5, 84.0))
    ]
    shown, joined = drawn_of(files)
    assert shown == {
        tradeoff.NAMES["dense"]: ([[1.0, 86.0], [1.125, 86.0]], [[1.0, 1.25], [1.0, 1.25]], "None"),
        tradeoff.NAMES["taylor"]: ([[1.5, 84.0], [2.0, 80.0]], [[1.5, 1.75], [2.0, 2.25]], "-"),
    }
    assert joined == [1.0, 1.5]
