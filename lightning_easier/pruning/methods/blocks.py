r"""LaCoOT: whole blocks are taken out, those first whose output is nearest to their input.

In training, a regulariser brings the two together. With blocks :math:`b`, what goes in :math:`x_b` and comes out
:math:`y_b`, and :math:`W` the max-sliced Wasserstein distance, the loss of a step becomes

.. math:: L + \lambda \, \frac{1}{B} \sum_b W(x_b, y_b).

Source: LaCoOT, arXiv 2406.08933.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from random import Random

import torch
from torch import Tensor, nn

from lightning_easier.measure.block_pairs import BlockPairs
from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.measure.transport import SlicedWasserstein, sliced_wasserstein
from lightning_easier.pruning.collapsible import collapsible_blocks
from lightning_easier.pruning.methods.base import Evidence, Measuring, Method, Proposal, Regularizer, Worker
from lightning_easier.pruning.without_blocks import WithoutBlocks, no_longer_blocks
from lightning_easier.report import BlockReport
from lightning_easier.sites.activations import ActivationSite, match_names
from lightning_easier.sites.blocks import Block, find_blocks
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.operations import TakenOut
from lightning_easier.support.arguments import as_globs, check_non_negative
from lightning_easier.support.calibration import tell
from lightning_easier.support.hooks import Remembered
from lightning_easier.support.processes import sum_over_processes

LOSS_KEY = "transport_loss"
DISTANCE_KEY = "distance/"


@dataclass(frozen=True)
class RemoveBlocks(Method):
    """Take whole blocks out, those first whose output is nearest to their input.

    A block leaves its input, or zeros where it is a branch of an addition; see
    :func:`~lightning_easier.collapsible_blocks`. Nearness is the max-sliced Wasserstein distance on validation batches,
    the mean over them; of a branch, that of its output to zeros. Logged as ``distance/<block>``.

    Args:
        weight: Of the regulariser that brings inputs and outputs together, in the loss of training steps; none for 0.
            LaCoOT takes 5 for ResNet-18, 0.1 for Swin-T, 9 for MobileNetV2 on CIFAR-10. Its value, without the weight,
            is logged as ``transport_loss``. Without it the distance tells little of what a block is worth.
        blocks: Name globs of the blocks; by default those that lie in no other.
        directions: How many directions the distance looks along; drawn anew for each batch.
        p: Order of the distance, at least 1.
        seed: Of the directions.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range; when training starts, if no block is found, or one of
            those chosen lies inside another.

    Source: LaCoOT, arXiv 2406.08933.
    """

    weight: float = 0.0
    blocks: list[str] | str | None = None
    directions: int = 50
    p: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_non_negative("weight", self.weight)
        as_globs("blocks", self.blocks)
        SlicedWasserstein(p=self.p, directions=self.directions, seed=self.seed)

    @property
    def wanted(self) -> str:
        """Blocks."""
        return "to have at least one block whose output has the shape of its input (see `collapsible_blocks`)"

    @property
    def needs_eval_mode(self) -> bool:
        """Yes: nearness is measured between removals, when nothing is trained."""
        return True

    @property
    def needs_whole_parameters(self) -> tuple[str, str] | None:
        """Those of blocks leave with them."""
        return "take blocks out", "Take them out of a gathered model with `compress`"

    @property
    def charts(self) -> dict[str, str]:
        """The distances of all blocks in one chart, and what is added to the loss."""
        charts = {"Distance of blocks": f"^{DISTANCE_KEY}.*$"}
        return charts | ({"Distance in the loss of training steps": f"^{LOSS_KEY}$"} if self.weight > 0 else {})

    def worker(self, measuring: Measuring) -> "BlockWorker":
        """Return who measures for it in a run."""
        return BlockWorker(self, measuring)

    def regularizer(self) -> "BlockRegularizer | None":
        """Return what it adds to the loss."""
        return BlockRegularizer(self) if self.weight > 0 else None

    def chosen(self, model: nn.Module) -> list[Block]:
        """Return the blocks of a model that may be taken out.

        Raises:
            ValueError: If a glob matches none.
        """
        found, globs = find_blocks(model), as_globs("blocks", self.blocks)
        if globs is None:
            return [block for block in found if block.inside is None]
        removed = [name for name, each in stand_ins(model).items() if each.mark.stand_in in ("identity", "zeros")]
        there = [*(block.name for block in found), *removed]
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in there):
                raise ValueError(
                    f"Expected argument `blocks` to hold globs that match blocks, but {glob!r} matches none of "
                    f"{there}. `collapsible_blocks(model)` lists them."
                )
        names = match_names(there, globs, None)
        return [block for block in found if block.name in names]

    def removable(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the blocks that may be taken out, by name."""
        return {block.name: block.module for block in self.chosen(model)}

    def check(self, model: nn.Module, names: Sequence[str], *, named: bool) -> None:
        """Refuse blocks that overlap."""
        for name in names:
            other = next((other for other in names if name.startswith(f"{other}.")), None)
            if other is not None:
                raise ValueError(
                    f"Expected argument `blocks` to choose blocks that do not overlap, but {name!r} lies inside "
                    f"{other!r}. Name one of the two; `collapsible_blocks(model)` tells which lie in which."
                )

    def propose(self, model: nn.Module, evidence: "BlockEvidence") -> Proposal:
        """Propose to take out each block whose distance is known and finite, ranked by it."""
        proposal = Proposal(blocks=[{"name": name, "reason": reason} for name, reason in evidence.needed.items()])
        known = {
            name: evidence.distances[name]
            for name in evidence.blocks
            if name in evidence.distances and name not in evidence.needed
        }
        strange = [name for name, distance in known.items() if not isfinite(distance)]
        if strange:  # they would order nothing, and a score that says nothing of them would let all of them go
            tell(
                f"{strange} are not taken out: the distance between what goes in and what comes out is not finite. "
                f"Look for NaN in the validation data; if there is none, the training has diverged: lower the learning "
                f"rate, or `weight`."
            )
        for name, distance in known.items():
            if name not in strange:
                block = evidence.blocks[name]
                proposal.add(TakenOut([name], block.leaves, block.returns or 0), distance)
        return proposal

    def list_candidates(self, model: nn.Module, entropies: Mapping[str, float] | None) -> BlockReport:
        """List the blocks, for a dry run."""
        return collapsible_blocks(model, include=[block.name for block in self.chosen(model)])

    def listed(self, model: nn.Module, entropies: Mapping[str, float] | None, proposal: Proposal) -> BlockReport:
        """List the blocks, and those that the model can't do without, for a dry run."""
        found = self.list_candidates(model, entropies)
        needed = {block["name"]: block["reason"] for block in proposal.blocks}
        return BlockReport([row for row in found.blocks if row.name not in needed], needed, found.notes)


@dataclass(frozen=True)
class BlockEvidence(Evidence):
    """What was measured of the blocks.

    Attributes:
        blocks: Name -> block.
        distances: Name -> distance between what it leaves and what it computes, of those that were called with two
            samples or more; NaN or infinite where values are not finite.
        needed: Name -> why the model can't do without a block.
    """

    blocks: dict[str, Block]
    distances: dict[str, float]
    needed: dict[str, str] = field(default_factory=dict)


class BlockWorker(Worker):
    """Measures how near what blocks compute is to what they would leave.

    Args:
        method: The method.
        measuring: What is measured on.
    """

    method: RemoveBlocks

    def __init__(self, method: RemoveBlocks, measuring: Measuring) -> None:
        super().__init__(method, measuring)
        self._looked_at: Remembered[nn.Module] = Remembered()
        self._gone: list[str] = []
        self._blocks: dict[str, Block] = {}
        self._metrics: dict[str, SlicedWasserstein] = {}
        self._pairs: BlockPairs | None = None
        self._without = WithoutBlocks(self.pause)
        self.distances: dict[str, float] = {}

    def start(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        """Measure from zero."""
        super().start(model, sites)
        method = self.method
        gone = list(stand_ins(model))
        if not self._looked_at.is_(model) or gone != self._gone:  # to look for blocks takes time
            chosen = {block.name: block for block in method.chosen(model)}
            self._blocks = {
                name: block
                for name, block in chosen.items()
                if not any(fnmatchcase(name, glob) for glob in self.excluded)
            }
            self._looked_at, self._gone = Remembered(model), gone
        self._metrics = {
            name: SlicedWasserstein(p=method.p, directions=method.directions, seed=method.seed).to(_device(block))
            for name, block in self._blocks.items()
        }
        self._pairs = BlockPairs([*self._blocks.values()], self._compare)
        self._pairs.attach()
        self._without.watch(model, [*self._blocks.values()])

    def _compare(self, name: str, left: Tensor, computed: Tensor) -> None:
        with _naming(name):
            self._metrics[name].update(left, computed)

    def pause(self, paused: bool) -> None:
        """Leave what runs now out, or measure again."""
        super().pause(paused)
        if self._pairs is not None:
            self._pairs.paused = paused

    def take(self, probe: EntropyProbe) -> None:
        """Take note of what was measured; every process has to call this."""
        super().take(probe)
        metrics = self._metrics.values()
        sums = [each for metric in metrics for each in (metric.total, metric.samples, metric.left_out)]
        total, samples, left_out = (
            torch.stack([each.cpu().double() for each in sum_over_processes(sums)]).reshape(-1, 3).T
            if sums
            else torch.zeros(3, 0, dtype=torch.float64)
        )
        is_measured, distances = (samples > 0).tolist(), (total / samples).tolist()
        measured = zip(self._metrics, distances, is_measured, strict=True)
        self.distances = {name: distance for name, distance, is_there in measured if is_there}
        single = [name for name, n, out in zip(self._metrics, samples, left_out, strict=True) if n == 0 < out]
        if single and not self.distances and not self._gone:  # else they may be what is left
            raise ValueError(
                "Expected validation batches of two samples or more, but got batches of one, which are no "
                "distribution. Raise the batch size of the validation loader."
            )
        if single:
            tell(
                f"{single} are not taken out: in validation they are only given one sample at once, which is no "
                f"distribution."
            )

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return the distances."""
        return {f"{DISTANCE_KEY}{name}": value for name, value in self.distances.items()}

    def reduce(self) -> None:
        """Put together over all processes which blocks the model can't do without."""
        super().reduce()
        self._without.agree()

    def propose(self, model: nn.Module, names: Sequence[str]) -> Proposal:
        """Have the method propose by what was measured last."""
        blocks = {name: block for name, block in self._blocks.items() if name in names}
        needed = {name: reason for name, reason in self._without.reasons.items() if name in blocks}
        needed |= no_longer_blocks(model, [name for name in names if name not in blocks])
        self._without.tell(needed)
        return self.method.propose(model, BlockEvidence(self._among(names), blocks, self.distances, needed))

    def detach(self) -> None:
        """Take all hooks away; what was measured stays."""
        super().detach()
        self._without.detach()
        if self._pairs is not None:
            self._pairs.detach()


class BlockRegularizer(Regularizer):
    """Brings what goes into blocks and what comes out of them together, while training goes on.

    Args:
        method: The method.
    """

    key = LOSS_KEY

    def __init__(self, method: RemoveBlocks) -> None:
        self._method = method
        self._pairs: BlockPairs | None = None
        self._watched: dict[str, nn.Module] | None = None
        self._number = 0  # of the step
        self._distances: list[Tensor] = []

    def attach(self, model: nn.Module, names: Sequence[str]) -> None:
        """Watch the blocks that are in the model."""
        self.detach()
        modules = {name: model.get_submodule(name) for name in names}
        if modules != self._watched:  # a removal has changed the model, or another one is trained
            self._watched = modules
            blocks = [block for block in self._method.chosen(model) if block.name in names]
            self._pairs = BlockPairs(blocks, self._compare)
        assert self._pairs is not None
        self._pairs.attach()

    def detach(self) -> None:
        """Take all hooks away."""
        if self._pairs is not None:
            self._pairs.detach()

    def begin_step(self, number: int) -> None:
        """Forget the last step."""
        self._number, self._distances = number, []
        if self._pairs is not None:
            self._pairs.forget()

    def term(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean of the distances, with and without the weight."""
        distances, self._distances = self._distances, []
        if not distances:
            return None
        mean = torch.stack([each.float() for each in distances]).mean()
        return self._method.weight * mean, mean.detach()

    def _compare(self, name: str, left: Tensor, computed: Tensor) -> None:
        """Take the distance of one block.

        A call that is checkpointed is repeated in the backward pass, and has to compute the same then.
        """
        if not torch.is_grad_enabled():
            return
        if len(computed) < 2:
            if self._number <= 0:  # the first batch of the run
                raise ValueError(
                    f"Expected training batches of two samples or more, but {name!r} has computed one, which is no "
                    f"distribution. Raise the batch size of the training loader, leave the block out by `exclude`, or "
                    f"pass weight=0."
                )
            return
        seed = Random(f"{self._method.seed}, {self._number}, {name}").getrandbits(32)
        generator = torch.Generator(computed.device).manual_seed(seed)
        with _naming(name):
            distance = sliced_wasserstein(
                left, computed, p=self._method.p, directions=self._method.directions, generator=generator
            )
        if self.in_step:
            self._distances.append(distance)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say in the error of a comparison which block it was, and what to do."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"The block {name!r} can't be taken out: {error}. Leave it out by `exclude`, or by the globs of `blocks`."
        ) from error


def _device(block: Block) -> torch.device:
    return next((each.device for each in block.module.parameters()), torch.device("cpu"))
