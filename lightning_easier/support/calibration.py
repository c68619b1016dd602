"""Read calibration data: what a model is called with, batch by batch, and what has to be left out of it."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_easier.support.batches import BatchReader
from lightning_easier.support.calls import Arguments, copies, mapped
from lightning_easier.support.inference import describe, device_of, evaluation_mode, tensors_in
from lightning_easier.support.progress import over


@dataclass(frozen=True)
class Calibration:
    """Calibration data.

    Attributes:
        batches: What the forward is called with, for each batch.
        notes: What was left out.
        first: The first batch as it was given, labels and all.
    """

    batches: list[Arguments]
    notes: list[str]
    first: Any


def _all(first: Arguments) -> float:
    return math.inf


def read_calibration(
    reader: BatchReader, data: Iterable[Any], model: nn.Module, tried: Callable[[Arguments], float] = _all
) -> Calibration:
    """Read batches, and leave out those without samples, and samples whose values are not all finite.

    One sample that is not finite would make every sum over the data so.

    Args:
        reader: Tells what the forward is called with.
        data: Batches.
        model: The model; it is called on the batches. Batches go where the reader's example is, or to the model.
        tried: Of the first batch, returns on how many samples that are kept the model is called; all by default. Of
            others only the inputs are looked at, but of the first batch of other shapes or dtypes.

    Raises:
        TypeError: If the data is no iterable of batches, or a batch holds no tensors.
        ValueError: If nothing is left, a batch holds no data, or the model does not accept it.

    Warns:
        UserWarning: If something is left out.
    """
    argument = reader.argument
    check_batches(argument, data)
    devices = None if reader.example is None else [x.device for x in reader.example]
    first = None
    read, empty, samples, strange = [], 0, 0, 0
    most: float | None = None
    kinds = set()
    for number, batch in enumerate(over(data, "Reading")):
        first = batch if number == 0 else first
        given = reader(batch)
        if any(_is_empty(x) for x in given):
            empty += 1
            continue
        there = devices or [device_of(model)] * len(given)
        arguments = Arguments((x.to(device) for x, device in zip(given, there, strict=True)), given.names)
        most = tried(arguments) if most is None else most
        kind = tuple((value.dtype, value.shape[1:]) for value in arguments)
        outputs = _outputs(reader, model, arguments) if samples - strange < most or kind not in kinds else []
        kinds.add(kind)
        kept = _finite_samples(arguments, outputs)
        samples += len(kept)
        strange += int((~kept).sum())
        if bool(kept.all()):
            read.append(arguments)
        elif bool(kept.any()):
            read.append(mapped(partial(_rows, kept=kept), arguments))
    notes = _notes_of_empty(argument, empty)
    if strange:
        notes.append(
            f"{strange} of the {samples} samples in `{argument}` were left out: their values, or what the model makes "
            f"of them, are not all finite"
        )
    _check_left(argument, data, len(read), notes)
    for note in notes:
        rank_zero_warn(note)
    return Calibration(read, [*notes, *reader.notes], first)


def _rows(value: Tensor, kept: Tensor) -> Tensor:
    return value[kept.to(value.device)] if _has_samples(value, len(kept)) else value


def tell_left_out(left_out: int, samples: int, what: str) -> None:
    """Warn of samples that were left out of what was measured.

    Args:
        left_out: How many; of none nothing is said.
        samples: How many there were.
        what: What they are samples of.
    """
    if left_out:
        tell(
            f"{left_out} of the {samples} samples in {what} were left out where the model's values for them are not "
            f"all finite. Look for NaN in the data."
        )


def tell(note: str) -> None:
    """Warn, on one process."""
    rank_zero_warn(note)


def usable_batches(reader: BatchReader, batches: Iterable[Any], most: int | None = None) -> Iterator[Arguments]:
    """Yield what the forward is called with for each batch, those without samples left out.

    Args:
        reader: Tells what that is.
        batches: The batches.
        most: How many to yield at most; all by default.

    Raises:
        TypeError: If a batch holds no tensors.
        ValueError: If nothing is left, or a batch holds no data.

    Warns:
        UserWarning: If something is left out.
    """
    yielded = empty = 0
    for batch in batches:
        arguments = reader(batch)
        if any(map(_is_empty, arguments)):
            empty += 1
            continue
        yielded += 1
        yield arguments
        if yielded == most:
            break
    _check_left(reader.argument, batches, yielded, notes := _notes_of_empty(reader.argument, empty))
    for note in notes:
        rank_zero_warn(note)


def check_batches(argument: str, data: Any) -> None:
    """Refuse what holds no batches, before anything is read of it.

    Raises:
        TypeError: If the data is no iterable, or one of something else: a tensor, a mapping, a string.
    """
    if isinstance(data, Tensor):
        why = ", whose samples would be taken for batches. Pass `[tensor]`."
    elif isinstance(data, Mapping):
        why = ", whose keys would be taken for batches. Pass `[batch]`."
    elif isinstance(data, str | bytes) or not isinstance(data, Iterable):
        why = ". Pass a list of tensors, or a DataLoader."
    else:
        return
    raise TypeError(f"Expected argument `{argument}` to be an iterable of batches, but got {describe(data)}{why}")


def _is_empty(value: Tensor) -> bool:
    return value.ndim > 0 and len(value) == 0


def _notes_of_empty(argument: str, empty: int) -> list[str]:
    return [f"{empty} of the batches in `{argument}` hold no sample and were left out"] if empty else []


def _check_left(argument: str, data: Iterable[Any], left: int, notes: Sequence[str]) -> None:
    if not left:
        nothing = "it yielded none"
        if isinstance(data, Iterator):
            nothing += ": an iterator yields its batches only once. Pass a list of them"
        raise ValueError(
            f"Expected argument `{argument}` to yield at least one batch that can be used, but "
            f"{'; '.join(notes) or nothing}"
        )


def _outputs(reader: BatchReader, model: nn.Module, arguments: Sequence[Tensor]) -> list[Tensor]:
    with evaluation_mode(model):
        return list(tensors_in(reader.call(model, copies(arguments))))


def _finite_samples(arguments: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Tell of each sample whether all its values, and those that the model makes of it, are finite; on the CPU."""
    first = arguments[0]
    samples = len(first) if first.ndim else 1
    kept = torch.ones(samples, dtype=torch.bool)
    for value in (*arguments, *outputs):
        if value.is_floating_point() and _has_samples(value, samples):
            kept &= value.isfinite().reshape(samples, -1).all(1).cpu()
    return kept


def _has_samples(value: Tensor, samples: int) -> bool:
    return value.ndim > 0 and len(value) == samples


def inputs_left_out(model: nn.Module, batch: Any, count: int) -> tuple[str | None, str | None]:
    """Say which inputs a batch may hold that the forward would take and is not given.

    Labels come last in a batch. Classes there (whole numbers, one a sample) are taken for labels, which they nearly
    always are; anything else in the place of an input may be one.

    Args:
        model: The model.
        batch: A batch.
        count: How many of its elements are taken for inputs.

    Returns:
        What is doubtful and to be warned of, and what was decided and is to be noted; None where there is nothing.
    """
    elements = batch if isinstance(batch, list | tuple) else [batch]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in positional
    ]
    given = f"The forward of {type(model).__name__} is called with {', '.join(f'`{name}`' for name in names[:count])}"
    places = [place for place in range(count, min(len(elements), len(names))) if isinstance(elements[place], Tensor)]
    untold = [names[place] for place in places if place < len(elements) - 1 or not _may_be_classes(elements[place])]
    if untold:
        more = ", ".join(f"`{name}`" for name in untold)
        doubt = (
            f"{given} alone: the batches hold {len(elements)} elements, and whether the others are {more}, which it "
            f"would take too, or labels, can't be told. If they are inputs, {_remedy(names, count + len(untold))}"
        )
        return doubt, None
    if places:
        decision = (
            f"{given}: the last element of the batches, whole numbers, was taken for labels. If it is "
            f"`{names[places[-1]]}`, {_remedy(names, len(elements))}"
        )
        return None, decision
    return None, None


def _remedy(names: Sequence[str], count: int) -> str:
    return f"pass `example_inputs=({', '.join(names[:count])})`, tensors of one batch"


def _may_be_classes(value: Tensor) -> bool:
    return value.ndim <= 1 and not value.is_floating_point() and value.dtype != torch.bool
