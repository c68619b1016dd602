"""Random networks as users write them collapse to the same function, or are refused with a reason."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_easier import CollapseError, collapse, isolate_activations
from lightning_easier.collapsing.exact.guards import SizeGuards
from lightning_easier.support.inference import relative_difference, tensors_in
from tests.random_graphs import Graph, graphs

ASKED_FOR = os.environ.get("COLLAPSE_EXAMPLES")  # new ones, by `make prove`; the suite takes the same ones each time
SETTINGS = settings(
    max_examples=int(ASKED_FOR or 25),
    derandomize=ASKED_FOR is None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    report_multiple_bugs=False,
)


@SETTINGS
@given(graphs(), st.sampled_from(["macs", "depth"]))
def test_a_random_network_keeps_its_function_or_is_refused_with_a_reason(graph, objective):
    note(str(graph))
    check(graph, objective)


def check(graph: Graph, objective: str) -> None:
    """Collapse a network, and compare it with its source wherever the source runs."""
    model = graph.model()
    example = graph.inputs(graph.shape)
    if not is_well_conditioned(model, graph):
        reject()
    written, isolated = graph.made(), isolate_activations_of(graph.made())
    assert_same(outcome(isolated, example), outcome(written, example))  # to isolate activations changes nothing
    before, description = copy.deepcopy(model.state_dict()), str(model)
    given_ = [x.clone() for x in example]
    result, reason = None, ""
    try:
        result = collapse(model, example, objective=objective)
    except (CollapseError, ValueError) as error:
        reason = str(error)
    assert result is not None or reason
    # or its own check has found that a merge is wrong, or that what was captured is not what the model does
    assert "report it" not in reason, reason
    assert str(model) == description
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(example, given_, strict=True))
    if result is None:
        return
    note(str(result.report))
    collapsed = result.model
    for refusal in result.report.refusals:
        assert refusal.reason
        assert "report it" not in refusal.reason, refusal  # a step that went wrong, and was left out
    assert_same(outcome(collapsed, example), outcome(model, example))
    names = [each.split("=")[0] for each in graph.signature.split(", ")]
    by_name = dict(zip(names, example, strict=False))
    assert_same(outcome(collapsed, (), **by_name), outcome(model, (), **by_name))
    for shape in graph.others:
        inputs = graph.inputs(shape)
        expected = outcome(model, inputs)
        if not isinstance(expected, Exception):
            compare(collapsed, outcome(collapsed, inputs), expected, shape[1:] == graph.shape[1:])
    for name, value in graph.keywords:  # a value that was not recorded is refused, or it counts
        output = outcome(collapsed, example, **{name: value})
        if not isinstance(output, TypeError | AssertionError):
            assert_same(output, outcome(model, example, **{name: value}))


def compare(collapsed: nn.Module, output: Any, expected: Any, of_same_size: bool) -> None:
    """Compare what a model returns at another size, which only a graph of torch.export may refuse."""
    refused = isinstance(output, AssertionError) and "What was recorded" in str(output)
    if refused and any(isinstance(module, SizeGuards) for module in collapsed.modules()):
        return
    assert_same(output, expected)


def outcome(model: nn.Module, inputs: Sequence[Tensor], **keywords: Any) -> Any:
    """Return what a model returns and what it has written into its inputs, or the error that it raises."""
    inputs, keywords = [x.clone() for x in inputs], {k: copy.deepcopy(v) for k, v in keywords.items()}
    try:
        with torch.no_grad():
            output = model(*inputs, **keywords)
    except Exception as error:
        return error
    return output, inputs, keywords


def assert_same(output: Any, expected: Any) -> None:
    if isinstance(output, Exception) and not isinstance(expected, Exception):
        raise output
    assert structure(output) == structure(expected)
    difference = relative_difference(tensors(output), tensors(expected))
    assert difference <= 1e-8, f"they differ by {difference:.1e}"


def structure(value: Any) -> Any:
    """Describe the classes in a value, its numbers and its tensors' shapes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if dataclasses.is_dataclass(value):
        return type(value).__name__, structure(vars(value))
    if isinstance(value, dict):
        return type(value).__name__, [(key, structure(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [structure(each) for each in value]
    return value if isinstance(value, str | int | float | None) else type(value)


def tensors(value: Any) -> list[Tensor]:
    """List the tensors in a value, those in dataclasses too."""
    if dataclasses.is_dataclass(value):
        return tensors(vars(value))
    if isinstance(value, dict):
        return [x for each in value.values() for x in tensors(each)]
    if isinstance(value, list | tuple):
        return [x for each in value for x in tensors(each)]
    return tensors_in(value)


def isolate_activations_of(model: nn.Module) -> nn.Module:
    isolate_activations(model)
    return model


def is_well_conditioned(model: nn.Module, graph: Graph) -> bool:
    """Tell whether its outputs are not rounding alone, as where it takes the variance of one value."""
    exact = outcome(model, graph.inputs(graph.shape))
    if isinstance(exact, Exception):  # only a network that draws something, or one that linearized has other sizes
        return False
    coarse = outcome(copy.deepcopy(model).float(), graph.inputs(graph.shape, torch.float32))
    if any(0 < x.norm() < 1e-3 for x in tensors(exact)):
        return False
    return isinstance(coarse, Exception) or relative_difference(tensors(coarse), tensors(exact)) < 1e-3
