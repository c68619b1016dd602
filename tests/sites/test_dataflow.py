"""The neuron axis of an activation is told by the layers and the reshapes that its values went through."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_easier import measure_entropy
from lightning_easier.sites.activations import isolated_sites


class MatrixProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 3, 1), torchvision.models.convnext.LayerNorm2d(3), nn.ReLU()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return F.gelu(x.flatten(2).transpose(1, 2) @ self.weight)


def test_the_neuron_axis_after_matrix_products_and_norms_that_permute():
    assert [(site.name, site.neuron_dim) for site in isolated_sites(MatrixProduct())] == [("act", 1), ("gelu", -1)]


class Convolutional(nn.Module):
    """A convolution map, then tokens, then channels last, each with a rectifier after it."""

    def __init__(self):
        super().__init__()
        self.conv, self.act1 = nn.Conv2d(2, 3, 1), nn.ReLU()
        self.fc1, self.act2 = nn.Linear(3, 5), nn.GELU()
        self.norm, self.act3 = nn.BatchNorm1d(7), nn.ReLU()

    def forward(self, x):
        x = self.act1(self.conv(x)).flatten(2).transpose(1, 2)
        return self.act3(self.norm(self.act2(self.fc1(x))))


def test_the_neuron_axis_is_that_of_the_layer_before():
    sites = isolated_sites(Convolutional())
    assert [(site.name, site.neuron_dim) for site in sites] == [("act1", 1), ("act2", -1), ("act3", 1)]
    entropies = measure_entropy(Convolutional(), [torch.randn(2, 2, 7, 1)])
    assert list(entropies) == ["act1", "act2", "act3"]


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.compute(self, x)


class HalfPrecisionNorm(nn.LayerNorm):
    """As in OpenAI's CLIP."""

    def forward(self, x):
        return super().forward(x.float()).type_as(x)


def tokens(size=3):
    return nn.Linear(size, 5)


@pytest.mark.parametrize(
    ("net", "shape", "neurons"),
    [
        # a generator: vectors become maps
        (Net(lambda s, x: s.conv(F.relu(s.fc(x).view(-1, 5, 2, 3))), fc=nn.Linear(3, 30), conv=nn.Conv2d(5, 2, 1)),
         (4, 3), [5]),
        (nn.Sequential(nn.Linear(3, 30), nn.Unflatten(1, (5, 2, 3)), nn.ReLU(), nn.ConvTranspose2d(5, 2, 2)),
         (4, 3), [5]),
        (Net(lambda s, x: s.norm(F.relu(s.fc(x).reshape(len(x) if False else -1, 5, 6))),
             fc=nn.Linear(3, 30), norm=nn.BatchNorm1d(5)), (4, 3), [5]),
        # squeeze and excitation: a gate computed by Linear works on maps
        (Net(lambda s, x: F.relu(s.conv(x) * s.fc(x.mean([2, 3])).sigmoid()[:, :, None, None]),
             conv=nn.Conv2d(3, 5, 1), fc=tokens()), (4, 3, 2, 7), [5]),
        (Net(lambda s, x: F.relu(s.fc(x.mean([2, 3])).sigmoid().view(-1, 5, 1, 1) * s.conv(x)),
             conv=nn.Conv2d(3, 5, 1), fc=tokens()), (4, 3, 2, 7), [5]),
        (Net(lambda s, x: F.relu(s.fc(x.mean([2, 3])).unsqueeze(-1).unsqueeze(-1) + s.conv(x)),
             conv=nn.Conv2d(3, 5, 1), fc=tokens()), (4, 3, 2, 7), [5]),
        # permutations, back and forth
        (Net(lambda s, x: F.relu(s.conv(x).permute(0, 2, 3, 1)), conv=nn.Conv2d(3, 5, 1)), (4, 3, 2, 7), [5]),
        (Net(lambda s, x: F.relu(torch.permute(s.fc(x.permute(0, 2, 3, 1)), (0, 3, 1, 2))), fc=tokens()),
         (4, 3, 2, 7), [5]),
        (Net(lambda s, x: F.relu(s.conv(x).transpose(1, 2)), conv=nn.Conv1d(3, 5, 1)), (4, 3, 7), [5]),
        (Net(lambda s, x: F.relu(s.conv(x).transpose(1, -1)), conv=nn.Conv1d(3, 5, 1)), (4, 3, 7), [5]),
        (Net(lambda s, x: F.relu(s.conv(x).flatten(2).transpose(1, 2)), conv=nn.Conv2d(3, 5, 1)), (4, 3, 2, 7), [5]),
        (Net(lambda s, x: s.conv(F.relu(s.fc(x).transpose(1, 2))), fc=tokens(), conv=nn.Conv1d(5, 2, 1)),
         (4, 7, 3), [5]),
        (Net(lambda s, x: s.out(F.relu(s.conv(x).flatten(1))), conv=nn.Conv2d(3, 5, 1), out=nn.Linear(30, 2)),
         (4, 3, 2, 3), [30]),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2), nn.ReLU()), (4, 3, 2, 7), [5]),
        (nn.Sequential(tokens(), nn.Flatten(1, 2), nn.ReLU()), (4, 2, 7, 3), [5]),
        # a block that normalises tokens as vectors in between (LeViT), and one that multiplies flat (GPT-2)
        (Net(lambda s, x: s.fc2(F.relu((y := s.fc(x)) + s.norm(y.flatten(0, 1)).reshape_as(y))),
             fc=tokens(), norm=nn.BatchNorm1d(5), fc2=nn.Linear(5, 2)), (4, 7, 3), [5]),
        (Net(lambda s, x: F.relu(torch.addmm(s.fc.bias, x.view(-1, 3), s.fc.weight.t()).view(4, 7, 5)), fc=tokens()),
         (4, 7, 3), [5]),
        (Net(lambda s, x: F.max_pool1d(F.relu(s.fc(x).transpose(1, 2)), 2), fc=tokens()), (4, 7, 3), [5]),
        (Net(lambda s, x: F.relu(s.fc(x).transpose(dim0=1, dim1=2)).mean(-1), fc=tokens()), (4, 7, 3), [5]),
        (Net(lambda s, x: F.relu(s.fc(x).mT), fc=tokens()), (4, 7, 3), [5]),
        (Net(lambda s, x: F.relu(s.conv(x).movedim(1, -1)), conv=nn.Conv2d(3, 5, 1)), (4, 3, 2, 7), [5]),
        (Net(lambda s, x: F.relu(torch.movedim(s.fc(x), -1, 1)), fc=tokens()), (4, 2, 7, 3), [5]),
        (Net(lambda s, x: F.relu(s.fc(x)[:, :, None, None]), fc=tokens()), (4, 3), [5]),
        (Net(lambda s, x: F.relu(torch.stack([s.conv(x), s.conv(x)], 1)), conv=nn.Conv2d(3, 5, 1)), (4, 3, 2, 7), [5]),
        (Net(lambda s, x: F.relu(torch.einsum("bct,cd->btd", x, s.fc.weight.t())), fc=tokens()), (4, 3, 7), [5]),
        (Net(lambda s, x: F.relu(s.fc.weight @ x), fc=tokens()), (4, 3, 7), [5]),
        # norms of somebody's own
        (nn.Sequential(tokens(), timm.layers.LayerNorm(5), nn.GELU()), (4, 7, 3), [5]),
        (nn.Sequential(tokens(), HalfPrecisionNorm(5), nn.GELU()), (4, 7, 3), [5]),
        (nn.Sequential(nn.Conv2d(3, 5, 1), timm.layers.LayerNorm2d(5), nn.GELU()), (4, 3, 2, 7), [5]),
        (nn.Sequential(nn.Conv2d(3, 5, 1), timm.layers.LayerNormAct2d(5)), (4, 3, 2, 7), [5]),
        # other axes
        (nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU()), (4, 3, 7), [5]),
        (nn.Sequential(nn.Conv3d(3, 5, 1), nn.GroupNorm(5, 5), nn.ELU()), (4, 3, 2, 7, 6), [5]),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 5, 1)), (4, 3, 2, 7), [3]),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 5)), (4, 7, 3), [3]),
        (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU()), (4, 7, 3), [5]),
        (Net(lambda s, x: F.relu(s.rnn(x)[0]), rnn=nn.GRU(3, 5, batch_first=True)), (4, 7, 3), [5]),
        (Net(lambda s, x: F.relu(s.attention(x, x, x)[0]), attention=nn.MultiheadAttention(4, 2)), (3, 7, 4), [4]),
    ],
)  # fmt: skip
def test_the_neuron_axis_follows_the_values(net, shape, neurons):
    sizes = []
    sites = isolated_sites(net.eval())
    for site in sites:
        axis = site.neuron_dim
        site.module.register_forward_pre_hook(lambda _, args, axis=axis: sizes.append(args[0].shape[axis]))
    net(torch.randn(shape))
    assert sizes == neurons


def test_a_wrong_shape_names_the_activation_and_the_remedy():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"activation `1` can't be measured: .*got shape \(5,\).*override its `neuron_dim`"
    ):
        measure_entropy(model, [torch.randn(3)])
    with pytest.raises(
        ValueError, match=r"activation `1` can't be measured: .*7 neurons on axis 1.*got shape \(2, 8, 5\)"
    ):
        measure_entropy(model, [torch.randn(2, 7, 3), torch.randn(2, 8, 3)], neuron_dim={"1": 1})
