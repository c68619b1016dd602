"""Images, and what runs a benchmark with a tiny network; the programs of ``benchmarks`` are imported by their names."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import networks


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Return a folder of few images, whose brightness tells their class."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 66), ("test", 32)):
        for label in range(2):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(128 * label, 128 * label + 128, (3, 32, 32), generator=generator)
                to_pil_image(pixels.to(torch.uint8)).save(folder / f"{number}.jpg")
    return root


@pytest.fixture
def run(monkeypatch, root, capsys):
    """Return what runs a benchmark with a tiny network, and returns what it prints."""

    def run(benchmark, build, *arguments, unsuited=()):
        network = networks.Network("Tiny", build, unsuited=unsuited)
        monkeypatch.setitem(networks.NETWORKS, "vit", lambda depth: network)
        monkeypatch.setattr(sys, "argv", ["benchmark", "--data.root", str(root), "--network", "vit", *arguments])
        benchmark.main()
        return capsys.readouterr().out

    return run
