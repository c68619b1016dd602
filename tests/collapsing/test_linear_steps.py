"""Which linear steps of real blocks become one operator, and what is done with the others."""

import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock

from lightning_easier import CollapseError, collapse, isolate_activations, linearize
from lightning_easier.support.inference import relative_difference
from lightning_easier.zoo.cifar_resnet import CifarResNet
from tests.models import randomize_batch_norms


class Net(nn.Module):
    """A forward given as a function."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x, *others):
        return self.function(self, x, *others)


def conv(channels: int, width: int, kernel: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, **options)


def numbers(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def merges_of(model: nn.Module, shape: tuple[int, ...], objective: str = "depth", *others: tuple[int, ...]) -> dict:
    model = randomize_batch_norms(model).double().eval()
    result = collapse(model, torch.randn(shape, dtype=torch.float64), objective=objective)
    for other in (shape, *others):
        x = torch.randn(other, dtype=torch.float64)
        with torch.no_grad():
            assert relative_difference(result.model(x.clone()), model(x)) <= 1e-9
    return {merge.operators: merge.into for merge in result.report.merges}


def scaled(s, x: Tensor) -> Tensor:
    return s.conv(x) * s.gamma.reshape(1, -1, 1, 1)


def two_readers_of_one_shape(s, x: Tensor) -> Tensor:
    y = s.a(x)
    return s.b(y.view(y.size(0), -1, y.size(2), y.size(3)))


IMAGES = (2, 3, 8, 9)


@pytest.mark.parametrize(
    ("model", "shape", "merges", "others"),
    [
        # a padding that is not even stays, and its neighbours merge
        (Net(lambda s, x: F.conv2d(s.b(s.a(x)), s.weight, padding="same"), a=conv(3, 4), b=conv(4, 2),
             weight=numbers(5, 2, 2, 2)), IMAGES, {("a", "b"): "Conv2d 1×1 3→2"}, [(1, 3, 5, 4)]),
        # batch norms before an operator
        (nn.Sequential(nn.BatchNorm2d(3), conv(3, 4, 3)), IMAGES, {("0", "1"): "Conv2d 3×3 3→4"}, [(1, 3, 5, 4)]),
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)), (2, 3), {("0", "1"): "Linear 3→4"}, [(5, 3)]),
        (Net(lambda s, x: F.batch_norm(s.a(x), s.n.running_mean, s.n.running_var, eps=0.1), a=conv(3, 4),
             n=nn.BatchNorm2d(4)), IMAGES, {("a", "batch_norm"): "Conv2d 1×1 3→4"}, []),
        (Net(lambda s, x: torch.batch_norm(s.a(x), s.n.weight, s.n.bias, s.n.running_mean, s.n.running_var, False, 0.1,
                                           0.2, False), a=nn.Linear(3, 4), n=nn.BatchNorm1d(4)), (2, 3),
         {("a", "batch_norm"): "Linear 3→4"}, [(5, 3)]),
        (Net(lambda s, x: torch.batch_norm(s.a(x), None, None, s.n.running_mean, s.n.running_var, training=False,
                                           momentum=0.1, eps=0.1, cudnn_enabled=True), a=conv(3, 4),
             n=nn.BatchNorm2d(4)), IMAGES, {("a", "batch_norm"): "Conv2d 1×1 3→4"}, [(1, 3, 5, 4)]),
        # layer scales
        (Net(scaled, conv=conv(3, 4, 3), gamma=nn.Parameter(torch.randn(4))), IMAGES,
         {("conv", "mul"): "Conv2d 3×3 3→4"}, []),
        (Net(lambda s, x: s.b(s.gamma * s.a(x) - 1), a=nn.Linear(3, 4), b=nn.Linear(4, 2),
             gamma=nn.Parameter(torch.randn(4))), (2, 5, 3), {("a", "mul", "sub", "b"): "Linear 3→2"}, [(1, 7, 3)]),
        (Net(lambda s, x: s.b(1 - s.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), (2, 3),
         {("a", "sub", "b"): "Linear 3→2"}, [(5, 3)]),
        # average pooling as a convolution
        (nn.Sequential(nn.AvgPool2d(2), conv(3, 4, 3)), IMAGES, {("0", "1"): "Conv2d 6×6 3→4"}, [(1, 3, 11, 8)]),
        (Net(lambda s, x: s.a(F.avg_pool2d(x, 2, 1)), a=conv(3, 4)), IMAGES, {("avg_pool2d", "a"): "Conv2d 2×2 3→4"},
         []),
        # maps of one position
        (nn.Sequential(conv(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), IMAGES, {}, []),
        (nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), IMAGES,
         {("0", "3"): "Linear 3→2"}, [(1, 3, 5, 6)]),
        (Net(lambda s, x: s.b(s.a(x).mean((2, 3))), a=conv(3, 4), b=nn.Linear(4, 2)), IMAGES,
         {("a", "b"): "Linear 3→2"}, [(1, 3, 5, 6)]),
        # an affine of other channels than the map that is flattened
        (nn.Sequential(nn.BatchNorm2d(3), conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), IMAGES,
         {("0", "1", "4"): "Linear 3→2"}, [(1, 3, 5, 6)]),
        (Net(lambda s, x: s.b(F.adaptive_avg_pool2d(s.a(x), 1).view(-1, 4)), a=conv(3, 4), b=nn.Linear(4, 2)), IMAGES,
         {("a", "b"): "Linear 3→2"}, [(1, 3, 5, 6)]),
        (Net(lambda s, x: s.b(s.a(x).view(x.size(0), -1)), a=conv(3, 4, (8, 9)), b=nn.Linear(4, 2)), IMAGES,
         {("a", "b"): "Conv2d 8×9 3→2"}, [(5, 3, 8, 9)]),
        (Net(lambda s, x: s.b(s.a(x).mean(1)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), (2, 5, 3),
         {("a", "b"): "Linear 3→2"}, [(1, 7, 3)]),
        # other layouts
        (Net(lambda s, x: s.b(s.a(x).flatten(0, 1)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), (2, 5, 3),
         {("a", "b"): "Linear 3→2"}, [(1, 7, 3)]),
        (Net(lambda s, x: s.b(s.a(x).reshape(-1, 4)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), (2, 5, 3),
         {("a", "b"): "Linear 3→2"}, [(1, 7, 3)]),
        (Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1)), a=conv(3, 4, 3), b=nn.Linear(4, 2)), IMAGES,
         {("a", "b"): "Conv2d 3×3 3→2"}, [(1, 3, 5, 6)]),
        (Net(two_readers_of_one_shape, a=conv(3, 4), b=conv(4, 2)), IMAGES, {}, []),
        # parallel branches
        (Net(lambda s, x: s.a(x) + s.b(x) + x, a=conv(3, 3, 3, padding=1), b=conv(3, 3)), IMAGES,
         {("a", "b", "add", "add_1"): "Conv2d 3×3 3→3"}, [(1, 3, 5, 6)]),
        (Net(lambda s, x: s.a(x) - s.b(x), a=conv(3, 3, 3, padding=1), b=conv(3, 3)), IMAGES,
         {("a", "b", "sub"): "Conv2d 3×3 3→3"}, [(1, 3, 5, 6)]),
        (Net(lambda s, x: torch.add(s.a(x), x, alpha=2), a=nn.Linear(3, 3)), (2, 3),
         {("a", "add"): "Linear 3→3"}, [(5, 3)]),
        (Net(lambda s, x: x.sub(s.a(x), alpha=0.5), a=nn.Linear(3, 3)), (2, 3), {("a", "sub"): "Linear 3→3"}, []),
        (Net(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=conv(3, 3, 3, padding=1), b=conv(3, 2)), IMAGES,
         {("a", "b", "cat"): "Conv2d 3×3 3→5"}, [(1, 3, 5, 6)]),
        (Net(lambda s, x: s.c(s.b(s.a(x)) + s.a.weight.new_zeros(1)), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)), IMAGES,
         {("b", "c"): "Conv2d 1×1 3→3"}, []),
        (Net(lambda s, x: s.b(F.pad(s.a(x), (0, 0, 0, 0, 1, 2))), a=conv(3, 3), b=conv(6, 2)), IMAGES,
         {("a", "pad", "b"): "Conv2d 1×1 3→2"}, []),
        (Net(lambda s, x: s.b(s.a(x)[:, :, ::2, ::2]), a=conv(3, 3, 2), b=conv(3, 2)), IMAGES,
         {("a", "getitem", "b"): "Conv2d 2×2 3→2"}, [(1, 3, 5, 6)]),
        # transposed convolutions
        (nn.Sequential(conv(3, 4, bias=False), nn.ConvTranspose2d(4, 2, 3, 2, 1, 1)), IMAGES,
         {("0", "1"): "ConvTranspose2d 3×3 3→2"}, [(1, 3, 5, 6)]),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), conv(4, 2)), IMAGES,
         {("0", "1"): "ConvTranspose2d 3×3 3→2"}, [(1, 3, 5, 6)]),
        # functions of parameters
        (Net(lambda s, x: F.linear(F.linear(x, s.a.weight, s.a.bias), s.w), a=nn.Linear(3, 4),
             w=nn.Parameter(torch.randn(2, 4))), (2, 3), {("linear", "linear_1"): "Linear 3→2"}, [(5, 3)]),
        (Net(lambda s, x: x @ s.w @ s.v, w=nn.Parameter(torch.randn(3, 4)), v=nn.Parameter(torch.randn(4, 2))), (2, 3),
         {("matmul", "matmul_1"): "Linear 3→2"}, [(5, 3)]),
        (Net(lambda s, x: torch.mm(torch.addmm(s.c, x, s.w), s.v), w=nn.Parameter(torch.randn(3, 4)),
             v=nn.Parameter(torch.randn(4, 2)), c=nn.Parameter(torch.randn(4))), (2, 3),
         {("addmm", "mm"): "Linear 3→2"}, [(5, 3)]),
        (Net(lambda s, x: s.a(torch.addmm(s.c, x.view(-1, 3), s.w, beta=2, alpha=0.5).view(*x.shape[:-1], 4)),
             a=nn.Linear(4, 2), w=nn.Parameter(torch.randn(3, 4)), c=nn.Parameter(torch.randn(4))), (2, 5, 3),
         {("addmm", "a"): "Linear 3→2"}, [(3, 7, 3)]),
        # what leaves values as they are
        (Net(lambda s, x: s.b(s.a(x).clone().to(x.dtype).contiguous()), a=conv(3, 3), b=conv(3, 2)), IMAGES,
         {("a", "b"): "Conv2d 1×1 3→2"}, [(1, 3, 5, 6)]),
        (Net(lambda s, x: s.b(s.a(x).clone()), a=conv(3, 3, 3), b=conv(3, 2, 3)), IMAGES,
         {("a", "b"): "Conv2d 5×5 3→2"}, [(1, 3, 7, 6)]),
        (Net(lambda s, x: s.a(x).clone() + x.clone(), a=conv(3, 3)), IMAGES,
         {("a", "clone", "clone_1", "add"): "Conv2d 1×1 3→3"}, [(1, 3, 5, 6)]),
        # zeros around the map
        (nn.Sequential(nn.ZeroPad2d(1), conv(3, 4, 3)), IMAGES, {("0", "1"): "Conv2d 3×3 3→4"}, [(1, 3, 5, 4)]),
        (nn.Sequential(nn.ConstantPad1d(2, 0.0), nn.Conv1d(3, 4, 3)), (2, 3, 8), {("0", "1"): "Conv1d 3 3→4"},
         [(1, 3, 5)]),
        # numbers for each element
        (Net(lambda s, x: (x + s.p) * s.q, p=numbers(1, 3, 8, 9), q=numbers(3, 8, 9)),
         IMAGES, {("add", "mul"): "ElementAffine 3×8×9"}, [(1, 3, 8, 9)]),
        (Net(lambda s, x: s.a(((x * 2 + s.p) * s.q).flatten(1)), a=nn.Linear(30, 4), q=numbers(3, 1, 1),
             p=numbers(3, 2, 5)), (2, 3, 2, 5),
         {("mul", "add", "mul_1", "a"): "Linear 30→4"}, [(1, 3, 2, 5)]),
        (Net(lambda s, x: s.a(s.b(x) + s.p) + x, a=nn.Linear(3, 3), b=nn.Linear(3, 3),
             p=nn.Parameter(torch.randn(1, 5, 3))), (2, 5, 3), {}, [(4, 5, 3)]),
        (Net(lambda s, x: (s.a * x + s.p) - s.q * x, p=numbers(5, 3), q=numbers(5, 3),
             a=nn.Parameter(torch.randn(3))), (2, 5, 3),
         {("mul", "add", "mul_1", "sub"): "ElementAffine 5×3"}, [(4, 5, 3)]),
        # layouts in a row
        (Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).contiguous().view(-1, 72, 4)), a=conv(3, 4, 3, padding=1),
             b=nn.Linear(4, 2)), IMAGES, {("a", "b"): "Conv2d 3×3 3→2"}, []),
        # grouped and depthwise
        (nn.Sequential(conv(4, 4, 3, groups=4), conv(4, 8, 3, groups=4)), (1, 4, 8, 9),
         {("0", "1"): "Conv2d 5×5 4→8, 4 groups"}, []),
        (nn.Sequential(conv(4, 8, 3, groups=4), conv(8, 4, groups=2)), (1, 4, 8, 9),
         {("0", "1"): "Conv2d 3×3 4→4, 2 groups"}, []),
    ],
)  # fmt: skip
def test_what_becomes_one_operator(model, shape, merges, others):
    assert merges_of(model, shape, "depth", *others) == merges


def one_number_a_sample(s, x: Tensor) -> Tensor:
    return s.head(s.a(x)).squeeze(-1)


@pytest.mark.parametrize("objective", ["depth", "macs", "latency"])
@pytest.mark.parametrize(
    ("forward", "merged"),
    [
        (lambda s, x: one_number_a_sample(s, x) * 2.0 + 5.0, ("a", "head")),
        (lambda s, x: s.one - one_number_a_sample(s, x) * s.zero, ("a", "head")),
        (lambda s, x: (lambda y: 2 * y + (y + 1) - y)(one_number_a_sample(s, x)), ("a", "head")),
        (lambda s, x: (lambda y: torch.cat([y * 2, y]))(one_number_a_sample(s, x)), ("a", "head")),
        (lambda s, x: torch.stack([one_number_a_sample(s, x) / 3 - 1] * 2, 1) * 2, ("a", "head")),
        (lambda s, x: (s.b(s.a(x)).view(-1) * 2 + 1) * 3, ("a", "b")),
        (lambda s, x: s.b(s.a(x)).mean(-1) * 2 + 5, ("a", "b")),
        (lambda s, x: s.b(s.a(x)) + (s.zero * 2 + 1) * s.one, ("a", "b")),
        # values without axes
        (lambda s, x: (s.b(s.a(x)).mean() * 2 + 1) / s.zero, ("a", "b")),
        (lambda s, x: (lambda y: 2 * y + y - (y + y))(s.b(s.a(x)).mean()), ("a", "b")),
    ],
)
def test_values_of_one_axis_and_of_none_stay_as_they_are(forward, merged, objective):
    model = Net(forward, a=nn.Linear(5, 9), b=nn.Linear(9, 4), head=nn.Linear(9, 1), one=numbers(1), zero=numbers())
    merges = list(merges_of(model, (3, 5), objective, (7, 5)))  # the one axis is that of the samples
    assert merges == [merged] or (merges == [] and objective == "latency")


def test_a_vector_without_samples_has_its_channels_on_its_one_axis():
    model = Net(lambda s, x: s.b(s.a(x) * s.gamma + 1) * 2, a=nn.Linear(5, 9), b=nn.Linear(9, 4), gamma=numbers(9))
    assert merges_of(model, (5,)) == {("a", "mul", "add", "b", "mul_1"): "Linear 5→4"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "cls_attn_layers": 1}),
        ("pit_ti_224", {"img_size": 32, "base_dims": (8, 8), "depth": (1, 1), "heads": (1, 2)}),
    ],
)
def test_networks_with_values_of_one_axis_or_inputs_that_no_hook_takes(name, options):
    model = pytest.importorskip("timm").create_model(name, num_classes=3, **options).eval()
    linearize(model, list(isolate_activations(model))[::2])
    result = collapse(model, torch.randn(2, 3, 32, 32), objective="macs")
    assert result.report.merges
    assert result.report.before.macs > result.report.after.macs > 0
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_difference(result.model(x), model(x)) <= 1e-4


def test_an_average_goes_in_front_of_what_treats_every_position_alone():
    model = nn.Sequential(conv(3, 8), nn.AvgPool2d(2), nn.ReLU()).double()
    result = collapse(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), objective="macs")
    (merge,) = result.report.merges
    assert (merge.price_before, merge.price_after) == (4 * merge.price_after, 2 * 16 * 24)
    assert [node.target for node in result.model.graph.nodes if node.op == "call_module"] == ["1", "0", "2"]


def test_an_average_that_would_change_the_bias_stays_after():
    assert merges_of(nn.Sequential(conv(3, 8), nn.AvgPool2d(3, 1, 1), nn.ReLU()), (2, 3, 8, 8), "macs") == {}


def test_a_convnext_block_is_one_matrix_product_with_its_layer_scale():
    block = CNBlock(8, layer_scale=1.0, stochastic_depth_prob=0.0)
    linearize(block, list(isolate_activations(block)))
    assert merges_of(block, (2, 8, 6, 7)) == {("block.3", "block.5", "mul"): "Linear 8→8"}


def test_a_strided_block_with_a_shortcut_of_zero_channels_is_one_convolution():
    block = CifarResNet(8, num_classes=10).layer2[0]
    linearize(block, list(isolate_activations(block))[:1], shift_padding=True)
    ((operators, into),) = merges_of(block, (2, 16, 10, 12)).items()
    assert into == "Conv2d 7×7 16→32"
    assert {"conv1", "conv2"} < set(operators)


def test_an_inverted_residual_is_one_convolution_with_its_skip():
    block = torchvision.models.mobilenet_v2().features[3]
    linearize(block, list(isolate_activations(block)), shift_padding=True)
    merges = merges_of(block, (1, 24, 12, 10), "macs", (2, 24, 7, 9))
    assert merges == {("conv.0.0", "conv.1.0", "conv.2", "add"): "Conv2d 3×3 24→24"}


def test_the_result_can_be_fine_tuned():
    model = randomize_batch_norms(nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4), nn.ReLU()))
    model[0].requires_grad_(False)
    linearize(model, ["2"])
    collapsed = collapse(model, torch.randn(2, 3, 6, 6), objective="depth").model
    x, target = torch.randn(8, 3, 6, 6), torch.randn(8, 4, 4, 4)
    optimizer = torch.optim.SGD(collapsed.train().parameters(), 0.1)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(collapsed(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    frozen = nn.Sequential(conv(3, 8), conv(8, 4)).requires_grad_(False)
    assert not any(p.requires_grad for p in collapse(frozen, x, objective="depth").model.parameters())


def test_constants_are_not_trained():
    model = nn.Sequential(nn.AvgPool2d(2), conv(3, 4).requires_grad_(False))
    result = collapse(model, torch.randn(IMAGES), objective="depth")
    assert len(result.report.merges) == 1
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


class WritesIntoAShared(nn.Module):
    """Values with two names, one of which is written to."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.function = forward
        self.a, self.b, self.gamma = conv(3, 3), conv(3, 3), nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def through_a_view(s, x):
    y = s.a(x)
    y.flatten(1).mul_(2)
    return s.b(y)


def through_an_alias(s, x):
    y = s.a(x)
    z = y.mul_(s.gamma)
    z = z.add_(1)
    return s.b(z) + y


def the_input_of_a_fork(s, x):
    y = s.a(x)
    left = s.b(y)
    y += 1
    return left + y


def through_an_attribute(s, x):
    y = s.a(x)
    turned = y.mT
    turned += 1
    return s.b(y)


@pytest.mark.parametrize("forward", [through_a_view, through_an_alias, the_input_of_a_fork, through_an_attribute])
def test_values_that_are_written_to_under_another_name_keep_their_function(forward):
    merges_of(WritesIntoAShared(forward), IMAGES)


def test_inputs_that_a_model_writes_into_are_the_callers_still():
    model = Net(lambda s, x: s.a(x.mul_(2)), a=conv(3, 3))
    x = torch.randn(IMAGES)
    before = x.clone()
    collapse(model, x)
    assert torch.equal(x, before)


class Asks(nn.Module):
    """Asks for the number of samples where a reshape has changed the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(x).view(-1, 16))
        return self.b(y).sum(0) / y.size(0)


class ReplacedForward(nn.Module):
    """As adapters and accelerators do it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        forward = self.a.forward
        self.a.forward = lambda x: forward(x).clamp(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def writes_by_a_hook(s, x: Tensor) -> Tensor:
    x = x.sin()
    left = s.a(x)
    s.idle(x)
    return left + s.b(x)


def test_what_holds_at_the_example_only_is_not_used():
    assert merges_of(Asks(), (2, 1, 8), "depth", (2, 5, 8)) == {("a", "c"): "Linear 8→16"}
    assert merges_of(ReplacedForward(), (2, 3), "depth", (50, 3)) == {}
    scalars = Net(lambda s, x: (x * 2 + 1)[:, :, ::2], a=nn.Linear(1, 1))
    assert merges_of(scalars, (2, 6, 8), "depth", (2, 7, 8)) == {}
    one_position = Net(lambda s, x: F.avg_pool2d(s.a(x), 4).flatten(1) * 2, a=conv(3, 4))
    merges_of(one_position, (2, 3, 4, 4), "macs", (2, 3, 8, 8))
    idle = nn.Identity()
    idle.register_forward_hook(lambda module, args, output: output.clamp_(min=0))
    hooked = Net(writes_by_a_hook, a=conv(3, 3), b=conv(3, 3), idle=idle)
    assert merges_of(hooked, IMAGES) == {}


@pytest.mark.parametrize(
    ("model", "shape", "other"),
    [
        # reshapes that mix samples at other sizes
        (Net(lambda s, x: s.b(F.avg_pool2d(s.a(x), 7).view(-1, 8)), a=conv(4, 8), b=nn.Linear(8, 3)),
         (2, 4, 7, 7), (2, 4, 14, 14)),
        (Net(lambda s, x: s.b(s.a(x).view(-1, 8)), a=conv(4, 8), b=nn.Linear(8, 3)), (2, 4, 1, 1), (2, 4, 2, 2)),
        (Net(lambda s, x: s.b(s.a(x).view(-1, 36)), a=nn.BatchNorm2d(4), b=nn.Linear(36, 3)), (2, 4, 3, 3),
         (2, 4, 6, 3)),
        (Net(lambda s, x: s.b((x * s.g).reshape(-1, 20)), g=numbers(1, 5, 1), b=nn.Linear(20, 3)), (2, 5, 4),
         (2, 5, 8)),
        (Net(lambda s, x: s.b(s.a(x).reshape(-1, 8, 16)), a=conv(3, 8), b=nn.Conv1d(8, 5, 1)), (2, 3, 4, 4),
         (2, 3, 8, 8)),
        # the number of samples is another after it
        (Net(lambda s, x: (y := s.b(s.f(s.a(x)))) / y.size(0), a=nn.Linear(4, 8), b=nn.Linear(8, 8),
             f=nn.Flatten(0, 1)), (2, 1, 4), (2, 3, 4)),
        (Net(lambda s, x: s.c(z := s.b(s.f(s.a(x)))).view(z.size(0), -1), a=nn.Linear(4, 8), b=nn.Linear(8, 8),
             c=nn.Linear(8, 8), f=nn.Flatten(0, 1)), (4, 3, 4), (4, 2, 4)),
        # in another rank
        (Net(lambda s, x: s.b(s.a(F.avg_pool2d(x, 2).flatten(2) + s.g).clone()), a=nn.Conv1d(3, 8, 3, padding=1),
             b=nn.Conv1d(8, 3, 1), g=numbers(3, 1)), (2, 3, 8, 8), (3, 3, 6, 8)),
        (Net(lambda s, x: torch.cat([(h := s.a(x)) * s.g, h * s.h], -1).mean((1, 2)), a=nn.Linear(4, 8), g=numbers(8),
             h=numbers(1, 1, 1, 8)), (2, 5, 6, 4), (3, 4, 6, 4)),
        (Net(lambda s, x: s.b(s.a(s.c(x).permute(0, 2, 3, 1)).view(-1, 6)), c=conv(3, 8), a=nn.Linear(8, 6),
             b=nn.Linear(6, 5)), (1, 3, 4, 5), (2, 3, 4, 5)),
        (Net(lambda s, x: torch.relu(s.a(s.c(x).permute(0, 2, 3, 1))).view(-1, 6), c=conv(3, 8), a=nn.Linear(8, 6)),
         (2, 3, 4, 5), (3, 3, 4, 5)),
        # a factor that is a size
        (Net(lambda s, x: torch.add(s.a(x), x, alpha=x.size(0)), a=nn.Linear(3, 3)), (2, 3), (5, 3)),
        # pools of maps without samples
        (Net(lambda s, x: F.adaptive_avg_pool2d(s.a(x), (2, 1)), a=nn.Conv1d(8, 4, 1)), (3, 8, 6), (2, 8, 5)),
        # keywords in another order
        (Net(lambda s, x: torch.sub(other=s.a(x), input=s.b(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3)), (2, 3), (5, 3)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["depth", "macs"])
def test_a_model_keeps_its_function_at_other_sizes(model, shape, other, objective):
    merges_of(model, shape, objective, other)


def test_an_affine_after_an_average_has_the_axes_that_are_left():
    merges_of(Net(lambda s, x: (x * s.g).mean((1, 2)), g=numbers(1, 1, 1, 8)), (16, 32, 32, 8), "latency", (3, 8, 8, 8))


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.view(y.size(0), -1),
        lambda y: y.view(size=(-1, 2)),
        lambda y: torch.relu(y).view([-1]),
        lambda y: torch.ops.aten.view.default(y, [-1]),
        lambda y: (y.view(torch.int64) >> 40).double(),
    ],
)
def test_a_view_after_a_chain_reads_what_is_laid_out_in_another_order(view):
    # what the permutation gives, after the merged convolution, is not contiguous; what a Linear gives is
    model = Net(lambda s, x: view(s.b(s.a(x).permute(0, 2, 3, 1))), a=conv(3, 4, 3), b=nn.Linear(4, 2))
    assert merges_of(model, (2, 3, 5, 5), "depth", (4, 3, 7, 6)) == {("a", "b"): "Conv2d 3×3 3→2"}


def test_what_is_written_into_by_a_view_is_written_into():
    def forward(s, x: Tensor) -> Tensor:
        y = s.b(s.a(x).permute(0, 2, 3, 1))
        y.view(-1).add_(1)
        y.view(-1).view(-1, 2)[:, 0] = 0
        return y

    model = Net(forward, a=conv(3, 4, 3), b=nn.Linear(4, 2))
    assert merges_of(model, (2, 3, 5, 5), "depth", (4, 3, 7, 6)) == {("a", "b"): "Conv2d 3×3 3→2"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x, c: s.b(F.linear(x, s.a.weight, c)),
        lambda s, x, c: s.b(torch.addmm(c, x, s.a.weight.T)),
        lambda s, x, c: s.b(F.linear(x, s.a.weight + c.view(-1, 1))),
        lambda s, x, c: F.batch_norm(s.a(x), s.n.running_mean, s.n.running_var, c + 1),
    ],
)
def test_a_weight_or_bias_that_is_an_input_is_no_constant(forward):
    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), n=nn.BatchNorm1d(4))
    model = randomize_batch_norms(model).double().eval()
    x = torch.randn(2, 3).double()
    collapsed = collapse(model, (x, torch.zeros(4).double()), objective="depth").model
    c = torch.randn(4).double()
    assert relative_difference(collapsed(x, c), model(x, c)) <= 1e-9


def copies_and_writes(s, x: Tensor) -> Tensor:
    z = x[:, :, ::2, ::2].clone()
    z *= s.g
    return s.b(s.a(z).clone())


def test_a_copy_that_is_written_into_protects_the_input():
    model = Net(copies_and_writes, g=numbers(3, 3, 3), a=conv(3, 8, 3, padding=1), b=conv(8, 3)).eval()
    for objective in ("depth", "macs"):
        x = torch.randn(2, 3, 6, 6)
        collapsed = collapse(model, x, objective=objective).model
        before = x.clone()
        collapsed(x)
        assert torch.equal(x, before)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x)


def test_a_forward_that_leaves_something_behind_or_draws_numbers_is_refused():
    model = Counts()
    with pytest.raises(CollapseError, match="writes to the buffer 'calls'"):
        collapse(model, torch.randn(2, 3))
    assert model.calls == 0
    with pytest.raises(CollapseError, match="differs from call to call"):
        collapse(Net(lambda s, x: s.a(x) + torch.rand(3), a=nn.Linear(3, 3)), torch.randn(2, 3))


def test_a_buffer_that_is_not_a_number_is_none_that_is_written_to():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_buffer("unset", torch.tensor([float("nan"), 1.0]))
    assert len(collapse(model, torch.randn(2, 3), objective="macs").report.merges) == 1


def test_the_random_state_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 3))
    state = torch.random.get_rng_state()
    collapse(model, torch.ones(2, 3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_result_can_be_pickled_and_its_folded_biases_are_trained():
    model = randomize_batch_norms(nn.Sequential(conv(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())).eval()
    collapsed = collapse(model, torch.randn(IMAGES)).model
    assert all(parameter.requires_grad for parameter in collapsed.parameters())
    assert len(list(collapsed.parameters())) == 2
    x = torch.randn(IMAGES)
    assert torch.equal(pickle.loads(pickle.dumps(collapsed))(x), collapsed(x))


def test_shapes_that_are_asked_for_and_asserted_do_not_stop_a_chain():
    def forward(s, x: Tensor) -> Tensor:
        y = s.a(x)
        torch._assert(y.ndim == 4, "maps are expected")
        return s.b(y).reshape(y.shape[0], -1)

    assert merges_of(Net(forward, a=conv(3, 4), b=conv(4, 2)), IMAGES) == {("a", "b"): "Conv2d 1×1 3→2"}


def test_two_chains_in_a_row_are_timed_and_written():
    def forward(s, x: Tensor) -> Tensor:
        y = s.b(s.a(x))
        return torch.relu(s.d(s.c(y))) + y

    layers = {"a": nn.Linear(8, 999), "b": nn.Linear(999, 8), "c": nn.Linear(8, 999), "d": nn.Linear(999, 8)}
    merges = merges_of(Net(forward, **layers), (64, 8), "latency")
    assert merges == {("a", "b"): "Linear 8→8", ("c", "d"): "Linear 8→8"}


@pytest.mark.parametrize("step", [lambda x: 0.3 * x, lambda x: x / 0.7, lambda x: x + 0.1, lambda x: 0.01 - x])
@pytest.mark.filterwarnings("error")
def test_a_number_that_float32_rounds_is_taken_as_it_is_written(step):
    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return step(self.linear(x))

    net = Stepping()
    result = collapse(net, torch.randn(4, 5), objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("linear", result.report.merges[0].operators[1])]
    exact = collapse(net.double(), torch.randn(4, 5, dtype=torch.float64), objective="depth")
    x = torch.randn(7, 5, dtype=torch.float64)
    assert (exact.model(x) - net(x)).abs().max() < 1e-15
