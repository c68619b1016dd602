"""One cheaper operator, fitted to what a chain of operators computes, takes the place of the chain at once.

Where that is asked for, whole blocks are taken out as well, in one order with the chains.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_easier.collapsing.algebra.least_squares import Fit
from lightning_easier.collapsing.fit.block_fits import BlockProbe
from lightning_easier.collapsing.fit.chain_fits import ChainProbe
from lightning_easier.collapsing.fit.fit_prices import SLACK, PricedFit
from lightning_easier.collapsing.fit.fittable import ACTIVATIONS_IN_A_CHAIN, FittableChain
from lightning_easier.collapsing.fit.fittable_blocks import FittableBlock
from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.pruning.gains import Gain
from lightning_easier.pruning.methods.base import Measuring, Outlook, Proposal, Worker
from lightning_easier.pruning.methods.linearize import LinearEvidence, Linearize, LinearWorker, Option
from lightning_easier.pruning.without_blocks import WithoutBlocks, no_longer_blocks
from lightning_easier.report import BlockCandidate, BlockWay, FitReport, Report
from lightning_easier.sites.activations import ActivationSite, planned_sites
from lightning_easier.sites.blocks import Block, find_blocks
from lightning_easier.structure.block_operators import BlockFit
from lightning_easier.structure.inventory import not_removed
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.operations import FittedBlocks, FittedOperators, Operation, TakenOut, from_plain
from lightning_easier.support.arguments import check_bool
from lightning_easier.support.calibration import tell, tell_left_out
from lightning_easier.support.hooks import Remembered


@dataclass(frozen=True)
class ChainEvidence(LinearEvidence):
    """What was measured of a model, besides the entropies.

    Attributes:
        chains: What was summed up of the chains around the activations; None if nothing was.
        blocks: What was summed up of whole blocks; None if nothing was.
        of_all: Name -> entropy in bits of all activations that were measured, also those that may not be removed alone.
        needed: Block -> why the model can't do without.
    """

    chains: ChainProbe | None
    blocks: BlockProbe | None = field(default=None, kw_only=True)
    of_all: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    needed: Mapping[str, str] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class FitChains(Linearize):
    """Put one cheaper operator in the place of the chain around an activation, fitted to what the chain computes.

    It moves into the first operator of the chain, whose parameters stay the same objects; what comes after it becomes
    identities, and a batch norm after the chain stays and, where it has a scale and an offset, is adjusted. Two
    activations in a row, as in the bodies of bottlenecks and inverted residuals, go as one where the first alone saves
    nothing. Chains are measured in the last validation of a round.

    Whole blocks may go, too, and branches that an addition adds (see :func:`~lightning_easier.collapsible_blocks`).
    Nothing is left of them, so that a block leaves its input and a branch zeros, or one operator takes their place: a
    scale and an offset for each channel, a Linear or a convolution, or two smaller ones in a row, fitted to what they
    compute, a block with its skip. Its parameters are new and join the optimizer, in the group of what is trained right
    before it. They are ranked among the chains: by linearity by the share of the variance that is not explained, of the
    block's output, the skip among it, or of the sum that a branch is added to; else by the sum over the activations
    that were measured in them; with a ``gain`` for what that saves, where nothing is left an eighth of the block's cost
    more. What is equal to a chain goes after it. A block goes once: what took its place goes with a block around it
    only. `include` and `exclude` of the callback choose blocks by their names, also those around activations that may
    not go alone.

    Args:
        stand_in: What takes the place of an activation that lies in no such chain.
        trainable: As for :class:`Linearize`.
        shift_padding: As for :class:`Linearize`, where there is no chain.
        gates: As for :class:`Linearize`.
        order: Which goes first.
        blocks: Whether whole blocks, and branches, may go, too.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value that is not supported, or has no effect beside another; when training
            starts, if there is no block to take out.
    """

    blocks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("blocks", self.blocks)
        given = self.stand_in, self.trainable, self.shift_padding
        if self.order.mergeable_only and given != ("identity", False, True):
            raise ValueError(
                f"Expected arguments `stand_in`, `trainable` and `shift_padding` to be left out with "
                f"Order(mergeable_only=True), but got {given}: what lies in no chain is not removed then"
            )

    @property
    def needs_eval_mode(self) -> bool:
        """Yes: what is fitted has to compute what the chain computes in eval mode."""
        return True

    def worker(self, measuring: Measuring) -> Worker:
        """Return who measures for it in a run."""
        return ChainWorker(self, measuring)

    def removable(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return what may be removed, by name: the activations, and whole blocks."""
        return super().removable(model) | {block.name: block.module for block in self.chosen(model)}

    def chosen(self, model: nn.Module) -> list[Block]:
        """Return the blocks and branches of a model that may go; what took the place of one is none."""
        if not self.blocks:
            return []
        activations = {site.name for site in planned_sites(model, self.kinds_of_gates)}
        return [
            block for block in find_blocks(model) if block.name not in activations and not_removed(model, [block.name])
        ]

    def check(self, model: nn.Module, names: Sequence[str], *, named: bool) -> None:
        """Refuse a model without blocks where they are asked for."""
        if self.blocks and not self.chosen(model) and not stand_ins(model):
            raise ValueError(
                f"Expected argument `blocks` to be False for {type(model).__name__}, which has neither a block "
                f"nor a branch of an addition that could be taken out, but got True. `collapsible_blocks(model)` lists "
                f"what there is."
            )

    @property
    def prices_by(self) -> Gain:
        """What savings are measured in; a fitted operator has to save something in any case."""
        return self.order.gain or "macs"

    @property
    def is_cheap(self) -> bool:
        """No: chains are measured."""
        return False

    @property
    def needs_whole_parameters(self) -> tuple[str, str] | None:
        """Fitted operators do."""
        if self.trainable:
            return super().needs_whole_parameters
        return "fit operators", "Pass method=Linearize(), or fit a gathered model with `compress`"

    def propose(self, model: nn.Module, evidence: LinearEvidence) -> Proposal:
        """Rank the activations; tell why no chain has an operator, if none has."""
        proposal = super().propose(model, evidence)
        assert isinstance(evidence, ChainEvidence)
        if evidence.chains is not None and not self._fitted(proposal):
            reasons = {name: why for name, why in evidence.chains.reasons.items() if name in evidence.entropies}
            if reasons:
                tell(f"No operator can take the place of a chain: {reasons}")
        if evidence.blocks is not None and evidence.blocks.reasons and not _blocks_in(proposal):
            tell(f"No block can be taken out: {evidence.blocks.reasons}")
        if evidence.blocks is not None:
            proposal.blocks = [asdict(each) for each in self._listed(evidence.blocks, proposal)]
        return proposal

    @staticmethod
    def _listed(blocks: BlockProbe, proposal: Proposal) -> Iterator[BlockCandidate]:
        """Yield what is known of each block."""
        for block in blocks.blocks:
            name, kind = block.name, type(block.module).__name__
            ways, operation = tuple(blocks.ways.get(name, ())), proposal.operations.get(name)
            chosen = reason = None
            if operation is not None:
                made = from_plain(operation)
                chosen = made.fits[name]["kind"] if isinstance(made, FittedBlocks) else block.leaves
                reason = blocks.notes.get(name)
            else:
                reason = blocks.reasons.get(name, "validation does not call it")
            yield BlockCandidate(name, kind, block.inside, ways, chosen, reason)

    def listed(self, model: nn.Module, entropies: Mapping[str, float] | None, proposal: Proposal) -> Report:
        """List the activations, and the blocks where they may go, for a dry run."""
        found = self.list_candidates(model, entropies)
        if not self.blocks:
            return found
        return FitReport(found.candidates, [BlockCandidate.from_plain(plain) for plain in proposal.blocks])

    def options(self, model: nn.Module, evidence: LinearEvidence) -> dict[str, Option]:
        """Return how each activation may be removed."""
        assert isinstance(evidence, ChainEvidence)
        fitted = self._chains(evidence) if evidence.chains is not None else {}
        whole = self._blocks(model, evidence) if evidence.blocks is not None else {}
        if self.order.mergeable_only:  # what merges is in a chain
            return fitted | whole
        others = [name for name in evidence.entropies if name not in fitted]
        return fitted | self.stand_ins(model, evidence, others) | whole

    def _blocks(self, model: nn.Module, evidence: ChainEvidence) -> dict[str, Option]:
        """Return how each block may go; all that may take its place is noted."""
        blocks, gains = evidence.blocks, evidence.gains
        assert blocks is not None
        assert gains is not None
        options: dict[str, Option] = {}
        for found in blocks.choices():
            place = found.place
            if place.name in evidence.needed:
                blocks.reasons[place.name] = evidence.needed[place.name]
                continue
            known = None if self.order.criterion == "linearity" else self._cost_over(place.sites, evidence)
            ways: list[tuple[float, Option]] = []
            priced = blocks.priced(found, gains.prices)
            for choice in priced:
                unexplained = found.unexplained(choice.fit)
                operation = self._in_place_of(model, place, choice.fit, unexplained)
                if operation is None or choice.saving <= 0:
                    continue
                way = BlockWay(choice.fit.kind, unexplained, choice.saving, choice.price_before, gains.prices.objective)
                blocks.ways.setdefault(place.name, []).append(way)
                cost = unexplained if self.order.criterion == "linearity" else known
                if cost is not None:
                    ways.append((unexplained, Option(operation, cost, choice.worth)))
            best = self._best_for_block(ways)
            if best is not None:
                options[place.name] = best
            elif place.name in blocks.ways:
                blocks.reasons[place.name] = "no activation was measured in it, which tells what it is worth"
            elif priced[0].price_before <= 0:
                blocks.reasons[place.name] = "it costs nothing"
            else:
                blocks.reasons[place.name] = "nothing that may take its place is cheaper"
        return options

    def _best_for_block(self, ways: Sequence[tuple[float, Option]]) -> Option | None:
        """Choose among what may take the place of a block and saves something; None if nothing does.

        As for chains; but nothing is compared with what saves nothing: a convolution as wide as the body of a
        bottleneck is narrow costs more than that.

        Args:
            ways: What may, each with the share of the variance that it does not explain.
        """
        if self._weighs_savings:
            return min((option for _, option in ways), key=lambda option: option.rank, default=None)
        least = min((unexplained for unexplained, _ in ways), default=0.0)
        good = [option for unexplained, option in ways if unexplained <= least + SLACK]
        return max(good, key=lambda option: option.gain, default=None)

    @staticmethod
    def _in_place_of(model: nn.Module, place: FittableBlock, fit: Fit, unexplained: float) -> Operation | None:
        """Return what lets an operator, or nothing, take the place of a block; None if its values are too large."""
        if fit.kind == place.leaves:
            return TakenOut([place.name], place.leaves, place.returns)
        made = BlockFit.of(fit.operator, fit.kind, unexplained, place.like(model), place.returns)
        return None if made is None else FittedBlocks([place.name], {place.name: made.to_plain()})

    def _cost_over(self, sites: Sequence[str], evidence: ChainEvidence) -> float | None:
        """Return the sum of what activations cost, whether they may be removed alone or not; None if one is unknown."""
        of_all = replace(evidence, entropies=dict(evidence.of_all))
        costs = [cost for site in sites if (cost := self.cost(site, of_all)) is not None]
        return sum(costs) if costs and len(costs) == len(sites) else None

    def _chains(self, evidence: ChainEvidence) -> dict[str, Option]:
        """Return the best way to put one operator in the place of a chain that begins with each activation.

        What goes with a second activation in a row does so where the first alone saves nothing, or, by linearity, where
        that costs less for what it saves.
        """
        chains, gains, entropies = evidence.chains, evidence.gains, evidence.entropies
        assert chains is not None
        assert gains is not None
        options: dict[str, Option] = {}
        for chain, fitted, shape in chains.fitted():  # the shorter ones first
            name = chain.sites[0]
            if not {*chain.sites} <= entropies.keys() or shape is None:
                continue
            ways = []
            for choice in chains.price(chain, fitted, shape, gains.prices):
                moved = chains.chain_fit(chain, choice.fit)
                cost = self._cost_of(chain, choice.fit, evidence)
                if moved is not None and cost is not None and choice.saving > 0:
                    operation = FittedOperators([name], {name: moved.to_plain()})
                    ways.append((choice, Option(operation, cost, choice.saving)))
            best = self._best(ways)
            if best is None:
                reason = "no operator that can move into the first of its chain saves anything"
                chains.reasons.setdefault(name, reason)
            elif name not in options or (self._weighs_savings and best.rank < options[name].rank):
                options[name] = best
        for name in options:
            chains.reasons.pop(name, None)
        return options

    @property
    def _weighs_savings(self) -> bool:
        """Whether options for one activation are compared by their cost for what they save."""
        return self.order.criterion == "linearity" and self.order.gain is not None

    def _cost_of(self, chain: FittableChain, fit: Fit, evidence: ChainEvidence) -> float | None:
        """Return how much an operator in the place of a chain changes; None if that is not known."""
        if self.order.criterion == "linearity":
            return 1.0 - fit.explained
        costs = [cost for site in chain.sites if (cost := self.cost(site, evidence)) is not None]
        return sum(costs) if len(costs) == len(chain.sites) else None

    def _best(self, ways: Sequence[tuple[PricedFit, Option]]) -> Option | None:
        """Choose among the operators for one chain that save something; None if none stands for it.

        Neither entropy nor likelihood tells how well an operator represents a chain, and without a gain nothing weighs
        that against what it saves: the cheapest is taken of those that represent it nearly as well as the best.
        """
        if self._weighs_savings:
            return min((option for _, option in ways), key=lambda option: option.rank, default=None)
        good = [option for choice, option in ways if choice.represents_chain()]
        return max(good, key=lambda option: option.gain, default=None)

    def _does(self, device: str) -> str:
        """Say what a removal that is of use does."""
        if self.order.gain is not None:
            return super()._does(device)
        return "let one fitted operator that saves multiply-accumulates take the place of a chain"

    def _useful(self, model: nn.Module, proposal: Proposal) -> tuple[set[str], set[str]]:
        """Tell which removals are of use."""
        useful = {part for each in self._fitted(proposal) for part in each.parts}
        if self.order.gain is not None:
            useful |= super()._useful(model, proposal)[0]
        return useful, set()

    def outlook(self, model: nn.Module, proposal: Proposal, names: Sequence[str], device: str) -> Outlook:
        """Say how many removals would save something, and how many blocks there are."""
        words, is_promising = super().outlook(model, proposal, names, device)
        blocks = _blocks_in(proposal)
        if blocks:
            words += f" Besides, {len(blocks)} of its blocks and branches may go whole."
        return Outlook(words, is_promising or any(proposal.ranks[name] < math.inf for name in blocks))

    @staticmethod
    def _fitted(proposal: Proposal) -> list[FittedOperators]:
        operations = (plain for plain in proposal.operations.values() if plain["kind"] == FittedOperators.kind)
        return [made for plain in operations if isinstance(made := from_plain(plain), FittedOperators)]


def _blocks_in(proposal: Proposal) -> list[str]:
    kinds = TakenOut.kind, FittedBlocks.kind
    return [name for name, plain in proposal.operations.items() if plain["kind"] in kinds]


class ChainWorker(LinearWorker):
    """Measures what the chains around activations compute, and whole blocks, too.

    Args:
        method: The method.
        measuring: What is measured on.
    """

    method: FitChains

    def __init__(self, method: FitChains, measuring: Measuring) -> None:
        super().__init__(method, measuring)
        self.chains: ChainProbe | None = None
        self.blocks: BlockProbe | None = None
        self._sites: list[str] = []
        self._looked_at: Remembered[nn.Module] = Remembered()
        self._gone: list[str] = []
        self._chosen: list[Block] = []
        self._without = WithoutBlocks(self.pause)
        self._has_told_left_out = False  # that samples were left out of what was measured last

    def start(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        """Count from zero."""
        super().start(model, sites)
        self._sites = [site.name for site in sites]

    def follow(self, model: nn.Module, names: Sequence[str], batches: int) -> None:
        """Sum up what the chains around activations, and blocks, read and compute."""
        self.chains = ChainProbe(model, names, batches, ACTIVATIONS_IN_A_CHAIN)
        self.chains.attach()
        if self.method.blocks:
            self.blocks = BlockProbe(model, self._blocks_of(model), self._sites, batches)
            self.blocks.attach()
            self._without.watch(
                model,
                [block for block in self._chosen if not any(fnmatchcase(block.name, glob) for glob in self.excluded)],
            )
        super().follow(model, names, batches)

    def _blocks_of(self, model: nn.Module) -> list[Block]:
        """Look for blocks, once for a structure: it takes time."""
        gone = list(stand_ins(model))
        if not self._looked_at.is_(model) or gone != self._gone:
            self._chosen = self.method.chosen(model)
            self._looked_at, self._gone = Remembered(model), gone
        return self._chosen

    def pause(self, paused: bool) -> None:
        """Leave what runs now out of the counts, or count again."""
        super().pause(paused)
        for probe in (self.chains, self.blocks):
            if probe is not None:
                probe.paused = paused

    def take(self, probe: EntropyProbe) -> None:
        """Take note of what was counted."""
        super().take(probe)
        self._has_told_left_out = probe.has_left_out

    def reduce(self) -> None:
        """Sum up over all processes what chains and blocks have computed."""
        for probe in (self.chains, self.blocks):
            if probe is not None:
                probe.reduce()
        self._without.agree()

    def propose(self, model: nn.Module, names: Sequence[str]) -> Proposal:
        """Have the method propose by what was measured last."""
        entropies = self._among(names)
        needed = self._needed(model, names)
        self._without.tell(needed)
        if self.blocks is not None:
            self.blocks.leave_out_all_but(names)
        evidence = ChainEvidence(
            entropies, **self.evidence(), chains=self.chains, blocks=self.blocks, of_all=self.entropies, needed=needed
        )
        proposal = self.method.propose(model, evidence)
        if not self._has_told_left_out:
            left_out = max((p.left_out for p in (self.chains, self.blocks) if p is not None), default=(0, 0))
            tell_left_out(*left_out, "what fitted operators are fitted to")
        return proposal

    def _needed(self, model: nn.Module, names: Sequence[str]) -> dict[str, str]:
        """Say why the model can't do without some blocks."""
        if self.blocks is None:
            return {}
        known = {name: reason for name, reason in self._without.reasons.items() if name in names}
        others = {*self._sites, *(block.name for block in self._chosen)}
        return known | no_longer_blocks(model, [name for name in names if name not in others])

    def detach(self) -> None:
        """Take all hooks away; what was counted stays."""
        super().detach()
        self._without.detach()
        for probe in (self.chains, self.blocks):
            if probe is not None:
                probe.detach()

    def forget(self) -> None:
        """Forget chains and blocks."""
        for probe in (self.chains, self.blocks):
            if probe is not None:
                probe.detach()
        self.chains = self.blocks = None
        super().forget()
