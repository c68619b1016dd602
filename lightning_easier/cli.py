"""The command line: LightningCLI's own subcommands, joined by ``collapse``, ``export``, ``report`` and ``recipes``.

LightningCLI takes its subcommands from methods of the Trainer class, hence :class:`EasierTrainer`.
"""

import sys
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.nn import Module

import lightning_easier.zoo  # makes its classes known by their short names
from lightning_easier import recipes
from lightning_easier.collapsing import CollapseResult, collapse
from lightning_easier.exporting import export
from lightning_easier.measure.probe import measure_entropy
from lightning_easier.pruning.candidates import candidates as list_candidates
from lightning_easier.report import PruningReport, Round
from lightning_easier.structure.checkpoint import callback_states, load_pruned, read_checkpoint
from lightning_easier.structure.linearize import read_marks
from lightning_easier.support.arguments import check_integer
from lightning_easier.support.batches import BatchReader, as_arguments
from lightning_easier.support.calls import Arguments, mapped

try:
    import rich
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The command line needs {error.name}: `pip install 'lightning-easier[cli]'`", name=error.name
    ) from error


class EasierTrainer(Trainer):
    """A Trainer that can also collapse, export and report on a pruned checkpoint."""

    def collapse(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        output: str | None = None,
        objective: Literal["latency", "macs", "depth"] = "latency",
        batch_size: int | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Merge the neighbouring linear operators of a pruned checkpoint and report what that saves.

        Args:
            model: The model as it was trained.
            datamodule: Where the example inputs come from.
            ckpt_path: The pruned checkpoint.
            output: File to write the collapsed model to, ``.onnx`` or ``.pt2``; none by default.
            objective: What a merge has to improve.
            batch_size: Size of the example batch; that of the data by default.
            weights_only: As for ``torch.load``; true by default.
        """
        inputs = self._example_inputs(model, datamodule, batch_size)
        result = self._collapse(model, inputs, ckpt_path, objective, weights_only)
        rich.print(result.report)
        if output is not None:
            rich.print(export(result.model, output, inputs))

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        output: str = "model.onnx",
        collapsed: bool = True,
        objective: Literal["latency", "macs", "depth"] = "latency",
        batch_size: int | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Export a pruned checkpoint to ONNX or pt2, collapsed or as it is, and check the file against the model.

        Args:
            model: The model as it was trained.
            datamodule: Where the example inputs come from.
            ckpt_path: The pruned checkpoint.
            output: File to write, ``.onnx`` or ``.pt2``.
            collapsed: Whether to collapse the model first.
            objective: What a merge has to improve.
            batch_size: Size of the example batch; that of the data by default.
            weights_only: As for ``torch.load``; true by default.
        """
        inputs = self._example_inputs(model, datamodule, batch_size)
        if collapsed:
            result = self._collapse(model, inputs, ckpt_path, objective, weights_only)
            rich.print(result.report)
            shipped: Module = result.model
        else:
            shipped = self._load(model, ckpt_path, weights_only)
        rich.print(export(shipped, output, inputs))

    def report(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str | None = None,
        candidates: bool = False,
        max_batches: int = 0,
        weights_only: bool | None = None,
    ) -> None:
        """Report what a pruning run did, round by round, or which activations could be removed.

        Args:
            model: The model; for the first report LightningCLI passes it, but only the checkpoint is read.
            datamodule: Where the entropies are measured.
            ckpt_path: The checkpoint of a run. With ``candidates`` the weights to look at; the model's own by default.
            candidates: Whether to list the activations instead, the linear operators around each, and what would merge.
            max_batches: With ``candidates``: how many validation batches to measure the entropies on; not by default.
            weights_only: As for ``torch.load``; true by default.
        """
        check_integer("max_batches", max_batches, 0)
        if not candidates:
            if ckpt_path is None:
                raise ValueError("Expected argument `--ckpt_path` to be a checkpoint of a pruning run, but got none")
            rich.print(read_pruning_report(ckpt_path, weights_only=weights_only is not False))
            return
        if ckpt_path is not None:
            self._load(model, ckpt_path, weights_only)
        entropies = None
        if max_batches > 0:
            if datamodule is None:
                raise ValueError("Expected `data`, to measure entropies on, but got none; leave out `--max_batches`")
            loader = _validation_loader(datamodule)
            entropies = measure_entropy(model.to(self.strategy.root_device), loader, max_batches=max_batches)
        rich.print(list_candidates(model, entropies))

    def _collapse(
        self, model: LightningModule, inputs: Arguments, ckpt_path: str, objective: Any, weights_only: bool | None
    ) -> CollapseResult:
        self._load(model, ckpt_path, weights_only)
        return collapse(model.to(self.strategy.root_device), inputs, objective=objective)

    def _load(self, model: LightningModule, ckpt_path: str, weights_only: bool | None) -> LightningModule:
        """Load a checkpoint of any number of removals, none included."""
        safely = weights_only is not False
        checkpoint = read_checkpoint(ckpt_path, argument="--ckpt_path", weights_only=safely)
        state_dict = checkpoint.get("state_dict", checkpoint)
        if read_marks(state_dict):
            load_pruned(model, ckpt_path, weights_only=safely)
        else:
            rank_zero_info(f"No activation is linear in {ckpt_path}.")
            model.load_state_dict(state_dict)
        return model

    def _example_inputs(
        self, model: LightningModule, datamodule: LightningDataModule | None, batch_size: int | None
    ) -> Arguments:
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        if datamodule is not None:
            read = BatchReader(model, "data")
            inputs = next((read(batch) for batch in _validation_loader(datamodule)), None)
        else:
            example = model.example_input_array
            inputs = None if example is None else as_arguments(example, model)
        if inputs is None or any(len(value) == 0 for value in inputs if value.ndim):
            raise ValueError(
                "Expected `data` to yield a validation batch, or the model to have an `example_input_array`, for an "
                "example input; but there is none"
            )
        samples = len(inputs[0]) if inputs[0].ndim else 0
        some = mapped(lambda value: value[:batch_size] if value.ndim and len(value) == samples else value, inputs)
        return mapped(lambda value: value.to(self.strategy.root_device), some)


def _validation_loader(datamodule: LightningDataModule) -> Any:
    datamodule.prepare_data()
    datamodule.setup("validate")
    loaders = datamodule.val_dataloader()
    return loaders[0] if isinstance(loaders, list | tuple) else loaders


def read_pruning_report(checkpoint_path: str | Path, *, weights_only: bool = True) -> PruningReport:
    """Read what a pruning run did from one of its checkpoints.

    Args:
        checkpoint_path: A Lightning checkpoint.
        weights_only: As for :func:`torch.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the checkpoint is not from a run with an EntropyPruningCallback.
    """
    checkpoint = read_checkpoint(checkpoint_path, weights_only=weights_only)
    for state in callback_states(checkpoint):
        if {"monitor", "rounds"} <= set(state):
            try:
                rounds = [Round(**this) for this in state["rounds"]]
                return PruningReport(
                    state["monitor"], rounds, state.get("mode", "max"), list(state.get("activations", ()))
                )
            except TypeError as error:
                raise ValueError(
                    f"Expected argument `checkpoint_path` to be a checkpoint of a pruning run, but the rounds in "
                    f"{checkpoint_path} have another form ({error}): was it saved by another version?"
                ) from error
    linear = list(read_marks(checkpoint.get("state_dict", {})))
    raise ValueError(
        f"Expected argument `checkpoint_path` to be a checkpoint of a pruning run with its callbacks' states, but "
        f"{checkpoint_path} has none (saved with weights only?). Its weights mark {linear or 'nothing'} as linear."
    )


class EasierCLI(LightningCLI):
    """LightningCLI for any LightningModule and data, with the subcommands of :class:`EasierTrainer`."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=EasierTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "version": lightning_easier.__version__,
                "description": "Train, prune, collapse and export. `lightning-easier recipes list` lists configs that "
                "come with the package, which `--config` takes by name; `recipes copy NAME` makes one your own.",
            },
            args=args,
            run=run,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Take the recipes that come with the package by name, too."""
        if args is None:
            self.config = parser.parse_args(recipes.with_paths(sys.argv[1:]))
        else:
            super().parse_arguments(parser, recipes.with_paths(args) if isinstance(args, list) else args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add ours to LightningCLI's; the sets are what is not taken from the command line."""
        ours = {name: {"model", "datamodule"} for name in ("collapse", "export", "report")}
        return LightningCLI.subcommands() | ours

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        """Let ``--candidates`` stand alone, as one writes a flag; jsonargparse wants every bool spelled out."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "candidates":
                action.nargs, action.const = "?", True
        return parser


def main(args: ArgsType = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["recipes"]:
        rich.get_console().out(recipes.command(given[1:]), highlight=False)
        return
    EasierCLI(args)


if __name__ == "__main__":
    main()
