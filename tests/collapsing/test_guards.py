"""Are the sizes for which an exported graph holds those for which its questions are answered alike?"""

import pickle
from itertools import product
from math import floor
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch import Tensor, nn

from lightning_easier.collapsing.exact.capture import capture
from lightning_easier.collapsing.exact.guards import SizeGuards, read_guards


class Asks(nn.Module):
    """Takes more samples than its layer reads, and pairs of columns where their number is even."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[0] > 9:
            raise ValueError("too many")
        if y.shape[1] % 3 == 0:
            y = y[:, : y.shape[1] // 3]
        return self.layer(x) + y.sum(1, keepdim=True)


def guards_of(model: nn.Module, *arguments: Tensor) -> SizeGuards:
    captured = capture(model.eval(), arguments)
    (guards,) = (module for module in captured.modules() if isinstance(module, SizeGuards))
    return guards


def is_taken(guards: SizeGuards, *shapes: tuple[int, ...]) -> bool:
    try:
        guards(*map(torch.zeros, shapes))
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("columns", [6, 7])
def test_sizes_are_taken_for_which_every_question_is_answered_alike(columns):
    guards = guards_of(Asks(), torch.randn(5, 4), torch.randn(5, columns))
    for samples, others, width, features in product((2, 5, 9, 10), (2, 5), (6, 7, 8, 9, 12), (3, 4)):
        alike = (width % 3 == 0) == (columns % 3 == 0)
        taken = is_taken(guards, (samples, features), (others, width))
        assert taken == (samples == others and features == 4 and samples <= 9 and alike)


def test_another_number_of_axes_is_refused():
    guards = guards_of(Asks(), torch.randn(5, 4), torch.randn(5, 7))
    with pytest.raises(AssertionError, match=r"holds where y\.ndim == 2; collapse it at this size"):
        guards(torch.zeros(5, 4), torch.zeros(5, 7, 1))


class OfTwiceAsMany(nn.Module):
    """Adds to each sample what two rows say of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        if pairs.shape[0] != 2 * x.shape[0]:
            raise ValueError("two rows a sample")
        return self.layer(x) + pairs.view(x.shape[0], 2).sum(1, keepdim=True)


def test_a_size_that_is_computed_of_another_one_is_asked_for():
    guards = guards_of(OfTwiceAsMany(), torch.randn(5, 4), torch.randn(10))
    for samples, rows in product((3, 5, 6), (3, 6, 10, 12)):
        assert is_taken(guards, (samples, 4), (rows,)) == (rows == 2 * samples)


def test_guards_refuse_alike_once_they_were_pickled():
    guards = pickle.loads(pickle.dumps(guards_of(Asks(), torch.randn(5, 4), torch.randn(5, 7))))
    assert is_taken(guards, (3, 4), (3, 8))
    assert not is_taken(guards, (3, 4), (3, 9))


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (lambda n: bool((n > 4) & (n < 8)), 9),
        (lambda n: n * (1 / 3) < 3, 5),
        (lambda n: n * (2 / 3) < 6, 5),
    ],
)
def test_what_was_negated_and_fractions_are_asked_as_the_forward_does(asked, shown):
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x) if asked(x.shape[0]) else self.layer(x)

    guards = guards_of(Doubles(), torch.randn(shown, 4))
    for samples in range(2, 14):
        assert is_taken(guards, (samples, 4)) == (asked(samples) == asked(shown))


def test_sizes_that_the_forward_is_told_the_range_of_are_taken_within_it():
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            torch.sym_constrain_range(x.shape[0], min=3, max=6)
            return self.layer(x) * 2 if 2 < x.shape[0] < 8 else self.layer(x)

    guards = guards_of(Told(), torch.randn(5, 4))
    assert [samples for samples in range(2, 10) if is_taken(guards, (samples, 4))] == [3, 4, 5, 6]


class CalledAsFunctions(nn.Module):
    """Has arguments that are called as functions in its conditions are, and two that differ in a capital."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, X: Tensor, max: Tensor, x: Tensor, math: Tensor) -> Tensor:  # noqa: N803
        samples = max.shape[0]
        is_double = floor(samples * 0.7) > 2 and torch.sym_max(samples, 4) < 8
        values = self.layer(X) + max - 3 * x * math
        return 2 * values if is_double else values


def test_inputs_may_be_called_as_functions_and_are_told_as_they_are_called():
    model = CalledAsFunctions().eval()
    captured = capture(model, tuple(torch.randn(4, 5, 4)))
    for samples in range(2, 12):
        inputs = tuple(torch.randn(4, samples, 4))
        if 5 <= samples < 8:
            torch.testing.assert_close(captured(*inputs), model(*inputs))
        else:
            with pytest.raises(AssertionError, match=r"holds where .*max\.size\(\)\[0\]|X\.size\(\)\[0\]"):
                captured(*inputs)
    with pytest.raises(AssertionError, match=r"holds where X\.ndim == 2; collapse it at this size"):
        captured(torch.zeros(5, 4, 1), *torch.zeros(3, 5, 4))
    named = dict(zip(("x", "math", "max", "X"), torch.randn(4, 6, 4), strict=True))
    torch.testing.assert_close(captured(**named), model(**named))


def test_a_condition_on_what_is_no_size_of_an_input_is_an_error():
    size, other = sympy.symbols("s0 s1", integer=True)
    environment = SimpleNamespace(
        guards=[SimpleNamespace(expr=size > other)], deferred_runtime_asserts={},
        var_to_range={}, simplify=lambda condition: condition, is_unbacked_symint=lambda symbol: False,
    )  # fmt: skip
    x = SimpleNamespace(ndim=1, shape=(3,), fake_mode=SimpleNamespace(shape_env=environment))
    with pytest.raises(ValueError, match="torch.export asks for s0 > s1"):
        read_guards({"x": x})
