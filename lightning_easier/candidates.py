"""What would each activation's removal bring together? The table to read before a run."""

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_easier.activations import ActivationSite, planned_sites, unwrap
from lightning_easier.collapse.chains import has_hooks
from lightning_easier.collapse.operators import CannotMergeError, check, fold_batch_norm
from lightning_easier.inference import evaluation_mode
from lightning_easier.neighbourhood import Meeting, Neighbourhood
from lightning_easier.padding import possible_shift
from lightning_easier.report import Candidate, CandidateReport


def candidates(
    model: nn.Module,
    entropies: Mapping[str, float] | None = None,
    *,
    gates: bool | Iterable[str] = False,
    shift_padding: bool = True,
) -> CandidateReport:
    """List the activations of a model, the linear operators around each, and what would merge if it were linear.

    The model is looked at as in eval mode, and not touched. No example inputs are needed; where a forward can't be
    traced, the table says so.

    Args:
        model: Any module.
        entropies: Name -> entropy in bits, as :func:`~lightning_easier.measure_entropy` returns them.
        gates: Whether bounded activations are listed too, see :func:`~lightning_easier.isolate_activations`.
        shift_padding: Whether paddings move with the removal, as :class:`~lightning_easier.EntropyPruningCallback` does
            by default; see :func:`~lightning_easier.linearize`.

    Returns:
        A report with one row an activation, in execution order. A merge is one that
        :func:`~lightning_easier.collapse` can make exactly; whether it pays is measured there.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule.
        ValueError: If ``entropies`` or ``gates`` holds an unknown name.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU())
        >>> [(candidate.name, candidate.merges) for candidate in candidates(model).candidates]
        [('1', (('0', '2'),)), ('3', ())]
    """
    with evaluation_mode(unwrap(model)):
        sites = planned_sites(model, gates)
        names = [site.name for site in sites]
        for name in entropies or {}:
            if name not in names:
                raise ValueError(
                    f"Expected argument `entropies` to hold names of activations, but got {name!r}, not one of {names}"
                )
        owners = Counter(id(tensor) for module in unwrap(model).modules() for tensor in module._parameters.values())
        shifted = [_shifted(site) if shift_padding else site.neighbourhood for site in sites]
        return CandidateReport(
            [
                _candidate(site, around, (entropies or {}).get(site.name), owners)
                for site, around in zip(sites, shifted, strict=True)
            ]
        )


def _shifted(site: ActivationSite) -> Neighbourhood:
    """Return the neighbourhood of a site as it is once the padding between two convolutions has moved."""
    around = site.neighbourhood
    if possible_shift(around) is None:
        return around
    (meeting,) = around.meetings
    first, second = meeting.operators
    unpadded: Any = copy(second)
    unpadded.padding = (0,) * len(unpadded.kernel_size)
    return replace(around, meetings=(replace(meeting, operators=(first, unpadded)),))


def _candidate(
    site: ActivationSite, around: Neighbourhood, entropy: float | None, owners: Mapping[int, int]
) -> Candidate:
    merges, reasons = [], [around.reason] if around.reason else []
    for meeting in around.meetings:
        try:
            _check(meeting, owners)
            merges.append((meeting.first, meeting.second))
        except CannotMergeError as error:
            reasons.append(f"`{meeting.first}` and `{meeting.second}` would meet, but {error}")
    return Candidate(
        site.name, type(site.module).__name__, site.neuron_dim, entropy, around.before, around.behind, tuple(merges),
        "; ".join(reasons) or None,
    )  # fmt: skip


def _check(meeting: Meeting, owners: Mapping[int, int]) -> None:
    """Find out whether a collapse would merge two operators that meet.

    Args:
        meeting: The operators, and what lies between them.
        owners: How many modules hold a parameter, by its id.

    Raises:
        CannotMergeError: With the reason, when it would not.
    """
    for kind in ("addition", "flatten"):
        if kind in meeting.through:
            raise CannotMergeError(f"no merge goes through the {kind} between them")
    first, second = meeting.operators
    if first is None or second is None:
        raise CannotMergeError("one of them is a function, not a module")
    for operator in (first, second):
        if any(owners[id(parameter)] > 1 for parameter in operator.parameters()):
            raise CannotMergeError("one of them shares its parameters with another module")
        if has_hooks(operator):
            raise CannotMergeError("one of them has hooks, which would see something else")
    for module in meeting.between:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise CannotMergeError("a functional batch norm lies between them")
        first = fold_batch_norm(first, module)
        if isinstance(first.bias, nn.Parameter):
            nn.init.ones_(first.bias)  # that of a batch norm is zero before training, and then no longer
    check(first, second)
