"""What the bytecode of a forward tells, in whatever version of Python it was compiled."""

import dis
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import isolate_activations
from lightning_easier.sites.bytecode import asks_for_none, handles_exceptions, in_singles, names_used
from tests.sites.recorded_bytecode import ASKING, RECORDED, RECORDED_ASKING, SOURCES

COMPREHENSIONS = ("one for each layer", "nested")


def recorded(text: str) -> list[SimpleNamespace]:
    pairs = (word.split(":") for word in text.split())
    return [SimpleNamespace(offset=int(offset), opname=name) for offset, name in pairs]


@pytest.mark.parametrize(("version", "name"), RECORDED)
def test_a_comprehension_that_is_part_of_its_function_handles_no_exceptions(version, name):
    # recorded: the Python that runs this may be 3.11, in which a comprehension is a function of its own
    text, targets = RECORDED[version, name]
    entries = [SimpleNamespace(target=target) for target in targets]
    assert entries  # else the function would tell nothing
    assert handles_exceptions(recorded(text), entries) is (name not in COMPREHENSIONS)


@pytest.mark.parametrize("name", SOURCES)
def test_this_python_tells_the_same_of_what_it_compiles(name):
    made: dict = {}
    exec(SOURCES[name], made)
    bytecode = dis.Bytecode(made["forward"].__code__)
    assert handles_exceptions(list(bytecode), bytecode.exception_entries) is (name not in COMPREHENSIONS)


@pytest.mark.parametrize(
    "handler",
    [
        "PUSH_EXC_INFO POP_TOP POP_EXCEPT RETURN_VALUE",
        "SWAP POP_TOP SWAP RERAISE",  # nothing is restored
        "SWAP POP_TOP SWAP STORE_FAST",  # nothing is raised
        "SWAP POP_TOP SWAP STORE_FAST LOAD_GLOBAL CALL RERAISE",  # something is done
        "COPY POP_EXCEPT RERAISE",
    ],
)
def test_only_what_restores_variables_and_raises_again_is_no_handler(handler):
    instructions = [SimpleNamespace(offset=2 * place, opname=name) for place, name in enumerate(handler.split())]
    assert handles_exceptions(instructions, [SimpleNamespace(target=0)])
    assert not handles_exceptions(instructions, [])


def recorded_with_values(text: str) -> list[SimpleNamespace]:
    made = []
    for offset, name, value in (word.split(":") for word in text.split()):
        value = None if value == "None" else tuple(value.split("+")) if "+" in value else value
        made.append(SimpleNamespace(offset=int(offset), opname=name, argval=value))
    return made


@pytest.mark.parametrize(("version", "name"), RECORDED_ASKING)
def test_a_question_for_none_is_seen_where_two_variables_share_an_instruction(version, name):
    instructions = recorded_with_values(RECORDED_ASKING[version, name])
    assert any(isinstance(each.argval, tuple) for each in instructions)
    assert asks_for_none(in_singles(instructions), frozenset({"mask"})) is (name == "of a value")


@pytest.mark.parametrize("name", ASKING)
def test_this_python_asks_for_none_alike(name):
    made: dict = {}
    exec(ASKING[name], made)
    instructions = in_singles(dis.get_instructions(made["forward"]))
    assert asks_for_none(instructions, frozenset({"mask"})) is (name == "of a value")


def test_a_name_that_is_asked_of_the_parent_is_used():
    class Child(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert names_used([Child.forward.__code__])["forward"] == 1


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 4)])
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.cat([self.act(layer(x)) for layer in self.layers], 1))


def test_a_forward_with_a_comprehension_is_recorded():
    assert list(isolate_activations(Branches())) == ["act", "act_1", "act_2"]
