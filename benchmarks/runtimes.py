"""Is a collapsed network ever slower than a linearized one, or than the original, in what networks are run in?

Part ``runtimes`` of ``python -m benchmarks``: eager, ``torch.compile`` and ONNX Runtime, at batch sizes of 1 and 64.
The three networks are timed in turn in each. They are the same in all: what is collapsed once is left for the others.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from collapsing import a_third_linear, network
from fitting import tiny
from measuring import cifar_resnet18
from questions import Bar, Case, Effort, Question, Variant, timed
from torch import Tensor, nn

from lightning_easier import collapse, export
from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.support.timing import LatencyTable, Pace

RUNTIMES = ["eager", "torch.compile", "ONNX Runtime"]
# Beyond noise
BARS = {"linearized": Bar(time=1.02), "collapsed": Bar(time=1.02)}


def questions(effort: Effort) -> Iterator[Question]:
    """Ask how long each takes in each runtime."""
    small = ("ResNet-18 for CIFAR", cifar_resnet18, (3, 32, 32))
    large = [(name, partial(network, name), (3, 224, 224)) for name in ("resnet50", "mobilenet_v2", "swin_t")]
    networks: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = effort.pick(
        [small, *large], [small], [("three convolutions", tiny, (3, 8, 8))]
    )
    # Compiling for a CPU takes minutes on two cores
    chosen = effort.pick(RUNTIMES, ["eager", "torch.compile" if effort.device == "cuda" else "ONNX Runtime"], RUNTIMES)
    for runtime in chosen:
        # What takes less long: a collapse that stops timing, or does not begin
        how: dict[str, Any] = effort.pick({}, {"seconds": 4.0}, {"backend": "aot_eager", "objective": "macs"})
        how["folder"] = effort.folder
        needs = ("onnx", "onnxscript", "onnxruntime") if runtime == "ONNX Runtime" else ()
        variants = {
            f"{name}, batch {size}": partial(_variants, name, make, (size, *shape), runtime, **how)
            for name, make, shape in networks
            for size in effort.pick((1, 64), (1, 64), (2,))
        }
        cases = [Case(case, make, BARS, has_memory=False, needs=needs) for case, make in variants.items()]
        yield Question(f"forward, {runtime}", tuple(cases))


def _variants(
    network: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    runtime: str,
    device: torch.device,
    backend: str = "inductor",
    objective: Objective = "latency",
    seconds: float = math.inf,
    folder: str | None = None,
) -> dict[str, Variant]:
    with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        left = Path(place)
        torch.manual_seed(0)  # so that what is left by a case is what the next would make
        original = make().eval().to(device)
        x = torch.randn(shape, device=device)
        models = networks_of(original, x, objective, seconds, left / f"{network}, batch {len(x)}.pt")
        return {
            name: Variant(timed(_running(model, x, runtime, backend, left), device)) for name, model in models.items()
        }


def networks_of(
    original: nn.Module, x: Tensor, objective: Objective, seconds: float, file: Path
) -> Mapping[str, nn.Module]:
    """Return a network, the same with a third of its activations linear, and that collapsed.

    Args:
        original: The network.
        x: What it is given.
        objective: Of the collapse.
        seconds: How long that may time things; the fewest samples are always taken.
        file: Read instead of a collapse where there is one, and written where there is none.
    """
    linearized = a_third_linear(copy.deepcopy(original)).eval()
    if not file.exists():
        until = time.monotonic() + seconds
        table = LatencyTable(pace=Pace(lambda: until - time.monotonic()))
        with _whole(file) as unfinished:
            torch.save(collapse(linearized, x, objective=objective, latencies=table).model, unfinished)
    collapsed = torch.load(file, weights_only=False)
    return {"original": original, "linearized": linearized, "collapsed": collapsed}


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Give another name to write to: who is stopped leaves no half of a file."""
    unfinished = file.with_name(f"unfinished {file.name}")
    yield unfinished
    unfinished.replace(file)


def _running(model: nn.Module, x: Tensor, runtime: str, backend: str, folder: Path) -> Callable[[], Any]:
    if runtime == "eager":
        return partial(model, x)
    if runtime == "torch.compile":
        compiled = torch.compile(model, dynamic=False, backend=backend)
        with torch.no_grad():
            compiled(x)  # it compiles
        return partial(compiled, x)
    return _in_session(model, x, folder)


def _in_session(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on waiting busily while something else is timed
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CUDAExecutionProvider"] if x.is_cuda else ["CPUExecutionProvider"]
    if missing := set(providers) - set(onnxruntime.get_available_providers()):
        raise RuntimeError(f"ONNX Runtime has no {missing.pop()} here")
    file = folder / f"{_fingerprint(model)}.onnx"
    if not file.exists():
        with _whole(file) as unfinished:
            export(model, unfinished, x[:2] if len(x) > 1 else torch.cat([x, x]))  # for batches of any size
    session = onnxruntime.InferenceSession(file, options, providers=providers)
    feed = {session.get_inputs()[0].name: x.cpu().numpy()}
    return lambda: session.run(None, feed)


def _fingerprint(model: nn.Module) -> str:
    """Return what networks have in common that are written alike and have the same weights."""
    found = hashlib.sha256(str(model).encode())  # with the code, where it is a graph
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
