"""Images, weights, and what runs a benchmark with a small network; programs of ``benchmarks`` are imported by name."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from lightning_easier.zoo import CifarResNet
from tests.benchmarks.tiny import SIDE, cells_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import networks


def _images(root, side):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 66), ("test", 32)):
        for label in range(2):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(128 * label, 128 * label + 128, (3, side, side), generator=generator)
                to_pil_image(pixels.to(torch.uint8)).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Return a folder of few small images, whose brightness tells their class."""
    return _images(tmp_path_factory.mktemp("images"), SIDE)


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    """Return such a folder of images of CIFAR's size, for a network that is tiny itself."""
    return _images(tmp_path_factory.mktemp("larger"), 32)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Return a file with the weights of a CIFAR ResNet of three blocks."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet8.th"
    torch.save({"state_dict": CifarResNet(8).state_dict()}, file)
    return file


@pytest.fixture
def run(monkeypatch, larger, capsys):
    """Return what runs a benchmark with a tiny network, and returns what it prints."""

    def run(benchmark, build, *arguments, unsuited=()):
        network = networks.Network("Tiny", build, unsuited=unsuited)
        monkeypatch.setitem(networks.NETWORKS, "vit", lambda depth: network)
        monkeypatch.setattr(sys, "argv", ["benchmark", "--data.root", str(larger), "--network", "vit", *arguments])
        benchmark.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def tables(monkeypatch, root, weights, tmp_path, capsys):
    """Return what runs a benchmark with that ResNet, and returns the tables that it prints: title -> rows of cells."""

    def run(benchmark, *arguments):
        monkeypatch.chdir(tmp_path)
        given = ["--data.root", str(root), "--weights", str(weights), "--depth", "8"]
        monkeypatch.setattr(sys, "argv", ["benchmark", *given, *arguments])
        benchmark.main()
        printed = capsys.readouterr().out
        found = re.findall(r"^\*\*(.+)\*\*\n\n(\|.*\n)\|[ |-]+\n((?:\|.*\n)+)", printed, re.MULTILINE)
        return {title: [*map(cells_of, (head + rows).splitlines())] for title, head, rows in found}

    return run
