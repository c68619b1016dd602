"""The benchmarks run in tiny sizes: those of one command, those that train networks, those that run other runtimes."""

import json
import math
import mmap
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import onnx
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.transforms.functional import to_pil_image

from lightning_easier import fit_chains, measure_affines, measure_entropy
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support.inference import relative_difference
from lightning_easier.zoo import CifarResNet

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import answers
import children
import cifar
import command
import curve
import drifting
import fitting
import networks
import removing
import results
import rounds
import shipped
import tradeoff
import tuned
import tuning
from questions import EFFORTS, Bar, Measurement, Quartiles, Variant, compared, in_turn

CHECKOUT = Path(__file__).parents[1]


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


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def rows_of(printed):
    rows = [cells_of(line) for line in printed.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows}


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


def test_the_picture_of_accuracy_against_time_shows_what_the_table_says(run, tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.json" for number in (1, 2)]
    compare = partial(run, tuning, Tiny, "--weights", str(tmp_path / "tiny.th"), "--before", "1", "--after", "0.1")
    printed = [rows_of(compare("--methods", "dense", "magnitude", "--json", str(file))) for file in files]
    read = [json.loads(file.read_text()) for file in files]
    for table, file in zip(printed, read, strict=True):
        for line in file["lines"]:
            assert table[line["method"]][1] == f"{line['top1'][0]:.2f}"
            assert table[line["method"]][4].startswith(f"{line['faster']['64'][1]:.2f} (")
    read[0]["lines"][1]["faster"]["64"][1], read[1]["lines"][1]["faster"]["64"][1] = 2.0, 1.5
    drawn = tradeoff.points_of(read, 64)
    assert [point.median for point in drawn["magnitude"]] == [1.5, 2.0]  # in the order of speed
    assert drawn["magnitude"][1].top1 == read[0]["lines"][1]["top1"][0]
    picture = tmp_path / "picture.svg"
    monkeypatch.setattr(sys, "argv", ["tradeoff", *map(str, files), "--output", str(picture)])
    tradeoff.main()
    assert picture.read_text().count("magnitude") >= 2  # a legend in each panel


def line_of(method, quartiles, *top1):
    return {"method": method, "top1": list(top1), "faster": {"64": quartiles}}


def drawn_of(files):
    """Return what the panel of batch 64 shows: label -> places of the points, ends of their bars, style of the line."""
    axes = Figure().subplots()
    draw, _ = tradeoff.panel(tradeoff.points_of(files, 64), 64)
    draw(axes)
    shown = {}
    for container in axes.containers:
        line, _, (bars,) = container
        ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
        shown[container.get_label()] = line.get_xydata().tolist(), ends, line.get_linestyle()
    joined = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
    return shown, [line.get_xdata()[0] for line in joined]


def test_a_point_of_one_file_is_joined_to_nothing_and_has_its_quartiles():
    lines = [line_of("dense", [0.9, 1.125, 1.5], 86.0), line_of("compress", [1.5, 1.625, 2.0], 85.0, 86.0)]
    shown, joined = drawn_of([{"lines": lines}])
    assert shown == {
        tradeoff.NAMES["dense"]: ([[1.125, 86.0]], [pytest.approx([0.9, 1.5])], "None"),
        tradeoff.NAMES["compress"]: ([[1.625, 85.5]], [pytest.approx([1.5, 2.0])], "None"),
    }
    assert joined == [1.0]  # the line of what all are compared with


def test_points_of_one_method_in_several_files_are_joined_and_those_of_the_dense_network_are_not():
    files = [
        {"lines": [line_of("dense", [1.0, dense, 1.25], 86.0), line_of("taylor", [speed, speed, speed + 0.25], top1)]}
        for dense, speed, top1 in ((1.125, 2.0, 80.0), (1.0, 1.5, 84.0))
    ]
    shown, joined = drawn_of(files)
    assert shown == {
        tradeoff.NAMES["dense"]: ([[1.0, 86.0], [1.125, 86.0]], [[1.0, 1.25], [1.0, 1.25]], "None"),
        tradeoff.NAMES["taylor"]: ([[1.5, 84.0], [2.0, 80.0]], [[1.5, 1.75], [2.0, 2.25]], "-"),
    }
    assert joined == [1.0, 1.5]


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


def test_every_part_runs_and_is_in_one_table_and_one_file(tmp_path, monkeypatch, capfd):
    parts = ["gpu", "scale", "fitting"]  # that of tuning.py is run below
    monkeypatch.setattr(sys, "argv", ["benchmarks", *parts, "--dry", "--threads", "1", "--output", str(tmp_path)])
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as the program sets it
    if torch.cuda.is_available():  # autograd may have threads here, one for each GPU, which a fork would not have
        monkeypatch.setattr(children, "_start_method", "spawn")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks", run_name="__main__")
    printed = capfd.readouterr()
    assert ended.value.code == 0, printed.err

    written = json.loads((tmp_path / "results.json").read_text())
    measured = written["measurements"]
    assert {each["part"] for each in measured} == set(answers.PARTS)
    for each in measured:
        assert (each["failure"], each["effort"], each["threads"]) == ("", "dry", 1)
        for figures in (each["seconds"], each["ratio"]):
            assert 0 < figures["median"] < math.inf
            assert figures["first"] <= figures["median"] <= figures["third"]
        assert each["samples"] == 2
        if each["against"] == each["variant"]:
            assert each["ratio"]["median"] == 1.0
        if each["part"] in ("measuring", "collapsing", "fitting", "large"):
            assert each["memory"] >= 0
    told = {each["variant"] for each in measured if each["part"] in ("measuring", "rounds")}
    assert told == {"plain", "all", "sample=0.1", "masks", "transport", "distillation"}
    assert os.uname().nodename not in json.dumps(written["machine"])
    assert set(written["machine"]) == {"processor", "cores"}
    assert written["versions"]["torch"] == metadata.version("torch")

    markdown = (tmp_path / "results.md").read_text()
    assert printed.out.endswith(f"{markdown}\n")
    titles = [line for line in markdown.splitlines() if line.startswith("**")]
    assert len(titles) == 2  # the table, and EASIER's curve
    assert len([line for line in markdown.splitlines() if line.startswith("| ")]) > len(measured)
    rounds = [cells for number, cells in rows_of(written["tables"]["curve"]).items() if number.isdigit()]
    assert len(rounds) == 3
    assert all(0 <= float(score) <= 100 for score, _ in rounds)


def measured(case, *quartiles):
    return Measurement("scale", "q", case, "new", "old", "cpu", 1, "full", ratio=Quartiles(*quartiles), bar=Bar(1.05))


def test_what_is_measured_again_takes_the_place_of_what_was_there(tmp_path):
    machine, versions = {"processor": "x", "cores": 2}, {"torch": "2"}
    first, second = measured("first", 1.0, 1.1, 1.2), measured("second", 1.0, 1.1, 1.2)
    before = results.Results(tmp_path, machine, versions)
    before.add([first, second])
    before.add_table("curve", "| 1 |")
    anew = replace(first, samples=99, bounds=(1.0, 1.2), memory=5)
    results.Results(tmp_path, machine, versions).add([anew])
    there = results.read(tmp_path / "results.json")
    assert there.measurements == [anew, second]
    failed = replace(second, variant="", failure="was stopped")
    before.add([failed])
    assert before.measurements == [first, failed]
    before.add([second])
    assert before.measurements == [first, second]
    assert there.tables == {"curve": "| 1 |"}
    assert not results.Results(tmp_path, machine | {"cores": 99}, versions).measurements
    assert not results.Results(tmp_path, machine, {"torch": "3"}).measurements


def slowness(*moments):
    """Return a clock of a machine that is so many times slower at the moment of each round, for two variants."""
    calls = iter(each for moment in moments for each in (moment, moment))
    return lambda seconds: lambda: seconds * next(calls)


def test_variants_are_sampled_in_turn_and_their_ratio_does_not_notice_other_work():
    order = []

    def variant(name, seconds, clock):
        def sample():
            order.append(name)
            return clock(seconds)()

        return Variant(sample)

    clock = slowness(1, 1, 5, 5, 1)
    latencies = in_turn({"a": variant("a", 1.0, clock), "b": variant("b", 2.0, clock)}, samples=4)
    assert order == [*"ab", *"ba", *"ab", *"ba", *"ab"]  # after a warm-up every other round in the opposite order
    ratio, bounds = compared(latencies["b"], latencies["a"])
    assert ratio == Quartiles(2.0, 2.0, 2.0)
    assert bounds == (2.0, 2.0)
    ratio, _ = compared(latencies["b"], latencies["a"], work=4.0)
    assert ratio.median == 0.5
    assert latencies["a"].spread > 1


def test_a_time_limit_leaves_the_fewest_samples():
    calls = []
    in_turn({"a": Variant(lambda: calls.append(0) or 1.0)}, samples=50, seconds=0.0)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [((1.01, 1.02, 1.03), "kept"), ((1.06, 1.07, 1.08), "missed"), ((1.0, 1.02, 1.2), "open")],
)
def test_a_bar_is_kept_or_missed_where_all_samples_say_so(samples, verdict):
    latencies = in_turn({"a": Variant(lambda: 1.0), "b": Variant(iter((1.0, *samples)).__next__)}, samples=3)
    ratio, bounds = compared(latencies["b"], latencies["a"])
    measured = Measurement(*["x"] * 6, 1, "dry", ratio=ratio, bounds=bounds, bar=Bar(time=1.05))
    assert list(measured.verdicts()) == [f"≤ 1.05×: {verdict}"]


def test_slower_is_what_is_so_by_more_than_the_spread():
    spread, none = (1.0, 1.05, 1.1), (1.0, 1.0, 1.0)
    before, after = (results.Results(None, {"processor": "x", "cores": 2}, {}) for _ in range(2))
    before.add(measured(case, *spread) for case in ("slower", "as wide", "faster"))
    before.add(measured(case, *none) for case in ("by a hair", "gone"))
    after.add(
        [measured("slower", 1.2, 1.25, 1.3), measured("as wide", 1.05, 1.2, 1.4), measured("faster", 0.5, 0.5, 0.5)]
    )
    after.add([measured("by a hair", 1.01, 1.01, 1.01), measured("new", 9.0, 9.0, 9.0)])
    table = results.slower(after, before)
    assert [row[1] for row in table.rows] == ["slower"]
    assert table.title.startswith("1 of 4 measurements")
    assert "another machine" not in table.title
    before.machine["cores"] = 4
    assert "another machine" in results.slower(after, before).title


def slow(seconds, tell):
    tell("began")
    if not seconds:
        raise ValueError("no time")
    __import__("time").sleep(seconds)


def test_a_child_is_stopped_and_what_it_raises_is_told():
    told = []
    with pytest.raises(children.ChildError, match="was stopped after 2 seconds"):
        children.in_child(slow, 60, seconds=2.0, tell=told.append)
    with pytest.raises(children.ChildError, match="ValueError: no time"):
        children.in_child(slow, 0, tell=told.append)
    with pytest.raises(children.ChildError, match="its process ended with 7"):
        children.in_child(os._exit, 7)
    assert told == ["began", "began"]
    assert children.in_child(math.sqrt, 4.0) == 2.0


def test_what_fails_is_told_and_the_next_follows():
    setting = answers.Setting("collapsing", "cpu", 1, "dry", seconds=0.0)
    failures = [each.failure for measured in answers.answers(setting) for each in measured]
    assert failures == ["was stopped after 0 seconds"] * len(list(setting.cases()))


def test_a_peak_of_memory_is_that_of_one_call():
    def call():
        with mmap.mmap(-1, 64 * 2**20) as memory:  # not by malloc, which may have some left
            for place in range(0, len(memory), mmap.PAGESIZE):
                memory[place] = 1

    grown = [children.peak_memory(each, torch.device("cpu")) for each in (call, lambda: None, call)]
    assert grown[1] < 8 * 2**20
    assert all(60 * 2**20 < grown[place] < 72 * 2**20 for place in (0, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measurings"], "expected parts to be some of"),
        (["measuring", "--batches", "3"], "unrecognized arguments: --batches 3"),
        (["profile", "tests"], "followed by one of measuring, compress, but got 'tests'"),
        (["--compare", "nowhere.json"], "there is no such file"),
        (["--quick", "--dry"], "not allowed with"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_images_of_the_curve_can_be_learned():
    device = torch.device("cpu")
    (images, labels), (others, truth) = (curve.learnable(count, device, seed) for count, seed in ((4000, 1), (200, 2)))
    assert images.shape == (4000, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.bfloat16
    assert len({*labels.tolist()}) == curve.CLASSES
    spectra = [torch.fft.rfft(each.float(), dim=-1).abs()[:, :, ::4, :6].flatten(1) for each in (images, others)]
    nearest = torch.cdist(spectra[1], spectra[0]).topk(5, largest=False).indices
    found = labels[nearest].mode(1).values
    assert (found == truth).float().mean() > 0.5  # a tenth by chance; shifts leave a spectrum as it is
    assert not torch.equal(images[:200], others)


PYTHON = """#!/bin/bash
echo "$@" >> calls.txt
case "$*" in *curve*) exit 3 ;; *measuring*) exec sleep 100 ;; esac
"""


def test_the_script_for_a_gpu_does_one_part_after_the_other_whatever_becomes_of_them(tmp_path):
    folder = tmp_path / "checkout" / "benchmarks"
    folder.mkdir(parents=True)
    script, python = folder / "gpu.sh", tmp_path / "python"
    text = (CHECKOUT / "benchmarks" / "gpu.sh").read_text()
    script.write_text(text.replace("bench 60 24 measuring", "bench 1 1 measuring"))
    assert script.read_text() != text
    python.write_text(PYTHON)
    for each in (script, python):
        each.chmod(0o755)
    done = subprocess.run([script, "--dry"], env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "== of seven parts 2 failed: measuring curve;" in done.stdout
    calls = (folder.parent / "calls.txt").read_text().splitlines()
    parts = [call.split()[2] for call in calls if call.startswith("-m benchmarks")]
    assert sorted(parts) == sorted(command.ON_A_GPU)
    assert all("--dry --output" in call for call in calls if call.startswith("-m benchmarks"))
    assert any("pytest" in call and "test_gpu.py" in call for call in calls)
    log = (folder.parent / "gpu_results" / "log.txt").read_text()
    assert "ended with 3" in log
    assert "ended with 124 after at most 1 s" in log


def test_the_part_that_calls_tuning_returns_its_table_alone():
    table = tuned.run_dry()
    assert table.startswith("**Tiny, ")
    assert set(rows_of(table)) == {"method", "---", "dense", "identity"}
    assert "tiny" not in networks.NETWORKS


def test_the_script_for_a_gpu_leaves_every_case_less_time_than_its_part_has():
    text = (CHECKOUT / "benchmarks" / "gpu.sh").read_text()
    limits = {
        part: (int(whole), int(case)) for whole, case, part in re.findall(r"^bench (\d+) (\d+) (\w+)", text, re.M)
    }
    assert sorted(limits) == sorted(command.ON_A_GPU)
    assert all(case + 10 <= whole for whole, case in limits.values())
    assert all(2 * case < whole for part, (whole, case) in limits.items() if part != "curve")


PYTHON_THAT_LACKS_SOMETHING = """#!/bin/bash
echo "$@" >> calls.txt
case "$*" in -c*|"-m $FAILS "*) exit 1 ;; esac
"""


@pytest.mark.parametrize("fails", ["venv", "pip", "nothing"])
def test_the_script_for_a_gpu_stops_where_what_is_needed_can_not_be_installed(fails, tmp_path):
    benchmarks, made = tmp_path / "checkout" / "benchmarks", tmp_path / "made" / "bin"
    for folder in (benchmarks, made):
        folder.mkdir(parents=True)
    script, python = benchmarks / "gpu.sh", made / "python"
    script.write_text((CHECKOUT / "benchmarks" / "gpu.sh").read_text())
    python.write_text(PYTHON_THAT_LACKS_SOMETHING)
    for each in (script, python):
        each.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "VENV": str(made.parent), "FAILS": fails}
    done = subprocess.run([script, "--dry"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "lacks some of torch, lightning, " in done.stdout
    assert "could not be installed" in done.stdout.splitlines()[-1]
    calls = (benchmarks.parent / "calls.txt").read_text()
    assert ("-m pip install" in calls) == (fails != "venv")
    assert "-m benchmarks" not in calls
    assert "-m pytest" not in calls


@pytest.mark.parametrize("what", ["measuring", "compress"])
def test_what_takes_the_most_time_is_listed(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_available():
        monkeypatch.setattr(children, "_start_method", "spawn")
    assert command.main(["profile", what, "--dry", "--threads", "1", "--output", str(tmp_path)]) == 0
    table = results.read(tmp_path / "results.json").tables[f"profile {what}"]
    assert table in capsys.readouterr().out
    title, *_ = table.splitlines()
    assert title.startswith(f"**{what}: ")
    rows = {name: cells for name, cells in rows_of(table).items() if name not in ("operator", "---")}
    assert 10 < len(rows) <= 25
    assert any("conv" in name for name in rows)
    seconds, shares, calls = (list(map(float, column)) for column in zip(*rows.values(), strict=True))
    assert seconds == sorted(seconds, reverse=True)
    assert 50 < sum(shares) <= 101  # the rest is in operators that take less
    assert min(calls) >= 1


def test_results_of_other_versions_may_have_other_fields(tmp_path):
    machine = {"processor": "x", "cores": 2}
    results.Results(tmp_path, machine, {"torch": "2"}).add([measured("first", 1.0, 1.1, 1.2)])
    file = tmp_path / "results.json"
    written = json.loads(file.read_text())
    for each in written["measurements"]:
        each["another field"] = each.pop("samples")
    file.write_text(json.dumps(written))
    later = results.Results(tmp_path, machine, {"torch": "3"})
    assert not later.measurements
    second = measured("second", 1.0, 1.1, 1.2)
    later.add([second])
    assert results.read(file).measurements == [second]
    del written["machine"]
    file.write_text(json.dumps(written))
    assert not results.Results(tmp_path, machine, {"torch": "2"}).measurements


@pytest.mark.parametrize(
    ("seconds", "ends"), [(math.inf, [10.0, 20.0, 30.0]), (35.0, [10.0, 20.0, 30.0]), (29.0, [10.0, 20.0])]
)
def test_a_curve_begins_no_round_that_it_has_no_time_for(seconds, ends, monkeypatch):
    clock, told = iter(range(0, 1000, 10)), []
    monkeypatch.setattr(curve, "perf_counter", lambda: float(next(clock)))
    curve.run(EFFORTS["dry"], torch.device("cpu"), told.append, seconds)
    assert [float(row[-1]) for row in told[-1].rows] == ends
    assert ("another round would have ended after 29 s" in told[-1].title) == (seconds == 29.0)


def test_a_fit_is_told_with_its_size_and_what_it_explains():
    channels, unknowns, positions, *_, explained = fitting.measure(4)
    assert (channels, unknowns) == ("4", "37")  # the last is a constant
    assert positions == f"{fitting.BATCHES * fitting.IMAGES * fitting.SIZE**2:,}"
    assert 0 < float(explained) < 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a file with the weights of a small network."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet8.th"
    torch.save({"state_dict": CifarResNet(8).state_dict()}, file)
    return file


@pytest.fixture
def tables(monkeypatch, root, weights, tmp_path, capsys):
    """Return what runs a benchmark with that network, and returns the tables that it prints: title -> rows of cells."""

    def run(benchmark, *arguments):
        monkeypatch.chdir(tmp_path)
        given = ["--data.root", str(root), "--weights", str(weights), "--depth", "8"]
        monkeypatch.setattr(sys, "argv", ["benchmark", *given, *arguments])
        benchmark.main()
        printed = capsys.readouterr().out
        found = re.findall(r"^\*\*(.+)\*\*\n\n(\|.*\n)\|[ |-]+\n((?:\|.*\n)+)", printed, re.MULTILINE)
        return {title: [*map(cells_of, (head + rows).splitlines())] for title, head, rows in found}

    return run


@pytest.fixture
def dense_accuracy(root, weights):
    return f"{cifar.accuracy(cifar.load(str(weights), 8), cifar.Images(str(root / 'test'))):.1f}"


INNER = [f"layer{stage}.0.relu1" for stage in (1, 2, 3)]


def test_drifting_tells_the_drift_after_each_operator(tables, dense_accuracy):
    ((title, (head, *rows)),) = tables(drifting, "--images", "32").items()
    assert title.startswith("ResNet-8, 32 training images")
    assert head == ["tried", "drift", "top-1 [%]"]
    assert [row[0] for row in rows] == [str(number) for number in range(len(rows))]
    assert rows[0][1:] == ["0.000", dense_accuracy]
    drifts = [float(row[1]) for row in rows]
    assert len(rows) > 3
    assert max(drifts) > 0
    assert all(0 <= float(row[2]) <= 100 for row in rows)


def test_removing_compares_ways_and_orders(tables, dense_accuracy):
    ((title, (head, *rows)),) = tables(removing, "--images", "32").items()
    assert title == "ResNet-8, top-1 [%] on 64 test images, no training after removals"
    assert head[2:] == ["0", "1", "2", "3"]
    orders = {"identity": 2, "affine": 3, "fitted": 3}
    assert [row[0] for row in rows] == [way for way, count in orders.items() for _ in range(count)]
    assert {row[2] for row in rows} == {dense_accuracy}
    for way in ("identity", "affine"):  # with all of them gone, the order says nothing
        assert len({row[-1] for row in rows if row[0] == way}) == 1
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[2:])


def test_rounds_prune_and_tune_in_turn(tables):
    ((title, (head, *rows)),) = tables(rounds, "--rounds", "2", "--removed", "1", "--images", "128").items()
    assert title.startswith("ResNet-8, top-1 [%] after 128 images a round, 1 seeds, from ")
    assert head[2:] == ["1", "2"]
    assert [row[:2] for row in rows] == [
        ["dense", ""], *([way, order] for way in rounds.WAYS for order in ("entropy", "linearity"))
    ]  # fmt: skip
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[2:])


@pytest.mark.parametrize("way", rounds.WAYS)
def test_a_round_makes_those_linear_that_are_lowest_in_its_order(way, root, weights):
    images = [cifar.Images(str(root / "train")).batch(torch.arange(32))]
    model = cifar.load(str(weights), 8)
    explained = fit_chains(model, images) if way == "fitted" else measure_affines(model, images)
    lowest = {
        "entropy": sorted(INNER, key=measure_entropy(model, images).__getitem__),
        "linearity": sorted(INNER, key=lambda name: -explained[name].explained),
    }
    for order, expected in lowest.items():
        model = cifar.load(str(weights), 8)
        assert list(rounds.WAYS[way](order)(model, INNER, images, 2)) == expected[:2]
        assert sorted(stand_ins(model)) == sorted(expected[:2])
