"""What the subcommands work on: a module with the weights of a checkpoint, its data, and a Trainer for validation."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_easier.cli.reading import named_as_options
from lightning_easier.pruning.rules import mode_in_name
from lightning_easier.structure.checkpoint import load_pruned, read_saved
from lightning_easier.structure.linearize import read_marks
from lightning_easier.support.batches import BatchReader, InputsOf, as_arguments
from lightning_easier.support.calls import Arguments, call, copies, mapped
from lightning_easier.support.inference import evaluation_mode
from lightning_easier.support.storage import first_line

Mode = Literal["min", "max"]

_PRECISIONS = {torch.bfloat16: "bf16-true", torch.float16: "16-true", torch.float64: "64-true"}
"""The precision of a Trainer in which batches are given to a network of this dtype."""

_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Session:
    """A module, its data and a Trainer.

    Args:
        module: The module, as it was trained; it is attached to the Trainer.
        datamodule: Its data; the loaders of the module if there is none.
        trainer: Says on which device and in which precision, and validates.
        network: Name of the submodule that is worked on. By default the module itself; if it has no ``forward``, the
            one submodule that has parameters.
        inputs_of: Returns the inputs in a batch, where they are found elsewhere than usual.

    Attributes:
        module: The module.

    Raises:
        ValueError: If there is no such submodule, or more than one.
    """

    def __init__(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        trainer: Trainer,
        network: str | None = None,
        inputs_of: InputsOf | None = None,
    ) -> None:
        self.module = module
        self._datamodule = datamodule
        self._trainer = trainer
        self._inputs_of = inputs_of
        module.trainer = trainer
        if datamodule is not None:
            datamodule.trainer = trainer
        module.configure_model()
        self._place = _place_of_network(module, network)
        self._in_its_place: nn.Module | None = None  # of the module itself: a network that was saved whole

    @property
    def network(self) -> nn.Module:
        """What is worked on."""
        return self.module.get_submodule(self._place) if self._in_its_place is None else self._in_its_place

    @property
    def device(self) -> torch.device:
        """Where it is worked on."""
        return self._trainer.strategy.root_device

    @property
    def precision(self) -> str:
        """What is computed in, as the Trainer calls it."""
        return str(self._trainer.precision)

    def load(self, ckpt_path: str | None, weights_only: bool | None) -> None:
        """Load a checkpoint of any number of removals, none included, and move the module to the device.

        Args:
            ckpt_path: The checkpoint, or a network that was saved whole, as `compress` saves it: it takes the place of
                what is worked on. The module keeps the weights it has if there is none.
            weights_only: As for :func:`torch.load`; true by default.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it can't be read, or does not fit the module.
        """
        if ckpt_path is not None:
            with named_as_options():
                self._load(ckpt_path, safely=weights_only is not False)
        for module in (self.module, self.network):
            self._trainer.precision_plugin.convert_module(module)
            module.to(self.device)

    def _load(self, ckpt_path: str, *, safely: bool) -> None:
        checkpoint = read_saved(ckpt_path, argument="--ckpt_path", weights_only=safely)
        if isinstance(checkpoint, nn.Module):
            self._take(checkpoint)
            return
        if read_marks(checkpoint.get("state_dict", checkpoint)):
            load_pruned(self.module, ckpt_path, weights_only=safely)
            return
        if "state_dict" in checkpoint:  # as Lightning, which has the module change what it loads
            self.module.on_load_checkpoint(checkpoint)
        try:
            self.module.load_state_dict(checkpoint.get("state_dict", checkpoint))
        except RuntimeError as error:
            raise ValueError(
                f"Expected argument `--ckpt_path` to fit {type(self.module).__name__}, but {ckpt_path} does not: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

    def _take(self, network: nn.Module) -> None:
        """Work on a network that was saved whole, in the place of the module's own."""
        if self._place:
            _put(self.module, self._place, network)
        else:
            self._in_its_place = network

    def example_inputs(self, batch_size: int | None) -> Arguments:
        """Return what the network is called with: of a validation batch, or the module's ``example_input_array``.

        Args:
            batch_size: How many samples; as many as the batch has by default. Samples are repeated where it has fewer.

        Raises:
            ValueError: If there is no sample, or the first input has no axis of samples and a batch size is given, or
                the network fails in the precision that is given, and would not in another.
        """
        inputs = next(self._inputs_of_validation(), None)
        if inputs is None and (example := self.module.example_input_array) is not None:
            inputs = as_arguments(self._trainer.precision_plugin.convert_input(example), self.network)
        if inputs is None:
            raise ValueError(
                "Expected `data` to yield a validation batch, or the model to have an `example_input_array`, for an "
                "example input; but there is neither"
            )
        if batch_size is not None:
            inputs = _resized(inputs, batch_size)
        inputs = mapped(lambda value: value.to(self.device), inputs)
        self._check_precision(inputs)
        return inputs

    def _check_precision(self, inputs: Arguments) -> None:
        """Refuse a precision in which the network does not take its inputs: one that leaves them in another dtype.

        Raises:
            ValueError: If it fails, and another precision would give it inputs of its own dtype.
        """
        own, given = _dtypes_of(self.network.parameters()), _dtypes_of(inputs)
        wanted = _PRECISIONS.get(next(iter(own))) if len(own) == 1 else None
        if wanted in (None, self.precision) or given <= own:
            return
        try:
            with evaluation_mode(self.network):
                call(self.network, copies(inputs))
        except Exception as error:  # whatever the user's forward raises; one that converts what it gets is right
            (dtype,) = own
            raise ValueError(
                f"Expected argument `--trainer.precision` to be {wanted} for a network in {_name_of(dtype)}, but got "
                f"{self.precision!r}, which gives it inputs in {', '.join(sorted(map(_name_of, given)))}, and it "
                f"fails: {first_line(error)}"
            ) from error

    def _inputs_of_validation(self) -> Iterator[Arguments]:
        """Yield the inputs in the validation batches that have samples; none where there is no loader."""
        if self._has_loader("val_dataloader"):
            read = BatchReader(self.network, "data", self._inputs_of)
            for inputs in map(read, self.validation_batches()):
                if all(len(value) for value in inputs if value.ndim):
                    yield inputs

    def validation_batches(self) -> Iterator[Any]:
        """Yield the batches of the validation loader, the first of several, on the device."""
        return self._batches("val_dataloader", "validate")

    def calibration(self, samples: int) -> list[Any]:
        """Return as many batches of the training loader as hold so many samples, on the device.

        Args:
            samples: How many samples, at least if the loader has them.
        """
        batches, count = [], 0
        read = BatchReader(self.network, "data", self._inputs_of)
        for batch in self._batches("train_dataloader", "fit"):
            batches.append(batch)
            count += len(read(batch)[0])
            if count >= samples:
                break
        return batches

    def score(self, network: nn.Module, monitor: "Monitor") -> float:
        """Validate the module with another network in the place of its own, as it validates itself.

        Args:
            network: The network.
            monitor: Tells which of the logged values is the score.

        Raises:
            ValueError: If there is none, or the network stands for the whole module and is no LightningModule.
        """
        module = self.module
        if self._place:
            before = self.network
            _put(module, self._place, network)
        else:
            if not isinstance(network, LightningModule):
                raise ValueError(
                    f"Expected argument `--no-score` for a {type(network).__name__} that was saved whole, in the place "
                    f"of {type(module).__name__}: it has no `validation_step`"
                )
            module = network
        try:
            logged = self._trainer.validate(module, datamodule=self._datamodule, verbose=False)
        finally:
            if self._place:
                _put(module, self._place, before)
        return monitor.of({name: value for each in logged for name, value in each.items()})

    @property
    def _source(self) -> Any:
        """What has the loaders."""
        return self.module if self._datamodule is None else self._datamodule

    def _has_loader(self, name: str) -> bool:
        return is_overridden(name, self._source, DataHooks)

    def _batches(self, name: str, stage: str) -> Iterator[Any]:
        source = self._source
        if not self._has_loader(name):
            raise ValueError(f"Expected `data`, or the module where there is none, to have a `{name}`, but it has none")
        source.prepare_data()
        source.setup(stage)
        yield from (self._transferred(batch) for batch in _first_of(getattr(source, name)()))

    def _transferred(self, batch: Any) -> Any:
        """Convert and move a batch as a Trainer would: with the hooks of the data, or else of the module."""
        batch = self._trainer.precision_plugin.convert_input(batch)
        for name in _TRANSFERS:
            owner: Any = self.module
            if self._datamodule is not None and is_overridden(name, self._datamodule, DataHooks):
                owner = self._datamodule
            given = (batch, self.device, 0) if name == "transfer_batch_to_device" else (batch, 0)
            batch = getattr(owner, name)(*given)
        return batch


class Monitor:
    """Tells which of the values that a validation logs is the score, and which way is better.

    Args:
        name: Its name, as the user gave it; the first validation tells by default.
        mode: Whether a higher score is better; told by the name by default.

    Attributes:
        name: Its name; None before the first validation if it was not given.
    """

    def __init__(self, name: str | None, mode: Mode | None) -> None:
        self.name = name
        self._mode = mode

    @property
    def mode(self) -> Mode:
        """Whether a higher score is better."""
        return self._mode or (mode_in_name(self.name) if self.name is not None else None) or "max"

    def of(self, logged: dict[str, Any]) -> float:
        """Return the score.

        Raises:
            ValueError: If it is not there, or several values may be meant.
        """
        if self.name is None:
            self.name = _the_score(logged)
            rank_zero_info(f"The score is {self.name!r} ({'lower' if self.mode == 'min' else 'higher'} is better).")
        if self.name not in logged:
            raise ValueError(
                f"Expected argument `--monitor` to be what a validation logs, but got {self.name!r}, and it logs "
                f"{sorted(logged)}"
            )
        return float(logged[self.name])


def _the_score(logged: dict[str, Any]) -> str:
    """Return the one value that is a score, or else the one that is a loss."""
    losses = [name for name in logged if mode_in_name(name) == "min"]
    for names in ([name for name in logged if name not in losses], losses):
        if len(names) == 1:
            return names[0]
        if names:
            break
    raise ValueError(
        f"Expected argument `--monitor` to name the score, since a validation logs {sorted(logged) or 'nothing'}"
        + ("" if logged else ": log one in `validation_step`, or pass `--no-score`, and `--max_drift` tells what stays")
    )


def _place_of_network(module: LightningModule, name: str | None) -> str:
    if name is not None:
        try:
            module.get_submodule(name)
        except AttributeError as error:
            known = [each for each, _ in module.named_children()]
            raise ValueError(
                f"Expected argument `--network` to name a submodule of {type(module).__name__}, but got {name!r}; it "
                f"has {known}"
            ) from error
        return name
    if type(module).forward is not LightningModule.forward:
        return ""
    trained = [each for each, child in module.named_children() if any(True for _ in child.parameters())]
    if len(trained) != 1:
        raise ValueError(
            f"Expected {type(module).__name__} to have a `forward`, or argument `--network` to say which of its "
            f"submodules is worked on, one of {trained}"
        )
    return trained[0]


def _dtypes_of(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _put(module: nn.Module, place: str, part: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(module.get_submodule(parent), name, part)


def _resized(inputs: Arguments, batch_size: int) -> Arguments:
    """Return as many samples as asked for; they are repeated where there are fewer."""
    if inputs[0].ndim == 0:
        raise ValueError(
            f"Expected argument `--batch_size` to be left out, since the first input has no axis of samples, but got "
            f"{batch_size}"
        )
    samples = len(inputs[0])

    def resized(value: Tensor) -> Tensor:
        if value.ndim == 0 or len(value) != samples:
            return value
        return value[torch.arange(batch_size, device=value.device) % samples]

    return mapped(resized, inputs)


def _first_of(loaders: Any) -> Iterable[Any]:
    """Return the first of several loaders, however they are held; nothing where there is none."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.flattened
    elif isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return _first_of(loaders[0]) if loaders else ()
    return () if loaders is None else loaders
