"""What does measuring cost? A validation batch with the entropy of every activation counted, against one without.

Run it with ``make bench``. All are timed interleaved; medians and interquartile ranges are shown. The peak memory is
that of all values that live at a time, those of the hooks among them, without parameters and input.
"""

import argparse
from collections.abc import Callable

import rich
import torch
import torchvision
from torch import Tensor, nn

from lightning_easier import EntropyProbe
from lightning_easier.activations import isolated_sites
from lightning_easier.costs import measure_activation_memory, measure_latency
from lightning_easier.report import Table


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem that 32×32 images call for."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Measured(nn.Module):
    """A model whose every call is measured."""

    def __init__(self, model: nn.Module, sample: float) -> None:
        super().__init__()
        self.model = model
        self.probe = EntropyProbe(isolated_sites(model), sample=sample)

    def forward(self, x: Tensor) -> Tensor:
        """Call the model with the hooks attached."""
        with self.probe:
            return self.model(x)


CASES = {
    "ResNet-18, 128×3×32×32": (cifar_resnet18, (128, 3, 32, 32)),
    "Swin-T, 8×3×224×224": (torchvision.models.swin_t, (8, 3, 224, 224)),
}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=15, help="timings of each")
    options = parser.parse_args()
    rows = []
    for name, (make, shape) in CASES.items():
        torch.manual_seed(0)
        model = make().eval()
        calls: dict[str, Callable[[Tensor], object]] = {"plain": model}
        for sample in (1.0, 0.1):
            calls[f"sample={sample:g}"] = Measured(model, sample)
        x = torch.randn(shape)
        with torch.no_grad():
            latency = measure_latency(calls, (x,), samples=options.samples)
            memory = {which: measure_activation_memory(call, (x,)) for which, call in calls.items()}
        for which, timed in latency.items():
            rows.append(
                (
                    name if which == "plain" else "",
                    which,
                    f"{timed.median * 1e3:.1f} ± {timed.spread * 1e3:.1f}",
                    f"{timed.median / latency['plain'].median:.3f}×",
                    f"{memory[which] / memory['plain']:.3f}×",
                )
            )
    columns = ("network, batch", "counted", "time [ms]", "time", "peak memory of values")
    table = Table("Cost of measuring", columns, rows)
    rich.print(table)


if __name__ == "__main__":
    main()
