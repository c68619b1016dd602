"""Is a collapsed network ever slower than a linearized one, or than the original, in what networks are run in?

Part ``runtimes`` of ``python -m benchmarks``: eager, ``torch.compile`` and ONNX Runtime, at batch sizes of 1 and 64.
The three networks are timed in turn in each.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
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
        how: dict[str, Any] = effort.pick({}, {}, {"backend": "aot_eager", "objective": "macs"})  # takes less long
        needs = ("onnx", "onnxscript", "onnxruntime") if runtime == "ONNX Runtime" else ()
        variants = {
            f"{name}, batch {size}": partial(_variants, make, (size, *shape), runtime, **how)
            for name, make, shape in networks
            for size in effort.pick((1, 64), (1, 64), (2,))
        }
        cases = [Case(case, make, BARS, has_memory=False, needs=needs) for case, make in variants.items()]
        yield Question(f"forward, {runtime}", tuple(cases))


def _variants(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    runtime: str,
    device: torch.device,
    backend: str = "inductor",
    objective: Objective = "latency",
) -> dict[str, Variant]:
    x = torch.randn(shape, device=device)
    models = networks_of(make().eval().to(device), x, objective)
    return {name: Variant(timed(_running(model, x, runtime, backend), device)) for name, model in models.items()}


def networks_of(original: nn.Module, x: Tensor, objective: Objective) -> Mapping[str, nn.Module]:
    """Return a network, the same with a third of its activations linear, and that collapsed."""
    linearized = a_third_linear(copy.deepcopy(original)).eval()
    return {
        "original": original,
        "linearized": linearized,
        "collapsed": collapse(linearized, x, objective=objective).model,
    }


def _running(model: nn.Module, x: Tensor, runtime: str, backend: str) -> Callable[[], Any]:
    if runtime == "eager":
        return partial(model, x)
    if runtime == "torch.compile":
        compiled = torch.compile(model, dynamic=False, backend=backend)
        with torch.no_grad():
            compiled(x)  # it compiles
        return partial(compiled, x)
    return _in_session(model, x)


def _in_session(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on waiting busily while something else is timed
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CUDAExecutionProvider"] if x.is_cuda else ["CPUExecutionProvider"]
    if missing := set(providers) - set(onnxruntime.get_available_providers()):
        raise RuntimeError(f"ONNX Runtime has no {missing.pop()} here")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, x[:2] if len(x) > 1 else torch.cat([x, x]))
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    feed = {session.get_inputs()[0].name: x.cpu().numpy()}
    return lambda: session.run(None, feed)
