"""The subcommands as a mixin: for :class:`~lightning_easier.cli.EasierCLI`, and for a LightningCLI of one's own.

Lightning takes its subcommands from methods of the Trainer, with all of the Trainer's options. Ours have a parser of
the same keys, so that every config of a run is read, and a help of their own.
"""

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn

from lightning_easier.cli.errors import DEBUG, in_one_line
from lightning_easier.cli.options import COMMANDS, Command, add_options
from lightning_easier.cli.reading import named_as_options
from lightning_easier.cli.session import Session
from lightning_easier.structure.checkpoint import read_saved

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

    _Base = LightningCLI
else:
    _Base = object

# What of a config is of training alone. One device: a network is timed, merged and exported in one place. Not in
# inference mode: what a module keeps of a validation may be needed for gradients, when it is fine-tuned.
_NOT_USED: dict[str, Any] = {
    "callbacks": None, "logger": False, "profiler": None, "plugins": None, "strategy": "auto", "num_nodes": 1,
    "fast_dev_run": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "sync_batchnorm": False, "barebones": False, "inference_mode": False,
}  # fmt: skip


_LIGHTNINGS = ("fit", "validate", "test", "predict")
_WORDS = ("best", "last", "hpc", "registry")  # what Lightning finds a checkpoint by itself for


class EasierSubcommands(_Base):
    """Adds ``candidates``, ``compress``, ``collapse``, ``export`` and ``report`` to a LightningCLI.

    Example::

        class OwnCLI(EasierSubcommands, LightningCLI):
            pass

        OwnCLI(OwnModule, OwnDataModule)
    """

    _words: Sequence[str] = ()

    def _setup_parser_kwargs(self, parser_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give the parsers of ours what is meant for them, as Lightning does with its own."""
        ours = {name: value for name, value in parser_kwargs.items() if name in COMMANDS}
        others = {name: value for name, value in parser_kwargs.items() if name not in COMMANDS}
        main, subcommands = super()._setup_parser_kwargs(others)
        return main, {**subcommands, **ours}

    def _add_subcommands(self, parser: "LightningArgumentParser", **kwargs: Any) -> None:
        super()._add_subcommands(parser, **{k: v for k, v in kwargs.items() if k not in COMMANDS})
        subcommands: Any = parser._subcommands_action
        self._own_arguments: dict[str, list[str]] = {}
        for name, command in COMMANDS.items():
            given = {"description": command.about, **kwargs.get(name, {}), "add_help": False}
            own = self.init_parser(**given)
            if self._may_be_asked_for(name):
                if command.needs_model:
                    self._add_arguments(own)
                self._own_arguments[name] = add_options(own, command)
            self._subcommand_parsers[name] = own
            subcommands.add_subcommand(name, own, help=command.about)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> "LightningArgumentParser":
        if self._may_be_asked_for(subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def _may_be_asked_for(self, subcommand: str) -> bool:
        """Tell whether the options of a subcommand may be needed: to add them all takes a while."""
        return True

    def parse_arguments(self, parser: "LightningArgumentParser", args: "ArgsType") -> None:
        """Take ``--debug``, unless the parsers have an option of that name: what is wrong is raised then."""
        given = sys.argv[1:] if args is None else args
        self._words = given if isinstance(given, list) else []
        if isinstance(given, list) and self._is_debugged(parser, given):
            self._parse(parser, given)
        else:
            super().parse_arguments(parser, args)

    def _parse(self, parser: "LightningArgumentParser", words: list[str]) -> None:
        """Parse the words of a command line."""
        self._words = words
        if self._is_debugged(parser, words):
            words = [word for word in words if word != DEBUG]
            for each in self._parsers(parser):
                each.exit_on_error = False
        try:
            self.config = parser.parse_args(words)
        except UnicodeDecodeError as error:
            parser.error(
                f"Expected argument `--config` to be a text file (YAML or JSON), but it is none: {error}", error
            )

    def _parsers(self, parser: "LightningArgumentParser") -> list[Any]:
        return [parser, *getattr(self, "_subcommand_parsers", {}).values()]

    def _is_debugged(self, parser: "LightningArgumentParser", words: list[str]) -> bool:
        is_theirs = any(DEBUG in each._option_string_actions for each in self._parsers(parser))
        return DEBUG in words and not is_theirs

    def _parse_ckpt_path(self) -> None:
        """Take the model's hyperparameters from the checkpoint, as Lightning does; the file as it was asked for.

        Raises:
            FileNotFoundError: If it is for Lightning, and there is no such file.
            ValueError: If it can't be read, or is for Lightning and has no run to go on with.
        """
        subcommand = self.config.get("subcommand") or ""
        given = self.config.get(subcommand, {})
        path = given.get("ckpt_path")
        meant = _checkpoint_before_a_config(self._words)
        if subcommand and meant is not None and meant != str(path or ""):
            self.parser.error(
                f"Expected argument `--ckpt_path` to come after `--config`, but got `--ckpt_path {meant}` before it: "
                f"the config has a `ckpt_path` of its own, {path or 'null'}, which took its place"
            )
        if not path or not given.get("model"):
            return
        is_lightnings = subcommand in _LIGHTNINGS
        if not isfile(path) and not (is_lightnings and _may_be_one(path)):
            return
        with named_as_options():
            safely = given.get("weights_only") is not False
            checkpoint = read_saved(path, argument="--ckpt_path", weights_only=safely)
        if isinstance(checkpoint, nn.Module):
            if is_lightnings:
                raise ValueError(
                    f"Expected argument `--ckpt_path` to be a checkpoint that a Trainer has saved, but {path} holds a "
                    f"{type(checkpoint).__name__}: make it part of a module in Python"
                )
            return
        if is_lightnings and "pytorch-lightning_version" not in checkpoint:
            raise ValueError(
                f"Expected argument `--ckpt_path` to be a checkpoint that a Trainer has saved, but {path} has no "
                f"record of a version of Lightning: weights alone are loaded in Python"
            )
        of_model = dict(checkpoint.get("hyper_parameters") or {})
        of_model.pop("_instantiator", None)
        class_path = of_model.pop("_class_path", None)
        if class_path is not None:
            of_model = {"class_path": class_path, "dict_kwargs": of_model}
        if of_model:
            self._take_hyperparameters(of_model, path)

    def _take_hyperparameters(self, of_model: dict[str, Any], path: str) -> None:
        parsers = self._parsers(self.parser)
        exits = [each.exit_on_error for each in parsers]
        try:
            for each in parsers:
                each.exit_on_error = False
            self.config = self.parser.parse_object({self.config.subcommand: {"model": of_model}}, self.config)
        except ArgumentError as error:
            reason = error
        else:
            return
        finally:
            for each, was in zip(parsers, exits, strict=True):
                each.exit_on_error = was
        self.parser.error(
            f"Expected argument `--ckpt_path` to be a checkpoint of the model that is given, but the hyperparameters "
            f"in {path} do not fit it: {in_one_line(str(reason))}",
            reason,
        )

    @property
    def _command(self) -> Command | None:
        return COMMANDS.get(self.subcommand or "")

    def instantiate_classes(self) -> None:
        """Instantiate model and data, and a Trainer that only validates; nothing that trains."""
        if self._command is None:
            super().instantiate_classes()
            return
        self._monitor = None
        if not self._command.needs_model:
            self.config_init = self.config
            return
        settings = self.config[self.subcommand]["trainer"]
        self._monitor = _monitored(settings.get("callbacks"))
        for name, value in _NOT_USED.items():
            if name in settings:  # a Trainer of one's own may take less
                settings[name] = value
        settings["devices"] = _one_of(settings.get("devices"))
        self.save_config_callback = None
        super().instantiate_classes()

    def _set_seed(self) -> None:
        """Set the seed.

        Raises:
            MisconfigurationException: If it is none.
        """
        try:
            super()._set_seed()
        except ValueError as error:
            raise MisconfigurationException(f"Expected argument `--seed_everything` to be a seed: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiate the Trainer; for ours, without the callbacks of the class.

        Raises:
            MisconfigurationException: If it refuses a value.
        """
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if self._command is not None:
            trainer.callbacks = []  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        command = COMMANDS.get(subcommand)
        if command is None:
            super()._run_subcommand(subcommand)
            return
        given = {name: self.config_init[subcommand].get(name) for name in self._own_arguments[subcommand]}
        if given.get("score") and given["monitor"] is None and self._monitor is not None:
            given["monitor"], mode = self._monitor
            given["mode"] = given["mode"] or mode
        if not command.needs_model:
            command.run(**given)
            return
        datamodule: LightningDataModule | None = self.datamodule
        start = partial(Session, self.model, datamodule, self.trainer)
        command.run(start, **given)


def _checkpoint_before_a_config(words: Sequence[str]) -> str | None:
    """Return the last checkpoint that words name, if a config follows it; None if none is named there."""
    found, is_followed = "", False
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, sign, value = word.partition("=")
        if name == "--ckpt_path":
            found, is_followed = value if sign else following, False
        elif name in ("--config", "-c"):
            is_followed = True
    return found if is_followed and found.lower() not in ("", "null", "none", "~") else None


def _may_be_one(path: str) -> bool:
    """Tell whether a path is meant as a file: not one of Lightning's words, an address, or a folder."""
    return path not in _WORDS and ":" not in path and not Path(path).is_dir()


def _monitored(callbacks: Any) -> tuple[str, str | None] | None:
    """Return the score that the first callback with a tolerance, or else the first of all, monitors, and its mode."""
    found = []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments = callback.get("init_args") if hasattr(callback, "get") else None
        if arguments is not None and arguments.get("monitor"):
            found.append(("tolerance" not in arguments, arguments["monitor"], arguments.get("mode")))
    return min(found, key=lambda each: each[0])[1:] if found else None


def _one_of(devices: Any) -> Any:
    """Return one of the devices that a run was on."""
    if isinstance(devices, str) and "," in devices:
        devices = [int(each) for each in devices.split(",") if each.strip()]
    return devices[:1] if isinstance(devices, list) and devices else 1
