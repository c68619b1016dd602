"""Operations apply and undo themselves, and say what they have done to parameters."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_easier import callbacks, fit_chains, linearize, measure_affines
from lightning_easier.structure import operations
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.operations import Affines, FittedOperators, Identities, Operation, from_plain

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
    assert len(names) == 8
    names += [] if path.stem == "entropy_pruning" else ["Linearize", "FitChains"]
    assert [name for name in names if name in path.read_text()] == []
