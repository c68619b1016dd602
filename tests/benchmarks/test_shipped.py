"""A network computes the same in each runtime, nearly so in int8, and is compared within each and with eager."""

from functools import partial

import onnx
import shipped
import torch

from lightning_easier.support.inference import relative_difference
from tests.benchmarks.tiny import Tiny, rows_of


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
