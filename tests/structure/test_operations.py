"""Operations apply and undo themselves, and say what they have done to parameters."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_easier import callbacks, fit_chains, linearize, measure_affines
from lightning_easier.structure import operations
from lightning_easier.structure.block_operators import BlockFit
from lightning_easier.structure.linearize import restructure_as_marked, stand_ins
from lightning_easier.structure.operations import (
    Affines,
    FittedBlocks,
    FittedOperators,
    Identities,
    Operation,
    from_plain,
)
from lightning_easier.support.affine import ChannelAffine

NAME = "1"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 32), nn.PReLU(), nn.Linear(32, 3), nn.ReLU(), nn.Linear(3, 2)
    return nn.Sequential(*layers).double()


def operation(kind: str, model: nn.Module, data: torch.Tensor) -> Operation:
    if kind == "identity":
        return Identities([NAME])
    if kind == "fitted":
        return FittedOperators([NAME], {NAME: fit_chains(model, [data])[NAME].to_plain()})
    return Affines([NAME], {NAME: measure_affines(model, [data])[NAME].to_plain()}, trainable="trained" in kind)


@pytest.mark.parametrize("kind", ["identity", "affine", "affine, trained", "fitted"])
def test_an_operation_is_plain_data_and_undoes_what_it_does(kind):
    model, data = network(), torch.randn(200, 4, dtype=torch.float64)
    before, given = deepcopy(model.state_dict()), list(model.parameters())
    made = from_plain(operation(kind, model, data).to_plain())
    slope = model[1].weight

    change = made.apply(model)
    now = list(model.parameters())
    assert any(slope is lost for lost in change.lost)
    assert {id(p) for p in given} - {id(p) for p in now} == {id(p) for p in change.lost}
    joined = [p for name in change.joined for p in model.get_submodule(name).parameters()]
    assert (
        {id(p) for p in now} - {id(p) for p in given} == {id(p) for p in joined} == {id(p) for p in made.leaving(model)}
    )
    rewritten = [p for name, p in model.named_parameters() if not torch.equal(p, before.get(name, p))]
    assert {id(p) for p in rewritten} - {id(p) for p in joined} == {id(p) for p in change.rewritten}
    assert made.changes_parameters == bool(joined or change.rewritten)
    assert list(stand_ins(model)) == [NAME]
    assert bool(change.notes) == (kind == "fitted")

    back = made.undo(model)
    assert [id(p) for p in back] == [id(p) for p in change.lost]
    assert {id(p) for p in model.parameters()} == {id(p) for p in given}
    model.load_state_dict(before)
    torch.testing.assert_close(model(data), network()(data), rtol=0, atol=0)


def test_an_operation_of_another_kind_is_named():
    with pytest.raises(ValueError, match=r"\['affine', 'block', 'fitted', 'identity'.*\], but got 'mask'"):
        from_plain({"kind": "mask", "names": []})


def test_marks_of_another_version_are_refused_by_that_name():
    model = linearize(network(), [NAME])
    state = model.state_dict()
    (key,) = (key for key in state if key.endswith("_extra_state"))
    text = bytes(state[key].tolist()).replace(b'"lightning_easier.linear": 1', b'"lightning_easier.linear": 7')
    state[key] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match=r"of version 1, but got 7"):
        model.load_state_dict(state)


def test_a_kind_is_that_of_one_class():
    with pytest.raises(TypeError, match="Mine.kind to be one of its own, but 'affine' is Affines"):

        class Mine(Operation):
            kind = "affine"

    assert operations.kind_of({"kind": "affine"}) is Affines


@pytest.mark.parametrize("path", sorted(Path(callbacks.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_no_module_of_the_callback_knows_a_kind_of_operation(path):
    """Beside the one whose default is EASIER's, which passes it on."""
    kinds = [kind for kind in vars(operations).values() if isinstance(kind, type) and issubclass(kind, Operation)]
    names = [name for each in kinds if "kind" in vars(each) for name in (each.__name__, f'"{each.kind}"')]
    assert len(names) == 10
    names += [] if path.stem == "entropy_pruning" else ["Linearize", "FitChains"]
    assert [name for name in names if name in path.read_text()] == []


class Pair(nn.Module):
    """A block of maps that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.back = nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.back(self.act(self.conv(x))), None


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, (1, 3)), Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.stem(x))[0].mean((2, 3))


OPERATORS = {
    "convolution": lambda: nn.Conv2d(4, 4, (3, 5), padding=(1, 2)),
    "separable": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 4, 1)),
    "affine": lambda: ChannelAffine(4, 1),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_an_operator_takes_the_place_of_a_block_and_gives_it_back(kind):
    torch.manual_seed(0)
    model, operator = Holder().double(), OPERATORS[kind]()
    for parameter in operator.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    dense, before = model(x), list(model.named_parameters())
    fit = BlockFit.of(operator, kind, 0.25, model.stem.weight, returns=2)
    assert fit is not None
    made = from_plain(FittedBlocks(["block"], {"block": fit.to_plain()}).to_plain())
    change = made.apply(model)
    assert change.lost == [p for name, p in before if name.startswith("block.")]
    assert change.joined == ["block"]
    assert change.notes == {"block": [f"{kind} in place of the block, 75.0% explained"]}
    expected = operator.double()(model.stem(x)).mean((2, 3))
    torch.testing.assert_close(model(x), expected)
    again = Holder().double()
    restructure_as_marked(again, model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with pytest.raises(RuntimeError, match="made_linear_by_lightning_easier"):
        Holder().double().load_state_dict(model.state_dict())
    assert made.leaving(model) == list(model.block.parameters())
    assert made.undo(model) == change.lost
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in before]
    assert torch.equal(model(x), dense)


def test_an_operator_whose_numbers_are_too_large_for_the_model_is_none():
    operator = nn.Linear(2, 2).double()
    nn.init.constant_(operator.weight, 1e6)
    assert BlockFit.of(operator, "linear", 0.0, torch.zeros((), dtype=torch.float16)) is None
