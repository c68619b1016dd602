"""What torch reads anew for each export to ONNX is read once for all tests: it was 0.8 of the 1.2 s that one takes.

That is what can be written, and torch's operators, which were looked through ninety times: they are what they were
until another one is registered.
"""

from contextlib import suppress
from functools import cache
from typing import Any

import torch

look_through: Any = None
"""What torch looks through its operators with; None where this torch has no such part."""


@cache
def _looked_through(names: tuple[str, ...]) -> None:
    look_through()


def read_once() -> None:
    """Have torch read both once; other versions may not have these parts, and one of them needs onnxscript."""
    global look_through
    with suppress(ImportError, AttributeError):
        from torch._export import utils

        registered = torch._C._dispatch_get_registrations_for_dispatch_key
        look_through = utils._materialize_cpp_cia_ops
        utils._materialize_cpp_cia_ops = lambda: _looked_through(tuple(registered("CompositeImplicitAutograd")))
    with suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = classmethod(cache(ONNXRegistry.from_torchlib.__func__))
