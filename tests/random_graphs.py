"""Random small networks as users write them, for property tests: drawn as plain statements, printed as runnable code.

A network is sketched: each statement is carried out on an example as soon as it is drawn, and one that fails is left
out. So the statements that come next know the shapes, and any of them may go when hypothesis shrinks a case.
"""

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import prod
from textwrap import indent
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_easier import isolate_activations, linearize
from tests.models import randomize_batch_norms

IMPORTS = """\
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""
_numbers = count()
Pick = Callable[..., Any]


@dataclass(frozen=True)
class Graph:
    """A network as code, with the inputs that it is tried on.

    Attributes:
        layers: Statements of its ``__init__``.
        lines: Statements of its ``forward``.
        signature: The arguments of its ``forward``.
        result: The expression that it returns.
        classes: Definitions that come before it.
        linear: Whether the activation at each place, modulo their number, becomes linear.
        shape: The shape of the example.
        others: Shapes to try besides; the network need not accept them.
        second: How a second input is passed: ``""`` (not at all), ``"same"`` (a tensor of the same shape).
        keywords: Keyword arguments to call the source and the result with besides.
        channels_last: Whether the example is laid out in this way.
    """

    layers: tuple[str, ...]
    lines: tuple[str, ...]
    signature: str
    result: str
    classes: str
    linear: tuple[bool, ...]
    shape: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]
    second: str = ""
    keywords: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False

    @property
    def definition(self) -> str:
        """The class, ``Model``."""
        layers = indent("\n".join(self.layers), " " * 8)
        init = f"    def __init__(self):\n        super().__init__()\n{layers}\n\n" if self.layers else ""
        lines = indent("\n".join([*self.lines, f"return {self.result}"]), " " * 8)
        return f"{self.classes}\n\nclass Model(nn.Module):\n{init}    def forward(self, {self.signature}):\n{lines}\n"

    def __str__(self) -> str:
        """Return a script that runs it."""
        names = [name for name, _ in self._chosen(isolate_activations(self.made()))]
        dtype = "dtype=torch.float64"
        inputs = [f"torch.randn{self.shape}, {dtype})".replace("),", ",")] * (1 + bool(self.second))
        if self.channels_last:
            inputs[0] += ".contiguous(memory_format=torch.channels_last)"
        return "\n".join([
            IMPORTS + "from lightning_easier import collapse, linearize\n"
            "from tests.models import randomize_batch_norms\n",
            self.definition,
            "torch.manual_seed(0)",
            "model = randomize_batch_norms(Model()).double().eval()",
            *([f"linearize(model, {names})"] if names else []),
            f"inputs = ({', '.join(inputs)},)",
            'result = collapse(model, inputs, objective="macs")  # or "depth"',
            f"# tried on inputs of shape {self.shape}, {', '.join(map(str, self.others))}, "
            f"with keywords {dict(self.keywords)}",
            "print(result.report)",
            "print((result.model(*inputs) - model(*inputs)).norm())",
        ])  # fmt: skip

    def made(self) -> nn.Module:
        """Make the network, in float64 and eval mode, its activations as they are written."""
        code = f"{IMPORTS}\n{self.definition}"
        name = f"<random graph {next(_numbers)}>"
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)  # the source can be read, as of a file
        room: dict[str, Any] = {"__name__": __name__}
        exec(compile(code, name, "exec"), room)
        torch.manual_seed(0)
        model = room["Model"]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:  # norms scale by one, and some biases are zero, by default
                    parameter += torch.randn_like(parameter) * 0.3
        return randomize_batch_norms(model).double().eval()

    def model(self) -> nn.Module:
        """Make the network with the activations that become linear."""
        model = self.made()
        return linearize(model, [name for name, _ in self._chosen(isolate_activations(model))])

    def _chosen(self, sites: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
        return [site for place, site in enumerate(sites.items()) if self.linear[place % len(self.linear)]]

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Make inputs for a call."""
        generator = torch.Generator().manual_seed(prod(shape))
        made = [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(1 + bool(self.second))
        ]
        if self.channels_last:
            made[0] = made[0].contiguous(memory_format=torch.channels_last)
        return tuple(made)


class _Sketch:
    """A network that is being drawn: its statements, and what they compute on an example.

    Args:
        pick: Draws one of several options; a shrunk case takes the first.
        values: Name -> value, to begin with.
    """

    def __init__(self, pick: Pick, values: dict[str, Any]) -> None:
        self.pick = pick
        self.layers: list[str] = []
        self.lines: list[str] = []
        self.values = values
        self.model = nn.Module()
        self.room: dict[str, Any] = {}
        exec(IMPORTS, self.room)
        self._drawn = 0

    def tensor(self, ranks: tuple[int, ...] = (1, 2, 3, 4)) -> str | None:
        """Draw a value of some ranks; a shrunk case takes the latest."""
        names = [
            name
            for name, x in self.values.items()
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim in ranks
        ]
        return self.pick(*[names[-1]] * 4, *names[::-1]) if names else None  # often the latest, so that chains arise

    def like(self, name: str) -> str:
        """Draw a value of the shape of another, perhaps the same."""
        shape = self.values[name].shape
        names = [each for each, x in self.values.items() if isinstance(x, Tensor) and x.shape == shape]
        return self.pick(*names[::-1])

    def layer(self, code: str) -> str:
        """Name a layer."""
        name = f"self.m{len(self.layers)}"
        self.layers.append(f"{name} = {code}")
        return name

    def parameter(self, *shape: int, offset: str = "") -> str:
        """Name a parameter."""
        return self.layer(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}){offset})")

    def new(self) -> str:
        """Name a value."""
        self._drawn += 1
        return f"x{self._drawn}"

    def step(self, most: int) -> bool:
        """Draw a statement; return False where the network is to end."""
        if len(self.lines) >= most or not self.pick(*range(21)):
            return False
        before, drawn, kept = len(self.layers), self._drawn, dict(self.values)
        name = self.tensor()
        assert name is not None
        line = self.pick(*STATEMENTS[self.values[name].ndim])(self, name, self.values[name])
        if line is None or not self._run(self.layers[before:], line):
            del self.layers[before:]
            self.values, self._drawn = kept, drawn
            return True
        self.lines.append(line)
        return True

    def _run(self, layers: list[str], line: str) -> bool:
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                for code in layers:
                    exec(code, self.room, {"self": self.model})
                    self.model.double().eval()
                room = {"self": self.model, **self.values}
                exec(line, self.room, room)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError):
            return False
        new = {key: value for key, value in room.items() if key[0] == "x" and isinstance(value, Tensor)}
        # empty, large, or not finite
        if any(not 0 < x.numel() <= 4000 or x.ndim > 4 or not x.isfinite().all() for x in new.values()):
            return False
        self.values.update(new)
        return True


def _given(**options: Any) -> str:
    """Write arguments that are not those that torch has by default."""
    plain = {
        "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": True, "output_padding": 0,
        "padding_mode": "zeros", "affine": True, "ceil_mode": False, "count_include_pad": True, "approximate": "none",
    }  # fmt: skip
    return "".join(f", {key}={value!r}" for key, value in options.items() if plain.get(key) != value)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


ACTIVATIONS = ("nn.ReLU()", "nn.GELU()", "nn.SiLU()", "nn.ReLU(inplace=True)", "nn.LeakyReLU(0.1)", "nn.Hardswish()")
FUNCTIONS = ("F.relu({})", "{}.relu()", "F.gelu({})", "F.silu({})", "torch.relu_({})", "F.leaky_relu({}, 0.2)")
GATES = ("torch.sigmoid({})", "{}.tanh()", "F.softmax({}, dim=1)", "{}.abs()", "F.normalize({}, dim=1)")


# ---- values of every rank ------------------------------------------------------------


def activation(s: _Sketch, x: str, _: Tensor) -> str:
    if s.pick(True, False):
        return f"{s.new()} = {s.layer(s.pick(*ACTIVATIONS))}({x})"
    return f"{s.new()} = {s.pick(*FUNCTIONS).format(x)}"


def gate(s: _Sketch, x: str, _: Tensor) -> str:
    return f"{s.new()} = {s.pick(*GATES).format(x)}"


def number(s: _Sketch, x: str, _: Tensor) -> str:
    form = s.pick("{} * 2.0 + 5.0", "{} * 0.5", "1 - {}", "{} / 3", "-{}", "torch.add({}, 1.5)", "{}.mul(2).sub(1)",
                  "torch.sub(2, {})", "2 ** 0.5 * {}", "{} - 0.25", "torch.rsub({}, 1)", "{}.div(2)")  # fmt: skip
    return f"{s.new()} = {form.format(x)}"


def join(s: _Sketch, x: str, _: Tensor) -> str:
    form = s.pick("{} + {}", "{} - {}", "{} * {}", "torch.add({}, {}, alpha=0.5)", "torch.cat([{}, {}], dim=1)",
                  "torch.stack([{}, {}]).sum(0)", "torch.stack([{}, {}], dim=1).mean(1)", "torch.cat(({}, {}), -1)",
                  "torch.lerp({}, {}, 0.3)", "torch.maximum({}, {})", "sum([{}, {}])",
                  "torch.where({} > 0, {}, 0.5)", "torch.stack(({}, {}), 1).flatten(1, 2)")  # fmt: skip
    return f"{s.new()} = {form.format(x, s.like(x))}"


def write(s: _Sketch, x: str, value: Tensor) -> str:
    other = s.like(x)
    forms = ["{x}.mul_(0.5)", "{x} += {y}", "{x}[:, 0] = 0.5", "{x}.add_({y}, alpha=0.5)", "{x} *= 2", "{x}.copy_({y})",
             "{x}[:1] = {x}[:1] * 2", "{x}.sub_(1.0)", "{x}.zero_()", "{x}.t_()"][: 9 + (value.ndim == 2)]  # fmt: skip
    if value.ndim > 1:
        forms += ["{x}[:, 1:] = {y}[:, 1:]", "{x}[..., 0] *= 2", "{x}[:, :1].add_(1)", "{x}.select(1, 0).mul_(3)"]
    return s.pick(*forms).format(x=x, y=other)


def idle(s: _Sketch, x: str, _: Tensor) -> str:
    form = s.pick("{}.clone()", "{}.contiguous()", "self_", "F.dropout({}, 0.5, self.training)", "{}",
                  "{}.to({}.dtype)", "{}.view_as({})", "{}.reshape({}.shape)", "{}.detach().clone()",
                  "{}.expand_as({})")  # fmt: skip
    if form == "self_":
        return f"{s.new()} = {s.layer(s.pick('nn.Identity()', 'nn.Dropout(0.1)'))}({x})"
    return f"{s.new()} = {form.replace('{}', x)}"


def again(s: _Sketch, x: str, _: Tensor) -> str | None:
    """Call a layer once more."""
    called = [f"self.m{place}" for place, code in enumerate(s.layers) if "Parameter" not in code]
    return f"{s.new()} = {s.pick(*called)}({x})" if called else None


def ask(s: _Sketch, x: str, value: Tensor) -> str | None:
    """Ask for a size, as torch.fx can't follow and torch.export can."""
    axis = s.pick(1, *range(value.ndim)) if value.ndim > 1 else 0
    size = value.shape[axis]
    form = s.pick(
        'if {x}.shape[{axis}] < 1:\n    raise ValueError("empty")',
        "if {x}.ndim != {rank}:\n    {x} = {x}[None]",
        "assert {x}.size({axis}) > 0",
        'if {x}.shape[1:] != {rest}:\n    raise ValueError("another size")',
        "{new} = torch.cat([row * 2 for row in {x}.split(1, dim={axis})], dim={axis})",
        "{new} = {x}\nfor _ in range({x}.shape[{axis}] // {size}):\n    {new} = {new} + 1",
        "{new} = {x} if {x}.size({axis}) > {less} else {x} * 2",
        "{new} = {x} / {x}.shape[{axis}]",
        "{new} = {x} * float(len({x}) > 1)",
        "{new} = torch.cat([{x}, {x}.new_zeros({x}.shape)], dim={axis})",
    )
    return form.format(
        x=x, axis=axis, size=size, less=max(size - 2, 0), rank=value.ndim, rest=tuple(value.shape[1:]), new=s.new()
    )


def pieces(s: _Sketch, x: str, value: Tensor) -> str | None:
    """Take a value apart."""
    if value.ndim < 2:
        return None
    axis = s.pick(1, -1)
    size = value.shape[axis]
    if size < 2:
        return None
    first, second = s.new(), s.new()
    form = s.pick(
        "{a}, {b} = {x}.chunk(2, dim={axis})", "{a}, {b} = torch.split({x}, [{one}, {rest}], dim={axis})",
        "{a}, *_, {b} = {x}.unbind({axis})", "{a} = {x}.split({one}, {axis})[-1]", "{a} = {x}.chunk(3, {axis})[1]",
        "{a} = {x}.narrow({axis}, {one}, {rest})", "{a} = torch.tensor_split({x}, 2, {axis})[0]",
        "{a} = torch.stack({x}.unbind({axis})[::-1], {axis})", "{a} = torch.cat({x}.chunk(2, {axis})[::-1], {axis})",
        "{a} = {x}.select({axis}, {one})",
        "{a} = {x}.index_select({axis}, torch.tensor([{one}, 0]))", "{a} = {x}[:, [{one}, 0]]",
        "{a} = {x}[..., None, 0]",
    )  # fmt: skip
    one = s.pick(*range(1, size))
    return form.format(a=first, b=second, x=x, axis=axis, one=one, rest=size - one)


def slices(s: _Sketch, x: str, value: Tensor) -> str | None:
    """Take a part of a value."""
    if value.ndim < 2:
        return None
    form = s.pick("{x}[:, {one}:]", "{x}[..., ::2]", "{x}[..., {one}:]", "{x}[:, :-{one}]",
                  "{x}[:, -{one}:]", "{x}[{all}, ::2]", "{x}[{all}, {one}:]", "{x}[{all}, {one}:-{one}]",
                  "{x}[..., :{one}, :]")  # fmt: skip
    return f"{s.new()} = {form.format(x=x, one=s.pick(1, 2), all=', '.join([':'] * (value.ndim - 1)))}"


def roll(s: _Sketch, x: str, value: Tensor) -> str | None:
    axes = list(range(1, value.ndim))
    if not axes:
        return None
    axis = s.pick(*axes[::-1])
    form = s.pick("torch.roll({x}, 1, {axis})", "{x}.roll(-1, {axis})", "{x}.flip({axis})", "{x}.cumsum({axis})",
                  "torch.roll({x}, 2, dims=({axis},))", "{x}.repeat_interleave(2, {axis})")  # fmt: skip
    return f"{s.new()} = {form.format(x=x, axis=axis)}"


def affine(s: _Sketch, x: str, value: Tensor) -> str | None:
    """Scale or offset by parameters."""
    if value.ndim < 2:
        return None
    shape = tuple(value.shape[1:])
    kinds = [(shape[0], *[1] * (value.ndim - 2)), shape, (1, *shape), (shape[-1],), (1,), ()]
    parameter = s.parameter(*s.pick(*kinds))
    form = s.pick("{x} * {p}", "{x} + {p}", "{p} - {x}", "torch.mul({p}, {x})", "{x} / ({p}.abs() + 1)",
                  "{x} + {p}.to({x}.dtype)", "torch.addcmul({x}, {x}, {p})")  # fmt: skip
    return f"{s.new()} = {form.format(x=x, p=parameter)}"


def layer_norm(s: _Sketch, x: str, value: Tensor) -> str | None:
    if value.ndim < 2:
        return None
    shape = s.pick([value.shape[-1]], list(value.shape[1:]))
    if s.pick(True, False):
        return f"{s.new()} = {s.layer(f'nn.LayerNorm({shape})')}({x})"
    return f"{s.new()} = F.layer_norm({x}, {x}.shape[{-len(shape)}:])"


def batch_norm(s: _Sketch, x: str, value: Tensor) -> str | None:
    if value.ndim < 2:
        return None
    kind = f"nn.BatchNorm{max(value.ndim - 2, 1)}d({value.shape[1]}{_given(affine=s.pick(True, False))})"
    norm = s.layer(kind)
    form = s.pick(
        "{m}({x})",
        "F.batch_norm({x}, {m}.running_mean, {m}.running_var, {m}.weight, {m}.bias)",
        "torch.batch_norm({x}, {m}.weight, {m}.bias, {m}.running_mean, {m}.running_var, False, 0.1, 1e-5, False)",
        "F.batch_norm({x}, {m}.running_mean, {m}.running_var, eps=0.1)",
    )
    return f"{s.new()} = {form.format(m=norm, x=x)}"


def pad(s: _Sketch, x: str, value: Tensor) -> str | None:
    if value.ndim < 2:
        return None
    a, b = s.pick(1, 0, 2), s.pick(1, 0, 2)
    axes = value.ndim - 2
    spread = [a, b] * axes
    forms = ["F.pad({x}, ({a}, {b}))", "F.pad({x}, ({a}, {b}), value=0.5)", "F.pad({x}, [{zeros}{a}, {b}])"]
    if axes:
        modes = ("constant", "constant", "constant", "reflect", "replicate", "circular")
        forms += [f"F.pad({{x}}, {spread}, mode={mode!r})" for mode in modes]
    module = (
        s.pick(None, None, None, "ReflectionPad", "ReplicationPad", "CircularPad", "ZeroPad", "ConstantPad")
        if axes
        else None
    )
    if module:
        made = f"nn.{module}{axes}d({spread if axes > 1 else (a, b)}{', 0.5' if module == 'ConstantPad' else ''})"
        return f"{s.new()} = {s.layer(made)}({x})"
    return f"{s.new()} = {s.pick(*forms).format(x=x, a=a, b=b, zeros='0, 0, ' * axes)}"


def argument(s: _Sketch, x: str, value: Tensor) -> str | None:
    """Use the other arguments of the forward."""
    forms = []
    if "scale" in s.values:
        forms += ["{new} = {x} * scale"]
    if "flag" in s.values:
        forms += ["{new} = {x} * 2 if flag else {x} * 3"]
    if "y" in s.values:
        if s.values["y"] is None:
            forms += ["{new} = {x} if y is None else {x} + y"]
        elif s.values["y"].shape == value.shape:
            forms += ["{new} = {x} + y", "{new} = torch.cat([{x}, y], 1)", "{new} = y - {x}"]
    return s.pick(*forms).format(new=s.new(), x=x) if forms else None


# ---- maps: (N, C, H, W) and (N, C, L) ------------------------------------------------------------


def convolution(s: _Sketch, x: str, value: Tensor) -> str:
    axes, channels = value.ndim - 2, value.shape[1]
    out = s.pick(3, 2, 4, 1, 6, 8)
    kernel = s.pick(1, 3, 2, (3, 1) if axes == 2 else 3)
    groups = s.pick(1, 1, 1, *_divisors(channels))
    options = {
        "stride": s.pick(1, 1, 2), "padding": s.pick(0, 1, 0, "same"), "dilation": s.pick(1, 1, 2), "groups": groups,
        "bias": s.pick(True, False),
        "padding_mode": s.pick("zeros", "zeros", "zeros", "reflect", "circular", "replicate"),
    }  # fmt: skip
    layer = s.layer(f"nn.Conv{axes}d({channels}, {out * groups if out % groups else out}, {kernel}{_given(**options)})")
    if options["padding_mode"] == "zeros" and s.pick(False, False, True):
        del options["bias"], options["padding_mode"]
        return f"{s.new()} = F.conv{axes}d({x}, {layer}.weight, {layer}.bias{_given(**options)})"
    return f"{s.new()} = {layer}({x})"


def pointwise(s: _Sketch, x: str, value: Tensor) -> str:
    made = f"nn.Conv{value.ndim - 2}d({value.shape[1]}, {s.pick(3, 2, 4, 8)}, 1{_given(bias=s.pick(True, False))})"
    return f"{s.new()} = {s.layer(made)}({x})"


def block(s: _Sketch, x: str, value: Tensor) -> str:
    """Call a Sequential."""
    axes, channels, wide = value.ndim - 2, value.shape[1], s.pick(4, 8, 2)
    kernel, act = s.pick(1, 3), s.pick(*ACTIVATIONS)
    norm = s.pick("", f"nn.BatchNorm{axes}d({wide}), ")
    out = s.pick(channels, 3)
    made = (
        f"nn.Sequential(nn.Conv{axes}d({channels}, {wide}, {kernel}, padding={kernel // 2}), {norm}{act}, "
        f"nn.Conv{axes}d({wide}, {out}, 1))"
    )
    return f"{s.new()} = {s.pick(f'{x} + ', '') if out == channels else ''}{s.layer(made)}({x})"


def transposed(s: _Sketch, x: str, value: Tensor) -> str:
    axes, channels = value.ndim - 2, value.shape[1]
    groups = s.pick(1, 1, *_divisors(channels))
    out = groups * s.pick(1, 2, 3)
    kernel = s.pick(2, 1, 3)
    options = {
        "stride": s.pick(2, 1), "padding": s.pick(0, 1), "output_padding": s.pick(0, 1), "dilation": s.pick(1, 1, 2),
        "groups": groups, "bias": s.pick(True, False),
    }  # fmt: skip
    layer = s.layer(f"nn.ConvTranspose{axes}d({channels}, {out}, {kernel}{_given(**options)})")
    size = (
        ", output_size=[{}]".format(", ".join(f"{n * 2}" for n in value.shape[2:]))
        if s.pick(False, False, True)
        else ""
    )
    if not size and s.pick(False, False, True):
        del options["bias"]
        return f"{s.new()} = F.conv_transpose{axes}d({x}, {layer}.weight, {layer}.bias{_given(**options)})"
    return f"{s.new()} = {layer}({x}{size})"


def normalize(s: _Sketch, x: str, value: Tensor) -> str:
    axes, channels = value.ndim - 2, value.shape[1]
    track = ", track_running_stats=True" if s.pick(False, True) else ""
    made = s.pick(
        f"nn.GroupNorm({s.pick(*_divisors(channels))}, {channels}{_given(affine=s.pick(True, False))})",
        f"nn.InstanceNorm{axes}d({channels}, affine={s.pick(True, False)}{track})",
        f"nn.GroupNorm(1, {channels})",
    )
    return f"{s.new()} = {s.layer(made)}({x})"


def pool(s: _Sketch, x: str, value: Tensor) -> str:
    axes = value.ndim - 2
    k = s.pick(2, 3)
    options = {"stride": s.pick(1, 2), "padding": s.pick(0, 1), "ceil_mode": s.pick(False, True)}
    average = {**options, "count_include_pad": s.pick(True, False)}
    form = s.pick(
        f"nn.AvgPool{axes}d({k}{_given(**average)})", f"nn.MaxPool{axes}d({k}{_given(**options)})",
        f"nn.AdaptiveAvgPool{axes}d({s.pick(1, 2, 3)})", f"nn.AdaptiveMaxPool{axes}d(1)", "function",
    )  # fmt: skip
    if form == "function":
        return f"{s.new()} = F.avg_pool{axes}d({x}, {k}{_given(**average)})"
    return f"{s.new()} = {s.layer(form)}({x})"


def resize(s: _Sketch, x: str, value: Tensor) -> str:
    linear = "linear" if value.ndim == 3 else "bilinear"
    form = s.pick(
        "F.interpolate({x}, scale_factor=2)", "F.interpolate({x}, scale_factor=2, mode='{linear}')",
        "F.interpolate({x}, size={size}, mode='{linear}', align_corners=True)", "F.interpolate({x}, {like}.shape[2:])",
        "F.interpolate({x}, scale_factor=0.5, mode='nearest')", "module",
    )  # fmt: skip
    if form == "module":
        made = s.pick(
            "nn.Upsample(scale_factor=2)", f"nn.Upsample(scale_factor=2, mode={linear!r})", "nn.Upsample(size=5)"
        )
        return f"{s.new()} = {s.layer(made)}({x})"
    size = [n + 1 for n in value.shape[2:]]
    return f"{s.new()} = {form.format(x=x, linear=linear, size=size, like=s.tensor((value.ndim,)))}"


def to_vectors(s: _Sketch, x: str, value: Tensor) -> str:
    every = list(range(2, value.ndim))
    form = s.pick(
        "{x}.mean({every})", "{x}.flatten(1)", "{x}.view({x}.size(0), -1)", "{x}.amax({every})", "{x}[:, :{zeros}]",
        "{x}.reshape(len({x}), -1)", "torch.flatten({x}, start_dim=1)", "{x}.sum({every})", "module", "unflat",
        "{x}.std({every}, unbiased=False)",
    )  # fmt: skip
    if form == "module":
        return f"{s.new()} = {s.layer('nn.Flatten()')}({x})"
    if form == "unflat":
        return f"{s.new()} = {x}.mean({every}, keepdim=True).squeeze(-1).squeeze(-1)"
    return f"{s.new()} = {form.format(x=x, every=every, zeros=', 0' * len(every))}"


def shuffle(s: _Sketch, x: str, value: Tensor) -> str:
    c, *sizes = value.shape[1:]
    if value.ndim == 3:
        return f"{s.new()} = nn.functional.channel_shuffle({x}, {s.pick(*_divisors(c))})"
    h, w = sizes
    form = s.pick("F.pixel_shuffle({x}, 2)", "F.pixel_unshuffle({x}, 2)", "shuffle", "unshuffle", "groups", "windows")
    if form == "shuffle":
        return f"{s.new()} = {s.layer('nn.PixelShuffle(2)')}({x})"
    if form == "unshuffle":
        return f"{s.new()} = {s.layer('nn.PixelUnshuffle(2)')}({x})"
    if form == "groups":
        g = s.pick(*_divisors(c))
        return f"{s.new()} = {x}.view({x}.size(0), {g}, {c // g}, {h}, {w}).transpose(1, 2).reshape({x}.shape)"
    if form == "windows":
        return (
            f"n, c, h, w = {x}.shape\n{s.new()} = {x}.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)"
            ".reshape(-1, 4, c)"
        )
    return f"{s.new()} = {form.format(x=x)}"


def move(s: _Sketch, x: str, value: Tensor) -> str:
    forms = ["{x}.permute(0, 2, 3, 1)", "{x}.flatten(2).transpose(1, 2)", "{x}.transpose(2, 3)", "{x}.movedim(1, -1)",
             "{x}.contiguous(memory_format=torch.channels_last)", "torch.permute({x}, (0, 3, 1, 2))",
             "{x}.to(memory_format=torch.channels_last)", "{x}.mT"]  # fmt: skip
    if value.ndim == 3:
        forms = ["{x}.transpose(1, 2)", "{x}.permute(0, 2, 1)", "{x}.mT", "{x}.unsqueeze(-1)", "{x}[:, :, None]",
                 "torch.swapaxes({x}, 1, 2)"]  # fmt: skip
        for side in _divisors(value.shape[1])[1:-1]:
            forms.append(f"{{x}}.transpose(1, 2).reshape({{x}}.shape[0], {value.shape[2]}, {side}, -1)")
    return f"{s.new()} = {s.pick(*forms).format(x=x)}"


def einsum(s: _Sketch, x: str, value: Tensor) -> str:
    out = s.pick(3, 4)
    if value.ndim == 4:
        equation, width = s.pick(("nchw,oc->nohw", 1), ("nchw,ow->ncho", 3), ("nhwc,oc->nhwo", 3))
    elif value.ndim == 3:
        equation, width = s.pick(("nlc,oc->nlo", 2), ("ncl,oc->nol", 1), ("nlc,ol->noc", 1))
    else:
        equation, width = "nc,oc->no", 1
    return f"{s.new()} = torch.einsum({equation!r}, {x}, {s.parameter(out, value.shape[width])})"


def self_product(s: _Sketch, x: str, value: Tensor) -> str:
    form = s.pick("{x} @ {y}.transpose(-1, -2)", "torch.einsum('n...c,n...d->n...cd', {x}, {y}).sum(-1)",
                  "torch.matmul({x}.mT, {y})", "torch.bmm({x}, {y}.mT)")  # fmt: skip
    return f"{s.new()} = {form.format(x=x, y=s.like(x))}"


# ---- tokens (N, L, C) and vectors (N, C) ------------------------------------------------------------


def linear(s: _Sketch, x: str, value: Tensor) -> str:
    width, out = value.shape[-1], s.pick(4, 3, 2, 1, 8)
    form = s.pick("{m}({x})", "{m}({x})", "F.linear({x}, {m}.weight, {m}.bias)", "{x} @ {m}.weight.t()",
                  "torch.addmm({m}.bias, {x}, {m}.weight.t())")  # fmt: skip
    layer = s.layer(f"nn.Linear({width}, {out}{_given(bias=form.endswith('t())') or s.pick(True, False))})")
    return f"{s.new()} = {form.format(m=layer, x=x)}"


def perceptron(s: _Sketch, x: str, value: Tensor) -> str:
    width, wide = value.shape[-1], s.pick(8, 4, 2)
    out = s.pick(width, 3)
    made = f"nn.Sequential(nn.Linear({width}, {wide}), {s.pick(*ACTIVATIONS)}, nn.Linear({wide}, {out}))"
    return f"{s.new()} = {s.pick(f'{x} + ', '') if out == width else ''}{s.layer(made)}({x})"


def attention(s: _Sketch, x: str, value: Tensor) -> str | None:
    width = value.shape[-1]
    heads = s.pick(*_divisors(width))
    form = s.pick("module", "module", "scaled", "encoder", "weights")
    if form == "scaled":
        a, b, c, out = s.new(), s.new(), s.new(), s.new()
        qkv = s.layer(f"nn.Linear({width}, {3 * width})")
        split = s.pick(
            f"{a}, {b}, {c} = {qkv}({x}).chunk(3, dim=-1)",
            f"{a}, {b}, {c} = {qkv}({x}).reshape({x}.shape[0], -1, 3, {heads}, {width // heads})"
            ".permute(2, 0, 3, 1, 4)",
        )
        attend = f"F.scaled_dot_product_attention({a}, {b}, {c})"
        if "permute" in split:
            return f"{split}\n{out} = {attend}.transpose(1, 2).flatten(2)"
        return f"{split}\n{out} = {attend}"
    if form == "encoder":
        act, first = s.pick("relu", "gelu"), s.pick(False, True)
        made = (
            f"nn.TransformerEncoderLayer({width}, {heads}, 8, activation={act!r}, batch_first=True, norm_first={first})"
        )
        return f"{s.new()} = {s.layer(made)}({x})"
    layer = s.layer(f"nn.MultiheadAttention({width}, {heads}, batch_first={s.pick(True, False)})")
    other = s.like(x)
    if form == "weights":
        return f"{s.new()}, {s.new()} = {layer}({x}, {other}, {other})"
    return f"{s.new()} = {layer}({x}, {other}, {other}, need_weights=False)[0]" + s.pick("", f".view({x}.shape)")


def recurrent(s: _Sketch, x: str, value: Tensor) -> str:
    kind = s.pick("LSTM", "GRU", "RNN")
    both = s.pick("", ", bidirectional=True", ", num_layers=2")
    layer = s.layer(f"nn.{kind}({value.shape[-1]}, 3, batch_first=True{both})")
    form = s.pick("{a}, _ = {m}({x})", "{a} = {m}({x})[0]", "_, {a} = {m}({x})\n{a} = {a}[-1]")
    if kind == "LSTM" and form.startswith("_"):
        form = "_, ({a}, _) = {m}({x})\n{a} = {a}[-1]"
    return form.format(a=s.new(), m=layer, x=x)


def from_tokens(s: _Sketch, x: str, value: Tensor) -> str:
    width = value.shape[-1]
    form = s.pick("{x}.mean(1)", "{x}[:, 0]", "{x}[:, -1]", "{x}.flatten(1)", "{x}.max(dim=1).values", "token",
                  "{x}.reshape(-1, {width})", "{x}.sum(dim=1)", "{x}.squeeze(1)", "back")  # fmt: skip
    if form == "token":
        return f"{s.new()} = torch.cat([{s.parameter(1, 1, width)}.expand({x}.shape[0], -1, -1), {x}], dim=1)"
    if form == "back":
        a = s.new()
        return f"{a} = {x}.flatten(0, 1).relu()\n{s.new()} = {a}.view({x}.shape[0], {x}.shape[1], -1)"
    return f"{s.new()} = {form.format(x=x, width=width)}"


def from_vectors(s: _Sketch, x: str, value: Tensor) -> str:
    form = s.pick("{x}.squeeze(-1)", "{x}[:, 0]", "{x}.unsqueeze(1)", "{x}[:, :, None, None]", "{x}.sum(-1)",
                  "{x}.view(-1, {c}, 1, 1)", "{x}.mean(1, keepdim=True)", "{x}[:, None].expand(-1, 3, -1)",
                  "{x}.unflatten(1, (-1, 1))", "{x}.reshape(-1)", "{x}.repeat(1, 2)")  # fmt: skip
    return f"{s.new()} = {form.format(x=x, c=value.shape[1])}"


def from_numbers(s: _Sketch, x: str, _: Tensor) -> str:
    form = s.pick("{x}.unsqueeze(-1)", "{x}[:, None]", "{x} * 2.0 + 5.0", "{x}.view(-1, 1)", "{x}.clamp(min=0)",
                  "torch.stack([{x}, {x} * 2], dim=1)", "{x} * torch.tensor(3.0)", "{x} / 2 - 1")  # fmt: skip
    return f"{s.new()} = {form.format(x=x)}"


_Statement = Callable[[_Sketch, str, Tensor], str | None]
EVERYWHERE: list[_Statement] = [
    activation, activation, number, join, affine, pieces, slices, argument, write, idle, again, ask, roll, gate, pad,
    batch_norm, layer_norm, einsum,
]  # fmt: skip
STATEMENTS: dict[int, list[_Statement]] = {
    1: [from_numbers, number, activation, join, write, idle],
    2: [*[linear] * 5, *[perceptron] * 2, *EVERYWHERE, from_vectors],
    3: [
        *[linear] * 4, *[perceptron] * 2, *[pointwise] * 2, *[convolution] * 2, block, *[attention] * 2, recurrent,
        *EVERYWHERE, from_tokens, move, to_vectors, normalize, pool, resize, transposed, shuffle, self_product,
    ],
    4: [
        *[convolution] * 4, *[pointwise] * 5, *[block] * 3, *[transposed] * 2, *EVERYWHERE, move, to_vectors, pool,
        slices, pad, resize, shuffle, normalize, linear, self_product,
    ],
}  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn, most: int = 9) -> Graph:
    """Draw a network that runs on its example."""
    return random_graph(lambda *options: draw(st.sampled_from(options)), most)


def random_graph(pick: Pick, most: int) -> Graph:
    """Sketch a network of a number of statements at most."""
    rank = pick(4, 2, 3, 4, 4)
    sizes = {2: [(4,), (3,), (1,)], 3: [(5, 4), (4, 6), (3, 8)], 4: [(3, 6, 8), (4, 5, 7), (4, 4, 4), (8, 6, 6)]}[rank]
    shape = (pick(2, 4, 1, 3), *pick(*sizes))
    channels_last = rank == 4 and pick(False, False, False, True)
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    signature, second, extra, keywords = pick(*SIGNATURES)
    values: dict[str, Any] = {"x": x, **extra}
    if second:
        values["y"] = torch.randn(shape, dtype=torch.float64)
    sketch = _Sketch(pick, values)
    while sketch.step(most):
        pass
    classes, result = _result(sketch)
    others = [(3, *shape[1:]), (1, *shape[1:]), (5, *shape[1:])]
    if rank > 2:
        others += [(2, shape[1], *(n + 2 for n in shape[2:])), (2, shape[1], shape[2] + 1, *shape[3:])]
    return Graph(
        tuple(sketch.layers), tuple(sketch.lines), signature, result, classes,
        pick((True,), (True, False), (False,), (True, True, False)), shape,
        tuple(each for each in others if each != shape), second, tuple(keywords.items()), channels_last,
    )  # fmt: skip


# The arguments of a forward, how a second tensor is passed, the values of the others, and other values to call it with
SIGNATURES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("x", "", {}, {}),
    ("x", "", {}, {}),
    ("x", "", {}, {}),
    ("x, y", "same", {}, {}),
    ("x, y=None", "", {"y": None}, {}),
    ("x, y=None", "same", {}, {}),
    ("x, scale=1.0", "", {"scale": 1.0}, {"scale": 2.0}),
    ("x, *, scale=1.0", "", {"scale": 1.0}, {"scale": 2.0}),
    ("x, flag=True", "", {"flag": True}, {"flag": False}),
]


def _result(sketch: _Sketch) -> tuple[str, str]:
    """Draw what is returned; the latest value is in it."""
    names = [name for name, value in sketch.values.items() if name[0] == "x" and isinstance(value, Tensor)]
    form = sketch.pick(*RESULTS)
    classes = ""
    if form.startswith("Unknown"):
        classes = "@dataclass\nclass Unknown:\n    logits: Tensor\n"
    elif form.startswith("Pair"):
        classes = "Pair = namedtuple('Pair', 'logits hidden')\n"
    elif form.startswith("Output"):
        classes = "from tests.random_graphs import Output\n"
    return classes, form.format(a=names[-1], b=sketch.pick(*names[::-1]))


@dataclass
class Output:
    """What a network may return; torch knows of it."""

    logits: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Output)


RESULTS = (
    "{a}", "{a}", "{a}", "{a}", "{a}", "({a}, {b})", "[{a}, {b}]", '{{"a": {a}, "b": {b}}}', "Output({a}, {b})",
    "Output(hidden={b}, logits={a})", "Pair({a}, {b})", 'OrderedDict(a={a}, b=({b}, None))', "({a}, {{'b': [{b}]}})",
    "({a}, {a}.shape[0])", "Output({a})", "Unknown({a})",
)  # fmt: skip
