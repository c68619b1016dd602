"""Pictures of reports: what they show, in which order, and what is said where they can't be drawn."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_easier import collapse, compress, linearize
from lightning_easier.report import OperatorTime, PruningReport, Round, check_report_path, figures
from lightning_easier.report.figures import new_figure, pareto_front, save_figure, scores_by_time

NAMES = [f"net.layer{place}.relu" for place in range(12)]


def of_epochs(first, last, without=()):
    """Entropies of all but some activations, epoch by epoch."""
    return {
        epoch: {name: 0.05 * place + 0.01 * epoch for place, name in enumerate(NAMES) if name not in without}
        for epoch in range(first, last)
    }


def report():
    """A dense round, one that was kept and one that was taken back; names were measured in another order."""
    costs = {"latency": 3e-3, "dense_latency": 4e-3, "speedup": 1.3, "depth": 11.0, "dense_depth": 12.0}
    rounds = [
        Round([], {}, None, 0.9, True, 0, measured={0: dict(reversed(of_epochs(0, 1)[0].items())), **of_epochs(1, 3)}),
        Round([NAMES[3]], {}, 0.9, 0.89, True, 3, [NAMES[3]], measured=of_epochs(3, 5, NAMES[3:4]), costs=costs),
        Round([NAMES[0]], {}, 0.89, 0.5, False, 5, [NAMES[0]], measured=of_epochs(5, 7, [NAMES[3], NAMES[0]]),
              costs=costs | {"latency": 2e-3}),
    ]  # fmt: skip
    return PruningReport("val_acc", rounds, order=NAMES)


def axes_of(figure, beginning):
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(beginning)]
    return found


def test_curves_are_in_the_order_of_the_network_in_colours_that_differ():
    axes = axes_of(report().figure(), "Entropy of every activation")
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert labels == [name.removeprefix("net.") for name in NAMES]
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert len({curves[label].get_color() for label in labels}) == len(NAMES)
    assert len({curves[label].get_linestyle() for label in labels}) > 1


def test_a_curve_ends_with_a_dot_where_its_activation_was_made_linear_and_not_where_that_was_taken_back():
    axes = axes_of(report().figure(), "Entropy of every activation")
    dots = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
    assert dots == [[[2.0, pytest.approx(0.17)]]]
    curves = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert np.isnan(curves["layer3.relu"]).tolist() == [False] * 3 + [True] * 4
    assert np.isnan(curves["layer0.relu"]).tolist() == [False] * 5 + [True] * 2


def test_the_map_has_a_row_a_layer_and_a_column_a_round():
    axes = axes_of(report().figure(), "Entropy at the end of each round")
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert shown.shape == (12, 3)
    assert shown[5].tolist() == pytest.approx([0.27, 0.29, 0.31])  # the last epoch of each
    assert np.argwhere(np.isnan(shown)).tolist() == [[0, 2], [3, 1], [3, 2]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dense", "1", "2"]
    assert [label.get_color() for label in axes.get_xticklabels()][:2] == ["black", "black"]
    assert axes.get_xticklabels()[2].get_color() != "black"


def test_scores_are_drawn_against_removals_and_against_measured_time():
    figure = report().figure()
    assert report().scores_by_removals() == [(0, 0.9, True), (1, 0.89, True), (2, 0.5, False)]
    axes = axes_of(figure, "val_acc against what is removed")
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[0, 0.9], [1, 0.89]], [[2, 0.5]]]
    texts = {text.get_text(): text.xy for text in axes_of(figure, "val_acc against measured time").texts}
    assert texts == {"dense": (4.0, 0.9), "round 1": (3.0, 0.89), "round 2": (2.0, 0.5)}


@pytest.mark.parametrize(("higher_is_better", "front"), [(True, ["b", "a"]), (False, ["b", "c"])])
def test_on_the_front_is_what_no_other_beats(higher_is_better, front):
    points = {"a": (4.0, 0.9), "b": (2.0, 0.8), "c": (3.0, 0.7), "d": (4.0, 0.85)}
    assert pareto_front(points, higher_is_better=higher_is_better) == front
    figure = new_figure([scores_by_time(points, "score", "time", higher_is_better=higher_is_better)])
    assert figure.axes[0].get_lines()[0].get_xydata().tolist() == [list(points[name]) for name in front]


def test_operators_that_took_the_place_of_others_stand_beside_them():
    before = dict.fromkeys(["stem", "a.0", "a.1", "b.0", "b.1", "head"], 1.0)
    times = OperatorTime.beside(before, {"stem": 1.0, "a": 2.0, "b.0": 3.0, "new": 4.0, "head": 1.0})
    assert [each.name for each in times] == ["stem", "a", "a.0", "a.1", "b.0", "new", "b.1", "head"]
    assert times[1] == OperatorTime("a", None, 2.0)
    assert times[4] == OperatorTime("b.0", 1.0, 3.0)


def test_a_collapse_and_a_compression_show_where_the_time_went(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    data = [torch.randn(16, 8) for _ in range(2)]
    result = collapse(linearize(model, ["1"]), data[0], objective="macs").report
    assert [(each.name, each.before is not None, each.after is not None) for each in result.operators] == [
        ("0", True, True), ("1", True, False), ("2", True, False), ("3", True, True), ("4", True, True),
    ]  # fmt: skip
    axes = result.figure().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "3", "4"]
    assert len(axes.patches) == 10
    compressed = compress(model, data, evaluate=lambda _: 1.0, mode="min", objective="macs").report
    assert [axes.get_title(loc="left")[:5] for axes in compressed.figure().axes] == ["score", "Where"]
    assert json.loads(compressed.to_json())["collapse"]["operators"][0]["name"] == "0"
    for name, beginning in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c", b"\x89PNG")):
        save_figure(compressed.figure(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(beginning)


def test_the_least_of_many_operators_are_one_bar():
    times = {f"layer{place}": (1e-6 * (place + 1), 1e-7) for place in range(100)}
    axes = new_figure([figures.bars_of_operators(times)]).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [*(f"layer{place}" for place in range(71, 100)), "71 others"]
    assert axes.patches[29].get_width() == pytest.approx(sum(range(1, 72)))


def test_figures_without_matplotlib_name_the_remedy(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-easier\[figures\]'"):
        report().figure()


@pytest.mark.parametrize("rounds", [[], [Round([], {}, None, None, None, 0)]], ids=["no round", "a round"])
def test_a_report_without_figures_says_so(rounds):
    with pytest.raises(ValueError, match="PruningReport has nothing to draw"):
        PruningReport("val_acc", rounds).figure()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_of_what_has_none_is_refused_before(suffix, tmp_path):
    check_report_path("--report", tmp_path / f"a{suffix}")
    check_report_path("--report", tmp_path / "a.md", pictures=False)
    with pytest.raises(ValueError, match=r"`--report` to end in one of \.md, \.json, \.txt, but got .*nothing to draw"):
        check_report_path("--report", tmp_path / f"a{suffix}", pictures=False)


@pytest.mark.parametrize("linear", [[], ["1"]])
def test_the_dense_network_has_a_score_only_where_it_was_evaluated(linear):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    if linear:
        linearize(model, linear)
    found = compress(model, [torch.randn(16, 4)], evaluate=lambda _: 0.75, objective="macs").report
    assert found.score == 0.75
    assert found.dense_score == (None if linear else 0.75)
    costs = next(found.tables())
    scores = {row[0]: row[-1] for row in costs.rows}
    assert scores.pop("dense, batch norms folded") == ("-" if linear else "0.7500")
    assert scores == dict.fromkeys(["as given", "collapsed exactly", "compressed"], "0.7500")
    drawn = {text.get_text() for text in axes_of(found.figure(), "score against").texts}
    assert drawn == {"as given", "collapsed exactly", "compressed", *([] if linear else ["dense"])}
