"""Which rectifier calls of other people's networks become sites: one row a network, counted while it runs.

``python -m tests.network_table`` writes the table of ``docs/networks.md``; the tests check each of its rows.
"""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_easier import EntropyProbe
from lightning_easier.sites.activations import isolated_sites
from tests.networks import NETWORKS, Network

PATH = Path(__file__).parents[1] / "docs" / "networks.md"
COLUMNS = ("network", "calls", "sites", "neuron axes", "difference", "finite entropies", "notes")


class RectifierCalls(TorchFunctionMode):
    """Counts rectifier calls while a model runs, by their names, without knowing anything of how sites are found."""

    functions = frozenset(
        {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "celu", "selu", "gelu",
         "silu", "mish", "hardswish", "softplus"}
    )  # fmt: skip
    formulas = frozenset(  # classes that write theirs out
        {"QuickGELU", "QuickGELUActivation", "NewGELUActivation", "Swish", "HardMish"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._inside = 0

    def __enter__(self) -> "RectifierCalls":
        modules = nn.modules.module
        self._handles = [
            modules.register_module_forward_pre_hook(self._enter_formula),
            modules.register_module_forward_hook(self._leave_formula),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def _enter_formula(self, module: nn.Module, args: Any) -> None:
        if type(module).__name__ in self.formulas:
            self.count += self._inside == 0
            self._inside += 1

    def _leave_formula(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= type(module).__name__ in self.formulas

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # nn.ReLU6 is a hardtanh between zero and six
        relu6 = name.startswith("hardtanh") and (*args[1:2], kwargs.get("min_val"))[0] == 0
        outermost = self._inside == 0 and (name in self.functions or relu6)
        self.count += outermost
        self._inside += outermost
        try:  # what F.relu6 calls in turn is not another call
            with super_mode(self) if outermost else torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        finally:
            self._inside -= outermost


@contextmanager
def super_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """Stay in a mode without entering it anew."""
    TorchFunctionMode.__enter__(mode)
    try:
        yield
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


# As many as a prime: no two rows of a weight are the same.
_DRAWN = torch.rand(65537, generator=torch.Generator().manual_seed(0))
# What these find with random weights is chance, and decides which parts run: they draw their own.
_DETECTORS = ("rcnn", "retinanet", "fcos", "ssd")


def _repeat(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Write the same numbers again and again."""
    with torch.no_grad():
        for part in tensor.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
    return tensor


def _uniform(tensor: Tensor, a: float = 0, b: float = 1, *, generator: Any = None) -> Tensor:
    return _repeat(tensor, a + (b - a) * _DRAWN)


def _normal(tensor: Tensor, mean: float = 0, std: float = 1, *, generator: Any = None) -> Tensor:
    return _repeat(tensor, mean + std * 2**0.5 * torch.erfinv((2 * _DRAWN - 1).clamp(-0.9999, 0.9999)))


def build(network: Network) -> nn.Module:
    """Build a network whose weights are drawn from few numbers; to draw each takes longer than all the rest does."""
    torch.manual_seed(0)
    if any(kind in network.name for kind in _DETECTORS):
        return network.build().eval()
    with patch.object(Tensor, "uniform_", _uniform), patch.object(Tensor, "normal_", _normal):
        return network.build().eval()


def row(network: Network) -> tuple[str, ...]:
    """Isolate the activations of a network and say what is found; fail where the model is not what it was."""
    model = build(network)
    inputs = network.inputs()
    keys, classes = list(model.state_dict()), Counter(type(module) for module in model.modules())
    with torch.no_grad(), RectifierCalls() as calls:
        expected = model(*copy.deepcopy(inputs))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sites = isolated_sites(model)
    left_alone = [str(w.message) for w in caught if "were left alone" in str(w.message)]
    assert list(model.state_dict()) == keys
    assert not classes - Counter(type(module) for module in model.modules())

    seen: Counter[str] = Counter()
    reached: dict[str, None] = {}  # by a sample; a detector that finds nothing calls the rest on none

    def note(module: nn.Module, args: Any, name: str) -> None:
        seen.update([name])
        if args[0].numel() > 0:
            reached[name] = None

    for site in sites:
        site.module.register_forward_pre_hook(partial(note, name=site.name))
    with torch.no_grad(), EntropyProbe(sites) as probe:
        output = model(*copy.deepcopy(inputs))
    entropies = probe.entropies()
    assert set(entropies) == set(reached)
    finite = sum(math.isfinite(bits) and 0 <= bits <= 1 for bits in entropies.values())

    again = isolated_sites(model)
    assert [(site.name, site.neuron_dim) for site in again] == [(site.name, site.neuron_dim) for site in sites]
    assert all(a.module is b.module for a, b in zip(again, sites, strict=True))

    notes = _notes(calls.count, seen, [site.name for site in sites], left_alone)
    if list(reached) != list(entropies):
        notes.append("in another order than they are called")
    axes = Counter(site.neuron_dim for site in sites if site.name in seen)
    difference = _largest_difference(output, expected)
    shown_axes = ", ".join(f"{count} × {axis}" for axis, count in axes.items())
    figures = (str(calls.count), str(len(sites)), shown_axes, f"{difference:g}", f"{finite} of {len(entropies)}")
    return (f"{network.library} {network.name}", *figures, "; ".join(notes))


def _notes(calls: int, seen: Counter[str], sites: list[str], left_alone: list[str]) -> list[str]:
    """Explain every difference between calls and sites, or fail."""
    notes = []
    several = [name for name in sites if seen[name] > 1]
    uncalled = [name for name in sites if seen[name] == 0]
    if several:
        count = sum(seen[name] for name in several)
        notes.append(
            f"{len(several)} {'sites stand' if several[1:] else 'site stands'} for {count} calls, since blocks with "
            f"weights are called several times "
            f"({', '.join(f'`{name}`' for name in several[:2])}{', ...' if several[2:] else ''})"
        )
    if uncalled:
        notes.append(f"not called in eval mode: {', '.join(f'`{name}`' for name in uncalled)}")
    unreached = calls - seen.total()
    if unreached:
        assert left_alone, "calls were missed without a word"
        named = left_alone[0].split(": ", 1)[1].split(". Call each")[0]
        notes.append(f"{unreached} calls are not reached: {named}")
    else:
        assert not left_alone, left_alone
    return notes


def _largest_difference(output: Any, expected: Any) -> float:
    pairs = zip(_tensors(output), _tensors(expected), strict=True)
    return max(float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def _tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def rendered(cells: tuple[str, ...]) -> str:
    """Render a row as it stands in the document."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main() -> None:
    """Write the document."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "transformers"))
    lines = [
        "# Networks that were tried",
        "",
        f"Written by `make networks` with {libraries};",
        "each row is checked by `tests/sites/test_networks.py`. Random weights, small inputs, eval mode.",
        "",
        "*Calls* are the rectifier calls counted while the network runs, by an observer that sees functions (and knows",
        "a few classes that write theirs out as a formula); *sites* are what `isolate_activations` finds, in the order",
        "of their calls; *neuron axes* how many of those called have their neurons on which axis; *difference* is the",
        "largest absolute difference of the outputs before and after; *finite entropies* are of those that a sample",
        "has reached (a detector with random weights may find nothing). State-dict keys and classes stay, and a second",
        "call changes nothing: a row that breaks one of these does not come about.",
        "",
        rendered(COLUMNS),
        rendered(("---",) * len(COLUMNS)),
    ]
    for network in NETWORKS:
        lines.append(rendered(row(network)))
        print(lines[-1], flush=True)
    PATH.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
