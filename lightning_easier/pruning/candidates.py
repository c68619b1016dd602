"""What would each activation's removal bring together? The table to read before a run."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_easier.collapsing.algebra.operators import CannotMergeError, check, fold_batch_norm
from lightning_easier.report import Candidate, CandidateReport
from lightning_easier.sites.activations import unwrap
from lightning_easier.sites.adjacency import Adjacency
from lightning_easier.sites.discovery import ActivationSite, Discovery, IsolationPlan
from lightning_easier.sites.neighbourhood import Meeting, Neighbourhood
from lightning_easier.sites.rectifiers import as_gates
from lightning_easier.structure.norms import with_split_norms
from lightning_easier.structure.padding import possible_shift
from lightning_easier.support.arguments import check_bool
from lightning_easier.support.inference import evaluation_mode


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
        shift_padding: Whether paddings move with the removal, see :func:`~lightning_easier.linearize`.

    Returns:
        A report with one row an activation, in execution order. A merge is one of two operators in a row that
        :func:`~lightning_easier.collapse` can make exactly; whether it pays is measured there. What depends on
        shapes and on parallel branches (additions, concatenations, poolings, layouts) is left to it, too.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule.
        ValueError: If ``entropies`` or ``gates`` holds an unknown name.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU())
        >>> [(candidate.name, candidate.merges) for candidate in candidates(model).candidates]
        [('1', (('0', '2'),)), ('3', ())]
    """
    check_bool("shift_padding", shift_padding)
    inner = with_split_norms(unwrap(model))
    with evaluation_mode(inner):
        plan = Discovery(as_gates(gates)).plan(inner)
        sites = plan.sites
        names = [site.name for site in sites]
        for name in entropies or {}:
            if name not in names:
                raise ValueError(
                    f"Expected argument `entropies` to hold names of activations, but got {name!r}, not one of {names}"
                )
        check = _Check(inner, plan)
        return CandidateReport(
            [
                _candidate(
                    site,
                    _shifted(site) if shift_padding else site.neighbourhood,
                    (entropies or {}).get(site.name),
                    check,
                )
                for site in sites
            ]
        )


def _shifted(site: ActivationSite) -> Neighbourhood:
    """Return the neighbourhood of a site as it is once the padding between two convolutions has moved."""
    around = site.neighbourhood
    if possible_shift(site.name, around) is None:
        return around
    (meeting,) = around.meetings
    first, second = meeting.operators
    unpadded: Any = copy(second)
    unpadded.padding = (0,) * len(unpadded.kernel_size)
    return replace(around, meetings=(replace(meeting, operators=(first, unpadded)),))


def _candidate(site: ActivationSite, around: Neighbourhood, entropy: float | None, check: "_Check") -> Candidate:
    merges, reasons = [], [around.reason] if around.reason else []
    for meeting in around.meetings:
        try:
            check(meeting)
            merges.append((meeting.first, meeting.second))
        except CannotMergeError as error:
            reasons.append(f"`{meeting.first}` and `{meeting.second}` would meet, but {error}")
    return Candidate(
        site.name, type(site.module).__name__, site.neuron_dim, entropy, around.before, around.after, tuple(merges),
        "; ".join(reasons) or None,
    )  # fmt: skip


class _Check:
    """Find out whether a collapse would merge two operators that meet."""

    def __init__(self, model: nn.Module, plan: IsolationPlan) -> None:
        self._adjacency = Adjacency(model, plan)

    def __call__(self, meeting: Meeting) -> None:
        """Check one meeting.

        Raises:
            CannotMergeError: With the reason, when it would not.
        """
        reason = self._adjacency.why_apart(meeting)
        if reason is not None:
            raise CannotMergeError(reason)
        first, second = meeting.operators
        assert first is not None
        assert second is not None
        for batch_norm in meeting.between:
            assert isinstance(batch_norm, nn.modules.batchnorm._BatchNorm)
            first = fold_batch_norm(first, batch_norm)
            if isinstance(first.bias, nn.Parameter):
                nn.init.ones_(first.bias)  # that of a batch norm is zero before training, and then no longer
        check(first, second)
