"""What is said to merge around an activation is what a collapse merges; where nothing would, the reason is given."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MeanMetric
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from lightning_easier import candidates, collapse, linearize
from tests.models import narrow, randomize_batch_norms
from tests.sites.test_dataflow import Net


def by_name(model, **options):
    return {candidate.name: candidate for candidate in candidates(model, **options).candidates}


def test_what_lies_around_each_activation_of_a_residual_network():
    found = by_name(torchvision.models.resnet18())
    assert list(found)[:3] == ["relu", "layer1.0.relu", "layer1.0.relu_1"]
    assert found["relu"].before == ("conv1",)
    assert found["relu"].after == ()
    assert found["relu"].reason == "what comes after it is `maxpool` (MaxPool2d), not a linear operator"
    inner = found["layer1.0.relu"]
    assert (inner.before, inner.after) == (("layer1.0.conv1",), ("layer1.0.conv2",))
    assert (inner.merges, inner.reason) == ((("layer1.0.conv1", "layer1.0.conv2"),), None)
    unmoved = by_name(torchvision.models.resnet18(), shift_padding=False)["layer1.0.relu"]
    assert unmoved.merges == ()
    assert "`layer1.0.conv1` and `layer1.0.conv2` would meet, but the second pads its input by (1, 1)" in unmoved.reason
    outer = found["layer2.0.relu_1"]
    assert (outer.before, outer.after) == (("layer2.0.conv2", "layer2.0.downsample.0"), ("layer2.1.conv1",))
    assert outer.reason.startswith("its value has 2 readers: `layer2.1.conv1` (Conv2d), `layer2.1.")
    assert outer.merges == ()


def conv(*channels, kernel=1, **options):
    return nn.Conv2d(*channels, kernel, **options)


def tied():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[0].register_forward_hook(lambda *_: None)
    return model


def hooked_between():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 5))
    model[2].register_forward_hook(lambda *_: None)
    return model


def hooked_around():
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), nn.Linear(5, 5))
    model[0].register_forward_hook(lambda *_: None)
    return model


class Takes(nn.Module):
    """Passes its first value on, whatever else it gets."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, other=None, *more, skip=None):
        x = self.layer(x[0] if isinstance(x, list) else x)
        return x if other is None and skip is None else x + (other if skip is None else skip)


def linears():
    return {"a": nn.Linear(5, 5), "act": nn.ReLU(), "b": nn.Linear(5, 5)}


def net(forward):
    return Net(forward, **linears())


IMAGES, VECTORS = (2, 2, 4, 5), (3, 5)


@pytest.mark.parametrize(
    ("model", "shape", "merges", "reason"),
    [
        (nn.Sequential(conv(2, 3), nn.ReLU(), conv(3, 2)), IMAGES, [("0", "2")], None),
        (nn.Sequential(conv(2, 3), nn.Identity(), nn.ReLU(), nn.Dropout(), conv(3, 2)), IMAGES, [("0", "4")], None),
        (nn.Sequential(conv(2, 3), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2)), IMAGES, [("0", "3")], None),
        (nn.Sequential(conv(2, 3), nn.ReLU(), nn.BatchNorm2d(3), conv(3, 2)), IMAGES, [("0", "3")], None),
        (net(lambda s, x: s.b(F.dropout(s.act(s.a(x)), 0.5, s.training))), VECTORS, [("a", "b")], None),
        (nn.Sequential(conv(2, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2, kernel=3, padding=1)), IMAGES,
         [("0", "3")], None),
        (nn.Sequential(conv(2, 3), nn.ReLU(), conv(3, 2, kernel=3, padding=1, padding_mode="reflect")), IMAGES,
         [], "padding mode 'reflect' does not commute"),
        (nn.Sequential(conv(2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 5, 2)), IMAGES, [],
         "`0` and `3` would meet, but a flatten lies between them"),
        (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 3)), VECTORS, [],
         "what comes after it is `2` (LayerNorm), not a linear operator"),
        (nn.Sequential(nn.ReLU(), nn.Linear(5, 3)), VECTORS, [],
         "what comes before it is the model's input, not a linear operator"),
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU()), VECTORS, [],
         "what comes after it is the model's output, not a linear operator"),
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU(), conv(2, 2)), (1, 2, 4, 5), [],
         "`0` and `2` would meet, but no merge of Linear and Conv2d is known"),
        (net(lambda s, x: s.b(s.act(s.a(x) + x))), VECTORS, [],
         "`a` and `b` would meet, but an addition lies between them"),
        (net(lambda s, x: s.b(s.act(y := s.a(x))) + y), VECTORS, [],
         "the value of `a` (Linear) has 2 readers: `act` (ReLU), `add` (function)"),
        (net(lambda s, x: s.b(s.act(F.linear(x, s.a.weight * 2)))), VECTORS, [],
         "`linear` and `b` would meet, but one of them is a function, not a module"),
        (net(lambda s, x: s.b(s.act(s.a(x))) if x.sum() > 0 else x), None, [],
         "it lies in the forward of `Net`, which can't be traced"),
        (net(lambda s, x: s.b(s.b(s.act(s.a(x))))), VECTORS, [], "`b` is called 2 times"),
        (net(lambda s, x: (y := s.act(s.a(x)), s.b(y))), VECTORS, [],
         "its value has 2 readers: `b` (Linear), `outputs`"),
        (net(lambda s, x: s.b(torch.cat([y := s.a(x), s.act(y)]))), VECTORS, [],
         "what comes after it is `cat` (function)"),
        # what a block does with a value that it is given is followed, or taken for another reader
        (Net(lambda s, x: s.t([y := s.act(s.a(x)), y]), a=nn.Linear(5, 5), act=nn.ReLU(), t=Takes(nn.Linear(5, 5))),
         None, [], "what comes after it is `list` (function)"),
        (Net(lambda s, x: s.t(x, s.act(s.a(x))), a=nn.Linear(5, 5), act=nn.ReLU(), t=Takes(nn.Linear(5, 5))),
         VECTORS, [], "what comes after it is an optional argument of `t`, not a linear operator"),
        (Net(lambda s, x: s.t(x, skip=s.act(s.a(x))), a=nn.Linear(5, 5), act=nn.ReLU(), t=Takes(nn.Linear(5, 5))),
         VECTORS, [], "what comes after it is an optional argument of `t`, not a linear operator"),
        (Net(lambda s, x: s.t(s.act(s.a(x))), a=nn.Linear(5, 5), act=nn.ReLU(), t=Takes(nn.Linear(5, 5))),
         None, [("a", "t.layer")], None),
        (tied(), VECTORS, [], "one of them shares its parameters with something else"),
        (net(lambda s, x: s.b(s.act(s.a(x))) + s.a.weight.sum()), VECTORS, [], "shares its parameters with something"),
        (hooked_between(), VECTORS, [], "`2` has hooks"),
        (hooked_around(), VECTORS, [], "`0` has hooks"),
        (hooked(), VECTORS, [], "`0` has hooks"),
    ],
)  # fmt: skip
def test_what_would_merge_and_why_nothing_would(model, shape, merges, reason):
    (found,) = candidates(randomize_batch_norms(model)).candidates
    assert list(found.merges) == merges
    assert found.reason is None if reason is None else reason in found.reason
    if shape is not None:
        linearize(model, [found.name], shift_padding=True)
        made = collapse(model, torch.randn(shape), objective="depth").report.merges
        # a collapse finds parallel branches, too
        assert [merge.operators for merge in made if "add" not in merge.operators] == merges


def test_a_block_that_is_called_twice_has_no_neighbourhood_of_its_own():
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    (found,) = candidates(Net(lambda s, x: s.block(s.block(x)), block=block)).candidates
    assert found.merges == ()
    assert found.reason == "`block.1` is called 2 times"


def narrow_resnet50() -> nn.Module:
    with torch.device("meta"):
        model = ResNet(Bottleneck, [2, 1, 1, 1])
    return narrow(model, 4)


# Each block of them in all its forms, and not as often
MOBILE_BLOCKS = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]


@pytest.mark.parametrize(
    "build",
    [
        partial(VisionTransformer, 64, 32, 2, 4, 64, 256),
        partial(MobileNetV2, inverted_residual_setting=MOBILE_BLOCKS),
        narrow_resnet50,
    ],
    ids=["vit_b_32", "mobilenet_v2", "resnet50"],
)
def test_what_is_said_to_merge_is_what_a_collapse_merges(build):
    listed = [candidate for candidate in candidates(build()).candidates if candidate.before and candidate.after]
    for chosen in ([c for c in listed if c.merges][:1], [c for c in listed if not c.merges][:1]):
        for candidate in chosen:
            torch.manual_seed(0)
            pruned = randomize_batch_norms(build().eval())
            linearize(pruned, [candidate.name], shift_padding=True)
            merges = collapse(pruned, torch.randn(1, 3, 64, 64), objective="depth").report.merges
            around = {candidate.before[0], candidate.after[0]}
            assert any(around <= set(merge.operators) for merge in merges) == bool(candidate.merges), candidate


def test_nothing_is_touched_and_the_mode_stays():
    model = torchvision.models.resnet18()
    model.layer1.eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    candidates(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_the_table_shows_entropies_and_names_beside_the_activation():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), nn.GELU(), nn.Linear(2, 2))
    report = candidates(model, {"0.1": 0.25})
    shown = report.to_markdown()
    assert "| 0.1 | ReLU | 0.2500 | .0 → .2 | .0 + .2 |" in shown
    assert "| 1 | GELU | - | 0.2 → 2 | 0.2 + 2 |" in shown
    assert json.loads(report.to_json())["candidates"][0]["merges"] == [["0.0", "0.2"]]
    with pytest.raises(ValueError, match=r"`entropies` to hold names of activations, but got 'x'"):
        candidates(model, {"x": 0.1})
    with pytest.raises(TypeError, match="to be a torch.nn.Module, but got int"):
        candidates(3)


def test_a_batch_norm_is_taken_to_have_a_bias_though_it_has_none_before_training():
    model = nn.Sequential(conv(2, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2, kernel=3, padding=1))
    (found,) = candidates(model, shift_padding=False).candidates
    assert found.merges == ()
    assert "at the borders it sees zeros where the first would have put its bias" in found.reason


def test_gates_are_listed_on_request():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2))
    assert candidates(model).candidates == []
    assert by_name(model, gates=True)["1"].merges == (("0", "2"),)


def test_a_forward_that_a_strategy_has_redirected_for_a_while_is_the_class_s_own():
    """Lightning puts it back on the instance."""
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))})["inner"]
    model.forward = model.forward
    assert [candidate.merges for candidate in candidates(model).candidates] == [(("0", "2"),)]
    model.forward = lambda x: x
    assert all(not candidate.merges for candidate in candidates(model).candidates)


def test_the_networks_of_a_module_without_a_forward_are_looked_at_each_on_its_own():
    """What calls them are the steps of training, in an order of their own."""

    class Pair(LightningModule):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU())
            self.accuracy = MeanMetric()
            self.second = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))

    merges = {candidate.name: candidate.merges for candidate in candidates(Pair()).candidates}
    assert merges == {
        "first.1": (("first.0", "first.2"),),
        "first.3": (),
        "second.1": (("second.0", "second.2"),),
    }
