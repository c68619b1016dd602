"""Methods that empty layers are compared: what is counted of a network is right, and what is done is not done again."""

from collections import OrderedDict

import cifar
import emptying
import pytest
import torch
from torch import nn

from lightning_easier import isolate_activations, linearize

SHORT = ["--rounds", "1", "--images", "32", "--held_out", "32", "--batch", "32", "--within", "100", "--distill"]


def test_what_is_left_of_a_network_is_counted(root, weights):
    inner = cifar.load(str(weights), 8)
    model = nn.Sequential(OrderedDict(model=inner))
    images = cifar.Images(str(root / "test"))
    batches = [images.batch(torch.arange(64))]
    assert emptying.scored(0, model, images, batches).emptied == 0
    isolate_activations(inner)
    linearize(inner, ["layer1.0.relu1", "layer3.0.relu2"])
    nn.init.zeros_(inner.layer2[0].bn1.weight)  # neurons that are always ON do not switch
    nn.init.ones_(inner.layer2[0].bn1.bias)
    nn.init.zeros_(inner.layer2[0].conv1.weight)
    found = emptying.scored(3, model, images, batches)
    assert (found.number, found.model, found.emptied) == (3, model, 3)
    assert found.accuracy == cifar.accuracy(model, images)
    convolutions = [module.weight.numel() for module in inner.modules() if isinstance(module, nn.Conv2d)]
    assert found.sparsity == pytest.approx(inner.layer2[0].conv1.weight.numel() / sum(convolutions))


def test_methods_prune_in_rounds_and_what_is_done_is_not_done_again(tables, tmp_path, monkeypatch):
    trained, train = [], emptying.train
    monkeypatch.setattr(emptying, "train", lambda method, *rest: trained.append(method) or train(method, *rest))
    methods = ("nepenthe", "tlc", "easier")
    given = ["--output", str(tmp_path), *SHORT, "--methods"]
    by_round, last = tables(emptying, *given, "dense", *methods).items()
    assert trained == ["dense", *methods]
    title, (head, *rows) = by_round
    assert title == "ResNet-8, 1 rounds of 1 × 32 images"
    assert head == ["method", "round", "top-1 [%]", "emptied", "zeros"]
    rounds = {method: [row[1:] for row in rows if row[0] == method] for method in ("dense", *methods)}
    assert [row[0] for row in rows] == [method for method, found in rounds.items() for _ in found]
    assert [number for number, *_ in rounds["dense"]] == ["0"]
    for method in methods:
        assert [number for number, *_ in rounds[method]][:2] == ["0", "1"]
        assert rounds[method][0][2:] == ["0", "0.0%"]
    inside, all_convolutions = 2304 + 4608 + 18432, 432 + 4608 + 13824 + 55296
    zeros = f"{inside / 2 / all_convolutions:.1%}"  # half of the weights that feed an activation inside a block
    assert rounds["nepenthe"][1][3] == zeros
    assert rounds["tlc"][1][2:] == rounds["easier"][1][2:] == ["1", "0.0%"]
    title, (head, *timed) = last
    assert title == "The last within 100"
    assert head == ["method", "round", "top-1 [%]", "emptied", "zeros", "batch", "MACs", "speedup"]
    ends = [[method, *found[-1]] for method, found in rounds.items()]
    assert [row[:6] for row in timed] == [[*row, batch] for row in ends for batch in ("64", "1")]
    macs = {row[0]: int(row[6].replace(",", "")) for row in timed}
    assert macs["easier"] >= macs["dense"] > 0  # two 3×3 convolutions do not merge into anything cheaper
    assert timed[0][7].startswith("1.00×")  # by a clock that counts work

    (tmp_path / "easier" / "report.md").unlink()
    again, _ = tables(emptying, *given, "tlc", "easier").values()
    assert trained == ["dense", *methods, "easier"]
    assert again[1:] == [row for row in rows if row[0] in ("tlc", "easier")]
