"""What a collapsed model is compared with: the dense network, with its batch norms folded.

To fold batch norms speeds up any network, and every runtime does it. What linear activations, fits and merges save is
what is saved beyond that.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, fx, nn

from lightning_easier.collapsing.errors import CaptureError
from lightning_easier.collapsing.exact.capture import capture, duplicate, note_shapes
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
        is_as_given: Whether it is a copy of what it is the dense network of: nothing was folded, nothing was linear.
    """

    model: nn.Module
    depth: int
    is_as_given: bool = False


def baseline_of(source: nn.Module, arguments: Sequence[Tensor], captured: fx.GraphModule | None = None) -> Baseline:
    """Return the dense network of a model.

    Args:
        source: The model in eval mode; it is not changed.
        arguments: Example inputs.
        captured: The graph of the model, if it is known; it is not changed.

    Raises:
        CaptureError: If neither the model nor its dense network can be captured.
    """
    dense = deepcopy(source)
    is_as_given = not stand_ins(dense)
    if not is_as_given:
        restore(dense)
    try:
        captured = capture(dense, copies(arguments)) if captured is None or stand_ins(source) else captured
    except CaptureError:  # it can be only while its activations are linear
        captured = capture(deepcopy(source), copies(arguments)) if captured is None else captured
        return Baseline(dense, depth(captured))
    twin = duplicate(captured)
    note_shapes(twin, copies(arguments))
    steps = Steps(twin, "macs", LatencyTable(), {})
    steps.simplify()
    if not steps.fused:  # its own forward is as good, and may be faster than what was recorded
        return Baseline(dense, depth(captured), is_as_given)
    folded = steps.finish()
    steps.round()
    return Baseline(folded, depth(folded))
