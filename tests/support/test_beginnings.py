"""A model whose end has changed computes what it would from the start; what comes before is not run again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_easier.support.beginnings import Beginnings
from lightning_easier.support.calls import Arguments, call
from lightning_easier.zoo import CifarResNet


class Everything(nn.Module):
    """What may go wrong: writes in place, a module called twice, another that returns no tensor, an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.written = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.twice = nn.Linear(4, 4)
        self.pair = Pair()
        self.note = Note()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
        self.last = nn.Linear(4, 2)

    def forward(self, x, scale=None):
        x = self.first(x)
        y = self.written(x)
        y.view(-1)[:2] += 1
        y = self.twice(self.act(y))
        y, z = self.pair(self.twice(y))
        y = y + z * self.note(y)["factor"]
        y = self.block(y if scale is None else y * scale)
        return self.last(y)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x), x


class Note(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return {"factor": 1 + self.weight * x.mean(), "name": "note"}


NAMES = [name for name, module in Everything().named_modules() if name and not list(module.children())]


def changed(model, name):
    """Return what takes the place of a module: another of its kind, with other values."""
    other = type(model.get_submodule(name))
    if other is nn.Linear:
        old = model.get_submodule(name)
        return nn.Linear(old.in_features, old.out_features)
    return nn.Identity() if other is not Note else Note().requires_grad_(False)


@given(
    name=st.sampled_from(NAMES), seed=st.integers(0, 100), most=st.sampled_from([0, 300, 2**20]), named=st.booleans()
)
def test_it_computes_what_the_changed_model_does(name, seed, most, named):
    torch.manual_seed(seed)
    model = Everything().eval()
    values = [torch.randn(size, 4) for size in (5, 5, 2)]
    batches = [Arguments((x, torch.rand(len(x), 1)), ["scale"]) if named else (x,) for x in values]
    beginnings = Beginnings(model, batches, most)
    run = beginnings.running_from([name])
    before = [call(model, batch) for batch in batches]
    assert all(map(torch.equal, beginnings.outputs, before))
    old, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], changed(model, name))
    with torch.no_grad():
        expected = [call(model, batch) for batch in batches]
    for _ in range(2):
        assert all(map(torch.equal, run(), expected))
    setattr(parent, name.rpartition(".")[2], old)
    assert all(map(torch.equal, run(), before))
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_comes_before_is_not_run_and_what_it_is_told_is_a_part_of_a_block():
    model = CifarResNet(20).eval()
    run = Beginnings(model, [(torch.randn(2, 3, 32, 32),)]).running_from(["layer2.1.conv2", "layer3.0.conv1"])
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            own = module.forward
            module.forward = lambda x, own=own, name=name: ran.append(name) or own(x)
    run()
    assert ran[0] == "layer2.1.conv2"
    assert not any(name.startswith(("layer1", "layer2.0")) for name in ran)
    assert len(ran) == 9


def test_an_own_forward_of_an_instance_comes_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    own = model[0].forward
    model[0].forward = lambda x: own(x) + 1
    mine = model[0].forward
    x = torch.randn(3, 2)
    run = Beginnings(model, [(x,)]).running_from(["2"])
    with torch.no_grad():
        torch.testing.assert_close(run()[0], model(x))
    assert model[0].forward is mine


def test_a_forward_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    run = Beginnings(model, [(torch.randn(3, 2),)]).running_from(["1"])
    model[1] = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        run()
    assert "forward" not in vars(model[0])


class WritesIntoItsInput(nn.Module):
    """An activation in place before a skip: what is added reads what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.act(x)) + x


class Keeps(nn.Module):
    """Keeps something of each call, which others read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.how, self.skip, self.skips = nn.Linear(4, 4), how, None, []
        self.register_buffer("written", torch.zeros(4))

    def forward(self, x):
        y = self.first(x)
        if self.how == "attribute":
            self.skip = y
        elif self.how == "list":
            self.skips.append(y)
        else:
            self.written.copy_(y[0])
        return 2 * y


class ReadsWhatIsKept(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.block = nn.Sequential(Keeps(how))
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        y, keeps = self.last(self.block(x)), self.block[0]
        return y + {"attribute": keeps.skip, "list": (keeps.skips or [None])[-1], "buffer": keeps.written}[keeps.how]


class Hooked(nn.Module):
    """A hook doubles what a module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.block.register_forward_hook(lambda module, args, output: 2 * output)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.block(x))


def kept_in(how):
    return lambda: ReadsWhatIsKept(how)


@pytest.mark.parametrize(
    "make",
    [WritesIntoItsInput, Hooked, kept_in("attribute"), kept_in("list"), kept_in("buffer")],
    ids=["in place", "hooks", "attribute", "list", "buffer"],
)
def test_what_does_more_than_to_return_something_is_run_again(make):
    torch.manual_seed(0)
    model = make().eval()
    batches = [(torch.randn(5, 4),) for _ in range(3)]
    with torch.no_grad():
        expected = [model(*batch) for batch in batches]
    beginnings = Beginnings(model, batches)
    for returned in (beginnings.outputs, beginnings.running_from(["last"])()):
        for value, wanted in zip(returned, expected, strict=True):
            torch.testing.assert_close(value, wanted)


class OfItself(nn.Module):
    """Calls itself, once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x, depth=1):
        return self(self.first(x), depth - 1) if depth else x


def test_a_module_that_calls_itself_and_weights_made_in_inference_mode_are_no_error():
    with torch.inference_mode():
        model = nn.Sequential(OfItself(), nn.Linear(4, 4)).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(Beginnings(model, [(x,)]).running_from(["1"])()[0], model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_takes_no_hooks_is_run_again():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    model = nn.Sequential(scripted, nn.Sequential(nn.Linear(4, 4), scripted), nn.Linear(4, 4)).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(Beginnings(model, [(x,)]).running_from(["2"])()[0], model(x))
