"""The benchmarks that train networks of their own, and those that run other runtimes, run on tiny ones."""

import sys
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

from lightning_easier.support.inference import relative_difference

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import networks
import shipped
import tuning


class Tiny(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(*(_Block() for _ in range(2)))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64), nn.ReLU()
        self.second = nn.Conv2d(64, 8, 1)

    def forward(self, x):
        return x + self.second(self.relu(self.norm(self.first(x))))


@pytest.fixture(scope="module")
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


def rows_of(printed):
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines)}


def test_tuning_trains_a_network_without_weights_once_and_compares_what_is_made_of_it(run, tmp_path):
    weights = tmp_path / "tiny.th"
    compare = partial(
        run, tuning, Tiny, "--weights", str(weights), "--before", "3", "--after", "1", "--speedup", "1.1"
    )  # fmt: skip
    first = rows_of(compare("--methods", "dense", "compress", "blocks_kl", "blocks_cka", "practise"))
    assert set(first) == {"method", "---", "dense", "compress", "blocks_kl", "blocks_cka", "practise"}
    macs = {method: float(cells[2]) for method, cells in first.items() if method not in ("method", "---")}
    assert all(macs[method] < macs["dense"] for method in macs if method != "dense")
    trained = torch.load(weights, weights_only=True)["state_dict"]
    again = rows_of(compare("--methods", "dense"))
    assert again["dense"][0] == first["dense"][0]  # before tuning
    kept = torch.load(weights, weights_only=True)["state_dict"]
    assert all(torch.equal(kept[name], value) for name, value in trained.items())


def test_tuning_goes_on_where_it_was_cut_short(run, tmp_path):
    folder = tmp_path / "kept"
    compare = partial(
        run, tuning, Tiny, "--weights", str(tmp_path / "tiny.th"), "--before", "3", "--keep", str(folder)
    )  # fmt: skip
    first = rows_of(compare("--methods", "dense", "magnitude"))
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "magnitude-0.pt").unlink()
    again = rows_of(compare("--methods", "dense", "magnitude", "identity", "--removed", "1"))
    assert set(again) == {"method", "---", "dense", "magnitude", "identity"}
    for method in ("dense", "magnitude"):
        assert again[method][:3] == first[method][:3]
    assert (folder / "dense-0.pt").stat().st_mtime_ns == written["dense-0.pt"]
    assert (folder / "magnitude-0.pt").stat().st_mtime_ns != written["magnitude-0.pt"]


def test_tuning_refuses_what_can_not_be_made_of_a_network(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(
            tuning, Tiny, "--weights", str(tmp_path / "tiny.th"), "--methods", "dense", "scratch", unsuited=("scratch",)
        )
    assert "--methods scratch can't be made of a Tiny" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [partial(networks.vgg16, 1 / 32), partial(networks.vit, 1, 8, 2)], ids=["vgg", "vit"])
def test_networks_of_the_benchmarks_take_small_images(build):
    model, images = build(), torch.randn(3, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (3, 10)
    assert (logits[0] - logits[1]).abs().max() > 1e-6
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_each_runtime_computes_the_same_and_int8_nearly(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # no compiler, which takes long
    model, images = Tiny().eval(), torch.randn(64, 3, 32, 32)
    running = shipped.runtimes(model, [images], images[:4], tmp_path)
    with torch.no_grad():
        expected = model(images)
        differences = {name: relative_difference([call(images)], [expected]) for name, call in running.items()}
    assert list(differences) == ["eager", "torch.compile", "ONNX Runtime", "ONNX Runtime int8"]
    quantized = differences.pop("ONNX Runtime int8")
    assert max(differences.values()) < 1e-5
    assert 1e-4 < quantized < 0.1
    graph = onnx.load(tmp_path / "int8.onnx").graph
    weights = [each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 4]
    scales = [each for each in graph.initializer if list(each.dims) == [64]]
    assert len(weights) == 5
    assert scales  # one for each channel


def test_shipped_compares_in_each_runtime(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = rows_of(run(shipped, Tiny, "--weights", str(tmp_path / "tiny.th"), "--before", "3", "--speedup", "1.3"))
    runtimes = ["eager", "torch.compile", "ONNX Runtime", "ONNX Runtime int8"]
    assert list(rows) == ["runtime", "---", *runtimes]
    assert all(rows[runtime][:2] == ["100.00", "100.00"] for runtime in runtimes)
    ratios = [float(cell.split()[0]) for cell in rows["eager"][2:]]
    assert ratios[:2] == ratios[2:]  # within eager, and against it
    assert min(ratios) >= 1.3  # by a clock that counts work
