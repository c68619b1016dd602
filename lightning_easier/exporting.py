"""Write a model to a file that is shipped, and check that the file computes the same."""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_easier.report import ExportReport, Parity
from lightning_easier.sites.activations import unwrap
from lightning_easier.support import storage
from lightning_easier.support.batches import as_arguments
from lightning_easier.support.calls import Arguments, call, mapped
from lightning_easier.support.inference import (
    check_weights,
    forward,
    relative_difference,
    tensors_in,
    tolerance_for,
    without_masks,
)
from lightning_easier.support.programs import export_program, quiet, remedy_for
from lightning_easier.support.storage import first_line

Format = Literal["onnx", "pt2"]
FORMATS: tuple[str, ...] = get_args(Format)


class ExportError(RuntimeError):
    """A model that can't be exported, or a file that does not compute the same; no file was written."""


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    format: Format | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Export a model in eval mode to ONNX or a ``torch.export`` archive, checked against the model before it is kept.

    The file is run (by ONNX Runtime, or after loading it again) on the example inputs and on a batch of another size,
    and its outputs are compared with the model's. A file that differs is not written.

    Args:
        model: Any module that ``torch.export`` accepts; a copy on the CPU is exported, the model is not changed.
        path: Where to write; its folder is made if need be, an existing file is replaced only by one that passed.
        example_inputs: A tensor, the tuple of the forward's positional arguments, or a dictionary of arguments by name
            (labels are left out, where the forward can do without), each with the batch axis first.
        format: ``"onnx"`` or ``"pt2"``; by the suffix of ``path`` when not given.
        dynamic_batch: Whether the file takes any batch size. Without, it takes the example's only, and only that is
            checked.
        tolerance: Relative difference up to which the file counts as equal; by default what rounding explains.

    Returns:
        The path, the format and the parity figures.

    Raises:
        TypeError: If ``model`` is not a Module, or ``example_inputs`` are not tensors.
        ValueError: If the format is not known, ``path`` is a folder, ``tolerance`` is negative, ``example_inputs`` hold
            no sample, they or the model are on the meta device, or the model does not accept them.
        ModuleNotFoundError: If ONNX is asked for and its packages are not installed.
        ExportError: If the export fails, or the file does not compute the same.
        OSError: If the file can't be written; one that was there is as it was.
    """
    path = Path(path)
    format = _format_of(path, format)
    if path.is_dir():
        raise ValueError(f"Expected argument `path` to be a file, but {path} is a folder")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"Expected argument `tolerance` to be None or at least 0, but got {tolerance}")
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"Export to ONNX needs {', '.join(missing)}: `pip install 'lightning-easier[onnx]'`", name=missing[0]
            )
    model = unwrap(model)
    arguments = mapped(lambda argument: argument.detach().cpu(), as_arguments(example_inputs, model))
    if dynamic_batch and any(argument.ndim == 0 for argument in arguments):
        raise ValueError(
            "Expected argument `example_inputs` to have a batch axis first, but got a tensor without axes; pass "
            "`dynamic_batch=False` if there is none"
        )
    check_weights(model)
    source = without_masks(model).cpu().eval()
    with torch.no_grad():
        expected = forward(source, arguments, "example_inputs")
    if tolerance is None:
        tolerance = tolerance_for(expected)

    program = _capture(source, arguments, dynamic_batch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / f"model.{format}"
            run = _WRITERS[format](program, written)
            checks = [arguments, _larger_batch(arguments)] if dynamic_batch else [arguments]
            parity = [_compare(source, run, inputs, path) for inputs in checks]
            for result in parity:
                if not result.relative_difference <= tolerance:
                    raise ExportError(
                        f"The {format} file differs from {type(model).__name__} by {result.relative_difference:.1e} "
                        f"(relative) at batch size {result.batch_size}, more than `tolerance` {tolerance:.0e}; {path} "
                        f"was not written"
                    )
            storage.put_in_place(written, path)
    except OSError as error:
        raise storage.not_written(path, error, "Make room there, or export to another folder.") from error
    return ExportReport(str(path), format, path.stat().st_size, parity, tolerance)


def _format_of(path: Path, format: str | None) -> Format:
    wanted = format if format is not None else path.suffix.removeprefix(".")
    if wanted not in FORMATS:
        given = f"`format` {format!r}" if format is not None else f"`path` {str(path)!r}"
        raise ValueError(f"Expected the format to be one of {FORMATS} (or a path to end so), but got {given}")
    return wanted  # type: ignore[return-value]


def _capture(model: nn.Module, arguments: Arguments, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """Capture with ``torch.export``; it takes a batch of 1 for a constant, so a larger one is shown to it."""
    sizes: list[Any] | None = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shown = _larger_batch(arguments) if len(arguments[0]) == 1 else arguments
        sizes = [{0: batch} if len(argument) == len(arguments[0]) else None for argument in arguments]
    else:
        shown = arguments
    reasons: list[Exception] = []
    # Reading its Python passes on a batch size that runs through `len`, which running it takes for a constant
    for reads_code in (False, True)[: 1 + dynamic_batch]:
        try:
            with torch.no_grad(), quiet():
                return export_program(model, shown, sizes, reads_code=reads_code)
        except Exception as error:  # torch.export has no common base for what it raises
            reasons.append(error)
    reason = reasons[0]
    remedy = remedy_for(reason)
    if remedy is None and dynamic_batch:
        remedy = "`dynamic_batch=False` exports the example's batch size only"
    raise ExportError(
        f"torch.export does not take {type(model).__name__}: {first_line(reason)}.{f' {remedy}.' if remedy else ''}"
    ) from reason


_Run = Callable[[Arguments], list[Tensor]]


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> _Run:
    import onnxruntime

    try:
        torch.onnx.export(program, (), path, external_data=False, verbose=False)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"torch.onnx can't translate the model: {first_line(error)}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has no public base for what it raises
        reason = first_line(error)
        raise ExportError(f"ONNX Runtime does not take the file, so it can't be checked: {reason}") from error
    names = [node.name for node in session.get_inputs()]

    def run(inputs: Arguments) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed) if output is not None]

    return run


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> _Run:
    whole = io.BytesIO()
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())  # torch's own writer ends the process when the disk is full
    loaded = torch.export.load(path).module()
    return lambda inputs: tensors_in(call(loaded, inputs))


_WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path], _Run]] = {"onnx": _write_onnx, "pt2": _write_pt2}


def _larger_batch(arguments: Arguments) -> Arguments:
    """One sample more in every argument that has the batch axis."""
    size = len(arguments[0])
    return mapped(lambda x: torch.cat([x, x[-1:].flip(-1)]) if len(x) == size else x, arguments)


def _compare(model: nn.Module, run: _Run, inputs: Arguments, path: Path) -> Parity:
    with torch.no_grad():
        expected = tensors_in(call(model, inputs))
        try:
            output = run(inputs)
        except Exception as error:
            raise ExportError(
                f"The exported file does not run at batch size {len(inputs[0])}: {error}; {path} was not written"
            ) from error
    pairs = [(a, b) for a, b in zip(output, expected, strict=False) if a.shape == b.shape and b.numel()]
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)
    return Parity(len(inputs[0]), largest, relative_difference(output, expected))
