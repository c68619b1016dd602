"""Activations of a trained ResNet are removed one after the other: in each way and order, with and without training."""

import cifar
import drifting
import pytest
import removing
import rounds
import torch

from lightning_easier import fit_chains, measure_affines, measure_entropy
from lightning_easier.structure.linearize import stand_ins


@pytest.fixture
def dense_accuracy(root, weights):
    return f"{cifar.accuracy(cifar.load(str(weights), 8), cifar.Images(str(root / 'test'))):.1f}"


INNER = [f"layer{stage}.0.relu1" for stage in (1, 2, 3)]


def test_drifting_tells_the_drift_after_each_operator(tables, dense_accuracy):
    ((title, (head, *rows)),) = tables(drifting, "--images", "32").items()
    assert title.startswith("ResNet-8, 32 training images")
    assert head == ["tried", "drift", "top-1 [%]"]
    assert [row[0] for row in rows] == [str(number) for number in range(len(rows))]
    assert rows[0][1:] == ["0.000", dense_accuracy]
    drifts = [float(row[1]) for row in rows]
    assert len(rows) > 3
    assert max(drifts) > 0
    assert all(0 <= float(row[2]) <= 100 for row in rows)


def test_removing_compares_ways_and_orders(tables, dense_accuracy):
    ((title, (head, *rows)),) = tables(removing, "--images", "32").items()
    assert title == "ResNet-8, top-1 [%] on 64 test images, no training after removals"
    assert head[2:] == ["0", "1", "2", "3"]
    orders = {"identity": 2, "affine": 3, "fitted": 3}
    assert [row[0] for row in rows] == [way for way, count in orders.items() for _ in range(count)]
    assert {row[2] for row in rows} == {dense_accuracy}
    for way in ("identity", "affine"):  # with all of them gone, the order says nothing
        assert len({row[-1] for row in rows if row[0] == way}) == 1
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[2:])


def test_rounds_prune_and_tune_in_turn(tables):
    ((title, (head, *rows)),) = tables(rounds, "--rounds", "2", "--removed", "1", "--images", "128").items()
    assert title.startswith("ResNet-8, top-1 [%] after 128 images a round, 1 seeds, from ")
    assert head[2:] == ["1", "2"]
    assert [row[:2] for row in rows] == [
        ["dense", ""], *([way, order] for way in rounds.WAYS for order in ("entropy", "linearity"))
    ]  # fmt: skip
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[2:])


@pytest.mark.parametrize("way", rounds.WAYS)
def test_a_round_makes_those_linear_that_are_lowest_in_its_order(way, root, weights):
    images = [cifar.Images(str(root / "train")).batch(torch.arange(32))]
    model = cifar.load(str(weights), 8)
    explained = fit_chains(model, images) if way == "fitted" else measure_affines(model, images)
    lowest = {
        "entropy": sorted(INNER, key=measure_entropy(model, images).__getitem__),
        "linearity": sorted(INNER, key=lambda name: -explained[name].explained),
    }
    for order, expected in lowest.items():
        model = cifar.load(str(weights), 8)
        assert list(rounds.WAYS[way](order)(model, INNER, images, 2)) == expected[:2]
        assert sorted(stand_ins(model)) == sorted(expected[:2])
