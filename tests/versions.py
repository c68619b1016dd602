"""Marks for tests that lean on what not every supported version has."""

from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from lightning_easier import CollapseError, ExportError
from lightning_easier.collapsing.errors import CaptureError
from lightning_easier.support.versions import SAYS_SIZES

_WHY = f"torch.export of torch {torch.__version__} does not say for which sizes its graph holds"

needs_sizes = pytest.mark.skipif(not SAYS_SIZES, reason=_WHY)

refused_without_sizes = pytest.mark.xfail(
    not SAYS_SIZES,
    reason=_WHY,
    strict=True,  # so that no test is left out that would pass
    raises=pytest.RaisesExc((CollapseError, CaptureError), match="does not say for which sizes"),
)
"""For what an earlier torch has to refuse by this reason: any other error, or a wrong result, fails the test."""


def _records_symbolic_strides() -> bool:
    try:
        fx.symbolic_trace(lambda x: F.conv1d(x, x, stride=x.size(0)))
    except TypeError:
        return False
    return True


needs_symbolic_strides = pytest.mark.skipif(
    not _records_symbolic_strides(), reason=f"torch.fx of torch {torch.__version__} records no size as a stride"
)

needs_later_operators = pytest.mark.xfail(
    version("onnxscript").startswith("0.2."),
    reason=f"onnxscript {version('onnxscript')} writes version 18 of ONNX's operators only",
    strict=True,
    raises=pytest.RaisesExc(ExportError, match="can't write the model in version .* it wrote 18"),
)
