"""What does measuring cost? Time of a validation batch with the entropy of every activation counted, against without.

Run it with ``make bench``. The two are timed interleaved; medians and interquartile ranges are shown.
"""

import argparse

import rich
import torch
import torchvision
from torch import nn

from lightning_easier import EntropyProbe
from lightning_easier.activations import isolated_sites
from lightning_easier.costs import measure_latency
from lightning_easier.report import Table


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem that 32×32 images call for."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


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
        probe = EntropyProbe(isolated_sites(model))

        def measured(x: torch.Tensor, model: nn.Module = model, probe: EntropyProbe = probe) -> None:
            with probe:
                model(x)

        latency = measure_latency(
            {"plain": model, "measured": measured}, (torch.randn(shape),), samples=options.samples
        )
        plain, with_probe = latency["plain"], latency["measured"]
        rows.append(
            (
                name,
                f"{plain.median * 1e3:.1f} ± {plain.spread * 1e3:.1f}",
                f"{with_probe.median * 1e3:.1f} ± {with_probe.spread * 1e3:.1f}",
                f"{with_probe.median / plain.median:.3f}×",
            )
        )
    table = Table("Cost of measuring", ("network, batch", "plain [ms]", "measured [ms]", "ratio"), rows)
    rich.print(table)


if __name__ == "__main__":
    main()
