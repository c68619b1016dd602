"""The command line of the package: any LightningModule and data, and configs that come with it."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_easier.zoo  # makes its classes known by their short names
from lightning_easier import recipes
from lightning_easier.cli.errors import DEBUG, WRONG_VALUE, in_one_line
from lightning_easier.cli.options import COMMANDS
from lightning_easier.cli.subcommands import EasierSubcommands
from lightning_easier.support.arguments import check_choice

_ABOUT = (
    "Train, prune, compress, collapse and export. Recipes, configs that come with the package, are taken by name: "
    "`%(prog)s recipes list`, and `recipes copy NAME` makes one your own. `--debug` shows the traceback of an "
    "error, `--print_shtab bash` what completes commands in a shell."
)
_SHELLS = "--print_shtab"
# Options of a parser that has it look for those of any subcommand outside of the command line
_READ_ELSEWHERE = {"default_config_files", "default_env"}
_FILES = ("config", "ckpt_path", "output", "report", "fitted")
_MISSING = re.compile(r"the following arguments are required: ([\w., ]+)")
_NO_MAPPING = "Unexpected config:"
_NO_FILE = re.compile(r"(?:File does not exist:|Unable to load config) '([^']+)'")


class EasierArgumentParser(LightningArgumentParser):
    """A parser that tells what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write one line, and leave with 2; raise where a traceback is asked for."""
        if not self.exit_on_error:
            super().error(message, ex)
        program = self.prog.replace(" [options]", "")
        told = in_one_line(message)
        subcommand, missing = _missing(told, getattr(self._subcommands_action, "choices", None) or ())
        if missing:
            program = f"{program} {subcommand}".strip()
            told = f"the following arguments are required: {', '.join(missing)}"
        elif told.startswith(_NO_MAPPING):
            given = told.removeprefix(_NO_MAPPING).strip()
            told = f"Expected argument `--config` to hold options by name (YAML or JSON), but got {given or 'nothing'}"
        elif ex is not None and (option := _of_several_values(ex)):
            told = f"Expected `{option}` to be a list in a config, such as `{option}: [...]`: {told}"
        elif meant := _recipe_meant(told):
            told += f". Did you mean the recipe {meant!r}?"
        sys.stderr.write(f"{program}: error: {told} (`{program} --help` lists what there is)\n")
        self.exit(WRONG_VALUE)


class EasierCLI(EasierSubcommands, LightningCLI):
    """LightningCLI for any LightningModule and data, with :class:`EasierSubcommands` and recipes by name.

    Args:
        model_class: A class of your own, whose arguments are options then; any LightningModule by default.
        datamodule_class: A class of your own; by default any LightningDataModule, or the loaders of the model.
        args: As for LightningCLI.
        run: As for LightningCLI.
        **kwargs: Whatever else LightningCLI takes.
    """

    def __init__(
        self,
        model_class: Any = LightningModule,
        datamodule_class: Any = None,
        *,
        args: ArgsType = None,
        run: bool = True,
        **kwargs: Any,
    ) -> None:
        parser = {
            "version": lightning_easier.__version__,
            "description": _ABOUT,
            **kwargs.pop("parser_kwargs", {}),
        }
        defaults: dict[str, Any] = {
            "subclass_mode_model": model_class is LightningModule,
            "subclass_mode_data": datamodule_class in (None, LightningDataModule),
            "save_config_kwargs": {"overwrite": True},
            "parser_class": EasierArgumentParser,
        }
        self._only = None if _READ_ELSEWHERE & parser.keys() else _first_word(sys.argv[1:] if args is None else args)
        super().__init__(
            model_class, datamodule_class, parser_kwargs=parser, args=args, run=run, **{**defaults, **kwargs}
        )

    def _may_be_asked_for(self, subcommand: str) -> bool:
        """Tell whether a subcommand is the one that the command line begins with; any where it begins with none."""
        return self._only in (None, subcommand) or self._only not in {*self.subcommands(), *COMMANDS, "recipes"}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """List the recipes beside the others; they need no parser of ours."""
        super()._add_subcommands(parser, **kwargs)
        listed: Any = parser._subcommands_action
        listed.add_subcommand("recipes", LightningArgumentParser(), help="List, show and copy configs of the package.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Take the recipes that come with the package by name, too, and do what needs no model."""
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, list):
            super().parse_arguments(parser, given)
            return
        parsers = getattr(self, "_subcommand_parsers", {})
        words = recipes.with_paths(given)
        asked = [word for word in words if word != DEBUG]
        if parsers and asked[:1] == ["recipes"]:
            sys.stdout.write(f"{recipes.command(asked[1:], parser.prog)}\n")
            raise SystemExit(0)
        _print_completion(parser.prog, parsers, asked)
        self._parse(parser, words)


def _first_word(words: Any) -> str | None:
    """Return the first word of a command line; None where there is none, or all subcommands are looked at."""
    if not isinstance(words, list) or any(str(word).startswith(_SHELLS) for word in words):
        return None
    return next((word for word in words if word != DEBUG), None)


def _of_several_values(error: Exception) -> str:
    """Return the option of several values that a config gives as one, over which jsonargparse fails; else nothing."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        action, value = frame.f_locals.get("self"), frame.f_locals.get("value", [])
        if isinstance(action, argparse.Action) and action.nargs == "+" and not isinstance(value, list):
            return action.dest
    return ""


def _recipe_meant(message: str) -> str:
    """Return the recipe whose name is nearly that of a file that is not there; nothing where there is none."""
    found = _NO_FILE.search(message)
    return next(iter(get_close_matches(os.path.relpath(found[1]), recipes.recipes(), 1)), "") if found else ""


def _missing(message: str, subcommands: Collection[str]) -> tuple[str, list[str]]:
    """Return the subcommand and the arguments, as they are written, that jsonargparse tells to be missing."""
    found = _MISSING.fullmatch(message)
    keys = found[1].split(", ") if found else []
    first = keys[0].partition(".")[0] if keys else ""
    if first not in subcommands:
        return "", [f"--{key}" for key in keys]
    names = [key.removeprefix(f"{first}.") for key in keys]
    return first, ["CKPT" if (first, name) == ("report", "ckpt_path") else f"--{name}" for name in names]


def _print_completion(program: str, parsers: Mapping[str, Any], words: Sequence[str]) -> None:
    """Print what has a shell complete commands and options, and leave, where that is asked for.

    jsonargparse would offer what every known class takes, too, which takes minutes to write and seconds to load.

    Args:
        program: What is called.
        parsers: Name of a subcommand -> its parser.
        words: The words of the command line.
    """
    asked = [number for number, word in enumerate(words) if word.split("=")[0] == _SHELLS]
    if not asked:
        return
    _, sign, shell = words[asked[0]].partition("=")
    shell = shell if sign else next(iter(words[asked[0] + 1 :]), "")
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"`{_SHELLS}` needs shtab: `pip install 'lightning-easier[cli]'`") from error
    check_choice(_SHELLS, shell, tuple(shtab.SUPPORTED_SHELLS))
    sys.stdout.write(shtab.complete(_plain(program, parsers, shtab.FILE), shell))
    raise SystemExit(0)


def _plain(program: str, parsers: Mapping[str, Any], file: Any) -> argparse.ArgumentParser:
    """Return a parser of names alone: those of the subcommands and their options, and which of these take a file."""
    whole = argparse.ArgumentParser(program)
    subcommands = whole.add_subparsers()
    for name, parser in parsers.items():
        each = subcommands.add_parser(name, help=name)  # shtab leaves out what has no help
        for action in parser._actions:
            options = [option for option in action.option_strings if not option.endswith("+")]
            if not options or "-h" in options:
                continue
            takes_value = action.nargs != 0
            added = each.add_argument(*options) if takes_value else each.add_argument(*options, action="store_true")
            if takes_value and options[-1].lstrip("-") in _FILES:
                added.complete = file  # type: ignore[attr-defined]
    tasks = subcommands.add_parser("recipes", help="recipes").add_subparsers()
    for task in ("list", "show", "copy"):
        named = tasks.add_parser(task, help=task)
        if task != "list":
            named.add_argument("name", choices=[*recipes.recipes()])
    return whole
