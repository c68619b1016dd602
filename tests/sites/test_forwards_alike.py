"""Of forwards that are alike the first is traced; those that only seem to be alike each say what they do."""

import functools

import pytest
import torch
from torch import nn

from lightning_easier.sites import tracing
from lightning_easier.sites.discovery import Discovery
from lightning_easier.sites.rectifiers import GATES


class Asks(nn.Module):
    """Asks what it is told to of itself, and goes one way or another."""

    at_hand = None

    def __init__(self, asks, **given):
        super().__init__()
        self.asks = asks
        self.up, self.act = nn.Linear(4, 4), nn.ReLU()
        for name, value in given.items():
            setattr(self, name, value)

    @property
    def reads_on(self):
        return self.flag

    @functools.cached_property
    def kept(self):
        return self.__dict__["flag"]

    def forward(self, x):
        return self.act(self.up(x)) if self.asks(self) else self.up(self.act(x))


class Slotted(Asks):
    __slots__ = ("slot",)


class Plain(nn.Linear):
    pass


class Config:
    def __init__(self, flag):
        self.flag = flag


def tied(is_tied: bool) -> nn.Module:
    pair = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    if is_tied:
        pair[1] = pair[0]
    return pair


def with_slot(module, value):
    module.slot = value
    return module


def made(asks, one, other):
    return Asks(asks, **one), Asks(asks, **other)


def elsewhere(module):
    return made(lambda m: module.weight.shape[0] == 4, {"more": nn.Linear(4, 4)}, {"more": module})


def replaced_forward(module):
    module.forward = lambda x: module.up(module.act(x))
    return module


def with_attribute(module, name, value):
    object.__setattr__(module, name, value)
    return module


PAIRS = {
    "a flag": lambda: made(lambda m: m.flag, {"flag": True}, {"flag": False}),
    "a type": lambda: made(lambda m: m.flag is True, {"flag": True}, {"flag": 1}),
    "a property": lambda: made(lambda m: m.reads_on, {"flag": True}, {"flag": False}),
    "a cached property": lambda: made(lambda m: m.kept, {"flag": True}, {"flag": False}),
    "a slot": lambda: (
        with_slot(Slotted(lambda m: m.slot), True), with_slot(Slotted(lambda m: m.slot), False),
    ),
    "an attribute that may be missing": lambda: made(lambda m: hasattr(m, "flag"), {"flag": 0}, {}),
    "an attribute that is the class's on one": lambda: made(lambda m: m.at_hand is None, {}, {"at_hand": 1}),
    "all attributes": lambda: made(lambda m: "flag" in vars(m), {"flag": 0}, {}),
    "an item": lambda: made(lambda m: m.flags[1], {"flags": (0, True)}, {"flags": (0, False)}),
    "an item of a dictionary": lambda: made(lambda m: m.flags["b"], {"flags": {"b": 1}}, {"flags": {"b": 0}}),
    "a key": lambda: made(lambda m: "a" in m.flags, {"flags": {"a": 1}}, {"flags": {"b": 1}}),
    "an item of an item": lambda: made(lambda m: m.flags[0][0], {"flags": [[1]]}, {"flags": [[0]]}),
    "a function": lambda: made(lambda m: m.tell(), {"tell": lambda: True}, {"tell": lambda: False}),
    "an object": lambda: made(lambda m: m.config.flag, {"config": Config(True)}, {"config": Config(False)}),
    "a tensor": lambda: made(
        lambda m: m.numbers["t"].item() > 0, {"numbers": {"t": torch.ones(())}}, {"numbers": {"t": torch.zeros(())}}
    ),
    "a child that may be none": lambda: made(lambda m: m.more is None, {"more": None}, {"more": nn.Linear(4, 4)}),
    "a child that may be missing": lambda: made(lambda m: hasattr(m, "more"), {}, {"more": nn.Linear(4, 4)}),
    "the class of a child": lambda: made(
        lambda m: isinstance(m.more, Plain), {"more": nn.Linear(4, 4)}, {"more": Plain(4, 4)}
    ),
    "an attribute of a child": lambda: made(
        lambda m: m.more.out_features == 4, {"more": nn.Linear(4, 4)}, {"more": nn.Linear(4, 5)}
    ),
    "the length of a child": lambda: made(
        lambda m: len(m.more) > 1, {"more": nn.ModuleList([nn.ReLU()])}, {"more": nn.ModuleList([nn.ReLU()] * 2)}
    ),
    "the names in a child": lambda: made(
        lambda m: "a" in m.more, {"more": nn.ModuleDict({"a": nn.ReLU()})}, {"more": nn.ModuleDict({"b": nn.ReLU()})}
    ),
    "whether children are one": lambda: made(
        lambda m: m.more[0] is m.more[1], {"more": tied(True)}, {"more": tied(False)}
    ),
    "a parameter that may be none": lambda: made(
        lambda m: m.more.bias is None, {"more": nn.Linear(4, 4)}, {"more": nn.Linear(4, 4, bias=False)}
    ),
    "all parameters": lambda: made(
        lambda m: sum(p.numel() for p in m.more.parameters()) == 20,
        {"more": nn.Linear(4, 4)}, {"more": nn.Linear(4, 5)},
    ),
    "the parameters by name": lambda: made(
        lambda m: len(m.more._parameters["weight"]) == 4, {"more": nn.Linear(4, 4)}, {"more": nn.Linear(4, 5)},
    ),
    "a module elsewhere": lambda: made(
        lambda m: m.others[0].flag,
        {"others": [Asks(None, flag=True)]}, {"others": [Asks(None, flag=False)]},
    ),
    "a module that is no child": lambda: (
        with_attribute(Asks(lambda m: m.other.out_features == 4), "other", nn.Linear(4, 4)),
        with_attribute(Asks(lambda m: m.other.out_features == 4), "other", nn.Linear(4, 5)),
    ),
    "a module that is a child of one": lambda: elsewhere(nn.Linear(4, 4)),
    "a forward of its own": lambda: (Asks(lambda m: True), replaced_forward(Asks(lambda m: True))),
}  # fmt: skip


def flow(model: nn.Module) -> list:
    plan = Discovery(frozenset(GATES)).plan(model)
    return [[(node.kind, node.name, [each.name for each in node.inputs]) for node in plan.flow.nodes], plan.left_alone]


@pytest.mark.parametrize("what", PAIRS)
def test_forwards_that_ask_for_what_differs_are_each_traced(monkeypatch, what):
    first, second = PAIRS[what]()
    if "asks" in vars(first):  # one function: they differ in nothing else
        second.asks = first.asks
    for pair in ((first, second), (second, first)):
        model = nn.Sequential(*pair).eval()
        found = flow(model)
        with monkeypatch.context() as patched:
            patched.setattr(tracing, "_is_alike", lambda *_: False)
            assert flow(model) == found
    assert flow(first) != flow(second)


@pytest.mark.parametrize("given", [
    ({"flag": True, "unread": 1}, {"flag": True, "unread": 2}),
    ({"flag": True, "more": nn.Linear(4, 4)}, {"flag": True, "more": nn.Linear(8, 8)}),
    ({"flag": True, "flags": [1]}, {"flag": True, "flags": [2]}),
], ids=str)  # fmt: skip
def test_what_a_forward_does_not_ask_for_makes_no_difference(monkeypatch, given):
    traced = []
    read = tracing._read
    monkeypatch.setattr(tracing, "_read", lambda module, watch: (traced.append(module), read(module, watch))[1])
    model = nn.Sequential(*made(lambda m: m.flag, *given)).eval()
    found = flow(model)
    assert traced == [model[0]]
    monkeypatch.setattr(tracing, "_is_alike", lambda *_: False)
    assert flow(model) == found
    assert traced == [model[0], model[0], model[1]]


def test_many_forwards_that_differ_are_not_compared_with_each_other(monkeypatch):
    compared = []
    alike = tracing._is_alike
    monkeypatch.setattr(tracing, "_is_alike", lambda *pair: (compared.append(pair), alike(*pair))[1])

    def asks(module):
        return module.number % 2

    def count(depth: int) -> int:
        compared.clear()
        flow(nn.Sequential(*[Asks(asks, number=number) for number in range(depth)]))
        return len(compared)

    assert count(120) - count(80) == count(80) - count(40)
