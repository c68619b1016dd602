"""What listens to all modules while forwards are traced is put there once for a look at a model, and leaves nothing."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_easier import isolate_activations
from lightning_easier.sites import tracing, watching
from lightning_easier.sites.activations import isolated_sites, plan_isolation

METHODS = ("__getattribute__", "__setattr__", "__getattr__", "__call__")


class Block(nn.Module):
    """Its forward is traced."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return F.relu(self.fc(x) * self.scale)


class Wrong(Block):
    """Can't be traced."""

    def forward(self, x):
        if x.sum() > 0:
            raise RuntimeError("of the user")
        return super().forward(x)


class Tracing(nn.Module):
    """Traces another module inside its forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.inner = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.graphs = []

    def forward(self, x):
        self.graphs.append([(node.op, node.target) for node in fx.symbolic_trace(self.inner).graph.nodes])
        return F.relu(self.inner(self.fc(x)))


def of_modules():
    return {name: nn.Module.__dict__.get(name) for name in METHODS}


def test_one_look_hooks_modules_once_and_leaves_them_as_they_were(monkeypatch):
    before, listening, heard_by = of_modules(), [], tracing.heard_by
    monkeypatch.setattr(tracing, "heard_by", lambda tracer: listening.append(of_modules()) or heard_by(tracer))
    model = nn.Sequential(*(nn.Sequential(Block(), nn.ReLU()) for _ in range(3)))
    plan = plan_isolation(model)
    assert len(plan.sites) == 6
    assert of_modules() == before
    first, *others = listening  # of each trace, when all patches are in place
    assert len(others) > 1
    assert all(each == first for each in others)
    assert {hook.__module__ for hook in first.values()} == {watching.__name__}  # torch.fx has put none over them


@pytest.mark.parametrize("kind", [KeyError, StopIteration, KeyboardInterrupt])
def test_modules_are_as_they_were_after_an_error(kind, monkeypatch):
    def fail(*_):
        raise kind("any")

    before, model = of_modules(), nn.Sequential(Block(), Block())
    monkeypatch.setattr("lightning_easier.sites.discovery.read_steps", fail)
    with pytest.raises(kind):
        plan_isolation(model)
    assert of_modules() == before
    assert watching._now.watch is watching._now.tracer is None
    monkeypatch.undo()
    assert len(isolate_activations(model)) == 2


def test_a_forward_that_can_not_be_traced_is_told_of_alone_and_the_next_is_traced():
    before, model = of_modules(), nn.Sequential(Wrong(), Block())
    sites = isolated_sites(model)
    assert [site.name for site in sites] == ["1.relu"]
    assert of_modules() == before
    x = -torch.ones(2, 4)
    assert torch.equal(model[1](x), F.relu(model[1].fc(x) * model[1].scale))


def test_a_trace_inside_a_forward_has_patches_of_its_own():
    model = nn.Sequential(Tracing(), Block())
    plan_isolation(model)
    expected = [("placeholder", "input"), ("call_module", "0"), ("call_module", "1"), ("output", "output")]
    model[0](torch.randn(2, 4))
    alone, model[0].graphs = model[0].graphs, []
    assert alone[-1] == expected
    with watching.hooked():
        plan_isolation(model)
        assert "__getattribute__" in vars(nn.Module)
        model[0](torch.randn(2, 4))  # between traces, modules do what they do
    assert model[0].graphs[-1] == expected
    assert "__getattribute__" not in vars(nn.Module)
