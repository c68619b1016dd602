"""A score may move and cast the network that it is of, and the network may hold what is no plain tensor."""

import copy

import pytest
import torch
from torch import nn

from lightning_easier import compress

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Shifted(nn.Sequential):
    """Adds a buffer that has one place for all of its values."""

    def __init__(self):
        super().__init__(*body())
        self.register_buffer("shift", torch.full((1, 1), 1 / 3).expand(1, 8))

    def forward(self, x):
        return super().forward(x) + self.shift


class Fixed(Shifted):
    """Adds a buffer that may not be written into."""

    def __init__(self):
        super().__init__()
        with torch.inference_mode():
            self.shift = torch.full((1, 8), 1 / 3)


def body():
    torch.manual_seed(0)
    return [nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)]


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(8, 8)), *body())


def in_half(model):
    model.half()(X.half())
    model.float()


@torch.inference_mode()
def in_double(model):
    model.double()(X.double())
    model.float()


def compressed(model, look, **options):
    def evaluate(candidate):
        look(candidate)
        return 1.0

    return compress(model, [X], evaluate=evaluate, objective="macs", tolerance=9.0, **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("make", [lambda: nn.Sequential(*body()), Shifted, Fixed, scripted])
@pytest.mark.parametrize("look", [in_half, in_double, lambda model: model(X), lambda model: model._apply(torch.clone)])
def test_a_network_is_searched_whatever_its_evaluation_moves(make, look):
    result = compressed(make(), look)
    assert any(trial.kept for trial in result.report.trials)
    torch.testing.assert_close(result.model(X), result.fitted(X), rtol=1e-3, atol=1e-3)


def test_a_network_that_was_moved_in_inference_mode_is_trained_afterwards():
    result = compressed(nn.Sequential(*body()), in_double, finetune=2)
    assert any("trained for 2 steps" in note for note in result.report.notes)
    assert not any(parameter.is_inference() for parameter in result.fitted.parameters())


def test_an_evaluation_that_leaves_another_dtype_is_named():
    model = nn.Sequential(*body())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"to leave the model in its dtype, but `0\.weight` was torch\.float32 and is"):
        compressed(model, lambda candidate: candidate.bfloat16())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
