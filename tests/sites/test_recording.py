"""A rewritten forward does what the user's own does, later too: what it reads may change, what it writes is written."""

import contextlib
import copy
import cProfile
import functools
import pickle
import random
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from lightning_easier import candidates, collapse, isolate_activations, linearize
from lightning_easier.sites.activations import isolated_sites


class Net(nn.Module):
    """A Linear, whatever else it is given, and a forward."""

    def __init__(self, forward, **given):
        super().__init__()
        self.compute = forward
        self.fc = nn.Linear(4, 4)
        for name, value in given.items():
            if type(value) is torch.Tensor:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.compute(self, x)


def counts(s, x):
    s.count.add_(1)
    return F.relu(s.fc(x))


def averages(s, x):
    x = F.relu(s.fc(x))
    if s.training:
        s.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return x - s.average


def initializes(s, x):
    if not s.ready:
        s.average.copy_(x.detach().mean(0))
        s.ready.fill_(True)
    return F.relu(s.fc(x) - s.average)


def in_place_power(s, x):
    z = s.fc(x)
    skip = z
    z **= 2
    return F.relu(z - 1) + skip


def in_place_on_a_transpose(s, x):
    z = s.fc(x)
    turned = z.mT
    turned += 1
    turned[0] = 0.5
    return F.relu(z - 1)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def features(self, x):
        return F.dropout(F.relu(self.fc(x)), 0.5, self.training)

    def forward(self, x):
        return self.features(x)


def dropout():
    return nn.Dropout(0.2)


def set_rate(model):
    model.drop.p = 0.9


def append_identity(model):
    model.layers.append(nn.Linear(4, 4))
    nn.init.eye_(model.layers[1].weight)
    nn.init.zeros_(model.layers[1].bias)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: Net(counts, count=torch.zeros(1)), None),
        (lambda: Net(averages, average=torch.ones(4)), None),
        (lambda: Net(initializes, average=torch.zeros(4), ready=torch.tensor(False)), None),
        (lambda: Net(in_place_power), None),
        (lambda: Net(in_place_on_a_transpose), None),
        (lambda: Net(lambda s, x: s.fc(s.inner.features(x)), inner=Backbone()), None),
        (lambda: Net(lambda s, x: F.dropout(F.relu(s.fc(x)), s.drop.p, s.drop.training), drop=dropout()), None),
        (lambda: Net(lambda s, x: F.dropout(F.relu(s.fc(x)), s.drop.p, s.training), drop=dropout()), set_rate),
        (lambda: Net(lambda s, x: F.relu(s.fc(x)) * s._k, _k=1.0), lambda m: setattr(m, "_k", 3.0)),
        (lambda: Net(lambda s, x: F.relu(s.fc(x)) * s.cfg.k, cfg=SimpleNamespace(k=1.0)),
         lambda m: setattr(m.cfg, "k", 3.0)),
        (lambda: Net(lambda s, x: F.relu(s.fc(x)).view(-1, *s.size), size=(2, 2)),
         lambda m: setattr(m, "size", (4, 1))),
        (lambda: Net(lambda s, x: F.relu(s.fc(x)) * s.scales["k"], scales={"k": 1.0}),
         lambda m: m.scales.update(k=3.0)),
        (lambda: Net(lambda s, x: F.relu(s.fc(x)) * getattr(s, "scale"), scale=1.0),  # noqa: B009
         lambda m: setattr(m, "scale", 2.0)),
        (lambda: Net(lambda s, x: F.relu(s.act(s.fc(x))), act=torch.sin), lambda m: setattr(m, "act", torch.cos)),
        (lambda: Net(lambda s, x: F.relu(s.fc(x)) * (2 if s.on else 1), on=torch.tensor(False)),
         lambda m: m.on.fill_(True)),
        (lambda: Net(lambda s, x: F.relu(s.fc(x)) * s.heat.item(), heat=torch.tensor(1.0)),
         lambda m: m.heat.fill_(5.0)),
        (lambda: Net(lambda s, x: F.relu(s.fc(x.to(next(s.parameters()).dtype)))), lambda m: m.double()),
        (lambda: Net(lambda s, x: F.relu(s.fc(x.to(s.b.dtype))), b=torch.ones(1)), lambda m: m.double()),
        (lambda: Net(lambda s, x: F.relu(sum(layer(x) for layer in s.layers)), layers=nn.ModuleList([nn.Linear(4, 4)])),
         append_identity),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:Activations called")
def test_a_rewritten_forward_follows_what_changes(make, change, training):
    torch.manual_seed(0)
    model = make()
    reference = copy.deepcopy(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    candidates(model)
    isolate_activations(model)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    x = torch.randn(3, 4)
    for changed in (False, True):
        if changed and change is not None:
            change(model)
            change(reference)
        for network in (model, reference):
            network.train(training)
        for seed in range(2):
            torch.manual_seed(seed)
            expected = reference(x)
            torch.manual_seed(seed)
            assert torch.equal(model(x), expected)
    pairs = zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def asks_shape(s, x):
    try:
        _, _, _ = x.shape
    except ValueError:
        x = x.unsqueeze(1)
    return F.relu(s.fc(x))


def swallows(s, x):
    with contextlib.suppress(Exception):
        x = x * 2 if x.sum() > 1e9 else x
    return F.relu(s.fc(x))


def seeds(s, x):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        noise = torch.randn_like(x)
    return F.relu(s.fc(x + noise))


def stores(s, x):
    s.fc.last = x
    return F.relu(s.fc(x))


def asks_for_none(s, x):
    mask = s.masks.get("x")
    return F.relu(s.fc(x)) if mask is None else F.relu(s.fc(x)) * mask


def matches(s, x):
    match x:
        case [first, *_]:
            x = first
    return F.relu(s.fc(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Net(matches), "matches a value against patterns"),
        (Net(asks_for_none, masks={}), "asks whether a value is None"),
        (Net(asks_shape), "handles exceptions"),
        (Net(swallows), "handles exceptions|control flow"),
        (Net(seeds), "handles exceptions or enters a context"),
        (Net(stores), r"changes `self\.last`"),
        (Net(lambda s, x: F.relu(s.fc(x if torch.is_tensor(x) else x[0]))), r"can't know \(`is_tensor`\)"),
        (Net(lambda s, x: F.relu(s.fc(x[0] if type(x) is tuple else x))), r"can't know \(`type`\)"),
        (Net(lambda s, x: OrderedDict(out=F.relu(s.fc(x)))), "makes a OrderedDict"),
        (Net(lambda s, x: checkpoint(lambda y: F.relu(s.fc(y)), x, use_reentrant=False)), "recomputes|Error"),
        (Net(lambda s, x: F.relu(s.fc(x)) * (np.random.rand() < 2)), "draws random numbers"),
        (Net(lambda s, x: F.relu(s.fc(x)) * s.rng.random(), rng=random.Random(0)), r"`self\.rng`, a Random"),
        (Net(lambda s, x: nn.ReLU()(s.fc(x))), "not installed"),
        (Net(lambda s, x: s.acts["a"](s.fc(x)), acts={"a": nn.ReLU()}), "not installed"),
        (Net(lambda s, x: F.relu(s.fc(x)) if s.training else s.fc(x)), "other activations in train mode"),
        (Net(lambda s, x: s.act(s.fc(x)) if x.sum() > 0 else x, act=functools.partial(F.gelu, approximate="tanh")),
         "control flow"),
    ],
)  # fmt: skip
def test_what_a_recording_would_lose_is_named_and_goes_on_as_it_was(model, reason):
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=f"`0`: .*({reason})"):
        assert isolate_activations(nn.Sequential(model)) == {}
    assert vars(model).keys() == vars(reference).keys()
    x = torch.rand(3, 4)
    for network in (model, reference):
        torch.manual_seed(0)
        np.random.seed(0)
        network.output = network(x)
    assert str(model.output) == str(reference.output)
    pickle.dumps(model.fc)


class Either(nn.Module):
    """Computes two rectifiers in another order in train mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            p = F.relu(self.a(x))
            return p - F.relu(self.b(x))
        q = F.relu(self.b(x))
        return F.relu(self.a(x)) - q


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, skip, mask=None):
        if mask is not None:
            x = F.gelu(x * mask)
        return F.relu(self.fc(x)) + skip


def test_calls_of_one_name_are_the_same_calls_in_both_modes():
    with pytest.warns(UserWarning, match="other activations in train mode than in eval mode, or elsewhere"):
        assert isolate_activations(nn.Sequential(Either())) == {}


def test_what_only_an_optional_argument_calls_is_named():
    model = nn.Sequential(Given())
    with pytest.warns(UserWarning, match="`0`: given `mask` it calls other activations"):
        assert list(isolate_activations(model)) == ["0.relu"]
    x = torch.randn(2, 4)
    assert torch.equal(model[0](x, x, x), F.relu(model[0].fc(F.gelu(x * x))) + x)


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, skip):
        return F.relu(self.fc(x)) + helper(skip)


def helper(skip):
    return 0 if skip is None else skip


def test_none_for_a_required_argument_runs_the_users_own_forward():
    model, x = Skips(), torch.randn(2, 4)
    assert list(isolate_activations(model)) == ["relu"]
    assert torch.equal(model(x, None), F.relu(model.fc(x)))
    linearize(model, ["relu"])
    with pytest.raises(RuntimeError, match="with a value for each argument: its activation `relu` was replaced"):
        model(x, None)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(F.gelu(self.fc(self.act(x))))


def test_a_graph_module_keeps_its_sites_when_it_is_copied_pickled_and_collapsed():
    model = fx.symbolic_trace(Block()).eval()
    reference, x = copy.deepcopy(model), torch.randn(3, 4)
    names = ["act", "gelu", "act_1"]
    assert list(isolate_activations(model)) == names
    assert torch.equal(model(x), reference(x))
    assert list(isolate_activations(model)) == names
    linearize(model, ["gelu", "act_1"])
    expected = model.fc(x.relu())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), collapse(model, x).model):
        assert torch.allclose(twin(x), expected)
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (x,)).module()
    with pytest.warns(UserWarning, match=r"its graph calls `aten\.relu\.default`"):
        assert isolate_activations(exported) == {}


def test_a_shared_activation_with_a_hook_keeps_its_calls():
    model = Block()
    model.act.register_forward_hook(lambda module, args, output: output * 0.5)
    reference, x = copy.deepcopy(model), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="`act` has hooks and is called several times"):
        assert list(isolate_activations(model)) == ["act", "gelu"]
    assert torch.equal(model(x), reference(x))


class Stubborn(nn.Module):
    def add_module(self, name, module):
        raise RuntimeError("no more")

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.fc(x))


def test_all_edits_are_carried_out_or_none():
    shared = nn.ReLU()
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(shared, Block(), shared, fx.symbolic_trace(Block()), layer, Stubborn())
    before = {name: (module, set(vars(module)), set(module._modules)) for name, module in model.named_modules()}
    code = model[3].code
    with pytest.raises(RuntimeError, match="no more"):
        isolate_activations(model)
    after = {name: (module, set(vars(module)), set(module._modules)) for name, module in model.named_modules()}
    assert after == before
    assert model[3].code == code
    assert model[0] is model[2]


def test_a_scripted_child_is_a_layer_like_any_other():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), scripted)
    assert list(isolate_activations(model)) == ["1"]
    assert [found.name for found in candidates(model).candidates] == ["1"]


def test_a_profiler_goes_on():
    profiler = cProfile.Profile()
    profiler.enable()
    isolate_activations(Block())
    sorted([3, 1])
    profiler.disable()
    assert any("sorted" in str(entry.code) for entry in profiler.getstats())


def test_a_gate_of_somebodys_own_is_not_looked_into():
    class HardSigmoid(nn.Module):
        def forward(self, x):
            return F.relu6(x + 3) / 6

    model = nn.Sequential(nn.Linear(2, 2), HardSigmoid())
    assert isolate_activations(model) == {}
    assert list(isolate_activations(model, gates=["hardsigmoid"])) == ["1"]


class Gated(nn.GELU):
    def forward(self, x):
        a, b = x.chunk(2, -1)
        return super().forward(a) * b


def test_a_subclass_that_computes_something_else_is_looked_into():
    model = nn.Sequential(nn.Linear(4, 8), Gated(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    expected = model(x)
    sites = isolated_sites(model)
    assert [(site.name, site.neuron_dim) for site in sites] == [("1.gelu", -1)]
    assert torch.equal(model(x), expected)
