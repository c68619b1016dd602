"""What is done once for all tests, in the place of what torch does each time, has the same outcome."""

import torch
from torch._export import utils
from torch.library import Library
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests import torch_once


def test_what_can_be_written_to_onnx_is_read_once():
    first = ONNXRegistry.from_torchlib()
    assert first is ONNXRegistry.from_torchlib()
    assert first.is_registered(torch.ops.aten.relu.default)


def test_operators_are_looked_through_again_when_another_is_registered(monkeypatch):
    looked, look = [], torch_once.look_through
    monkeypatch.setattr(torch_once, "look_through", lambda: looked.append(None) or look())

    def times():
        utils._materialize_cpp_cia_ops()
        utils._materialize_cpp_cia_ops()
        return len(looked)

    before = times()
    library = Library("once_for_all", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeImplicitAutograd")
    assert times() == before + 1
    assert "twice" in dir(torch.ops.once_for_all)
