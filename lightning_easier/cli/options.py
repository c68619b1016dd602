"""The options of each subcommand, and its help: one screen, with examples and nothing that it does not use."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse import ActionYesNo, ArgumentParser

from lightning_easier.cli import commands
from lightning_easier.cli.errors import DEBUG

_WIDTH = 100

_OF_CONFIGS = (
    ("-c, --config FILE", "the config of the run, such as lightning_logs/version_0/config.yaml, or a recipe's name; "
     "several are put together"),
    ("--model, --data", "the LightningModule and its data, where the config has none; their options, "
     "--model.lr for example, and the Trainer's, --trainer.accelerator, are as for fit"),
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: Its name.
        run: What it does.
        add_options: Adds its own options to a group of a parser, which has model, data and Trainer besides.
        examples: Three command lines, without the program and the name.
        needs_model: Whether it works on a model; else it takes none, and no config.
    """

    name: str
    run: Callable[..., None]
    add_options: Callable[["_Added"], None]
    examples: Sequence[str] = field(default=())
    needs_model: bool = True

    @property
    def about(self) -> str:
        """What it does, in a line."""
        return str(self.run.__doc__).partition("\n")[0]


def _add_candidates(group: "_Added") -> None:
    _add_checkpoint(group, required=False)
    group.add_argument(
        "--max_batches", type=int, default=0, metavar="N",
        help="measure the entropies on so many validation batches (none by default)",
    )  # fmt: skip
    _add_flag(group, "--gates", False, "list bounded activations, such as sigmoids, too")
    _add_report(group, kinds=".md, .json or .txt")
    _add_reading(group)


def _add_collapse(group: "_Added") -> None:
    _add_checkpoint(group, required=True)
    _add_output(group, "write the collapsed network to this file, .onnx or .pt2")
    _add_objective(group)
    group.add_argument(
        "--mode", type=Literal["exact", "fit"], default="exact",
        help="exact: the same function; fit: besides, fitted operators replace the chains around --sites (default: "
        "exact)",
    )  # fmt: skip
    group.add_argument("--sites", type=str, default=None, nargs="+", metavar="NAME", help="for --mode fit: activations")
    _add_samples(group, "for --mode fit: fit to")
    _add_batch_size(group)
    _add_report(group)
    _add_reading(group)
    _add_names(group)


def _add_export(group: "_Added") -> None:
    _add_checkpoint(group, required=True)
    _add_output(group, "the file, .onnx or .pt2 (default: model.onnx)", "model.onnx")
    _add_flag(group, "--collapse", True, "collapse the network first (the default), or export it as it is")
    _add_objective(group)
    _add_batch_size(group)
    _add_report(group)
    _add_reading(group)
    _add_names(group)


def _add_compress(group: "_Added") -> None:
    _add_checkpoint(group, required=False)
    _add_output(group, "write the compressed network to this file, .onnx or .pt2")
    add = group.add_argument
    add("--target_speedup", type=float | None, default=None, metavar="X", help="stop when it is X times as fast")
    add("--target_depth", type=int | None, default=None, metavar="N", help="stop at N operators in a row")
    add("--tolerance", type=float, default=None, metavar="T",
        help="by how much the score may fall (default: 0.01)")  # fmt: skip
    add(
        "--monitor", type=str | None, default=None, metavar="NAME",
        help="the score, of what a validation logs; that of the config's callbacks, or the only one, by default",
    )  # fmt: skip
    add("--mode", type=Literal["min", "max"] | None, default=None,
        help="whether a lower or a higher score is better (told by its name)")  # fmt: skip
    _add_flag(group, "--score", True, "validate after every step (the default), or go by --max_drift alone")
    add("--max_drift", type=float | None, default=None, metavar="D",
        help="how large a share of the outputs' variance may change (0.1 with --no-score)")  # fmt: skip
    add("--max_minutes", type=float | None, default=None, metavar="M", help="stop after M minutes")
    add("--finetune", type=int | None, default=None, metavar="STEPS",
        help="train what is left for so many steps, without labels")  # fmt: skip
    add("--include", type=str, default=None, nargs="+", metavar="GLOB", help="activations that may go")
    add("--exclude", type=str, default=None, nargs="+", metavar="GLOB", help="those that may not")
    _add_objective(group)
    _add_samples(group, "fit to")
    add("--fitted", type=str | None, default=None, metavar="FILE.pt", help="write the network to train on, too")
    _add_batch_size(group)
    _add_report(group)
    _add_reading(group)
    _add_names(group)


def _add_report_of_a_run(group: "_Added") -> None:
    group.add_argument("ckpt_path", type=str, metavar="CKPT", help="a checkpoint of a run with a pruning callback")
    _add_report(group, "--output")
    _add_weights_only(group)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "candidates", commands.candidates, _add_candidates,
            ("--config config.yaml",
             "--config config.yaml --max_batches 6 --report candidates.md",
             "--config config.yaml --ckpt_path last.ckpt --gates"),
        ),
        Command(
            "compress", commands.compress, _add_compress,
            ("--config config.yaml --ckpt_path last.ckpt --output model.onnx",
             "--config config.yaml --ckpt_path last.ckpt --target_speedup 1.5 --finetune 300",
             "--config config.yaml --no-score --max_drift 0.05 --report compress.png"),
        ),
        Command(
            "collapse", commands.collapse, _add_collapse,
            ("--config config.yaml --ckpt_path round_3.ckpt",
             "--config config.yaml --ckpt_path round_3.ckpt --output model.pt2 --report collapse.svg",
             "--config config.yaml --ckpt_path last.ckpt --mode fit --sites model.relu"),
        ),
        Command(
            "export", commands.export, _add_export,
            ("--config config.yaml --ckpt_path round_3.ckpt --output model.onnx",
             "--config config.yaml --ckpt_path round_3.ckpt --no-collapse",
             "--config config.yaml --ckpt_path round_3.ckpt --input_names image --output_names scores"),
        ),
        Command(
            "report", commands.report, _add_report_of_a_run,
            ("lightning_logs/version_0/entropy_pruning/round_3.ckpt",
             "round_3.ckpt --output report.md report.json",
             "round_3.ckpt --output report.png"),
            needs_model=False,
        ),
    )
}  # fmt: skip
"""The subcommands, by name."""


def add_options(parser: ArgumentParser, command: Command) -> list[str]:
    """Add the options of a subcommand, and its help.

    Args:
        parser: Made without a help of its own.
        command: The subcommand.

    Returns:
        The names of what its function is called with.
    """
    own = _Added(parser.add_argument_group(f"Options of {command.name}"))
    command.add_options(own)
    parser.add_argument("-h", "--help", action=_ShortHelp, command=command, own=own.actions, help=argparse.SUPPRESS)
    return [action.dest for action in own.actions]


class _Added:
    """Adds arguments to a group, and knows which."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.actions: list[argparse.Action] = []

    def add_argument(self, *args: Any, **kwargs: Any) -> None:
        self.actions.append(self._group.add_argument(*args, **kwargs))


class _ShortHelp(argparse.Action):
    """Shows what a subcommand uses, and leaves."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, command: Command, own: Sequence[argparse.Action], help: str
    ) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self._command, self._own = command, own

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(self.text(parser.prog.replace(" [options]", "")))
        parser.exit()

    def text(self, prog: str) -> str:
        """Return the help."""
        formatter = argparse.HelpFormatter(prog, max_help_position=28, width=_WIDTH)
        positional = [action for action in self._own if not action.option_strings]
        places = "".join(f" {action.metavar}" for action in positional)
        config = " --config FILE" if self._command.needs_model else ""
        formatter.add_usage(f"{prog}{config}{places} [options]", [], [])
        formatter.add_text(self._command.about)
        formatter.start_section("options")
        if self._command.needs_model:
            for option, about in _OF_CONFIGS:
                formatter.add_argument(argparse.Action([option], "config", nargs=0, help=about))
        for action in [*positional, *(action for action in self._own if action.option_strings)]:
            formatter.add_argument(_plain(action))
        formatter.add_argument(argparse.Action([DEBUG], "debug", nargs=0, help="show the traceback of an error"))
        formatter.end_section()
        examples = "\n".join(f"  {prog} {example}" for example in self._command.examples)
        return f"{formatter.format_help()}\nexamples:\n{examples}\n"


def _plain(action: argparse.Action) -> argparse.Action:
    """Return an action as argparse shows it: jsonargparse has choices and lists in its types."""
    options = [option for option in action.option_strings if not option.endswith("+")]
    metavar = f"{action.metavar} ..." if action.nargs == "+" else _metavar(action)
    nargs = 0 if isinstance(action, ActionYesNo) else None
    return argparse.Action(options, action.dest, nargs, metavar=metavar, help=action.help)


def _metavar(action: argparse.Action) -> Any:
    choices = {"objective": "{latency,macs,depth}", "mode": "{min,max}" if action.default is None else "{exact,fit}"}
    return action.metavar or choices.get(action.dest)


def _add_flag(group: "_Added", option: str, default: bool, about: str) -> None:
    group.add_argument(option, action=ActionYesNo(no_prefix="no-"), nargs="?", default=default, help=about)


def _add_checkpoint(group: "_Added", *, required: bool) -> None:
    about = "the checkpoint" if required else "the checkpoint; the model's own weights by default"
    kind: Any = str if required else str | None
    group.add_argument("--ckpt_path", type=kind, required=required, metavar="CKPT", help=about)


def _add_output(group: "_Added", about: str, default: str | None = None) -> None:
    group.add_argument("--output", type=str if default else str | None, default=default, metavar="FILE", help=about)


def _add_objective(group: "_Added") -> None:
    group.add_argument(
        "--objective", type=Literal["latency", "macs", "depth"], default="latency",
        help="what has to become less (default: latency)",
    )  # fmt: skip


def _add_samples(group: "_Added", what: str) -> None:
    group.add_argument(
        "--samples", type=int, default=1000, metavar="N", help=f"{what} so many training samples (default: 1000)"
    )


def _add_report(group: "_Added", option: str = "--report", kinds: str = ".md, .json, .txt, .png, .svg or .pdf") -> None:
    group.add_argument(
        option, type=str, default=None, nargs="+", metavar="FILE",
        help=f"write the report to files, too: {kinds}",
    )  # fmt: skip


def _add_batch_size(group: "_Added") -> None:
    group.add_argument(
        "--batch_size", type=int | None, default=None, metavar="N",
        help="of the example that is timed and exported, samples are repeated; that of the data by default",
    )  # fmt: skip


def _add_reading(group: "_Added") -> None:
    """Add how checkpoints and batches are read."""
    add = group.add_argument
    add("--network", type=str | None, default=None, metavar="NAME",
        help="the submodule to work on; the module itself by default")  # fmt: skip
    add("--inputs_of", type=Callable | None, default=None, metavar="own.function",
        help="returns the inputs in a batch, where they are not found")  # fmt: skip
    _add_weights_only(group)


def _add_weights_only(group: "_Added") -> None:
    group.add_argument(
        "--weights_only", type=bool | None, default=None, metavar="false",
        help="false: unpickle any object of the checkpoint, if you trust it",
    )  # fmt: skip


def _add_names(group: "_Added") -> None:
    """Add what the file calls what it takes and returns."""
    add = group.add_argument
    add("--input_names", type=str, default=None, nargs="+", metavar="NAME", help="what ONNX calls inputs")
    add("--output_names", type=str, default=None, nargs="+", metavar="NAME",
        help="what it calls outputs")  # fmt: skip
    add("--opset_version", type=int | None, default=None, metavar="N", help="the version of ONNX's operators")
    add("--dynamic_axes", type=dict[str, dict[int, str]] | None, default=None, metavar="JSON",
        help="sizes that are free besides the batch's: '{\"ids\": {\"1\": \"length\"}}'")  # fmt: skip
