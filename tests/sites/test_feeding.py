"""Which weights feed an activation: those from which its neurons come, each weight for one activation only."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_easier.measure.affines import AffineFit
from lightning_easier.sites.activations import isolate, plan_isolation
from lightning_easier.sites.feeding import feeding_weights
from lightning_easier.structure.stand_in import AffineStandIn, IdentityStandIn


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.add_module(name, layer)

    def forward(self, x):
        return self.compute(self, x)


def fed(model):
    """Return site -> names of the weights that feed it; they have to be the same once the sites are isolated."""
    plan = plan_isolation(model)
    before = feeding_weights(model, plan)
    isolate(model, plan)
    assert feeding_weights(model, plan) == before == feeding_weights(model, plan_isolation(model))
    names = dict(model.named_parameters())
    for weights in before.weights.values():
        for weight in weights:
            assert names[weight.name].ndim >= 2
            assert f"{weight.operator}." in f"{weight.name}."
    return {site: [weight.name for weight in weights] for site, weights in before.weights.items()}


def conv(inputs=3, outputs=3, size=1, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def affine():
    return AffineStandIn(nn.ReLU(), AffineFit(torch.ones(3), torch.zeros(3), 1, 0.0))


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


PASSING = {
    "nothing": lambda s, x: F.relu(s.a(x)),
    "batch norm": lambda s, x: F.relu(s.norm(s.a(x))),
    "functional batch norm": lambda s, x: F.relu(
        F.batch_norm(s.a(x), s.norm.running_mean, s.norm.running_var, s.norm.weight, s.norm.bias)
    ),
    "group norm": lambda s, x: F.relu(s.group_norm(s.a(x))),
    "instance norm": lambda s, x: F.relu(F.instance_norm(s.a(x))),
    "layer norm": lambda s, x: F.relu(F.layer_norm(s.a(x).permute(0, 2, 3, 1), (3,), s.norm.weight, s.norm.bias)),
    "rms norm": lambda s, x: F.relu(F.rms_norm(s.a(x).movedim(1, -1), (3,))),
    "an identity": lambda s, x: F.relu(s.identity(s.a(x))),
    "dropout": lambda s, x: F.relu(F.dropout(s.dropout(s.a(x)), 0.5, s.training)),
    "dropout that is always on": lambda s, x: F.relu(F.dropout(s.a(x), 0.5)),
    "an identity in place of an activation": lambda s, x: F.relu(s.stand_in(s.a(x))),
    "an affine in place of an activation": lambda s, x: F.relu(s.affine(s.a(x))),
    "flatten": lambda s, x: F.relu(s.a(x).flatten(1)),
    "view": lambda s, x: F.relu(s.a(x).contiguous().view(2, 3, -1)),
    "reshape": lambda s, x: F.relu(torch.reshape(s.a(x), (2, -1))),
    "transpose": lambda s, x: F.relu(s.a(x).flatten(2).transpose(1, 2)),
    "max pooling": lambda s, x: F.relu(F.max_pool2d(s.a(x), 2)),
    "average pooling": lambda s, x: F.relu(F.avg_pool2d(s.pool(s.a(x)), 1)),
    "adaptive pooling": lambda s, x: F.relu(F.adaptive_avg_pool2d(s.a(x), 1)),
    "the mean of a map": lambda s, x: F.relu(s.a(x).mean((2, 3))),
    "chunk and concatenation": lambda s, x: F.relu(torch.cat([(y := s.a(x).chunk(3, 1))[2], y[0]], 1)),
    "split and getitem": lambda s, x: F.relu(s.a(x).split(1, 1)[1][:, :, 0]),
    "padding": lambda s, x: F.relu(F.pad(s.a(x), (1, 1))),
    "a constant factor": lambda s, x: F.relu(s.scale * s.a(x) / 2 + 1),
    "an addition of the input": lambda s, x: F.relu(x + s.a(x)),
    "an addition in place": lambda s, x: F.relu(s.a(x).add_(x)),
    "a subtraction": lambda s, x: F.relu(x - s.a(x)),
    "upsampling": lambda s, x: F.relu(F.interpolate(s.a(x), scale_factor=2.0)),
}


@pytest.mark.parametrize("between", PASSING)
def test_a_weight_feeds_through_what_passes_neurons_on(between):
    model = Net(
        PASSING[between], last=nn.Linear(3, 3), a=conv(), norm=nn.BatchNorm2d(3), group_norm=nn.GroupNorm(3, 3),
        identity=nn.Identity(), dropout=nn.Dropout(), stand_in=IdentityStandIn(nn.ReLU()), affine=affine(),
        pool=nn.AdaptiveMaxPool2d(2), scale=parameter(3, 1, 1),
    ).eval()  # fmt: skip
    model(torch.randn(2, 3, 4, 6))
    assert list(fed(model).values()) == [["a.weight"]]


STOPS = {
    "the input": lambda s, x: F.relu(x),
    "a gate": lambda s, x: F.relu(s.a(x).sigmoid()),
    "a product of two values": lambda s, x: F.relu(s.a(x) * s.b(x)),
    "attention": lambda s, x: F.relu(s.attention(x, x, x)[0]),
    "a recurrent layer": lambda s, x: F.relu(s.rnn(x)[0]),
    "an embedding": lambda s, x: F.relu(s.embedding(x.long())),
    "two values at once": lambda s, x: F.relu(s.bilinear(x, x)),
    "a vector": lambda s, x: F.relu(x @ s.norm.running_mean),
    "a weight that is standardized": lambda s, x: F.relu(F.linear(x, s.a.weight / s.a.weight.std())),
    "a matrix of two values": lambda s, x: F.relu(torch.matmul(x, x.transpose(-1, -2))),
}


@pytest.mark.parametrize("before", STOPS)
def test_a_site_without_a_weight_of_its_own_has_none(before):
    model = Net(
        STOPS[before], a=nn.Linear(4, 4), b=nn.Linear(4, 4), attention=nn.MultiheadAttention(4, 2), rnn=nn.GRU(4, 4),
        embedding=nn.Embedding(4, 4), bilinear=nn.Bilinear(4, 4, 4), norm=nn.BatchNorm1d(4),
    ).eval()  # fmt: skip
    assert list(fed(model).values()) == [[]]


def test_an_activation_ends_the_way_back():
    model = Net(lambda s, x: F.relu(F.max_pool2d(F.gelu(s.a(x)), 2)), a=conv())
    assert fed(model) == {"gelu": ["a.weight"], "relu": []}
    assert feeding_weights(model, plan_isolation(model)).shared == {}


def test_a_forward_that_can_not_be_traced_ends_the_way_back():
    def forward(self, x):
        return F.relu(self.a(x)) if x.sum() > 0 else self.b(x)

    model = nn.Sequential(conv(), Net(forward, a=conv(), b=conv()), nn.ReLU())
    with pytest.warns(UserWarning, match="were left alone"):
        assert fed(model) == {"2": []}


@pytest.mark.parametrize(
    ("forward", "shape", "dim"),
    [
        (lambda s, x: F.linear(x, s.weight), (5, 3), 0),
        (lambda s, x: F.linear(x, weight=s.weight.t()), (3, 5), 1),
        (lambda s, x: x @ s.weight, (3, 5), 1),
        (lambda s, x: x.matmul(s.weight.transpose(0, 1)), (5, 3), 0),
        (lambda s, x: torch.matmul(x, s.weight.mT), (5, 3), 0),
        (lambda s, x: x @ s.weight.T, (5, 3), 0),
        (lambda s, x: s.weight @ x.mT, (5, 3), 0),
        (lambda s, x: torch.addmm(s.bias, x, s.weight), (3, 5), 1),
        (lambda s, x: F.conv1d(x.mT, s.weight), (5, 3, 1), 0),
        (lambda s, x: torch.conv_transpose1d(x.mT, s.weight, s.bias), (3, 5, 2), 1),
    ],
)
def test_functions_are_fed_by_the_parameter_that_they_are_given(forward, shape, dim):
    model = Net(lambda s, x: F.relu(forward(s, x)), weight=parameter(*shape), bias=parameter(5))
    assert 5 in model(torch.randn(2, 3) if "addmm" in forward.__code__.co_names else torch.randn(2, 4, 3)).shape
    (weights,) = feeding_weights(model, plan_isolation(model)).weights.values()
    assert [(weight.name, weight.neuron_dim, weight.operator) for weight in weights] == [("weight", dim, "")]
    assert shape[dim] == 5


def test_the_neurons_of_modules():
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ReLU(), conv(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU())
    feeding = feeding_weights(model, plan_isolation(model))
    assert [weights[0].neuron_dim for weights in feeding.weights.values()] == [1, 0, 0]
    assert [weights[0].operator for weights in feeding.weights.values()] == ["0", "2", "4"]


def test_the_order_of_registration_does_not_matter():
    model = Net(lambda s, x: F.relu(s.a(F.relu(s.b(F.relu(s.c(x)))))), a=conv(), b=conv(), c=conv())
    assert list(fed(model).values()) == [["c.weight"], ["b.weight"], ["a.weight"]]


BRANCHES = {
    "a downsampling convolution": (lambda s, x: s.norm(s.b(F.relu(s.a(x)))) + s.norm2(s.c(x)), [["a"], ["b"]]),
    "one on the other side": (lambda s, x: s.c(x) + s.b(F.relu(s.a(x))), [["a"], ["b"]]),
    "one after a pooling": (lambda s, x: s.b(F.relu(s.a(x))) + s.c(F.avg_pool2d(x, 1)), [["a"], ["b"]]),
    "one without an activation on the way": (lambda s, x: s.b(s.a(x)) + s.c(x), [["b"]]),
    "one whose longer way ends in a product": (
        lambda s, x: s.a(x) * s.b(x.mean((2, 3), True)).sigmoid() + s.c(x), [["c"]],
    ),
    "one whose longer way ends in a product of what is further": (
        lambda s, x: (y := s.b(F.relu(s.a(x)))) * y.sigmoid() + s.c(x), [["a"], []],
    ),
    "one in a sum of three": (lambda s, x: (s.c(x) + x) + s.b(F.relu(s.a(x))), [["a"], ["b"]]),
    "branches of equal length": (lambda s, x: s.a(x) + s.b(x), [["a", "b"]]),
    "branches of equal length and another reader": (lambda s, x: s.a(x) + s.b(F.max_pool2d(x, 1)), [["a", "b"]]),
    "a concatenation": (lambda s, x: torch.cat([s.b(F.relu(s.a(x))), s.c(x)]), [["a"], ["b", "c"]]),
    "a chain of additions": (lambda s, x: (y := (z := s.a(x)) + s.b(z)) + s.c(y), [["a", "b", "c"]]),
}  # fmt: skip


@pytest.mark.parametrize("branches", BRANCHES)
def test_shortcuts_do_not_take_part(branches):
    forward, expected = BRANCHES[branches]
    model = Net(
        lambda s, x: F.relu(forward(s, x)), a=conv(), b=conv(), c=conv(), norm=nn.BatchNorm2d(3),
        norm2=nn.BatchNorm2d(3),
    ).eval()  # fmt: skip
    model(torch.randn(2, 3, 4, 6))
    assert list(fed(model).values()) == [[f"{name}.weight" for name in names] for names in expected]


def test_two_inputs_have_no_longer_way_in_common():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(), conv(), conv()

        def forward(self, x, y):
            return F.relu(self.b(F.relu(self.a(x))) + self.c(y))

    assert list(fed(Two()).values()) == [["a.weight"], ["b.weight", "c.weight"]]


def test_a_weight_that_reaches_two_sites_belongs_to_the_first():
    model = Net(lambda s, x: torch.cat([F.relu(y := s.a(x)), F.relu(-y), F.relu(y + s.b(y))]), a=conv(), b=conv())
    assert fed(model) == {"relu": ["a.weight"], "relu_1": [], "relu_2": ["b.weight"]}
    assert feeding_weights(model, plan_isolation(model)).shared == {"relu_1": "relu"}


def test_a_site_shares_with_the_first_of_several():
    model = Net(lambda s, x: torch.cat([F.relu(y := s.a(x)), F.relu(z := s.b(x)), F.relu(z + y)]), a=conv(), b=conv())
    assert fed(model) == {"relu": ["a.weight"], "relu_1": ["b.weight"], "relu_2": []}
    assert feeding_weights(model, plan_isolation(model)).shared == {"relu_2": "relu"}


def test_a_tied_weight_is_handled_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    model[2].weight = model[0].weight
    assert fed(model) == {"1": ["0.weight"], "3": []}
    assert feeding_weights(model, plan_isolation(model)).shared == {"3": "1"}


def test_a_module_that_is_called_several_times_is_handled_once():
    model = Net(lambda s, x: F.relu(s.a(F.relu(s.a(x))) + s.a(x)), a=conv())
    assert fed(model) == {"relu": ["a.weight"], "relu_1": []}


def test_a_block_that_is_called_several_times_has_the_weights_of_all_calls():
    block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model = Net(lambda s, x: s.block(s.b(s.block(s.a(x)))), a=conv(), b=conv(), block=block)
    assert fed(model) == {"block.1": ["a.weight", "b.weight"]}


def test_each_site_of_a_pre_activation_network_has_its_own():
    def block():
        return Net(
            lambda s, x: x + s.b(F.relu(s.norm2(s.a(F.relu(s.norm1(x)))))), a=conv(size=3), b=conv(size=3),
            norm1=nn.BatchNorm2d(3), norm2=nn.BatchNorm2d(3),
        )  # fmt: skip

    model = nn.Sequential(conv(), block(), block(), block(), nn.BatchNorm2d(3), nn.ReLU())
    names = ["0", *(f"{index}.{name}" for index in (1, 2, 3) for name in "ab")]
    assert list(fed(model).values()) == [[f"{name}.weight"] for name in names]


@pytest.mark.parametrize(
    "compute", [parametrizations.orthogonal, partial(prune.random_unstructured, name="weight", amount=1)]
)
def test_a_weight_that_is_computed_has_a_name_that_is_no_parameter(compute):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compute(model[0])
    weights = feeding_weights(model, plan_isolation(model)).weights["1"]
    assert [weight.name for weight in weights] == ["0.weight"]
    assert "0.weight" not in dict(model.named_parameters())


def test_a_wrapped_model_has_the_names_of_the_one_inside():
    model = nn.DataParallel(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert feeding_weights(model, plan_isolation(model)).weights["1"][0].name == "0.weight"


def _torchvision(name, **options):
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def _timm(name):
    return lambda: timm.create_model(name, pretrained=False)


_TEXT = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 11}


@pytest.mark.parametrize(
    ("build", "sites", "left"),
    [
        (_torchvision("resnet18"), 17, {"fc", "downsample.0"}),
        (_torchvision("resnet50"), 49, {"fc", "downsample.0"}),
        (_torchvision("vgg16_bn"), 15, {"classifier.6"}),
        (_torchvision("mobilenet_v2"), 35, {"classifier.1", "features.1.conv.1", "conv.2"}),
        (_torchvision("swin_t"), 12, {"features.0.0", "mlp.3", "reduction", "qkv", "proj", "head"}),
        (_torchvision("vit_b_16"), 12, {"conv_proj", "mlp.3", "out_proj", "self_attention", "head"}),
        (_torchvision("googlenet", init_weights=False), 61, {"fc", "fc2"}),
        (_torchvision("inception_v3", init_weights=False), 96, {"fc"}),
        (_timm("resnetv2_50"), 49, {"downsample.conv", "head.fc"}),
        (_timm("resnet18d"), 19, {"downsample.1", "fc"}),
        (_timm("convnext_atto"), 12, {"stem.0", "conv_dw", "mlp.fc2", "downsample.1", "head.fc"}),
        (_timm("vit_tiny_patch16_224"), 12, {"patch_embed.proj", "qkv", "attn.proj", "mlp.fc2", "head"}),
        (lambda: transformers.BertModel(transformers.BertConfig(**_TEXT)), 2,
         {"embeddings", "query", "key", "value", "output.dense", "pooler.dense"}),
        (lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_TEXT)), 2,
         {"embeddings", "query", "key", "value", "output.dense", "classifier.dense", "out_proj"}),
        (lambda: transformers.GPT2Model(transformers.GPT2Config(
            n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)), 2,
         {"wte", "wpe", "c_attn", "c_proj"}),
    ],
)  # fmt: skip
def test_each_rectified_layer_of_a_real_network_has_one_weight_and_no_other_takes_part(build, sites, left):
    with torch.device("meta"):
        model = build()
    feeding = feeding_weights(model, plan_isolation(model))
    assert [len(weights) for weights in feeding.weights.values()] == [1] * sites
    assert not feeding.shared
    taken = {weight.name for weights in feeding.weights.values() for weight in weights}
    assert len(taken) == sites
    axes = {name: parameter.ndim for name, parameter in model.named_parameters() if name.endswith("weight")}
    others = {name for name, ndim in axes.items() if ndim >= 2} - taken
    assert all(any(part in name for part in left) for name in others), others
    assert all(any(part in name for name in others) for part in left)


def test_the_first_layer_of_a_densenet_reads_what_was_rectified_before():
    with torch.device("meta"):
        model = torchvision.models.densenet121(weights=None)
    feeding = feeding_weights(model, plan_isolation(model))
    empty = [site for site, weights in feeding.weights.items() if not weights]
    assert empty == ["features.denseblock1.denselayer1.relu1"]
    assert not feeding.shared
    names = [weight.name for weights in feeding.weights.values() for weight in weights]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(names) == sorted(f"{name}.weight" for name in convolutions)


def test_gpt2_is_fed_by_the_last_axis():
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2Model(config)
    ((weight,),) = feeding_weights(model, plan_isolation(model)).weights.values()
    assert (weight.name, weight.neuron_dim, weight.operator) == ("h.0.mlp.c_fc.weight", 1, "h.0.mlp.c_fc")
    assert model.get_parameter(weight.name).shape == (16, 64)
