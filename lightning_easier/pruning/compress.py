"""Make a trained model shallower and faster without training it: fit, check, keep or take back, in minutes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_easier.collapsing.engine import warn_of_lost_arguments
from lightning_easier.collapsing.exact.prices import OBJECTIVES, Objective
from lightning_easier.collapsing.fit.enough import enough_to_fit
from lightning_easier.collapsing.fit.fit_prices import SLACK, ChainPrices
from lightning_easier.collapsing.fit.fittable_blocks import fittable_blocks
from lightning_easier.measure.features import places_of_features
from lightning_easier.pruning.finetuning import Finetuner, Finetuning, check_trainable
from lightning_easier.pruning.judge import Judge
from lightning_easier.pruning.mending import Mending
from lightning_easier.pruning.rules import Rejections, Tolerance
from lightning_easier.pruning.search import FittedCandidate, Search
from lightning_easier.pruning.stages import (
    PREPARING,
    SEARCHING,
    STAGES,
    STAGES_WITH_FINETUNING,
    TIMING,
    TRYING,
    Clock,
)
from lightning_easier.pruning.targets import Look, Target, TargetWatch, check_target
from lightning_easier.pruning.unneeded import Unneeded
from lightning_easier.pruning.work import work_of_a_sample
from lightning_easier.report import CompressReport
from lightning_easier.sites.activations import isolate_activations, match_names, unwrap
from lightning_easier.sites.blocks import Block, find_blocks
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.norms import split_norms
from lightning_easier.support.arguments import (
    as_globs,
    check_bool,
    check_choice,
    check_integer,
    check_non_negative,
    check_positive,
)
from lightning_easier.support.batches import BatchReader, InputsOf, as_arguments
from lightning_easier.support.calibration import inputs_left_out, read_calibration
from lightning_easier.support.calls import Arguments, copies
from lightning_easier.support.hooks import remove_hooks_of_one_model
from lightning_easier.support.inference import (
    check_weights,
    device_of,
    forward,
    without_masks,
)
from lightning_easier.support.layouts import in_fast_layout
from lightning_easier.support.progress import Stages
from lightning_easier.support.timing import LatencyTable, Pace

# As many timings does any other step take as one of prices: of the dense network, of two models, and of all.
_TIMINGS = 3


@dataclass(frozen=True)
class CompressResult:
    """A compressed model and how it came about.

    Attributes:
        model: A new module in eval mode, collapsed.
        fitted: The model as it was given, with the fitted operators in their places and nothing merged: the one to
            train on. It is in eval mode, too; call ``fitted.train()`` before it is fine-tuned.
        report: What was tried, kept and taken back, and the cost before and after.
    """

    model: nn.Module
    fitted: nn.Module
    report: CompressReport


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    tolerance: float = 0.01,
    mode: Literal["min", "max"] = "max",
    target_speedup: float | None = None,
    target_depth: int | None = None,
    max_drift: float | None = None,
    max_minutes: float | None = None,
    objective: Objective = "latency",
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    max_rejections: int = 3,
    slack: float = SLACK,
    narrow: bool = True,
    finetune: int | Finetuning | None = None,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    inputs_of: InputsOf | None = None,
) -> CompressResult:
    """Replace chains around activations, and whole blocks, the one that adds least per second saved first.

    Around every activation between two operators, and every two in a row, and in the place of every residual block and
    every branch that an addition adds, every kind of operator is fitted (see :func:`~lightning_easier.collapse` with
    ``mode="fit"``) and tried alone; a block may leave nothing, too, the identity or zeros. The *drift* is the share of
    the variance of the model's outputs on the calibration batches that changes, once the batch norms that are left have
    the mean and the deviation that they had. The one that adds least to it per
    second that it saves is next, by what it changes alone and what has changed by then. It is fitted again to what the
    model has become, and to correct the errors of what is in place already; it is put in place, and the model is
    evaluated; where the score has fallen by more than the tolerance, it is taken back. A chain may go in several steps:
    it keeps three quarters, half or a quarter of its inner channels, those that the operator after them, fitted again,
    can do least without; a convolution takes its place; an affine for each channel does, which merges with the skip
    beside it; the block that it is in may go last. At last operators that stay are refitted to make up for the error of
    what was replaced, and each batch norm that is left is given the scale and the offset with which it computes the
    mean and the deviation that it did, where that brings the outputs nearer to those of the model as given. The result
    is collapsed exactly.

    Args:
        model: Any module; it is not changed.
        batches: Calibration data, such as a few batches of a training loader: a tensor each, or a sequence whose first
            elements are the forward's positional arguments: as many as it can't do without, or as ``example_inputs``
            has. What follows them is taken for labels: with a warning where the forward would take it, too, and with a
            note in the report where it is the last and holds classes. Of a dictionary or dataclass the forward gets by
            name what it takes, labels aside. Batches without samples and samples that are not finite are left out.
        evaluate: Returns the score of a model, which it gets in eval mode. Without it ``max_drift`` tells what stays.
        tolerance: By how much the score may fall below that of the model as given.
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        target_speedup: Stop when the collapsed model is measured to be so many times faster at ``example_inputs`` than
            the dense network with its batch norms folded, both timed in turn.
        target_depth: Stop when it has no more operators than this in a row. Where the last step passes a target, those
            that are not needed for it are taken back, the largest drift first, or less is put in their places, while
            what is measured reaches it still.
        max_drift: How large a share of the variance of the model's outputs on the calibration data all that is replaced
            may change; what goes beyond is taken back. By default 0.1 without ``evaluate``, and no limit with it.
        max_minutes: Stop after so many minutes with what is there then; no limit by default. The first half is for
            the search, what is left up to 80 % for trials, and the rest for the costs in the report and for the refits.
            In each, timings take fewer samples where time is short, five at least; bounds are wider then, and a note
            says so. What is not cut short: reading ``batches``, each call of ``evaluate`` (one at least), the first run
            over the data, a chain, a trial or an operator that has begun, the collapse and its verification.
        objective: What is to be saved: ``"latency"``, ``"macs"`` or ``"depth"``.
        include: Name globs of the activations that may go; all by default. A block may go if all activations in it may;
            one that has none goes by its own name.
        exclude: Name globs of those that may not.
        max_rejections: How many in a row may be taken back before it stops.
        slack: Where neither a score nor a target tells where to stop: how much less of the variance of a chain than the
            best operator one may explain to be taken for its price.
        narrow: Whether a chain may lose inner channels, where there is a score or a ``target_speedup``, and no
            ``target_depth`` alone: it gets no shallower.
        finetune: For how many steps what is left is trained at last, or how: without labels, to compute on ``batches``
            what the model as given does, see :class:`~lightning_easier.Finetuning`. What would be taken back is
            trained first, up to ``max_rejections`` times, and stays if it is good enough then. 300 steps bring back
            most of what tuning on labels would; none by default.
        example_inputs: What costs are measured at; the first batch by default.
        inputs_of: Returns the inputs in a batch, where they are found elsewhere: a tensor, a tuple of positional
            arguments, or a dictionary of arguments by name; none of them is left out.

    Returns:
        The collapsed model, the model to train on, and a report.

    Warns:
        UserWarning: If there is a target and it is not reached, ``max_minutes`` are over before anything is tried,
            something is left out of ``batches``, or they may hold inputs that the forward is not given.

    Raises:
        TypeError: If ``model`` is not a Module, or an argument is of another type.
        ValueError: If an argument has a value out of range, ``batches`` yields none, ``example_inputs`` hold no sample,
            they or the model are on the meta device, or the score is not finite.
        CollapseError: As :func:`~lightning_easier.collapse`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        >>> result = compress(mlp, [torch.randn(64, 8) for _ in range(4)], objective="macs", max_drift=0.5)
        >>> result.model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    allowed, most = Tolerance(tolerance, mode), Rejections(max_rejections)
    check_non_negative("slack", slack)
    check_bool("narrow", narrow)
    check_choice("objective", objective, OBJECTIVES)
    check_target(target_speedup, target_depth, "target_")
    has_target = target_speedup is not None or target_depth is not None
    target = Target(target_speedup, target_depth) if has_target else None
    for argument, value, check in (
        ("max_drift", max_drift, check_non_negative), ("max_minutes", max_minutes, check_positive),
    ):  # fmt: skip
        if value is not None and value != math.inf:
            check(argument, value)
    settings = _as_finetuning(finetune)
    stages = STAGES if settings is None else STAGES_WITH_FINETUNING
    clock = Clock(max_minutes, stages)
    model = unwrap(model)
    check_weights(model)
    if settings is not None:
        check_trainable(model)
    source, activations = _replaceable_copy(model)
    found = find_blocks(source)
    sites, blocks = _wanted(activations, found, as_globs("include", include), as_globs("exclude", exclude))
    given = None if example_inputs is None else as_arguments(example_inputs, source)
    reader = BatchReader(source, "batches", inputs_of, given)
    device = device_of(source)
    if given is not None:
        with torch.no_grad():
            forward(source, copies(given), "example_inputs")
    work: float | None = None

    def tried(first: Arguments) -> float:
        nonlocal work
        work = work_of_a_sample(source, first)
        return enough_to_fit(work) if settings is None else math.inf  # trained on all of them

    data = read_calibration(reader, batches, source, tried)
    notes = list(data.notes)
    if given is None and inputs_of is None:
        doubt, decision = inputs_left_out(source, data.first, len(data.batches[0]))
        if doubt is not None:
            rank_zero_warn(doubt)
        notes += [said for said in (doubt, decision) if said is not None]
    arguments = copies(given or data.batches[0])
    calibration = in_fast_layout(source, [*data.batches, arguments])[:-1]  # examples run beside them: tried as well

    with Stages(stages) as progress:
        progress.begin(PREPARING, units=_TIMINGS)
        judge = Judge(source, evaluate, allowed, max_drift, device)
        pace = Pace(clock.left, progress.tell)
        table = LatencyTable(pace=pace)
        is_guided = evaluate is not None or target is not None
        is_for_speed = objective != "depth" and (target is None or target_speedup is not None)
        search = Search(
            source, calibration, arguments, ChainPrices(objective, table), math.inf if is_guided else slack,
            narrow and is_guided and is_for_speed, work,
        )  # fmt: skip
        clock.begin(SEARCHING)
        watch = TargetWatch(source, arguments, objective, table, target)
        look = watch.look_if_due(search.model, search.saved)
        candidates: list[FittedCandidate] = []
        if look is None or not look.attained.is_reached:  # else by an exact collapse alone
            fittable, reasons = fittable_blocks(search.model, blocks, activations, arguments)
            candidates = search.candidates(sites, fittable, clock, progress)
            search.reasons |= reasons
        clock.begin(TRYING)
        progress.begin(TRYING, len(candidates), _TIMINGS)
        followed = places_of_features(found, activations)
        finetuner = None if settings is None else Finetuner(source, followed, calibration, settings, clock, most)
        rejections, ended, is_over, score = 0, "", False, judge.dense_score
        left = list(candidates)
        while left:
            if most.are_too_many(rejections):
                ended = f"{rejections} in a row were taken back"
                break
            if is_over := clock.is_over():
                ended = f"the time for trials is over, 80 % of the {max_minutes:g} minutes of `max_minutes`"
                break
            candidate = search.next_of(left, clock.is_over)
            left = [each for each in left if each is not candidate]
            progress.name(" + ".join(candidate.choice.place.operators))
            trial = search.take(candidate)
            if trial is not None:
                trial.score = judge.score(search.model)
                trial.reason = judge.why_not(trial.score, search.drift_seen)
                if trial.reason is not None and finetuner is not None:
                    finetuner.rescue(trial, search, judge)
                if trial.reason is not None:
                    search.take_back(trial.reason)
                    rejections += 1
                else:
                    rejections, score = 0, trial.score
                    look = watch.look_if_due(search.model, search.saved)
                    if look is not None and (look.attained.is_reached or look.is_impossible):
                        break
            progress.finish()
        else:
            ended = judge.why_nothing_is_left(search.was_cut)
        clock.begin(TIMING)
        progress.begin(TIMING, 1 + len(search.steps) * watch.has_target, _TIMINGS)
        if look is None:  # whatever was estimated: what is returned is measured
            look = watch.look(search.model, search.saved)
        progress.finish()
        unneeded = Unneeded(search, candidates, judge, watch, look, score, most, clock, progress)
        unneeded.take_back()
        look, score = unneeded.look, unneeded.score
        mending = Mending(search, source, search.some_batches, judge, score, clock, progress)
        mending.mend(finetuner)
        if mending.notes:
            score = mending.score
            notes += mending.notes
            look = watch.look_again(search.model, search.saved, look)
        look = watch.with_operators(look)
        drift = search.drift
    is_too_short = not search.trials and (search.was_cut or is_over)
    if is_too_short and not look.attained.is_reached:
        ended = f"nothing was tried: {search.looked_at} within the {max_minutes:g} minutes of `max_minutes`"
    ended = _why_ended(ended, look) if watch.has_target else ended
    if is_too_short and not look.attained.is_reached:
        rank_zero_warn(f"Compression ended since {ended}. Raise `max_minutes`.")
    elif watch.has_target and not look.attained.is_reached:
        remedy = "Raise `tolerance` or `max_drift`, or include more activations"
        if is_over or search.was_cut:
            remedy = "Raise `max_minutes`"
        elif not judge.has_refused and include is None and exclude is None:
            remedy = "What is left can't be replaced, or would save nothing: the report says why"
        rank_zero_warn(f"Compression ended since {ended}. {remedy}.")
    if pace.was_short:
        samples = len(look.result.report.speedup.ratios)
        notes.append(
            f"`max_minutes` left time for few samples, {samples} of the compressed model: the bounds of speed-ups are "
            f"wider than without it, and so are those of prices"
        )
    report = CompressReport(
        search.trials, search.reasons, judge.dense_score, look.before, look.dense, look.exact, look.result.report.after,
        drift, look.result.report, ended, notes, score, mode, None if stand_ins(source) else judge.dense_score,
    )  # fmt: skip
    warn_of_lost_arguments(source, look.result.report)
    return CompressResult(look.result.model, search.model, report)


def check_globs(model: nn.Module, include: list[str] | str | None, exclude: list[str] | str | None) -> None:
    """Refuse globs that :func:`compress` would refuse, before anything is run or read for it.

    Args:
        model: The model; it is not changed.
        include: As for :func:`compress`.
        exclude: As for :func:`compress`.

    Raises:
        ValueError: If a glob matches nothing.
    """
    if include is None and exclude is None:
        return
    source, activations = _replaceable_copy(unwrap(model))
    _wanted(activations, find_blocks(source), as_globs("include", include), as_globs("exclude", exclude))


def _replaceable_copy(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return a copy of a model in eval mode in which all may be replaced, and the names of its activations."""
    source = without_masks(model).eval()
    remove_hooks_of_one_model(source)
    split_norms(source)
    return source, list(isolate_activations(source))


def _as_finetuning(finetune: int | Finetuning | None) -> Finetuning | None:
    """Return how is trained; a number is one of steps.

    Raises:
        TypeError: If it is neither.
        ValueError: If the number is not positive.
    """
    if finetune is None or isinstance(finetune, Finetuning):
        return finetune
    if isinstance(finetune, bool) or not isinstance(finetune, int):
        raise TypeError(
            f"Expected argument `finetune` to be None, a number of steps or a Finetuning, but got {finetune!r}"
        )
    check_integer("finetune", finetune, 1)
    return Finetuning(finetune)


def _wanted(
    activations: Sequence[str], blocks: Sequence[Block], include: list[str] | None, exclude: list[str] | None
) -> tuple[list[str], list[Block]]:
    """Return the activations that may go, and the blocks: with all activations in them, or by name if they have none.

    Raises:
        ValueError: If a glob matches nothing.
    """
    inside = {block.name: [each for each in activations if each.startswith(f"{block.name}.")] for block in blocks}
    alone = [name for name, sites in inside.items() if not sites]
    wanted = set(match_names([*activations, *alone], include, exclude))
    sites = [name for name in activations if name in wanted]
    return sites, [block for block in blocks if wanted.issuperset(inside[block.name] or [block.name])]


def _why_ended(ended: str, look: Look) -> str:
    """Say why a compression with a target has ended, and what it has reached."""
    if look.attained.is_reached:
        return f"the target is reached: {look.attained.words}"
    if look.is_impossible:
        ended = (
            f"of {look.dense.macs:,} multiply-accumulates {look.result.report.after.macs:,} are left, and it is no "
            f"use to go on: the time on this device does not come from them, or something else keeps the machine busy"
        )
    return f"{ended}, and the target is not reached: {look.attained.words}"
