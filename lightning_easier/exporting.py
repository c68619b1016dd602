"""Write a model to a file that is shipped, and check that the file computes the same."""

import io
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim

from lightning_easier.report import ExportReport, Parity
from lightning_easier.sites.activations import unwrap
from lightning_easier.support import storage
from lightning_easier.support.arguments import check_integer
from lightning_easier.support.batches import as_arguments
from lightning_easier.support.calls import Arguments, call, copies, mapped, named_arguments
from lightning_easier.support.inference import (
    check_weights,
    forward,
    full_float32,
    relative_difference,
    tensors_in,
    tolerance_for,
    without_masks,
)
from lightning_easier.support.programs import export_program, quiet, remedy_for
from lightning_easier.support.progress import Steps
from lightning_easier.support.storage import first_line

Format = Literal["onnx", "pt2"]
FORMATS: tuple[str, ...] = get_args(Format)
_LARGEST = 2**31 - 1
"""Of sizes that are free: torch 2.6 asks whether one is the largest integer, where a slice has no end."""


class ExportError(RuntimeError):
    """A model that can't be exported, or a file that does not compute the same; no file was written."""


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    format: Format | None = None,
    dynamic_batch: bool = True,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    tolerance: float | None = None,
) -> ExportReport:
    """Export a model in eval mode to ONNX or a ``torch.export`` archive, checked against the model before it is kept.

    The file is run (by ONNX Runtime, or after loading it again) on the example inputs and on inputs that are larger
    along all axes of any size (a larger batch of shorter ones where the model takes no longer), and its outputs are
    compared with the model's. A file that differs is not written.

    Args:
        model: Any module that ``torch.export`` accepts; a copy on the CPU is exported, the model is not changed.
        path: Where to write; its folder is made if need be, an existing file is replaced only by one that passed.
        example_inputs: A tensor, the tuple of the forward's positional arguments, or a dictionary of arguments by name
            (labels are left out, where the forward can do without), each with the batch axis first.
        format: ``"onnx"`` or ``"pt2"``; by the suffix of ``path`` when not given.
        dynamic_batch: Whether the file takes any batch size. Without, it takes the example's only, and only that is
            checked.
        dynamic_axes: Besides the batch: name of an argument of the forward -> axis -> what its size is called, such as
            ``{"input_ids": {1: "length"}, "attention_mask": {1: "length"}}``. What is called alike has one size. It may
            be any from 2 up, as far as the model takes it. An ONNX file calls the sizes so, and the batch's ``batch``.
        input_names: For ONNX: what the file calls its inputs; the names of the forward's arguments by default.
        output_names: For ONNX: what it calls its outputs, the tensors in what the model returns; by default the keys of
            a dictionary (such as a ModelOutput of Hugging Face), or what torch calls them.
        opset_version: For ONNX: which version of its operators; torch's choice by default.
        tolerance: Relative difference up to which the file counts as equal; by default what rounding explains.

    Returns:
        The path, the format and the parity figures.

    Raises:
        TypeError: If ``model`` is not a Module, ``example_inputs`` are not tensors, or another argument is of another
            type.
        ValueError: If the format is not known, ``path`` is a folder, ``tolerance`` is negative, ``example_inputs`` hold
            no sample, they or the model are on the meta device, the model does not accept them, it computes in bfloat16
            and the format is ONNX, or there are not as many names as tensors, or axes that the inputs do not have.
        ModuleNotFoundError: If ONNX is asked for and its packages are not installed.
        ExportError: If the export fails, or the file does not compute the same.
        OSError: If the file can't be written; one that was there is as it was.
    """
    options = _Options(format, dynamic_batch, dynamic_axes, input_names, output_names, opset_version, tolerance)
    order = _ordered(model, Path(path), example_inputs, options)
    path = Path(path)
    with Steps("Exporting", 3) as steps:
        steps.begin("capture")
        program = _capture(order.model, order.inputs, order.free)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                written = Path(folder) / f"model.{order.format}"
                steps.begin("write")
                run = (
                    _write_onnx(program, written, order.names, order.free)
                    if order.format == "onnx"
                    else _write_pt2(program, written)
                )
                steps.begin("check")
                parity = _checked(order, run, path, type(model).__name__)
                storage.put_in_place(written, path)
        except OSError as error:
            raise storage.not_written(path, error, "Make room there, or export to another folder.") from error
    return ExportReport(str(path), order.format, path.stat().st_size, parity, order.tolerance)


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of :func:`export`."""

    format: Format | None = None
    dynamic_batch: bool = True
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    opset_version: int | None = None
    tolerance: float | None = None


class _Order(NamedTuple):
    """What is to be exported, and how; its arguments are checked."""

    model: nn.Module
    format: Format
    inputs: Arguments
    free: list["_Axes"]
    names: "_Onnx"
    tolerance: float


def check_export(
    model: nn.Module, path: str | Path, example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], **options: Any
) -> None:
    """Raise what :func:`export` would raise of its arguments, without exporting: for who has long work to do first.

    Of a version of ONNX's operators, one layer tells whether torch writes it here.

    Args:
        model: The model, or what it will be made of: called alike, it returns as many tensors.
        path: As for :func:`export`.
        example_inputs: As there.
        **options: As there.

    Raises:
        TypeError: As :func:`export`.
        ValueError: As there.
        ModuleNotFoundError: As there.
        OSError: As there, if the file can't be written.
    """
    order = _ordered(model, Path(path), example_inputs, _Options(**options))
    if order.names.opset is not None:
        _try_opset(order.names.opset)


def _try_opset(version: int) -> None:
    """Refuse a version of ONNX's operators that torch can't even write one layer in.

    Raises:
        ValueError: If it can't.
    """
    layer = nn.utils.skip_init(nn.Linear, 1, 1).requires_grad_(False).eval()  # no random number is drawn
    with quiet():
        program = torch.export.export(layer, (torch.zeros(1, 1, device="cpu"),))  # whatever the default is
    with tempfile.TemporaryDirectory() as folder:
        try:
            _write_onnx(program, Path(folder) / "layer.onnx", _Onnx(["x"], None, version), [])
        except ExportError as error:
            raise ValueError(
                f"Expected argument `opset_version` to be a version that can be written, but got {version}: {error}"
            ) from error


def _ordered(
    model: nn.Module,
    path: Path,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    options: _Options,
) -> _Order:
    """Check the arguments of an export, and prepare the model."""
    format = check_file("path", path, options.format)
    if options.tolerance is not None and not options.tolerance >= 0:
        raise ValueError(f"Expected argument `tolerance` to be None or at least 0, but got {options.tolerance}")
    if format == "pt2" and any(
        each is not None for each in (options.input_names, options.output_names, options.opset_version)
    ):
        raise ValueError(
            "Expected arguments `input_names`, `output_names` and `opset_version` to be None: they belong to ONNX, and "
            "a pt2 file takes and returns what the model does"
        )
    if options.opset_version is not None:
        _check_opset(options.opset_version)
    model = unwrap(model)
    arguments = mapped(lambda argument: argument.detach().cpu(), as_arguments(example_inputs, model))
    if options.dynamic_batch and any(argument.ndim == 0 for argument in arguments):
        raise ValueError(
            "Expected argument `example_inputs` to have a batch axis first, but got a tensor without axes; pass "
            "`dynamic_batch=False` if there is none"
        )
    check_weights(model)
    names = named_arguments(model, arguments)
    free = _free_axes(names, arguments, options.dynamic_batch, options.dynamic_axes or {})
    source = without_masks(model).cpu().eval()
    with torch.no_grad():
        expected = forward(source, arguments, "example_inputs")
    outputs = len(tensors_in(expected))
    inputs = _checked_names("input_names", options.input_names, len(names)) or names
    given = _checked_names("output_names", options.output_names, outputs)
    if shared := set(inputs) & set(given or ()):
        raise ValueError(
            f"Expected argument `output_names` to hold other names than the inputs have, {list(inputs)}, but got "
            f"{given}: take another name for {sorted(shared)}, or other `input_names`"
        )
    wanted = _Onnx(inputs, given or _keys(expected, inputs), options.opset_version)
    if format == "onnx":
        _check_not_bfloat16(source, arguments)
    tolerance = tolerance_for(expected) if options.tolerance is None else options.tolerance
    return _Order(source, format, arguments, free, wanted, tolerance)


def _check_opset(version: Any) -> None:
    """Refuse a version of ONNX's operators that the installed package does not know.

    Raises:
        TypeError: If it is no integer.
        ValueError: If there is no such version.
    """
    import onnx

    check_integer("opset_version", version, 1)
    latest = onnx.defs.onnx_opset_version()
    if version > latest:
        raise ValueError(
            f"Expected argument `opset_version` to be at most {latest}, the last one that onnx {onnx.__version__} "
            f"knows, but got {version}"
        )


def check_file(argument: str, path: Path, format: str | None = None) -> Format:
    """Return the format of a file that a model is to be exported to, and refuse one that can't be written.

    Args:
        argument: What the path was given as, for errors.
        path: The file.
        format: One of :data:`FORMATS`; by the suffix of the path when not given.

    Raises:
        ValueError: If the format is not known, or the path is a folder.
        ModuleNotFoundError: If ONNX is asked for and its packages are not installed.
        OSError: If the file can't be written.
    """
    wanted = format if format is not None else path.suffix.removeprefix(".")
    if wanted not in FORMATS:
        given = f"`format` {format!r}" if format is not None else f"`{argument}` {str(path)!r}"
        raise ValueError(f"Expected the format to be one of {FORMATS} (or a path to end so), but got {given}")
    storage.check_writable(argument, path)
    if wanted == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"Export to ONNX needs {', '.join(missing)}: `pip install 'lightning-easier[onnx]'`", name=missing[0]
            )
    return wanted  # type: ignore[return-value]


_Axes = Mapping[int, Any]
"""Axis -> what torch.export calls its size."""


def _free_axes(
    names: Sequence[str],
    arguments: Arguments,
    dynamic_batch: bool,
    dynamic_axes: Mapping[str, Mapping[int, str]],
) -> list[_Axes]:
    """Return the axes of any size of each argument.

    Raises:
        ValueError: If there is no such argument, or it has no such axis.
    """
    for name, axes in dynamic_axes.items():
        if name not in names:
            raise ValueError(
                f"Expected argument `dynamic_axes` to hold names of arguments of the forward, but got {name!r}, not "
                f"one of {list(names)}"
            )
        value = arguments[names.index(name)]
        for axis, size in axes.items():
            if axis not in range(1, value.ndim) or not str(size).isidentifier() or size == "batch":
                raise ValueError(
                    f"Expected argument `dynamic_axes` to hold axes from 1 to {value.ndim - 1} with a name of the size "
                    f"for `{name}` (the first axis is `dynamic_batch`), but got {axis!r}: {size!r}"
                )
    sizes = {size: Dim(size, max=_LARGEST) for axes in dynamic_axes.values() for size in axes.values()}
    batch = Dim("batch", max=_LARGEST)
    free: list[_Axes] = []
    for name, value in zip(names, arguments, strict=True):
        has_batch = dynamic_batch and len(value) == len(arguments[0])
        others = {axis: sizes[size] for axis, size in dynamic_axes.get(name, {}).items()}
        free.append({0: batch, **others} if has_batch else others)
    return free


def _capture(model: nn.Module, arguments: Arguments, free: Sequence[_Axes]) -> torch.export.ExportedProgram:
    """Capture with ``torch.export``; it takes a size of 1 for a constant, so a larger one is shown to it."""
    is_one = any(value.shape[axis] == 1 for value, axes in zip(arguments, free, strict=True) for axis in axes)
    shown = _larger(arguments, free) if is_one else arguments
    sizes = [axes or None for axes in free] if any(free) else None
    # Reading its Python passes on a batch size that runs through `len`, which running it takes for a constant
    ways = [(sizes, False), *([(sizes, True)] if sizes else [])]
    if any(axis for axes in free for axis in axes):  # a size with a name may not have a limit, as positions have
        ways.append(([dict.fromkeys(axes, Dim.DYNAMIC) or None for axes in free], False))
    reasons: list[Exception] = []
    for sizes, reads_code in ways:
        try:
            with torch.no_grad(), quiet():
                return export_program(model, shown, sizes, reads_code=reads_code)
        except Exception as error:  # torch.export has no common base for what it raises
            reasons.append(error)
    reason = reasons[0]
    remedy = remedy_for(reason)
    if remedy is None and any(free):
        remedy = "`dynamic_batch=False` (and no `dynamic_axes`) exports the example's sizes only"
    raise ExportError(
        f"torch.export does not take {type(model).__name__}: {first_line(reason)}.{f' {remedy}.' if remedy else ''}"
    ) from reason


_Run = Callable[[Arguments], list[Tensor]]


@dataclass(frozen=True)
class _Onnx:
    """How an ONNX file is written.

    Attributes:
        inputs: Names of its inputs.
        outputs: Names of its outputs; what torch calls them by default.
        opset: The version of its operators; torch's choice by default.
    """

    inputs: Sequence[str]
    outputs: Sequence[str] | None
    opset: int | None


def _checked_names(argument: str, names: Sequence[str] | None, count: int) -> list[str] | None:
    """Return names that a file is to have; None where there are none.

    Raises:
        TypeError: If they are no sequence of strings.
        ValueError: If there are not so many different ones.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise TypeError(f"Expected argument `{argument}` to be a sequence of names, but got {names!r}")
    if len(names) != count or len(set(names)) != count or not all(names):
        raise ValueError(f"Expected argument `{argument}` to hold {count} different names, but got {list(names)}")
    return list(names)


def _keys(output: Any, inputs: Sequence[str]) -> list[str] | None:
    """Return the names of the tensors in what a model returns; None where they have none.

    A file has no two tensors of one name: what is called as an input gets ``_out`` at its end.
    """
    if not isinstance(output, Mapping):
        return None
    values = {str(name): value for name, value in output.items() if value is not None}
    if not all(isinstance(value, Tensor) for value in values.values()):
        return None
    names: list[str] = []
    for name in values:
        while name in inputs or name in names:
            name += "_out"
        names.append(name)
    return names


def _check_not_bfloat16(model: nn.Module, arguments: Arguments) -> None:
    """Refuse what ONNX Runtime can't run, and its file so can't be checked.

    Raises:
        ValueError: If a tensor is in bfloat16.
    """
    own = (each for kind in (model.named_parameters, model.named_buffers) for each in kind())
    for name, value in (*own, *((f"example_inputs[{place}]", value) for place, value in enumerate(arguments))):
        if value.dtype == torch.bfloat16:
            raise ValueError(
                f"Expected argument `model` to compute in float32 or float16 for ONNX, but `{name}` is in bfloat16, "
                f"which ONNX Runtime has hardly an operator for, so that the file could not be checked. Export "
                f"`model.float()` (its numbers stay what they are) or to .pt2"
            )


def _write_onnx(program: torch.export.ExportedProgram, path: Path, wanted: _Onnx, free: Sequence[_Axes]) -> _Run:
    import onnx
    import onnxruntime

    try:
        with quiet():
            program = _in_simple_operators(program)
            torch.onnx.export(
                program, (), path, external_data=False, optimize=True, verbose=False, opset_version=wanted.opset,
                input_names=wanted.inputs, output_names=wanted.outputs,
            )  # fmt: skip
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"torch.onnx can't translate the model: {first_line(error)}") from error
    if wanted.opset is not None:
        version = {each.domain: each.version for each in onnx.load(path).opset_import}.get("")
        if version != wanted.opset:  # torch only logs that it could not convert
            raise ExportError(
                f"torch.onnx can't write the model in version {wanted.opset} of ONNX's operators, as `opset_version` "
                f"asks; it wrote {version}. It writes 18, and later ones with a recent onnxscript"
            )
    if any(free):
        _name_sizes(path, free)
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


def _in_simple_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write as products and sums, as ONNX has them, what torch 2.6 can't tell the shape of where a size is free."""
    aten = torch.ops.aten
    packets = (aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_, aten.lerp, aten.lerp_)
    table = {op: way for op, way in torch.export.default_decompositions().items() if op.overloadpacket in packets}
    if not any(node.target in table for node in program.graph.nodes):
        return program
    return program.run_decompositions(table)


def _name_sizes(path: Path, free: Sequence[_Axes]) -> None:
    """Call the sizes in an ONNX file what they were asked for as; torch.onnx calls them s43 and the like."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    names: dict[str, str] = {}
    for value, axes in zip(graph.input, free, strict=True):
        for axis, size in axes.items():
            if symbol := value.type.tensor_type.shape.dim[axis].dim_param:
                names.setdefault(symbol, size.__name__)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:  # a formula of sizes, in places
                size.dim_param = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size.dim_param)
    onnx.save(model, path)


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> _Run:
    whole = io.BytesIO()
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())  # torch's own writer ends the process when the disk is full
    loaded = torch.export.load(path).module()
    return lambda inputs: tensors_in(call(loaded, inputs))


def _of_other_sizes(order: _Order) -> Arguments:
    """Return inputs that are larger than the example's; of shorter texts where the model takes no longer ones."""
    larger = _larger(order.inputs, order.free)
    try:
        with torch.no_grad():
            call(order.model, copies(larger))
    except Exception:  # whatever a model raises, of positions that it does not have for example
        named = [{axis for axis in axes if axis} for axes in order.free]
        batches: list[_Axes] = [{axis: size for axis, size in axes.items() if not axis} for axes in order.free]
        return _smaller(_larger(order.inputs, batches), named)
    return larger


def _smaller(arguments: Arguments, axes: Sequence[Collection[int]]) -> Arguments:
    """Return arguments that are smaller by one along some axes of each, where that leaves two."""

    def smaller(value: Tensor, axes: Collection[int]) -> Tensor:
        for axis in axes:
            value = value.narrow(axis, 0, max(value.shape[axis] - 1, min(2, value.shape[axis])))
        return value

    return Arguments((smaller(value, some) for value, some in zip(arguments, axes, strict=True)), arguments.names)


def _larger(arguments: Arguments, free: Sequence[_Axes]) -> Arguments:
    """Return arguments that are larger by one along all axes of any size."""

    def larger(value: Tensor, axes: _Axes) -> Tensor:
        for axis in axes:
            last = value.narrow(axis, value.shape[axis] - 1, 1)
            value = torch.cat([value, last if axis else last.flip(-1)], axis)
        return value

    return Arguments((larger(value, axes) for value, axes in zip(arguments, free, strict=True)), arguments.names)


@full_float32()
def _checked(order: _Order, run: _Run, path: Path, name: str) -> list[Parity]:
    """Compare a file with the model, on the example inputs and on larger ones.

    Raises:
        ExportError: If it does not compute the same.
    """
    checks = [order.inputs, _of_other_sizes(order)] if any(order.free) else [order.inputs]
    parity = [_compare(order.model, run, inputs, path) for inputs in checks]
    for result in parity:
        if not result.relative_difference <= order.tolerance:
            raise ExportError(
                f"The {order.format} file differs from {name} by {result.relative_difference:.1e} (relative) at batch "
                f"size {result.batch_size}, more than `tolerance` {order.tolerance:.0e}; {path} was not written"
            )
    return parity


def _compare(model: nn.Module, run: _Run, inputs: Arguments, path: Path) -> Parity:
    samples = len(inputs[0]) if inputs[0].ndim else 1
    with torch.no_grad():
        expected = tensors_in(call(model, inputs))
        try:
            output = run(inputs)
        except Exception as error:
            raise ExportError(
                f"The exported file does not run at batch size {samples}: {error}; {path} was not written"
            ) from error
    pairs = [(a, b) for a, b in zip(output, expected, strict=False) if a.shape == b.shape and b.numel()]
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)
    return Parity(samples, largest, relative_difference(output, expected))
