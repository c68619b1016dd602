"""Tests of what activations are on neurons that do not switch."""

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import isolate_activations, linearize
from lightning_easier.measure.affines import AffineFit, AffineStatistics, affine_of
from lightning_easier.measure.switching import pieces, switched_affine

# Neurons that are always ON, always OFF, and always zero
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0], dtype=torch.float64)
LAYOUTS = {
    "maps": ((6, 5, 7, 3), 1),
    "tokens": ((6, 4, 5), -1),
    "vectors": ((6, 5), 1),
    "channels last": ((6, 3, 2, 5), -1),
}


def unswitched(shape: tuple[int, ...], dim: int, signs: Tensor = SIGNS) -> Tensor:
    """Return pre-activations whose neurons never switch, up to 12 in size."""
    torch.manual_seed(0)
    return (12 * torch.rand(shape, dtype=torch.float64).movedim(dim, -1) * signs).movedim(-1, dim)


def applied(fit: AffineFit, z: Tensor) -> Tensor:
    return (z.movedim(fit.dim, -1) * fit.scale + fit.offset).movedim(-1, fit.dim)


def prelu(slopes: int) -> nn.PReLU:
    activation = nn.PReLU(slopes).double()
    nn.init.uniform_(activation.weight, -0.5, 0.5)
    return activation


PIECEWISE = {
    "relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.3), "prelu": lambda: prelu(1),
    "rrelu": lambda: nn.RReLU(0.1, 0.4), "inplace": lambda: nn.LeakyReLU(-0.2, inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PIECEWISE)
def test_an_activation_of_two_pieces_is_an_affine_on_neurons_that_do_not_switch(name, layout):
    shape, dim = LAYOUTS[layout]
    activation, z = PIECEWISE[name]().eval(), unswitched(shape, dim)
    made = switched_affine(activation, SIGNS > 0, dim)
    assert made.is_exact
    assert made.affine.explained == 1.0
    assert made.affine.dim == dim
    torch.testing.assert_close(applied(made.affine, z), activation(z.clone()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["maps", "vectors"])
def test_a_slope_for_each_channel_goes_with_its_channel(layout):
    shape, dim = LAYOUTS[layout]
    activation, z = prelu(5), unswitched(shape, dim)
    made = switched_affine(activation, SIGNS > 0, dim)
    assert made.is_exact
    torch.testing.assert_close(applied(made.affine, z), activation(z), rtol=1e-12, atol=1e-12)
    assert not made.affine.scale.requires_grad


def test_slopes_of_another_axis_count_as_unknown():
    activation, z = prelu(5), unswitched((4, 5, 5), -1)  # as many tokens as neurons: the slopes are those of tokens
    assert switched_affine(activation, SIGNS > 0, -1) is None
    assert not torch.allclose(switched_affine(activation, SIGNS > 0, 1).affine.scale * z, activation(z))
    assert switched_affine(activation, torch.ones(5, dtype=torch.bool), -1).is_exact  # no slope of its own is needed


@pytest.mark.parametrize(
    ("activation", "signs", "other"),
    [(nn.ELU(0.5), 1, -1), (nn.CELU(0.5), 1, -1), (nn.SELU(), 1, -1), (nn.ReLU6(), -1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_an_activation_that_is_linear_on_one_side_is_an_affine_there_only(activation, signs, other):
    z = unswitched((6, 5, 7, 3), 1, torch.full_like(SIGNS, signs))
    made = switched_affine(activation, torch.full((5,), signs > 0), 1)
    assert made.is_exact
    torch.testing.assert_close(applied(made.affine, z), activation(z), rtol=1e-12, atol=1e-12)
    assert switched_affine(activation, torch.full((5,), other > 0), 1) is None


def test_the_slope_of_a_function_is_not_known_where_it_is_off():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor([0.3]))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.prelu(x, self.slope)

    (activation,) = isolate_activations(Net()).values()
    assert pieces(activation) == (None, 1.0)


class Doubled(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.ReLU):
    """Another name for the same function."""


@pytest.mark.parametrize(
    "activation",
    [
        nn.GELU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Mish(),
        nn.Softplus(),
        nn.Tanh(),
        nn.Hardtanh(),
        Doubled(),
        nn.Linear(2, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_others_are_linear_on_neither_side(activation):
    assert pieces(activation) == (None, None)


def test_a_subclass_is_known_by_its_forward():
    assert pieces(Named()) == (0.0, 1.0)
    own = nn.ReLU()
    own.forward = lambda input: 2 * input.relu()
    assert pieces(own) == (None, None)


def test_a_slope_that_is_drawn_is_none():
    assert pieces(nn.RReLU(0.1, 0.3)) == (None, 1.0)
    assert pieces(nn.RReLU(0.1, 0.3).eval()) == (0.2, 1.0)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ELU()], ids=lambda value: type(value).__name__)
def test_where_there_is_no_slope_the_closest_affine_is_taken_neuron_by_neuron(activation):
    z = unswitched((40, 5), 1)
    statistics = AffineStatistics(1)
    statistics.update(z, activation(z))
    closest = affine_of(statistics.sums, 1)
    made = switched_affine(activation, SIGNS > 0, 1, closest)
    assert not made.is_exact
    assert made.affine.explained == closest.explained < 1
    expected = applied(closest, z)
    if isinstance(activation, nn.ELU):
        expected = torch.where(SIGNS > 0, z, expected)
    torch.testing.assert_close(applied(made.affine, z), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(made.affine, AffineFit)


def test_it_takes_the_place_of_the_activation_in_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).double()
    with torch.no_grad():
        model[0].bias.copy_(100 * SIGNS)
        model[0].weight[4] = 0.0
    x = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    expected = model(x)
    made = switched_affine(model[1], SIGNS > 0, 1)
    linearize(model, ["1"], stand_in="affine", statistics={"1": made.affine}, shift_padding=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="`on` to be a bool tensor, but got dtype torch.int64"):
        switched_affine(nn.ReLU(), torch.tensor([3, 0]), 1)
    with pytest.raises(ValueError, match=r"`on` to have shape \(C,\), but got \(1, 2\)"):
        switched_affine(nn.ReLU(), torch.tensor([[True, False]]), 1)
    closest = AffineFit(torch.ones(2), torch.zeros(2), -1, 0.5)
    with pytest.raises(
        ValueError, match="`closest` to have 2 neurons on axis 1, as `on` and `dim` say, but got 2 on axis -1"
    ):
        switched_affine(nn.GELU(), torch.tensor([True, False]), 1, closest)
    with pytest.raises(ValueError, match="to have 3 neurons on axis -1, .* but got 2 on axis -1"):
        switched_affine(nn.GELU(), torch.tensor([True, False, True]), -1, closest)
    with pytest.raises(
        ValueError, match=r"`on` to have shape \(5,\), as PReLU\(num_parameters=5\) has slopes, but got \(2,\)"
    ):
        switched_affine(prelu(5), torch.tensor([True, False]), 1)
