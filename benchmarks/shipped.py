"""How much of a speed-up is left in what networks are shipped in: torch.compile, ONNX Runtime, and int8?

A trained network is compressed and tuned on the dense network's logits; the dense network is tuned for as long, on its
own logits as they were. Both are collapsed, which folds the batch norms of the dense one, and run in four ways:

- ``eager``: as they are.
- ``torch.compile``: with its defaults, once for each batch size.
- ``ONNX Runtime``: the file that ``lightning_easier.export`` has written, with as many threads as torch has.
- ``ONNX Runtime int8``: that file after static quantization (QDQ, a scale for each channel of the weights), with ranges
  from calibration images of the training data.

All are timed in turn. ``networks.py`` says what the networks and weights are:

    python benchmarks/shipped.py --data.root <folder> --weights <file> --depth 20
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from allocator import keep_freed_memory
from cifar import Images, accuracy, drawn
from networks import Network, add_arguments, chosen
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from lightning_easier import collapse, compress, export
from lightning_easier.report import Table
from lightning_easier.support.timing import Latency, Speedup, speed_up, time_interleaved

CALIBRATION = 1000  # images, of compress and of the quantization
SIZES = (1, 64)  # of batches

Call = Callable[[Tensor], Tensor]


class Batches(CalibrationDataReader):
    """Gives batches to what measures ranges for the quantization."""

    def __init__(self, name: str, batches: Iterable[Tensor]) -> None:
        self._feeds = ({name: batch.numpy()} for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch by the name of the input, None after the last."""
        return next(self._feeds, None)


class InSession:
    """Runs a file in ONNX Runtime.

    Args:
        path: The file; it has one input.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on waiting busily while something else is timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.name: str = self._session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        return torch.from_numpy(self._session.run(None, {self.name: images.numpy()})[0])


def runtimes(model: nn.Module, calibration: Iterable[Tensor], example: Tensor, folder: Path) -> dict[str, Call]:
    """Return a model in each runtime, by its name; the files of ONNX go into a folder.

    Args:
        model: In eval mode.
        calibration: Batches from which the ranges of int8 are read.
        example: What the exported file is checked on.
        folder: Where the files go.
    """
    plain, prepared, small = (folder / f"{name}.onnx" for name in ("model", "prepared", "int8"))
    export(model, plain, example)
    quant_pre_process(plain, prepared)
    in_session = InSession(plain)
    quantize_static(
        prepared, small, Batches(in_session.name, calibration), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        reduce_range=True,  # weights of seven bits: pairs of products overflow on a CPU without VNNI
    )  # fmt: skip
    return {
        "eager": model,
        "torch.compile": torch.compile(model, dynamic=False),
        "ONNX Runtime": in_session,
        "ONNX Runtime int8": InSession(small),
    }


def made(network: Network, train: Images, calibration: Sequence[Tensor], options: Any) -> tuple[nn.Module, nn.Module]:
    """Return the dense and the compressed network, both tuned."""
    subset = drawn(train, options.images, options.seed)
    teacher = network.trained(options.weights, train, subset, options.before, options.seed)
    target = {"target_speedup": options.speedup, "max_drift": math.inf}  # it is tuned afterwards
    models = deepcopy(teacher), compress(teacher, calibration, example_inputs=calibration[0][:64], **target).fitted
    for model in models:
        network.tune(model, train, subset, options.after, options.seed + 1000, teacher=teacher)
    return models


def timed(dense: Mapping[str, Call], compressed: Mapping[str, Call], images: Tensor) -> dict[tuple[str, str], Latency]:
    """Time all in turn, the two of a runtime next to each other; the keys are runtime and network."""
    calls = {
        (runtime, name): partial(models[runtime], images)
        for runtime in dense
        for name, models in (("dense", dense), ("compressed", compressed))
    }
    return time_interleaved(calls, samples=25)


def main() -> None:
    """Make both networks, run them in each runtime, and print one table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--before", type=float, default=1, help="epochs of the dense network first")
    parser.add_argument("--after", type=float, default=1, help="epochs of both after that")
    parser.add_argument("--images", type=int, default=50_000, help="training images an epoch goes over")
    parser.add_argument("--speedup", type=float, default=1.5, help="of compress")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    network = chosen(options)
    train, test = (Images(f"{options.root}/{split}") for split in ("train", "test"))
    calibration, example = train.calibration(CALIBRATION, options.seed), test.batch(torch.arange(64))
    running = []
    for model in made(network, train, calibration, options):
        with TemporaryDirectory() as folder:
            running.append(runtimes(collapse(model, example).model, calibration, example, Path(folder)))
    dense, compressed = running
    scores = {
        runtime: [f"{accuracy(models[runtime], test):.2f}" for models in (dense, compressed)] for runtime in dense
    }
    latencies = [timed(dense, compressed, test.batch(torch.arange(size))) for size in SIZES]
    rows = []
    for runtime, top in scores.items():
        inside = [speed_up(each[runtime, "dense"], each[runtime, "compressed"]) for each in latencies]
        whole = [speed_up(each["eager", "dense"], each[runtime, "compressed"]) for each in latencies]
        rows.append((runtime, *top, *map(written, inside), *map(written, whole)))
    sizes = [f"batch {size}" for size in SIZES]
    columns = ("runtime", "dense top-1 [%]", "compressed top-1 [%]", *(f"faster, {size}" for size in sizes),
               *(f"than dense in eager, {size}" for size in sizes))  # fmt: skip
    title = (
        f"{network.name}, compressed for {options.speedup:g}×, {options.before:g} + {options.after:g} epochs of "
        f"{options.images:,} images, {torch.get_num_threads()} threads; faster than the dense network with its batch "
        f"norms folded, in the same runtime and in eager (quartiles)"
    )
    print(Table(title, columns, rows).to_markdown())


def written(speedup: Speedup) -> str:
    """Write a ratio with its quartiles."""
    low, middle, high = speedup.quartiles
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main()
