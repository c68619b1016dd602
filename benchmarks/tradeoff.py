"""Draw accuracy against measured time, ours and the peers, from what ``tuning.py --json`` has written.

A file for each speed that was asked for:

    python benchmarks/tradeoff.py docs/results/resnet56-*.json --output docs/tradeoff.png
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_easier.report.figures import Draw, new_figure, save_figure

# What each method is called in the picture; ours are drawn in the first colours.
NAMES = {
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


def curves(files: Sequence[Mapping[str, Any]], size: int) -> dict[str, list[tuple[float, float]]]:
    """Return how much faster each method was, and its top-1, in the order of speed.

    Args:
        files: What was written.
        size: Batch size.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for file in files:
        for line in file["lines"]:
            point = line["faster"][str(size)][1], mean(line["top1"])
            found.setdefault(line["method"], []).append(point)
    return {method: sorted(points) for method, points in found.items()}


def panel(found: Mapping[str, Sequence[tuple[float, float]]], size: int) -> tuple[Draw, float]:
    """Draw the curves of one batch size; each begins at the dense network."""
    dense = mean(top1 for _, top1 in found["dense"])
    others = [method for method in found if method not in (*OURS, "dense")]

    def draw(axes: Any) -> None:
        axes.axhline(dense, color="0.8", linewidth=1, zorder=0)
        axes.plot(1.0, dense, "o", color="black", markersize=7, zorder=3)
        axes.annotate("dense", (1.0, dense), xytext=(6, 5), textcoords="offset points", fontsize=9)
        for method, points in found.items():
            if method == "dense":
                continue
            is_ours = method in OURS
            number = 0 if is_ours else others.index(method) % len(_OTHERS)
            line = list(zip(*[(1.0, dense), *points], strict=True))
            axes.plot(
                *line, color=_COLOURS.get(method, _OTHERS[number]), marker="o" if is_ours else _MARKERS[number],
                markevery=range(1, len(points) + 1), linewidth=2.4 if is_ours else 1.2, markersize=8 if is_ours else 6,
                label=NAMES.get(method, method), zorder=2 if is_ours else 1,
            )  # fmt: skip
        axes.set_xlabel(f"times faster than the dense network, batch {size}")
        axes.set_ylabel("top-1 [%]")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False, loc="lower left")

    return draw, 3.6


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what `tuning.py --json` has written")
    parser.add_argument("--output", type=Path, required=True, help="the picture: PNG, SVG or PDF")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 1], help="batch sizes, a panel each")
    options = parser.parse_args()
    files = [json.loads(file.read_text()) for file in options.files]
    save_figure(new_figure([panel(curves(files, size), size) for size in options.sizes], width=7.5), options.output)


if __name__ == "__main__":
    main()
