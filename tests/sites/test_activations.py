"""Every call of an activation becomes a module of its own with a readable name, and the model computes what it did."""

import copy
import inspect
import io
import pickle
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_easier import EntropyProbe, isolate_activations, linearize, measure_entropy, restore
from lightning_easier.sites.activations import isolated_sites, match_names, planned_sites, unwrap
from tests.forks import run_together
from tests.models import Functional, OptionalArgument, Residual


def test_torchvision_resnet18_has_17_readable_names_in_execution_order():
    names = list(isolate_activations(torchvision.models.resnet18()))
    assert len(names) == 17
    assert names[:5] == ["relu", "layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu", "layer1.1.relu_1"]
    assert names[-1] == "layer4.1.relu_1"


def test_functional_spellings_become_modules_with_their_arguments():
    model = Functional()
    sites = isolate_activations(model)
    assert {name: repr(module) for name, module in sites.items()} == {
        "relu": "ReLU(inplace=True)",
        "relu_1": "ReLU()",
        "gelu": "GELU(approximate='tanh')",
        "leaky_relu": "LeakyReLU(negative_slope=0.3)",
        "relu_2": "ReLU()",
        "relu_3": "ReLU(inplace=True)",
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("isolated_in_training", [True, False])
def test_a_forward_that_reads_the_mode_still_does(training, isolated_in_training):
    model = Functional().double()
    reference = copy.deepcopy(model).train(training)
    isolate_activations(model.train(isolated_in_training))
    model.train(training)
    x = torch.randn(7, 6, dtype=torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = reference(x)
        torch.manual_seed(seed)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", [Functional, Residual, OptionalArgument])
def test_an_isolated_model_is_copied_pickled_cast_and_compiled_as_before(make):
    model = make().eval()
    x = torch.randn(2, 4, 5, 7) if make is Residual else torch.randn(2, model.fc.in_features)
    isolate_activations(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = [twin, pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert all(torch.equal(other(x), expected) for other in (*loaded, exported, compiled))
    assert all(list(isolate_activations(other)) == list(isolate_activations(model)) for other in loaded)
    for parameter in model.parameters():  # the copies are independent
        parameter.data.zero_()
    assert all(torch.equal(other(x), expected) for other in loaded)
    assert model.double()(x.double()).dtype == torch.float64
    assert model.half()(x.half()).dtype == torch.float16


def test_keeps_the_signature_and_both_ways_of_an_optional_argument():
    model = OptionalArgument()
    reference = copy.deepcopy(model)
    isolate_activations(model)
    x, shortcut = torch.randn(3, 4), torch.randn(3, 4)
    assert inspect.signature(model.forward) == inspect.signature(reference.forward)
    for args, kwargs in (((x,), {}), ((x, shortcut), {}), ((x,), {"shortcut": shortcut}), ((x,), {"scale": 2.0})):
        assert torch.equal(model(*args, **kwargs), reference(*args, **kwargs))


def test_arguments_that_no_recording_covers_fail_loudly_once_the_activation_is_linear():
    model = OptionalArgument()
    linearize(model, ["relu"])
    x = torch.randn(3, 4)
    assert torch.equal(model(x, torch.ones(3, 4)), model.fc(x) + 1)
    with pytest.raises(RuntimeError, match=r"the default of \['scale'\].*`relu` was replaced"):
        model(x, scale=2.0)


def test_one_module_under_two_names_becomes_two_sites_with_shared_parameters():
    shared = nn.PReLU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    keys = list(model.state_dict())
    sites = isolate_activations(model)
    assert list(sites) == ["1", "3"]
    assert sites["1"] is not sites["3"]
    assert sites["1"].weight is sites["3"].weight
    assert list(model.state_dict()) == keys


class WithBlock(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2
        return F.relu(x)


class Branching(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else x


class Remembering(nn.Module):
    def forward(self, x):
        self.last = x
        return F.relu(x)


class MakesConstant(nn.Module):
    def forward(self, x):
        return F.relu(x + torch.ones(3))


class Variadic(nn.Module):
    def forward(self, *inputs):
        return F.relu(inputs[0])


class Filling(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        self.cache["x"] = x
        return F.relu(x)


class InFloat32(nn.Module):
    """What turns autocast off is off already while it is recorded."""

    device = "cpu"

    def forward(self, x):
        @torch.autocast(self.device, enabled=False)
        def computed(x):
            return x.float() * 2

        return F.relu(computed(x))


class ElsewhereInFloat32(InFloat32):
    device = "xpu"


class Drawing(nn.Module):
    def forward(self, x):
        random.random()
        return F.relu(x)


class AskingForGradients(nn.Module):
    def forward(self, x):
        return F.relu(x) if torch.is_grad_enabled() else F.relu(x) * 2


class AskingForType(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x):
        return F.relu(x) if isinstance(x, Tensor) else F.relu(x[0])


class Overridden(nn.Module):
    def __init__(self):
        super().__init__()
        self.forward = lambda x: F.relu(x) * 3

    def forward(self, x):
        return F.relu(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WithBlock, "changes the autograd or autocast mode"),
        (InFloat32, "changes the autograd or autocast mode"),
        (ElsewhereInFloat32, "changes the autograd or autocast mode"),
        (Branching, "control flow"),
        (Remembering, r"changes `self\.last`"),
        (Filling, r"changes `self\.cache`"),
        (Drawing, "draws random numbers in Python"),
        (AskingForGradients, "asks whether gradients are enabled"),
        (AskingForType, "asks for the type of a value"),
        (Overridden, "was replaced on the instance"),
        (MakesConstant, "makes constant tensors"),
        (Variadic, "variable number of arguments"),
    ],
)
def test_what_a_recording_would_lose_is_left_alone_and_named(make, reason):
    model = nn.Sequential(make(), nn.ReLU())
    reference = copy.deepcopy(model)
    contents = copy.copy(vars(model[0]).get("cache"))
    attributes = set(vars(model[0]))
    with pytest.warns(UserWarning, match=f"`0`: .*{reason}.*of its own"):
        sites = isolate_activations(model)
    assert list(sites) == ["1"]
    assert set(vars(model[0])) == attributes
    assert vars(model[0]).get("cache") == contents
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(model(x), reference(x))


class Scaled(nn.Module):
    """Reads plain attributes, works in place on a tensor with two names, and passes a child its input by keyword."""

    def __init__(self):
        super().__init__()
        self.alpha, self.unread = 2.0, 0
        self.act = nn.ReLU()

    def forward(self, x):
        y = x * self.alpha
        skip = y
        y += 1
        return self.act(input=F.relu(y) - 0.5) + self.act(input=skip)


def test_attributes_that_a_forward_reads_and_in_place_operators_keep_their_effect():
    model, reference = Scaled(), Scaled()
    assert list(isolate_activations(model)) == ["relu", "act", "act_1"]
    x = torch.randn(50)
    assert torch.equal(model(x), reference(x))
    model.alpha = reference.alpha = -3.0
    model.unread = 1
    assert torch.equal(model(x), reference(x))
    linearize(model, ["act_1"])
    with pytest.raises(RuntimeError, match=r"its attributes \['alpha'\] as they were: its activation `act_1`"):
        model(x)
    model.alpha = 2.0
    assert torch.equal(model(x), torch.relu(torch.relu(x * 2 + 1) - 0.5) + (x * 2 + 1))


class OwnForward(nn.Sequential):
    def forward(self, x):
        return F.gelu(super().forward(x))


def test_a_sequential_with_a_forward_of_its_own_is_looked_at():
    assert list(isolate_activations(OwnForward(nn.Linear(2, 2), nn.ReLU()))) == ["1", "gelu"]


class Branches(nn.Module):
    """Assigns into its input list, as timm's HRNet does."""

    def __init__(self):
        super().__init__()
        self.fcs, self.act = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), nn.ReLU()

    def forward(self, x):
        for i in range(2):
            x[i] = self.act(self.fcs[i](x[i]))
        return x[0] + x[1]


def test_assignments_into_a_list_keep_their_effect():
    model = Branches()
    reference = copy.deepcopy(model)
    assert list(isolate_activations(model)) == ["act", "act_1"]
    x = [torch.randn(2, 3), torch.randn(2, 3)]
    y = list(x)
    assert torch.equal(model(x), reference(y))
    assert torch.equal(x[0], y[0])


class Aliases(nn.Module):
    def __init__(self):
        super().__init__()
        self.act1 = self.act2 = nn.ReLU()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.act2(self.fc(self.act1(x)) - 1) + self.act1(x + 1)


def test_a_child_under_two_names_is_known_by_the_name_it_is_called_by():
    model = Aliases()
    reference = copy.deepcopy(model)
    assert list(isolate_activations(model)) == ["act1", "act2", "act1_1"]
    x = torch.randn(4, 3)
    assert torch.equal(model(x), reference(x))
    assert torch.equal(linearize(model, ["act2"])(x), reference.fc(x.relu()) - 1 + (x + 1).relu())


class Bare(nn.Module):
    """A module without weights, around activations: as good as an activation to be doubled."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(), nn.Dropout(0.0))

    def forward(self, x):
        return F.gelu(self.inner(x) - 0.1)


class CallsBareTwice(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.bare, self.fc, self.other = Bare(), nn.Linear(3, 3), other

    def forward(self, x):
        return self.other(self.bare(self.fc(self.bare(x))))


def test_a_module_without_weights_that_is_called_several_times_is_doubled_as_a_whole():
    other = Bare()
    model = nn.Sequential(CallsBareTwice(other), other)
    reference = copy.deepcopy(model)
    names = ["0.bare.inner.0", "0.bare.gelu", "0.bare_1.inner.0", "0.bare_1.gelu", "0.other.inner.0", "0.other.gelu"]
    names += ["1.inner.0", "1.gelu"]
    sites = isolate_activations(model)
    assert list(sites) == names
    assert len({id(module) for module in sites.values()}) == len(names)
    assert isolate_activations(model) == sites
    assert list(model.state_dict()) == list(reference.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(model(x), reference(x))


class CallsInALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        for part in x:
            x = x + self.act(part)
        return x


def test_a_module_that_an_untraceable_forward_may_call_several_times_is_named():
    model = nn.Sequential(CallsInALoop())
    with pytest.warns(UserWarning, match="`0`: TraceError: Proxy object cannot be iterated"):
        assert list(isolate_activations(model)) == ["0.act"]


@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.ReLU(), nn.SiLU(), lambda x: F.relu(x) + 1])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_transformer_layer_is_reached_though_its_fused_path_does_not_call_its_activation(activation, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, activation, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2).eval()
    reference = copy.deepcopy(model)
    x, padding = torch.randn(3, 5, 4), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    if callable(activation) and getattr(activation, "__name__", "") == "<lambda>":
        with pytest.warns(UserWarning, match=r"`layers\.0`: its activation is a function that is not one of torch's"):
            assert isolate_activations(model) == {}
        return
    names = ["layers.0.activation", "layers.1.activation"]
    sites = isolated_sites(model)
    assert [(site.name, site.neuron_dim) for site in sites] == [(name, -1) for name in names]
    assert sites[0].neighbourhood.before == ("layers.0.linear1",)
    assert sites[0].neighbourhood.after == ("layers.0.linear2",)
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
        assert torch.equal(model(x, src_key_padding_mask=padding), reference(x, src_key_padding_mask=padding))
    assert list(measure_entropy(model, [x])) == names
    with torch.no_grad(), EntropyProbe(sites) as probe:  # nested tensors
        model(x, src_key_padding_mask=padding)
    assert all(0 < bits < 1 for bits in probe.entropies().values())

    linearize(model, names[:1])
    with torch.no_grad():
        half = model(x)
    assert not torch.allclose(half, reference(x), atol=1e-3)
    assert torch.allclose(half, model(x), atol=1e-5)  # with gradients: never the fused path
    restore(model)
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))


def test_the_other_transformers_of_torch_are_reached():
    model = nn.Transformer(4, 2, 1, 1, 8, batch_first=True).eval()
    reference = copy.deepcopy(model)
    names = ["encoder.layers.0.activation", "decoder.layers.0.relu"]
    assert list(isolate_activations(model)) == names
    x, y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    assert torch.equal(model(x, y), reference(x, y))


def put_names_and_hash(queue):
    queue.put((list(isolate_activations(torchvision.models.resnet50().train())), hash("relu")))


def test_names_do_not_depend_on_the_process(forked):
    queue = forked.Queue()
    run_together([forked.Process(target=put_names_and_hash, args=(queue,))])
    names, seeded = queue.get(timeout=60)
    assert seeded != hash("relu")  # its sets are in another order
    assert names == list(isolate_activations(torchvision.models.resnet50().eval()))
    assert len(names) == 49


def test_the_order_is_that_of_eval_mode_in_either_mode():
    build = partial(torchvision.models.inception_v3, init_weights=False)
    assert list(isolate_activations(build().train())) == list(isolate_activations(build().eval()))


def test_an_isolated_model_trains_under_ddp_as_before(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = Residual()
        reference = copy.deepcopy(model)
        isolate_activations(model)
        wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
        x = torch.randn(2, 4, 5, 7)
        for network in (wrapped, reference):
            network(x).square().mean().backward()
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
        assert isolate_activations(wrapped) == {"relu": model.relu, "relu_1": model.relu_1}
    finally:
        torch.distributed.destroy_process_group()


def test_bad_models_are_refused_or_unwrapped():
    with pytest.raises(TypeError, match="but got list"):
        isolate_activations([nn.ReLU()])
    with pytest.raises(TypeError, match="ScriptModule"):
        isolate_activations(torch.jit.script(nn.Sequential(nn.ReLU())))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert unwrap(torch.compile(model)) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert isolate_activations(torch.compile(model)) == {"1": model[1]}


def test_planning_touches_nothing():
    model = Residual()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert [site.name for site in planned_sites(model)] == ["relu", "relu_1"]
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert list(dict(model.named_modules())) == ["", "conv1", "bn1", "conv2", "relu"]


def test_globs_select_names_and_one_that_matches_nothing_is_an_error():
    names = ["a.relu", "a.relu_1", "b.relu"]
    assert match_names(names, None, None) == names
    assert match_names(names, ["a.*"], ["*_1"]) == ["a.relu"]
    for argument in ("include", "exclude"):
        with pytest.raises(
            ValueError, match=f"`{argument}` to hold globs that match activations, but 'c.*' matches none"
        ):
            match_names(names, **{"include": None, "exclude": None, argument: ["c.*"]})
