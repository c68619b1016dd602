"""What a collapsed model is compared with: the dense network, with its batch norms folded.

To fold batch norms speeds up any network, and every runtime does it. What linear activations, fits and merges save is
what is saved beyond that.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, fx, nn

from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.collapsing.errors import CaptureError
from lightning_easier.collapsing.exact.capture import capture, capture_at, duplicate
from lightning_easier.collapsing.exact.chains import depth
from lightning_easier.collapsing.exact.steps import Steps
from lightning_easier.structure.linearize import restore, stand_ins
from lightning_easier.support.calls import copies
from lightning_easier.support.timing import LatencyTable


@dataclass(frozen=True)
class Baseline:
    """A dense network that others are compared with.

    Attributes:
        model: The network in eval mode: its activations are back, its batch norms folded where it can be captured.
        depth: Longest chain of weight-carrying operators.
        is_as_given: Whether it is what it is the dense network of: nothing was folded, nothing was linear.
    """

    model: nn.Module
    depth: int
    is_as_given: bool = False


def graph_of(model: nn.Module, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Capture what is only compared: of what has no batch norm to fold, nothing but the depth is asked for.

    Args:
        model: The model in eval mode. The graph shares its layers.
        arguments: Example inputs.

    Raises:
        CaptureError: With the reason.
    """
    return (capture if _has_norms(model) else capture_at)(model, copies(arguments))


def _has_norms(model: nn.Module) -> bool:
    return any(type(module) in BATCH_NORMS for module in model.modules())


def baseline_of(source: nn.Module, arguments: Sequence[Tensor], captured: fx.GraphModule | None = None) -> Baseline:
    """Return the dense network of a model.

    Args:
        source: The model in eval mode; it is not changed.
        arguments: Example inputs.
        captured: The graph of the model, if it is known; it is not changed.

    Raises:
        CaptureError: If neither the model nor its dense network can be captured.
    """
    is_as_given = not stand_ins(source)
    dense = source if is_as_given else deepcopy(source)
    if not is_as_given:
        restore(dense)
    try:
        graph = captured if captured is not None and is_as_given else graph_of(dense, arguments)
    except CaptureError:  # it can be only while its activations are linear
        return Baseline(dense, depth(graph_of(source, arguments) if captured is None else captured))
    longest = depth(graph)
    if not _has_norms(dense):
        return Baseline(dense, longest, is_as_given)
    steps = Steps(duplicate(graph) if graph is captured else graph, "macs", LatencyTable(), {})
    steps.simplify()
    if not steps.fused:  # its own forward is as good, and may be faster than what was recorded
        return Baseline(dense, longest, is_as_given)
    folded = steps.finish()
    steps.round()
    return Baseline(folded, depth(folded))
