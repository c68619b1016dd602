"""Blocks in a row become one operator, beside what ``compress`` finds there for as many multiply-accumulates."""

import cifar
import pytest
import spans
import torch
from torch import nn

from lightning_easier.zoo import CifarResNet
from tests.benchmarks.tiny import SIDE

# Of one 3×3 convolution of the first stage, on one image.
CONVOLUTION = 16 * 16 * 9 * SIDE**2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a file with the weights of a CIFAR ResNet of two blocks a stage, whose batch norms do something."""
    torch.manual_seed(0)
    model = CifarResNet(14)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    file = tmp_path_factory.mktemp("weights") / "resnet14.th"
    torch.save({"state_dict": model.state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def ladder(root, trained):
    test = cifar.Images(str(root / "test"))
    images = cifar.Images(str(root / "train")).calibration(64, seed=0)
    return spans.Ladder(cifar.load(str(trained), 14), images, test, narrow=True, longest=3)


def test_spans_compares_one_operator_with_what_saves_as_much(tables, trained):
    given = ["--weights", str(trained), "--depth", "14", "--images", "64", "--tested", "32", "--tried", "2"]
    ((title, (head, *rows)),) = tables(spans, *given).items()
    assert title.startswith("ResNet-14, 64 training images to fit to, top-1 [%] on 32 test images")
    assert head[:5] == ["blocks", "as", "steps", "MMACs saved", "drift"]
    assert [row[0] for row in rows] == ["layer1.0–1"] * len(rows)  # in the other stages the first block is strided
    table = {way: cells for _, way, *cells in rows}
    assert list(table) == ["one operator", "combination", "search"]
    steps, saved, *_ = table["one operator"]
    assert steps == "layer1.0: identity, layer1.1: convolution"
    assert float(saved) == pytest.approx(3 * CONVOLUTION / 1e6, abs=0.005)
    for _, saved, drift, top1, refitted, refitted_top1 in table.values():
        assert float(saved) >= 3 * CONVOLUTION / 1e6 - 0.005
        assert 0 <= float(refitted) <= float(drift)
        assert 0 <= float(top1) <= 100
        assert 0 <= float(refitted_top1) <= 100


def test_combinations_save_enough_and_no_more_than_needed(ladder):
    span, wanted = ("layer1.0", "layer1.1"), 3.0 * CONVOLUTION
    found = ladder.combinations(span, wanted, 1000)
    assert len(found) > 1
    for steps in found:
        savings = [step.choice.saving for step in steps]
        assert sum(savings) >= wanted
        assert all(sum(savings) - saving < wanted for saving in savings)
    changes = [float(sum(step.change for step in steps).square().sum()) for steps in found]
    assert changes == sorted(changes)
    assert ladder.combinations(span, wanted, 1) == found[:1]


def test_what_is_measured_is_undone(ladder):
    steps = ladder.as_one_operator(("layer1.0", "layer1.1"))
    drift = ladder.drift(steps)
    assert drift > 0
    first = ladder.together(steps)
    assert first.drift == drift
    ladder.searched(("layer1.0", "layer1.1"), 3.0 * CONVOLUTION)
    assert ladder.drift([]) == 0
    assert ladder.together(steps) == first
