"""From what a loader yields to what a forward is called with, by one rule for all that reads batches.

A batch is a tensor, a sequence whose first elements are the forward's positional arguments, or a dictionary or
dataclass, of which the forward is given by name what it takes; so is a named tuple that names all it needs. Labels are
left out, where the forward can do without: a loss tells nothing of the outputs that are compared, and a model that is
shipped gets none. ``inputs_of`` overrides all of this.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from lightning_easier.support.calls import Arguments, named_arguments, names_of
from lightning_easier.support.inference import arguments_wanted, describe, forward

InputsOf = Callable[[Any], Any]
"""Returns what the forward is called with, of a batch: a tensor, a tuple, or a dictionary of arguments by name."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Beside all that has `label` in its name; those of question answering among them
_LABELS = ("target", "targets", "start_positions", "end_positions")


class BatchReader:
    """Returns what a forward is called with, of any batch; of all batches the same arguments.

    Args:
        model: The model.
        argument: Name of the argument that holds the batches, for errors.
        inputs_of: Returns the inputs in a batch; none of them is left out.
        example: What the model is called with elsewhere. By default the first batch tells.

    Attributes:
        example: The same; what was read of the first batch by default.
        notes: What was decided about the first batch of those that have names.

    Raises:
        TypeError: If ``inputs_of`` can't be called.
    """

    def __init__(
        self,
        model: nn.Module,
        argument: str,
        inputs_of: InputsOf | None = None,
        example: Sequence[Tensor] | None = None,
    ) -> None:
        if inputs_of is not None and not callable(inputs_of):
            raise TypeError(
                f"Expected argument `inputs_of` to be a function of a batch, which returns the inputs in it, but got "
                f"{describe(inputs_of)}"
            )
        self.argument = argument
        self.example = example
        self.notes: list[str] = []
        self._labels: list[str] = []
        self._forward = _Forward(model)
        self._inputs_of = inputs_of

    def __call__(self, batch: Any) -> Arguments:
        """Read a batch.

        Raises:
            TypeError: If it does not hold the tensors that the forward takes.
            ValueError: If one of them holds no data (the meta device).
        """
        arguments = self._read(batch)
        for value in arguments:
            if value.is_meta:
                raise ValueError(
                    f"Expected argument `{self.argument}` to hold data, but got {describe(value)} on the meta device. "
                    f"Pass tensors that hold values, on the CPU or the device of the model."
                )
        if self.example is None:
            self.example = arguments
        return arguments

    def call(self, model: nn.Module, arguments: Sequence[Tensor]) -> Any:
        """Call a model with what was read.

        Raises:
            ValueError: If its forward does not accept that.
        """
        try:
            return forward(model, arguments, self.argument)
        except ValueError as error:
            if not self._labels:
                raise
            raise ValueError(
                f"{error} It was not given {_listed(self._labels)}; where it needs them, pass "
                f"`inputs_of=lambda batch: batch`, which leaves nothing out."
            ) from error.__cause__

    def _read(self, batch: Any) -> Arguments:
        given, are_inputs = (batch, False) if self._inputs_of is None else (self._inputs_of(batch), True)
        if isinstance(given, list | tuple) and given and not isinstance(given[0], Tensor) and not are_inputs:
            given, are_inputs = given[0], True  # several inputs, and the labels after them
        by_name = _as_mapping(given, self._forward)
        if by_name is not None:
            return self._named(by_name, are_inputs and self._inputs_of is not None)
        return self._in_a_row(given, are_inputs)

    def _in_a_row(self, given: Any, are_inputs: bool) -> Arguments:
        values = given if isinstance(given, list | tuple) else (given,)
        count = self._forward.wanted if self.example is None else len(self.example)
        if are_inputs and self.example is None:
            count = max(count, len(values))
        taken = tuple(values[:count])
        if len(taken) < count or not all(isinstance(value, Tensor) for value in taken):
            wanted = (
                "tensors, or sequences whose first element is the input tensor"
                if count == 1
                else f"sequences whose first {count} elements are the input tensors"
            )
            raise TypeError(
                f"Expected argument `{self.argument}` to hold {wanted}, or dictionaries of them, but got "
                f"{describe(given)}. {_REMEDY}"
            )
        return Arguments(taken, () if self.example is None else names_of(self.example))

    def _named(self, given: Mapping[Any, Any], are_inputs: bool) -> Arguments:
        if self.example is not None:
            names = named_arguments(self._forward.model, self.example)
            if len(names) == 1 and names[0] not in given:
                return self._alone(given)
            self._check(given, names, "which the forward is called with")
            return Arguments((given[name] for name in names), names_of(self.example))
        names = [name for name in self._forward.names_in(given) if given[name] is not None]
        labels = [name for name in names if _is_label(name) and not are_inputs and self._forward.can_do_without(name)]
        names = [name for name in names if name not in labels]
        if not names:
            return self._alone(given)
        self._check(given, [*self._forward.required, *names], "which its forward takes")
        positional = self._forward.positional(names)
        ordered = [*positional, *(name for name in names if name not in positional)]
        self._note(labels, [name for name, value in given.items() if name not in names and isinstance(value, Tensor)])
        return Arguments((given[name] for name in ordered), ordered[len(positional) :])

    def _alone(self, given: Mapping[Any, Any]) -> Arguments:
        """Take the only tensor that is no label for the only input, whatever it is called."""
        tensors = [name for name, value in given.items() if isinstance(value, Tensor) and not _is_label(name)]
        if len(tensors) != 1 or not self._forward.takes_one:
            wanted = self._forward.required or self._forward.names
            raise TypeError(
                f"Expected argument `{self.argument}` to hold dictionaries with what the forward of "
                f"{self._forward.name} takes, {_listed(wanted)}, but got one of {_listed(given)}. {_REMEDY}"
            )
        return Arguments((given[tensors[0]],))

    def _check(self, given: Mapping[Any, Any], names: Sequence[str], why: str) -> None:
        for name in names:
            if name not in given:
                raise TypeError(
                    f"Expected argument `{self.argument}` to hold `{name}` in each batch, {why} "
                    f"({self._forward.name}), but got a dictionary of {_listed(given)}. {_REMEDY}"
                )
            if not isinstance(given[name], Tensor):
                raise TypeError(
                    f"Expected argument `{self.argument}` to hold a tensor as `{name}`, {why} ({self._forward.name}), "
                    f"but got {describe(given[name])}. Make it a tensor (`return_tensors='pt'` of a tokenizer), or "
                    f"leave it out with `inputs_of`"
                )

    def _note(self, labels: Sequence[str], left: Sequence[Any]) -> None:
        name = self._forward.name
        self._labels = list(labels)
        if labels:
            self.notes.append(
                f"The forward of {name} was not given {_listed(labels)}: outputs are compared, not losses. To give it "
                f"all that a batch holds, pass `inputs_of=lambda batch: batch`"
            )
        others = [each for each in left if each not in labels and not _is_label(each)]
        if others:
            self.notes.append(f"The forward of {name} does not take {_listed(others)}, which the batches hold, too")


_REMEDY = "Pass `inputs_of=lambda batch: ...`, which returns the inputs in a batch: a tensor, a tuple or a dictionary"


def as_arguments(example_inputs: Any, model: nn.Module) -> Arguments:
    """Turn example inputs into what a forward is called with.

    Args:
        example_inputs: A tensor, a sequence of the forward's positional arguments, or a dictionary or dataclass of
            arguments by name, read as a batch is: labels are left out. A sequence that the forward does not take is
            read as a batch, too.
        model: The model.

    Raises:
        TypeError: If they are nothing of that.
        ValueError: If there is nothing in one of them to compute with: no sample, or no data (the meta device).
    """
    of_model = _Forward(model)
    by_name = _as_mapping(example_inputs, of_model)
    if by_name is not None:
        arguments = BatchReader(model, "example_inputs")._named(by_name, are_inputs=False)
    else:
        given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        if isinstance(given, list | tuple) and given and not names_of(given) and not of_model.takes(given):
            with suppress(TypeError):  # it is named below
                given = BatchReader(model, "example_inputs")._read(given)
        if not isinstance(given, list | tuple) or not given or not all(isinstance(each, Tensor) for each in given):
            raise TypeError(
                f"Expected argument `example_inputs` to be a tensor, a non-empty tuple of tensors, the positional "
                f"arguments of the model's forward, or a dictionary of them by name, but got {describe(example_inputs)}"
            )
        arguments = Arguments(given, names_of(given))
    for each in arguments:
        if each.ndim and not len(each):
            raise ValueError(
                f"Expected argument `example_inputs` to hold at least one sample, but got {describe(each)}. Pass a "
                f"batch of one or more."
            )
        if each.is_meta:
            raise ValueError(
                f"Expected argument `example_inputs` to hold data, which the result is compared on, but got "
                f"{describe(each)} on the meta device. Pass tensors on the device of the model."
            )
    return arguments


def as_called(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments | None:
    """Return what a model was called with, labels aside; None where that is anything but tensors with samples.

    Args:
        model: The model.
        args: What it was given by position.
        kwargs: What it was given by name.
    """
    of_model = _Forward(model)
    by_name = {
        name: value
        for name, value in kwargs.items()
        if value is not None and not (_is_label(name) and of_model.can_do_without(name))
    }
    values = (*args, *by_name.values())
    if not values or not all(isinstance(value, Tensor) and value.numel() for value in values):
        return None
    positional = [] if args else of_model.positional(list(by_name))
    names = [name for name in by_name if name not in positional]
    return Arguments((*args, *(by_name[name] for name in [*positional, *names])), names)


class _Forward:
    """What a forward takes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = type(model).__name__
        self._parameters = dict(inspect.signature(model.forward).parameters)
        self.names = [name for name, each in self._parameters.items() if each.kind in _BY_NAME]
        self.required = [name for name in self.names if self._parameters[name].default is inspect.Parameter.empty]
        self.wanted = arguments_wanted(model)
        needed = [each for each in self.required if self._parameters[each].kind not in _POSITIONAL]
        self.takes_one = self.wanted == 1 and not needed

    def names_in(self, given: Mapping[Any, Any]) -> list[str]:
        """Name what the forward is given of a dictionary, in its own order; one that only collects takes all."""
        kinds = [each.kind for each in self._parameters.values()]
        if not self.names and inspect.Parameter.VAR_KEYWORD in kinds:
            return [name for name, value in given.items() if isinstance(name, str) and isinstance(value, Tensor)]
        return [name for name in self.names if name in given]

    def takes(self, values: Sequence[Any]) -> bool:
        """Tell whether values are tensors, and no more than it takes by position."""
        kinds = [each.kind for each in self._parameters.values()]
        most = sum(kind in _POSITIONAL for kind in kinds)
        fits = inspect.Parameter.VAR_POSITIONAL in kinds or len(values) <= most
        return fits and all(isinstance(value, Tensor) for value in values)

    def can_do_without(self, name: str) -> bool:
        return name not in self.required

    def positional(self, names: Sequence[str]) -> list[str]:
        """Return those of some arguments that can be passed by position: up to the first that is left out."""
        first: list[str] = []
        for name, each in self._parameters.items():
            if each.kind not in _POSITIONAL or name not in names:
                break
            first.append(name)
        return first


def _as_mapping(value: Any, of_model: _Forward) -> Mapping[Any, Any] | None:
    """Return a batch as a dictionary, if it has names; those of a named tuple may be others than the forward's."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        named: Mapping[Any, Any] = value._asdict()
        is_of_model = bool(of_model.names_in(named)) and set(of_model.required) <= named.keys()
        return named if is_of_model else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _is_label(name: Any) -> bool:
    return "label" in str(name) or name in _LABELS


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
