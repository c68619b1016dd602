"""Activations become linear and come back exactly, and the marks in a state dict say which ones are."""

import copy
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_easier import candidates, fit_chains, isolate_activations, linearize, measure_affines, restore
from lightning_easier.structure.linearize import (
    MARK_KEY,
    IdentityStandIn,
    Mark,
    bypass,
    read_marks,
    replace_block,
    restructure_as_marked,
    stand_ins,
)
from lightning_easier.structure.stand_in import LEAVES
from lightning_easier.support.affine import ChannelAffine
from tests.models import Functional, Residual


def make_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def test_the_named_activation_becomes_linear_and_comes_back():
    model = make_mlp()
    x = torch.randn(5, 3)
    before = model(x)
    assert linearize(model, ["3"]) is model
    assert torch.equal(model(x), model[4](model[2](model[1](model[0](x)))))
    assert not torch.equal(model(x), before)
    assert restore(model, ["3"]) is model
    assert torch.equal(model(x), before)
    assert type(model[3]) is nn.ReLU


def test_one_call_of_a_shared_module_becomes_linear():
    model = Residual().eval()
    reference = copy.deepcopy(model)
    linearize(model, ["relu"])
    x = torch.randn(2, 4, 5, 6)
    expected = torch.relu(reference.conv2(reference.bn1(reference.conv1(x))) + x)
    assert torch.equal(model(x), expected)
    assert list(isolate_activations(model)) == ["relu_1"]


def test_functional_calls_become_linear():
    model = Functional().eval()
    names = list(isolate_activations(model))
    linearize(model, names)
    x = torch.randn(3, 6)
    assert torch.allclose(model(x), torch.sigmoid(model.fc(x) - 0.1 - 0.2) - 0.3)


def test_the_parameters_of_a_removed_activation_are_no_longer_the_models_until_it_is_restored():
    model = make_mlp()
    slope = model[1].weight
    linearize(model, ["1"])
    assert all(parameter is not slope for parameter in model.parameters())
    model.double()  # what is put aside is not cast along, but when it comes back
    restore(model)
    assert model(torch.randn(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert any(parameter is slope for parameter in model.parameters())


def test_the_mode_goes_over_both_ways():
    model = make_mlp()
    model[3].eval()
    linearize(model, ["3"])
    assert model[0].training
    assert not model[3].training
    model[3].train()
    restore(model)
    assert model[3].training


def test_is_idempotent_and_copies_with_the_model():
    model = linearize(linearize(make_mlp(), ["3"]), ["3"])
    twin = copy.deepcopy(model)
    restore(twin)
    assert list(stand_ins(model)) == ["3"]
    assert stand_ins(twin) == {}


def test_a_marked_state_dict_does_not_load_into_the_dense_model_nor_a_dense_one_into_the_pruned():
    pruned, dense = linearize(make_mlp(), ["3"]), make_mlp()
    with pytest.raises(
        RuntimeError, match=r"Unexpected key.*3\..*load_pruned_or_restore_structure_on_load\._extra_state"
    ):
        dense.load_state_dict(pruned.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*3\..*load_pruned_or_restore_structure_on_load\._extra_state"):
        pruned.load_state_dict(dense.state_dict())
    pruned.load_state_dict(pruned.state_dict())


def test_a_mark_of_another_activation_does_not_load():
    pruned = linearize(make_mlp(), ["3"])
    state_dict = pruned.state_dict()
    state_dict[f"3.{MARK_KEY}"] = Mark("identity", "GELU").encode()
    with pytest.raises(ValueError, match="to carry the mark.*ReLU.*but got.*GELU"):
        pruned.load_state_dict(state_dict)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_marks_are_plain_tensors_that_survive_a_cast(tmp_path, dtype):
    state_dict = linearize(make_mlp(), ["1", "3"]).state_dict()
    torch.save({key: value.to(dtype) for key, value in state_dict.items()}, tmp_path / "weights.pt")
    marks = read_marks(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert marks == {"1": Mark("identity", "PReLU"), "3": Mark("identity", "ReLU")}


def test_extra_states_of_others_are_no_marks():
    keys = "_extra_state", MARK_KEY
    values = [torch.zeros(3), torch.tensor([123, 125], dtype=torch.uint8), {"a": 1}, torch.zeros(())]
    assert read_marks({f"{i}.{key}": value for i, value in enumerate(values) for key in keys}) == {}


def test_the_structure_is_replayed_from_the_marks():
    state_dict = linearize(make_mlp(), ["1", "3"]).state_dict()
    model = linearize(make_mlp(), ["1"])
    assert restructure_as_marked(model, state_dict) == ({"3": Mark("identity", "ReLU")}, [])
    assert restructure_as_marked(model, state_dict) == ({}, [])
    model.load_state_dict(state_dict)
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match="to have an activation '1' of class PReLU.*but got ReLU"):
        restructure_as_marked(other, state_dict)
    assert stand_ins(other) == {}
    linearized, restored = restructure_as_marked(model, make_mlp().state_dict())
    assert (linearized, [each.name for each in restored]) == ({}, ["1", "3"])
    model.load_state_dict(make_mlp().state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["nope"],), ValueError, r"`names` to hold names of activations, but got 'nope'"),
        ((["3", "2"],), ValueError, "but got '2'"),
        (("3",), TypeError, "an iterable of names, but got the string '3'"),
        ((None,), TypeError, "an iterable of names, but got None"),
    ],
)
def test_bad_names_are_refused_and_the_model_is_as_it_was(arguments, error, message):
    model = make_mlp()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        linearize(model, *arguments)
    assert dict(model.named_modules()) == modules


def test_bad_stand_ins_are_refused():
    model = make_mlp()
    with pytest.raises(ValueError, match=r"`stand_in` to be one of \('identity', 'affine', 'fitted'\), but got 'zero'"):
        linearize(model, ["3"], stand_in="zero")
    with pytest.raises(ValueError, match="`statistics` to be None"):
        linearize(model, ["3"], statistics={"3": (1.0, 0.0)})
    with pytest.raises(ValueError, match="linearized activations, but got '3'; linear are"):
        restore(model, ["3"])
    assert not any(isinstance(module, IdentityStandIn) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainable": True}, ValueError, "`trainable` to be False with stand_in='identity', which has no parameters"),
        ({"trainable": 1, "stand_in": "affine"}, TypeError, "`trainable` to be a bool, but got 1"),
        ({"shift_padding": 1}, TypeError, "`shift_padding` to be a bool, but got 1"),
    ],
)
def test_options_without_effect_or_of_another_type_are_refused(options, error, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(error, match=message):
        linearize(model, ["1"], **options)
    assert isinstance(model[1], nn.ReLU)
    if "stand_in" not in options and "shift_padding" in options:
        with pytest.raises(error, match=message):
            candidates(model, **options)


class Around(nn.Module):
    """x + inner(x), on maps of two channels."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


def make_nested(dtype=torch.float64):
    """Blocks in blocks, three levels deep, with activations between convolutions that pad inside of each."""
    torch.manual_seed(0)

    def conv():
        return nn.Conv2d(2, 2, 3, padding=1)

    innermost = Around(conv(), nn.PReLU(2), conv())
    middle = Around(conv(), nn.ReLU(), conv(), innermost, conv(), nn.GELU(), conv())
    return nn.Sequential(conv(), nn.ReLU(), Around(conv(), nn.ReLU(), conv(), middle), nn.GELU(), conv()).to(dtype)


OUTER, MIDDLE, INNERMOST = "2", "2.inner.3", "2.inner.3.inner.3"
BLOCKS = [OUTER, MIDDLE, INNERMOST, f"{MIDDLE}.inner", f"{INNERMOST}.inner"]
ACTIVATIONS = ["1", "3", f"{OUTER}.inner.1", f"{MIDDLE}.inner.1", f"{MIDDLE}.inner.5", f"{INNERMOST}.inner.1"]
MAPS = torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def remove(model, name, kind):
    """Take something out in one of three ways, if it is there; tell whether it was."""
    if name in stand_ins(model):
        return False
    if name in BLOCKS:
        if kind == 2:
            operator = ChannelAffine(2, dim=1)
            nn.init.constant_(operator.weight, 0.5)
            replace_block(model, name, operator)
        else:
            bypass(model, [name], LEAVES[kind])
    elif kind == 2:
        linearize(model, [name], stand_in="fitted", statistics=fit_chains(model, [MAPS], include=[name]))
    elif kind == 1:
        linearize(model, [name], stand_in="affine", statistics=measure_affines(model, [MAPS]), trainable=True)
    else:
        linearize(model, [name])
    return True


@settings(max_examples=3, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*ACTIVATIONS, *BLOCKS]), st.integers(0, 2)), min_size=2, max_size=6),
    st.randoms(use_true_random=False),
)
@example([(f"{INNERMOST}.inner.1", 2), (INNERMOST, 2), (f"{MIDDLE}.inner.1", 0), (MIDDLE, 1), (OUTER, 2)], Random(0))
def test_what_was_removed_in_blocks_that_went_later_comes_back_as_each_state_dict_says(removals, order):
    model, dense = make_nested(), make_nested()
    saved = [({key: value.clone() for key, value in model.state_dict().items()}, model(MAPS))]
    for name, kind in removals:
        try:
            removed = remove(model, name, kind)
        except ValueError:  # it is not there, or there is nothing to fit, or something outside was changed with it
            removed = False
        if removed:
            saved.append(({key: value.clone() for key, value in model.state_dict().items()}, model(MAPS)))
    assert_is_dense(restore(copy.deepcopy(model)), dense)
    for state, expected in [*reversed(saved), saved[-1]]:
        restructure_as_marked(model, state)
        model.load_state_dict(state)
        assert torch.equal(model(MAPS), expected)
    linear = stand_ins(model)
    state_of_another = {**order.choice(saved)[0], f"0.{MARK_KEY}": Mark("identity", "SiLU").encode()}
    with pytest.raises(ValueError, match="an activation '0' of class SiLU.*but got Conv2d"):
        restructure_as_marked(model, state_of_another)
    assert torch.equal(model(MAPS), expected)
    assert stand_ins(model) == linear
    assert_is_dense(restore(model), dense)


def assert_is_dense(model, dense):
    assert not stand_ins(model)
    assert torch.equal(model(MAPS), dense(MAPS))
    assert [str(part) for part in model.modules()] == [str(part) for part in dense.modules()], "paddings too"


def test_what_is_inside_a_block_that_is_gone_comes_back_with_it_or_not_at_all():
    model, dense = make_nested(), make_nested()
    inside = f"{INNERMOST}.inner.1"
    linearize(model, [inside])
    with_one_linear = model(MAPS)
    bypass(bypass(model, [INNERMOST]), [OUTER])
    gone = model(MAPS)
    for remove_again in (bypass, lambda model, names: replace_block(model, *names, nn.Identity())):
        with pytest.raises(ValueError, match=f"'{OUTER}', which is gone.*Restore it first"):
            remove_again(model, [OUTER])
    for names, block in (([INNERMOST], OUTER), ([inside, OUTER], INNERMOST)):
        with pytest.raises(ValueError, match=f"to hold '{block}' besides .*inside of that block.*Restore the block"):
            restore(model, names)
        assert torch.equal(model(MAPS), gone)
    restore(model, [INNERMOST, OUTER])  # in whatever order
    assert list(stand_ins(model)) == [inside]
    assert torch.equal(model(MAPS), with_one_linear)
    bypass(model, [OUTER])
    model.float()
    assert {parameter.dtype for parameter in restore(model).parameters()} == {torch.float32}
    assert_is_dense(model.double().load_state_dict(dense.state_dict()) and model, dense)
