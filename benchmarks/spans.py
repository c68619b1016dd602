"""Is one operator in the place of several blocks better than what ``compress`` finds there for as many operations?

A span is a run of neighbouring blocks of equal shapes in a trained CIFAR ResNet. As *one operator* all its blocks but
the last become the identity, and one convolution takes the place of the last one's two, fitted to what all of them
compute: its skip stays. Beside it, for no more multiply-accumulates in these blocks:

- *combination*: of all ways to put what ``compress`` may put into each block, that of least drift among the few whose
  changes, added up, are least.
- *search*: what ``compress`` takes one after the other if it may touch these blocks only; what it takes last may save
  more than is asked for.

Each is fitted front to back (*search*: in its own order) to correct the errors of those before it. Drift is the share
of the variance of the outputs that changes on images that are fitted to. At last the operators that stay are refitted,
and batch norms matched, as ``compress`` does at its end. Nothing is timed, and nothing trained. ``cifar.py`` says what
the images and the weights are:

    python benchmarks/spans.py --data.root <folder> --weights <file> --depth 20
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import groupby, product
from typing import NamedTuple

from allocator import keep_freed_memory
from cifar import Images, accuracy, add_arguments, drawn, load
from torch import Tensor, nn
from tqdm import tqdm

from lightning_easier import isolate_activations
from lightning_easier.collapsing.fit.correcting import gather_alone
from lightning_easier.collapsing.fit.drift import change_of, drift_of, outputs_of
from lightning_easier.collapsing.fit.fit_prices import ChainPrices
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.collapsing.fit.fittable_blocks import fittable_blocks
from lightning_easier.collapsing.fit.fitting import fit_to
from lightning_easier.collapsing.fit.norms import match_norms
from lightning_easier.collapsing.fit.placing import try_out
from lightning_easier.collapsing.fit.refitting import refit_kept
from lightning_easier.pruning.search import FittedCandidate, Search
from lightning_easier.pruning.stages import STAGES, Clock
from lightning_easier.report import Table
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.support.progress import Stages
from lightning_easier.support.timing import LatencyTable


class Found(NamedTuple):
    """What has become of a network.

    Attributes:
        what: The steps, in words.
        saved: Multiply-accumulates of one image.
        drift: Of the outputs.
        top1: In per cent.
        refitted_drift: After the refits.
        refitted_top1: After the refits.
    """

    what: str
    saved: float
    drift: float
    top1: float
    refitted_drift: float
    refitted_top1: float


class Ladder:
    """What may be put into the blocks of a network, alone and together.

    Args:
        model: The trained network.
        calibration: Images to fit to, in batches.
        test: Images to test on.
        narrow: Whether chains may lose inner channels.
        longest: Blocks in a span at most.
        every: Of all spans, every so many-th is looked at.

    Attributes:
        spans: Names of the blocks of each span, those of a stage beside each other, the shorter ones first.
    """

    def __init__(
        self, model: nn.Module, calibration: Sequence[Tensor], test: Images, narrow: bool, longest: int, every: int = 1
    ) -> None:
        self._source = deepcopy(model).eval()
        self._sites = list(isolate_activations(self._source))
        self._batches = [(images,) for images in calibration]
        self._arguments = (calibration[0][:1],)
        self._prices = ChainPrices("macs", LatencyTable())
        self._test = test
        self._search = Search(self._source, self._batches, self._arguments, self._prices, math.inf, narrow)
        blocks, _ = fittable_blocks(self._search.model, find_blocks(self._source), self._sites, self._arguments)
        self.spans = [*_spans([block.name for block in blocks], longest)][::every]
        self._parts = {block.name: block.parts for block in blocks if any(block.name in span for span in self.spans)}
        sites = [site for site in self._sites if any(site in parts for parts in self._parts.values())]
        with Stages(STAGES) as progress:
            blocks = [block for block in blocks if block.name in self._parts]
            self._candidates = self._search.candidates(sites, blocks, Clock(None), progress)

    def as_one_operator(self, span: Sequence[str]) -> list[FittedCandidate]:
        """Return the steps that leave one convolution, and its skip, of some blocks in a row."""
        *gone, last = span
        return [*(self._identity(name) for name in gone), self._convolution(last)]

    def combinations(self, span: Sequence[str], saving: float, count: int) -> list[list[FittedCandidate]]:
        """Return the ways to save as much with one step or none in each block, the least sums of changes first.

        One in which a block could do with less is not among them.
        """
        choices = [(None, *(each for each in self._candidates if self._is_in(each, [name]))) for name in span]
        found = []
        for combination in product(*choices):
            steps = [step for step in combination if step is not None]
            left = sum(step.choice.saving for step in steps) - saving
            fewer = (
                step.choice.saving - (0.0 if less is None else less.choice.saving)
                for step, others in zip(combination, choices, strict=True)
                if step is not None
                for less in others
                if less is None or less.choice.saving < step.choice.saving
            )
            if left >= 0 and all(less > left for less in fewer):
                found.append(steps)
        return sorted(found, key=lambda steps: float(sum(step.change for step in steps).square().sum()))[:count]

    def searched(self, span: Sequence[str], saving: float) -> Found:
        """Return what a search makes of some blocks until it saves as much."""
        left = [each for each in self._candidates if self._is_in(each, span)]
        while left and self._search.saved < saving:
            step = self._search.next_of(left)
            left = [each for each in left if each is not step]
            self._search.take(step)
        return self._measured()

    def together(self, steps: Sequence[FittedCandidate]) -> Found | None:
        """Return what becomes of a network with some steps; None if one of them can't follow those before it."""
        if self._are_taken(steps):
            return self._measured()
        self._undo()
        return None

    def drift(self, steps: Sequence[FittedCandidate]) -> float:
        """Return the drift of the outputs with some steps, without refits."""
        drift = self._search.drift_seen if self._are_taken(steps) else math.inf
        self._undo()
        return drift

    def _are_taken(self, steps: Sequence[FittedCandidate]) -> bool:
        return all(self._search.take(step) is not None for step in steps)

    def _measured(self) -> Found:
        search = self._search
        what = ", ".join(f"{step.place.operators[0].removesuffix('.conv1')}: {step.fit.kind}" for step in search.steps)
        saved, drift, top1 = search.saved, search.drift_seen, accuracy(search.model, self._test)
        done = [refit_kept(search.model, search.dense, self._batches)]
        done.append(match_norms(search.model, self._source, self._batches, search.kept_channels))
        found = Found(what, saved, drift, top1, search.drift, accuracy(search.model, self._test))
        for each in reversed(done):
            if each is not None:
                each.undo()
        self._undo()
        return found

    def _undo(self) -> None:
        while self._search.steps:
            self._search.undo("it was measured")

    def _is_in(self, candidate: FittedCandidate, names: Sequence[str]) -> bool:
        return any(candidate.choice.place.parts <= self._parts[name] for name in names)

    def _identity(self, name: str) -> FittedCandidate:
        of_block = (each for each in self._candidates if each.choice.place.operators == (name,))
        return next(each for each in of_block if each.choice.fit.kind == "identity")

    def _convolution(self, name: str) -> FittedCandidate:
        """Return the convolution for a chain, also where a search would not try it alone."""
        sites = [site for site in self._sites if site == f"{name}.relu1"]
        place = FittableChains(self._search.model, sites).around(sites)
        gathered = gather_alone(self._search.model, None, place, self._batches, self._arguments)
        choices = fit_to(self._search.model, place, gathered, self._prices)
        choice = next(each for each in choices if each.fit.kind == "convolution")
        dense = outputs_of(self._search.model, self._batches)
        outputs = try_out(self._search.model, choice, lambda: outputs_of(self._search.model, self._batches))
        return FittedCandidate(choice, drift_of(outputs, dense), change_of(outputs, dense))


def _spans(blocks: Sequence[str], longest: int) -> Iterator[tuple[str, ...]]:
    """Yield the runs of two to so many blocks of one stage."""
    for _, stage in groupby(blocks, key=lambda name: name.rpartition(".")[0]):
        names = tuple(stage)
        for length in range(2, longest + 1):
            for first in range(len(names) - length + 1):
                yield names[first : first + length]


def rows_of(ladder: Ladder, span: Sequence[str], tried: int) -> Iterator[tuple[str, Found]]:
    """Yield each way to save as much in some blocks as one operator in their place does, and what becomes of it."""
    steps = ladder.as_one_operator(span)
    saving = sum(step.choice.saving for step in steps)
    one = ladder.together(steps)
    if one is None:
        return
    yield "one operator", one
    combinations = ladder.combinations(span, saving, tried)
    if combinations:
        best = ladder.together(min(combinations, key=ladder.drift))
        if best is not None:
            yield "combination", best
    yield "search", ladder.searched(span, saving)


def main() -> None:
    """Measure and print one table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--images", type=int, default=1000, help="training images to fit to")
    parser.add_argument("--tested", type=int, default=2000, help="test images")
    parser.add_argument("--longest", type=int, default=3, help="blocks in a span at most")
    parser.add_argument("--every", type=int, default=1, help="of all spans, every so many-th")
    parser.add_argument("--tried", type=int, default=4, help="combinations of which the drift is measured")
    parser.add_argument("--no-width", dest="width", action="store_false", help="chains may not lose inner channels")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    options = parser.parse_args()
    test = Images(f"{options.root}/test")
    places = drawn(test, options.tested, options.seed)
    test.pixels, test.labels = test.pixels[places], test.labels[places]
    calibration = Images(f"{options.root}/train").calibration(options.images, options.seed)
    model = load(options.weights, options.depth)
    ladder = Ladder(model, calibration, test, options.width, options.longest, options.every)
    rows = []
    for span in tqdm(ladder.spans, desc="Spans", leave=False):
        for way, found in rows_of(ladder, span, options.tried):
            rows.append(
                (
                    f"{span[0]}–{span[-1].rpartition('.')[-1]}", way, found.what, f"{found.saved / 1e6:.2f}",
                    f"{found.drift:.3f}", f"{found.top1:.1f}", f"{found.refitted_drift:.3f}",
                    f"{found.refitted_top1:.1f}",
                )
            )  # fmt: skip
            print("|", " | ".join(rows[-1]), "|", flush=True)
    title = (
        f"ResNet-{options.depth}, {options.images:,} training images to fit to, top-1 [%] on {len(test):,} test images "
        f"({accuracy(model, test):.1f} dense), no tuning"
    )
    columns = ("blocks", "as", "steps", "MMACs saved", "drift", "top-1", "drift, refitted", "top-1, refitted")
    print(Table(title, columns, rows).to_markdown())


if __name__ == "__main__":
    main()
