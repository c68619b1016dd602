r"""Draw accuracy against measured time, ours and the peers, from what ``tuning.py --json`` has written.

Each method is a point in each file: how many times faster it was, with a bar from the first quartile to the third, and
its top-1. Where there is a file for each of several speeds that were asked for, the points of one method are joined:

    python benchmarks/tradeoff.py docs/results/resnet56-1.5.json docs/results/resnet56-2.0.json \
        --output docs/tradeoff.png
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from lightning_easier.report.figures import Draw, new_figure, save_figure

# What each method is called in the picture; ours are drawn in the first colours.
NAMES = {
    "dense": "dense, tuned as long",
    "compress": "compress (this package)",
    "fitted": "fitted (this package)",
    "taylor": "Torch-Pruning, Taylor",
    "fastnas": "ModelOpt FastNAS",
    "blocks_cka": "blocks dropped, CKA",
    "blocks_kl": "blocks dropped, KL",
    "practise": "PRACTISE",
}
OURS = ("compress", "fitted")
_COLOURS = {"compress": "#1f6fb4", "fitted": "#63a5d8", "dense": "black"}
_OTHERS = ("#c8443a", "#d98b2b", "#7a6f5d", "#8a5aa8", "#4d8f5b")
_MARKERS = "sD^vP"


class Point(NamedTuple):
    """What one file says of one method at one batch size.

    Attributes:
        first: Quartile of how many times faster it was.
        median: Of the same.
        third: Quartile of the same.
        top1: In per cent, the mean over the seeds.
    """

    first: float
    median: float
    third: float
    top1: float


def points_of(files: Sequence[Mapping[str, Any]], size: int) -> dict[str, list[Point]]:
    """Return the points of each method, in the order of speed.

    Args:
        files: What was written.
        size: Batch size.
    """
    found: dict[str, list[Point]] = {}
    for file in files:
        for line in file["lines"]:
            found.setdefault(line["method"], []).append(Point(*line["faster"][str(size)], mean(line["top1"])))
    return {method: sorted(points, key=lambda point: point.median) for method, points in found.items()}


def panel(found: Mapping[str, Sequence[Point]], size: int) -> tuple[Draw, float]:
    """Draw the points of one batch size.

    Args:
        found: Method -> its points, in the order of speed; those of a method are joined, those of the dense network,
            which is the same in each file, are not.
        size: Batch size.
    """
    others = [method for method in found if method not in (*OURS, "dense")]

    def draw(axes: Any) -> None:
        axes.axvline(1.0, color="0.8", linewidth=1, zorder=0)  # what all are compared with
        for method, points in found.items():
            is_ours, number = method in OURS, others.index(method) % len(_OTHERS) if method in others else 0
            bars = [[point.median - point.first, point.third - point.median] for point in points]
            axes.errorbar(
                [point.median for point in points], [point.top1 for point in points],
                xerr=[*zip(*bars, strict=True)],
                color=_COLOURS.get(method, _OTHERS[number]), marker=_MARKERS[number] if method in others else "o",
                linestyle="-" if len(points) > 1 and method != "dense" else "none", linewidth=1.6 if is_ours else 1.0,
                elinewidth=1.6 if is_ours else 1.0, capsize=3, markersize=9 if is_ours else 6,
                label=NAMES.get(method, method), zorder=3 if is_ours else 2,
            )  # fmt: skip
        axes.set_xlabel(f"times faster than the dense network, batch {size}: median and quartiles")
        axes.set_ylabel("top-1 [%]")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return draw, 3.2


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what `tuning.py --json` has written")
    parser.add_argument("--output", type=Path, required=True, help="the picture: PNG, SVG or PDF")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 1], help="batch sizes, a panel each")
    options = parser.parse_args()
    files = [json.loads(file.read_text()) for file in options.files]
    save_figure(new_figure([panel(points_of(files, size), size) for size in options.sizes], width=8), options.output)


if __name__ == "__main__":
    main()
