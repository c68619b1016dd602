"""How the questions of a part are answered: each case in a process of its own, and each peak of memory too."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from tempfile import TemporaryDirectory

import torch
from allocator import give_back_freed_memory, keep_freed_memory
from children import ChildError, forgets_peak, in_child, peak_memory
from questions import (
    EFFORTS,
    FEWEST,
    YARDSTICK,
    Bar,
    Case,
    Measurement,
    Quartiles,
    Variant,
    compared,
    in_turn,
    yardstick,
)

from lightning_easier.support.timing import Latency

PARTS = {
    "measuring": "measuring",
    "scale": "growing",
    "rounds": "training",
    "collapsing": "collapsing",
    "fitting": "fitting",
    "runtimes": "runtimes",
    "large": "large",
}
"""Name of a part -> the module that has its ``questions``."""


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured.

    Attributes:
        part: Name of the part.
        device: ``"cpu"`` or ``"cuda"``.
        threads: How many torch may use.
        effort: Name of the effort.
        seconds: How long a case may take before it is stopped; None for no limit.
        folder: Where a case may leave what later ones would make again; None for nowhere.
    """

    part: str
    device: str
    threads: int
    effort: str
    seconds: float | None
    folder: str | None = None

    def cases(self) -> Iterator[tuple[str, Case]]:
        """Yield the cases of the part, each with the name of its question."""
        effort = replace(EFFORTS[self.effort], device=self.device, folder=self.folder)
        for question in import_module(PARTS[self.part]).questions(effort):
            for case in question.cases:
                yield question.name, case

    def find(self, question: str, case: str) -> Case:
        """Return a case by its name."""
        return next(each for name, each in self.cases() if (name, each.name) == (question, case))

    def prepare(self) -> torch.device:
        """Have this process compute as is asked for."""
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        return torch.device(self.device)


def answers(setting: Setting) -> Iterator[list[Measurement]]:
    """Yield what was measured of each case when it is done; what fails is told, and the next one follows."""
    with TemporaryDirectory() as folder:
        yield from _answers(replace(setting, folder=folder))


def _answers(setting: Setting) -> Iterator[list[Measurement]]:
    for question, case in setting.cases():
        if missing := [name for name in case.needs if importlib.util.find_spec(name) is None]:
            yield [_nothing(setting, question, case.name, f"{', '.join(missing)} is not installed")]
            continue
        arguments = setting, question, case.name
        try:
            measured = in_child(times, *arguments, seconds=setting.seconds)
            if len(measured) > 1 and case.has_memory:
                peaks = {each.variant: in_child(memory, *arguments, each.variant, seconds=setting.seconds)
                         for each in measured}  # fmt: skip
                measured = [_with_memory(each, peaks) for each in measured]
        except ChildError as error:
            measured = [_nothing(setting, question, case.name, str(error).splitlines()[0])]
        yield measured


def times(setting: Setting, question: str, name: str) -> list[Measurement]:
    """Time the variants of a case in turn, here; with one alone, its memory is measured at its first sample."""
    device, effort = setting.prepare(), EFFORTS[setting.effort]
    case = setting.find(question, name)
    give_back_freed_memory()  # from before anything is made: what was freed until then stays a hole
    variants = dict(case.make(device))
    own = list(variants)
    peak = None
    if len(own) == 1:
        # The first, which is the warm-up as well: later ones get memory that the first has given back
        peak = peak_memory(variants[own[0]].sample, device)
        variants = {YARDSTICK: yardstick(device), **variants}
    keep_freed_memory()
    samples = min(FEWEST, effort.samples) if case.is_slow else effort.samples
    latencies = in_turn(variants, samples, effort.seconds, warm_up=peak is None and not case.is_slow)
    against = next(iter(variants))
    return [_measurement(setting, question, case, variants, latencies, each, against, peak) for each in own]


def memory(setting: Setting, question: str, name: str, variant: str) -> int:
    """Return the peak of memory of one variant, which this process has to have to itself, after a warm-up."""
    device = setting.prepare()
    give_back_freed_memory()
    case = setting.find(question, name)
    sample = case.make(device)[variant].sample
    if not case.is_slow and forgets_peak(device):  # the first needs memory for what is imported and compiled then
        sample()
    return peak_memory(sample, device)


def _measurement(
    setting: Setting,
    question: str,
    case: Case,
    variants: Mapping[str, Variant],
    latencies: Mapping[str, Latency],
    name: str,
    against: str,
    peak: int | None,
) -> Measurement:
    work = 1.0 if against == YARDSTICK else variants[name].work / variants[against].work
    ratio, bounds = compared(latencies[name], latencies[against], work)
    samples = latencies[name].samples
    bar = Bar() if setting.effort == "dry" else case.bars.get(name, Bar())  # no bar is meant for such sizes
    return replace(
        _nothing(setting, question, case.name, ""), variant=name, against=against, samples=len(samples),
        seconds=Quartiles.of(samples), ratio=ratio, bounds=bounds, memory=peak, bar=bar,
    )  # fmt: skip


def _with_memory(each: Measurement, peaks: Mapping[str, int]) -> Measurement:
    peak, reference = peaks[each.variant], peaks[each.against]
    return replace(each, memory=peak, memory_ratio=peak / reference if reference > 0 else None)


def _nothing(setting: Setting, question: str, case: str, failure: str) -> Measurement:
    return Measurement(
        setting.part, question, case, "", "", setting.device, setting.threads, setting.effort, failure=failure
    )  # fmt: skip
