"""Accuracy against time, ours and the peers: part ``tuning`` of ``python -m benchmarks``, which calls ``tuning.py``.

What follows the part on the command line is given to it: ``python -m benchmarks tuning --data.root <folder> ...``.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import networks
import torch
import tuning
from torch import nn
from torchvision.transforms.functional import to_pil_image


def run(arguments: Sequence[str]) -> str:
    """Run it, and return the Markdown that it prints."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["tuning.py", *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            tuning.main()
    finally:
        sys.argv = before
    _, title, table = printed.getvalue().partition("**")  # what comes before tells how far it is
    return f"{title}{table}".strip()


def run_dry() -> str:
    """Run it with a tiny network on few images that are made for it."""
    tiny = {"tiny": lambda depth: networks.Network("Tiny", partial(_tiny, 8))}
    with TemporaryDirectory() as folder, patch.dict(networks.NETWORKS, tiny):
        root = Path(folder)
        _write_images(root)
        return run([
            "--data.root", folder, "--network", "tiny", "--weights", str(root / "tiny.th"), "--before", "1", "--after",
            "1", "--methods", "dense", "identity", "--removed", "1",
        ])  # fmt: skip


def _tiny(width: int) -> nn.Module:
    layers = [nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, 4 * width, 1), nn.ReLU(), nn.Conv2d(4 * width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _write_images(root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 32)):
        for label in range(2):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                low = 128 * label
                pixels = torch.randint(low, low + 128, (3, 32, 32), generator=generator, dtype=torch.uint8)
                to_pil_image(pixels).save(folder / f"{number}.jpg")
