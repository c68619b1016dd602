"""Train a changed network for some steps without labels: it follows what the network as given computes.

The closed forms see one place at a time. Some hundred steps on the calibration data let all that is left make up for
what has gone, at the cost of a gradient; they need no labels, no loss and no loader of the user's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.measure.features import FeatureDistance, common_features
from lightning_easier.pruning.judge import Judge
from lightning_easier.pruning.rules import Rejections
from lightning_easier.pruning.search import Search
from lightning_easier.pruning.stages import Clock
from lightning_easier.report import Trial
from lightning_easier.support.arguments import check_integer, check_positive
from lightning_easier.support.calls import Arguments, layout_of, names_of
from lightning_easier.support.inference import evaluation_mode
from lightning_easier.support.rows import rows_are_samples, rows_of

# Of the steps: for so many the rate rises, and by so many is known how long one takes.
_WARM_UP, _STEPS_THAT_TELL = 0.1, 5
# Batch norms go by the statistics of a batch of so many samples, as in training; by their own in a smaller one.
_FEWEST_FOR_STATISTICS = 16
# So many samples tell whether a network has come nearer.
_SAMPLES_THAT_TELL = 256
# A tensor of zeros moves as if its values were so large.
_SMALLEST_SCALE = 1e-2


@dataclass(frozen=True)
class Finetuning:
    """How a compressed network is trained, without labels, to compute what the network as given does.

    Adam, a rate that rises for a tenth of the steps and falls along a cosine then. What is followed are the features of
    :mod:`lightning_easier.measure.features`. Batch norms are in training mode where a step has 16 samples or more; all
    else stays in eval mode.

    Args:
        steps: How many steps; fewer where the time is short.
        samples: How many samples of the calibration data each of them sees.
        rate: By which share of its size (the root of the mean square of its values) a parameter moves in a step at
            most.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is not positive.
    """

    steps: int = 300
    samples: int = 64
    rate: float = 0.03

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_integer("samples", self.samples, 1)
        check_positive("rate", self.rate)


def check_trainable(model: nn.Module) -> None:
    """Refuse to train weights for which small steps are lost.

    Raises:
        ValueError: If a parameter is of less than 32 bits.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"Expected argument `finetune` to be None for a model of {parameter.dtype} (`{name}`): its steps would "
                f"be lost in rounding. Compress `model.float()`, and cast what comes out."
            )


class Finetuned:
    """What :func:`finetune` has changed, and how far the network was and is from the one that it follows.

    Attributes:
        steps: How many steps were taken.
        before: The distance before them.
        after: The distance after them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self.steps = 0
        self.before = self.after = math.nan

    @property
    def is_nearer(self) -> bool:
        """Whether the network has come nearer."""
        return self.after < self.before

    @property
    def words(self) -> str:
        """What was done."""
        return (
            f"at last it was trained for {self.steps} steps without labels, and its features and outputs are "
            f"{self.after:.2%} of their variance from those of the model as given, and were {self.before:.2%}"
        )

    @torch.no_grad()
    def undo(self) -> None:
        """Give all parameters and buffers the values that they had."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            if not torch.equal(tensor, value):  # what was not written to may not be writable: an expanded buffer
                tensor.copy_(value)


class Finetuner:
    """Trains the network of a search: where a trial would be taken back, and at last.

    Args:
        source: The network as it was given.
        names: As for :func:`finetune`.
        batches: Calibration data.
        settings: How.
        clock: Tells how long it may take.
        most: How many trials may be trained for: each takes as long as training at last.
    """

    def __init__(
        self,
        source: nn.Module,
        names: Sequence[str],
        batches: Sequence[tuple[Tensor, ...]],
        settings: Finetuning,
        clock: Clock,
        most: Rejections,
    ) -> None:
        self.settings = settings
        self._source, self._names, self._batches, self._clock, self._most = source, names, batches, clock, most
        self._rescues = 0

    def run(self, model: nn.Module, advance: Callable[[], object] = lambda: None) -> Finetuned:
        """Train a network in place, as long as the clock allows.

        Args:
            model: The network.
            advance: Called after each step.
        """
        return finetune(model, self._source, self._names, self._batches, self.settings, self._clock.left, advance)

    def rescue(self, trial: Trial, search: Search, judge: Judge) -> None:
        """Train the network of a trial that is not good enough; it is as it was if it is not good enough then, either.

        Args:
            trial: The last trial; what is said of it is changed if it is good enough after training.
            search: The search.
            judge: Tells what is good enough.
        """
        if self._most.are_too_many(self._rescues):
            return
        self._rescues += 1
        trained = self.run(search.model)
        if not trained.is_nearer:
            return
        score = judge.score(search.model)
        reason = judge.why_not(score, search.drift)
        if reason is None:
            trial.score, trial.reason = score, None
            search.forget_fits()
        else:
            trained.undo()


def finetune(
    model: nn.Module,
    dense: nn.Module,
    names: Sequence[str],
    batches: Sequence[tuple[Tensor, ...]],
    settings: Finetuning,
    left: Callable[[], float] = lambda: math.inf,
    advance: Callable[[], object] = lambda: None,
) -> Finetuned:
    """Train a changed network in place to compute what the network as given does; it stays as it was if it can't.

    Args:
        model: The changed network, in eval mode; so it is afterwards.
        dense: The network as it was given, in eval mode.
        names: Names of modules whose features may be followed, see
            :func:`~lightning_easier.measure.features.places_of_features`.
        batches: The forward's positional arguments, for each batch.
        settings: How.
        left: Returns for how many more seconds may be trained.
        advance: Called after each step.

    Returns:
        What can undo it.
    """
    samples = _Samples(dense, batches, settings.samples)
    followed = common_features(model, dense, names, samples.some(2))
    done = Finetuned(model)
    asked = [(each, each.requires_grad) for each in model.parameters()]
    norms = [module for module in model.modules() if type(module) in BATCH_NORMS]
    with FeatureDistance(model, dense, followed) as distance:
        done.before = _over(distance, model, samples.to_tell)
        with torch.inference_mode(False), torch.enable_grad():
            try:
                for parameter, _ in asked:
                    parameter.requires_grad_(parameter.is_floating_point())
                trained = [each for each, _ in asked if each.requires_grad]
                done.steps = _train(distance, trained, norms, samples, settings, left, advance)
            finally:
                for parameter, requires_grad in asked:
                    parameter.grad = None
                    parameter.requires_grad_(requires_grad)
                for norm in norms:
                    norm.eval()
        done.after = _over(distance, model, samples.to_tell)
    if not done.is_nearer:  # it has diverged
        done.undo()
    return done


def _train(
    distance: FeatureDistance,
    parameters: Sequence[nn.Parameter],
    norms: Sequence[nn.Module],
    samples: "_Samples",
    settings: Finetuning,
    left: Callable[[], float],
    advance: Callable[[], object],
) -> int:
    """Take steps; return how many."""
    if not parameters:
        return 0
    sizes = [max(float(each.detach().square().mean().sqrt()), _SMALLEST_SCALE) for each in parameters]
    optimizer = torch.optim.Adam(
        [{"params": [each], "lr": settings.rate * size} for each, size in zip(parameters, sizes, strict=True)]
    )
    total, began = settings.steps, monotonic()
    drawn = samples.drawn()
    for step in range(settings.steps):
        if step == _STEPS_THAT_TELL:
            seconds = (monotonic() - began) / step
            total = int(min(total, step + left() / max(seconds, 1e-9)))
        if step >= total or left() <= 0:
            return step
        arguments = next(drawn)
        for norm in norms:
            norm.train(bool(arguments[0].ndim) and len(arguments[0]) >= _FEWEST_FOR_STATISTICS)
        loss = distance.of(arguments)
        if not loss.requires_grad:  # nothing of what is compared depends on a parameter
            return step
        optimizer.zero_grad()
        loss.backward()
        share = _share_of_rate(step, total)
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = settings.rate * size * share
        optimizer.step()
        advance()
    return settings.steps


def _share_of_rate(step: int, steps: int) -> float:
    """Return which share of the largest rate a step has: it rises along a line first, and falls along a cosine then."""
    rising = max(int(_WARM_UP * steps), 1)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def _over(distance: FeatureDistance, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> float:
    with evaluation_mode(model):
        values = [float(distance.of(batch)) for batch in batches]
    weights = [len(batch[0]) if batch[0].ndim else 1 for batch in batches]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


class _Samples:
    """Draws samples from calibration data, across batches where their samples are alike.

    Batches of which the rows are no samples, one independent of the other, are drawn whole.

    Args:
        dense: The network as it was given, in eval mode.
        batches: The forward's positional arguments, for each batch.
        count: How many samples are drawn together.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[tuple[Tensor, ...]], count: int) -> None:
        self._batches = batches
        self._count = count
        self._alike: dict[tuple[object, ...], list[tuple[int, int]]] = {}  # what samples are like -> batch and row
        self._whole: list[int] = []  # batches that are no rows of samples: arguments that all samples share
        for number, batch in enumerate(batches):
            rows = rows_of(batch)
            key = tuple((value.shape[1:], value.dtype) for value in batch)
            if rows is None or (key not in self._alike and not rows_are_samples(dense, batch)):
                self._whole.append(number)
                continue
            self._alike.setdefault(key, []).extend((number, row) for row in range(rows))

    def some(self, count: int) -> tuple[Tensor, ...]:
        """Return so many samples of the first kind; a batch where there are none."""
        for places in self._alike.values():
            return self._at(places[:count])
        return self._batches[0]

    @property
    def to_tell(self) -> list[tuple[Tensor, ...]]:
        """Batches that tell how far a network is."""
        told, samples = [], 0
        for batch in self._batches:
            told.append(batch)
            samples += len(batch[0]) if batch[0].ndim else 1
            if samples >= _SAMPLES_THAT_TELL:
                break
        return told

    def drawn(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield samples without end, each once before one comes again."""
        generator = torch.Generator().manual_seed(0)
        while True:
            groups: list[list[tuple[int, int]] | int] = [*self._whole]
            for places in self._alike.values():
                order = [places[place] for place in torch.randperm(len(places), generator=generator).tolist()]
                count = min(self._count, len(order))
                groups += [order[start : start + count] for start in range(0, len(order) - count + 1, count)]
            for place in torch.randperm(len(groups), generator=generator).tolist():
                group = groups[place]
                yield self._batches[group] if isinstance(group, int) else self._at(group)

    def _at(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        first = self._batches[places[0][0]]
        count = len(first)
        stacked = (torch.stack([self._batches[batch][each][row] for batch, row in places]) for each in range(count))
        layout = layout_of(first) if len(first[0]) > 1 else torch.preserve_format  # one sample allows more views
        return Arguments(stacked, names_of(first), layout)
