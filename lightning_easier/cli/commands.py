"""What each subcommand does. How it is asked for is in :mod:`lightning_easier.cli.options`."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import rich
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_easier.cli.keeping import kept, save_whole
from lightning_easier.cli.reading import named_as_options, read_pruning_report
from lightning_easier.cli.session import Mode, Monitor, Session
from lightning_easier.collapsing import collapse as collapse_network
from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.exporting import check_export, check_file
from lightning_easier.exporting import export as export_network
from lightning_easier.measure.probe import measure_entropy
from lightning_easier.pruning.candidates import candidates as list_candidates
from lightning_easier.pruning.compress import check_globs
from lightning_easier.pruning.compress import compress as compress_network
from lightning_easier.pruning.targets import check_target
from lightning_easier.report import Report, check_report_path, save_report
from lightning_easier.support.arguments import check_integer, check_non_negative, check_positive
from lightning_easier.support.calls import Arguments
from lightning_easier.support.storage import check_writable, first_line, replacing

Files = Sequence[str] | None

MakeSession = Callable[..., Session]
"""Makes a session, of ``network`` and ``inputs_of``."""


def candidates(
    start: MakeSession,
    *,
    ckpt_path: str | None,
    max_batches: int,
    gates: bool,
    report: Files,
    network: str | None,
    inputs_of: Any,
    weights_only: bool | None,
) -> None:
    """List the activations, the linear operators around each, and what would merge if it were linear."""
    check_integer("--max_batches", max_batches, 0)
    _check_reports(report, pictures=False)
    session = start(network, inputs_of)
    session.load(ckpt_path, weights_only)
    entropies = None
    if max_batches > 0:
        batches = islice(session.validation_batches(), max_batches)
        entropies = measure_entropy(session.network, batches, inputs_of=inputs_of)
    _show(list_candidates(session.network, entropies, gates=gates), report)


def collapse(
    start: MakeSession,
    *,
    ckpt_path: str,
    output: str | None,
    objective: Objective,
    mode: str,
    sites: Sequence[str] | None,
    samples: int,
    batch_size: int | None,
    report: Files,
    network: str | None,
    inputs_of: Any,
    weights_only: bool | None,
    **names: Any,
) -> None:
    """Merge the neighbouring linear operators of a pruned checkpoint, and report what that saves."""
    _check_sizes(batch_size, samples)
    if (mode == "fit") != (sites is not None):
        raise ValueError(
            f"Expected arguments `--mode` and `--sites` to go together, but got {mode!r} and {sites}: `--mode fit` "
            f"replaces the chains around the activations in `--sites`, which `candidates` lists"
        )
    export_to = _Exporting(output, names)
    _check_reports(report)
    session = start(network, inputs_of)
    session.load(ckpt_path, weights_only)
    inputs = export_to.checked(session, batch_size)
    fitting: dict[str, Any] = {}
    if mode == "fit":
        fitting = {"mode": "fit", "sites": sites, "calibration": session.calibration(samples), "inputs_of": inputs_of}
    result = collapse_network(session.network, inputs, objective=objective, **fitting)
    with _shown_at_last(result.report, report), export_to.keeping(result.model):
        export_to(result.model, inputs)


def export(
    start: MakeSession,
    *,
    ckpt_path: str,
    output: str,
    collapse: bool,
    objective: Objective,
    batch_size: int | None,
    report: Files,
    network: str | None,
    inputs_of: Any,
    weights_only: bool | None,
    **names: Any,
) -> None:
    """Export a pruned checkpoint to ONNX or pt2, collapsed first, and check the file against the model."""
    _check_sizes(batch_size)
    if report and not collapse:
        raise ValueError("Expected argument `--report` to be left out with `--no-collapse`: it is of the collapse")
    export_to = _Exporting(output, names)
    _check_reports(report)
    session = start(network, inputs_of)
    session.load(ckpt_path, weights_only)
    inputs = export_to.checked(session, batch_size)
    if not collapse:
        export_to(session.network, inputs)
        return
    result = collapse_network(session.network, inputs, objective=objective)
    with _shown_at_last(result.report, report):
        export_to(result.model, inputs)


def compress(
    start: MakeSession,
    *,
    ckpt_path: str | None,
    output: str | None,
    fitted: str | None,
    score: bool,
    monitor: str | None,
    mode: Mode | None,
    tolerance: float | None,
    samples: int,
    batch_size: int | None,
    report: Files,
    network: str | None,
    inputs_of: Any,
    weights_only: bool | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset_version: int | None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None,
    **options: Any,
) -> None:
    """Make a trained network shallower and faster in minutes, without training."""
    _check_sizes(batch_size, samples)
    of_score = {"monitor": monitor, "mode": mode, "tolerance": tolerance}
    of_score = {name: value for name, value in of_score.items() if value is not None}
    if of_score and not score:
        raise ValueError(
            f"Expected argument {_listed(of_score)} to be left out with `--no-score`: there is no score then, and "
            f"`--max_drift` tells what stays"
        )
    if tolerance is not None:
        options["tolerance"] = tolerance
    _check_limits(options)
    if fitted is not None:
        if Path(fitted).suffix != ".pt":
            raise ValueError(f"Expected argument `--fitted` to end in .pt, but got {fitted!r}")
        check_writable("--fitted", Path(fitted))
    names = {
        "input_names": input_names, "output_names": output_names, "opset_version": opset_version,
        "dynamic_axes": dynamic_axes,
    }  # fmt: skip
    export_to = _Exporting(output, names)
    _check_reports(report)
    session = start(network, inputs_of)
    session.load(ckpt_path, weights_only)
    check_globs(session.network, options["include"], options["exclude"])
    inputs = export_to.checked(session, batch_size)
    calibration = session.calibration(samples)
    told = Monitor(monitor, mode)
    scores: list[float] = []
    if score:
        rank_zero_info("Validating the network as it is ...")
        scores.append(session.score(session.network, told))
        session.module.to(session.device)

    def evaluate(network: nn.Module) -> float:
        return scores.pop() if scores else session.score(network, told)  # first of the network as it is

    result = compress_network(
        session.network, calibration, example_inputs=inputs, inputs_of=inputs_of,
        evaluate=evaluate if score else None, mode=told.mode, **options,
    )  # fmt: skip
    with _shown_at_last(result.report, report), export_to.keeping(result.model, fitted):
        try:
            if fitted is not None:
                with replacing(fitted) as new:
                    save_whole(result.fitted, new)
                _say(f"{fitted}: the network to train on, for `torch.load(..., weights_only=False)`")
        finally:
            export_to(result.model, inputs)


def report(*, ckpt_path: str, output: Files, weights_only: bool | None) -> None:
    """Report what a pruning run did, round by round, from one of its checkpoints."""
    _check_reports(output, "--output")
    with named_as_options("CKPT"):
        found = read_pruning_report(ckpt_path, weights_only=weights_only is not False)
    _show(found, output)


class _Exporting:
    """Exports to a file, if one is asked for.

    Args:
        output: The file.
        names: What there is to say of it: arguments of :func:`~lightning_easier.export`.

    Raises:
        ValueError: If its suffix is none that is known, or there is something to say of a file that is not asked for.
    """

    def __init__(self, output: str | None, names: Mapping[str, Any]) -> None:
        self._output = output
        self._is_written = False
        self._names = {name: value for name, value in names.items() if value is not None}
        if output is not None:
            check_file("--output", Path(output))
        elif self._names:
            raise ValueError(f"Expected argument `--output` with {_listed(self._names)}")

    def checked(self, session: Session, batch_size: int | None) -> Arguments:
        """Return example inputs, and refuse now what the export of the network would refuse at the end."""
        if self._output is not None and Path(self._output).suffix == ".onnx":
            _check_not_bfloat16(session)
        inputs = session.example_inputs(batch_size)
        if self._output is not None:
            check_export(session.network, self._output, inputs, **self._names)
        return inputs

    def keeping(self, network: nn.Module, *others: str | None) -> AbstractContextManager[None]:
        """Have a network that took long to make survive a block that fails to export it.

        Args:
            network: The network.
            *others: Files that the block writes besides.
        """
        if self._output is None:
            return nullcontext()
        paths = [Path(other) for other in others if other is not None]
        return kept(network, Path(self._output), lambda: self._is_written, paths)

    def __call__(self, network: nn.Module, inputs: Arguments) -> None:
        if self._output is not None:
            report = export_network(network, self._output, inputs, **self._names)
            self._is_written = True
            rich.print(report)


def _check_not_bfloat16(session: Session) -> None:
    """Refuse an ONNX file of what computes in bfloat16."""
    if session.precision == "bf16-true":
        raise ValueError(
            f"Expected argument `--trainer.precision` to be 32-true or 16-true for an ONNX file, since ONNX Runtime "
            f"has hardly an operator for bfloat16, but got {session.precision!r}; a .pt2 file may be so"
        )
    if any(parameter.dtype == torch.bfloat16 for parameter in session.network.parameters()):
        raise ValueError(
            f"Expected argument `--trainer.precision` to be 16-true for an ONNX file of a network that is built in "
            f"bfloat16, since ONNX Runtime has hardly an operator for it, but got {session.precision!r}, which leaves "
            f"it so. Build it in float32 (its weights load into that), or write a .pt2 file in bf16-true"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`--{name}`" for name in names)


def _check_sizes(batch_size: int | None, samples: int = 1) -> None:
    if batch_size is not None:
        check_integer("--batch_size", batch_size, 1)
    check_integer("--samples", samples, 1)


def _check_limits(options: Mapping[str, Any]) -> None:
    """Refuse at once what :func:`~lightning_easier.compress` refuses once the network is validated."""
    if "tolerance" in options:
        check_non_negative("--tolerance", options["tolerance"])
    check_target(options["target_speedup"], options["target_depth"], "--target_")
    for name, check in (("max_drift", check_non_negative), ("max_minutes", check_positive)):
        value = options[name]
        if value is not None and value != math.inf:
            check(f"--{name}", value)
    if options["finetune"] is not None:
        check_integer("--finetune", options["finetune"], 1)


def _check_reports(files: Files, argument: str = "--report", *, pictures: bool = True) -> None:
    for file in files or ():
        check_report_path(argument, file, pictures=pictures)


@contextmanager
def _shown_at_last(report: Report, files: Files) -> Iterator[None]:
    """Show a report after the block, which writes what took the longest to make, whether it fails or not."""
    try:
        yield
    except BaseException as failure:
        try:
            _show(report, files)
        except Exception as error:  # of the two failures the first says where the network is
            failure.add_note(f"The report could not be shown, either: {first_line(error)}")
        raise
    _show(report, files)


def _show(report: Report, files: Files) -> None:
    rich.print(report)
    for file in files or ():
        save_report(report, file)
        _say(f"{file} was written.")


def _say(text: str) -> None:
    """Write a line with a path in it, in which rich would take brackets for markup."""
    sys.stdout.write(f"{text}\n")
