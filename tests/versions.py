"""Marks for tests that lean on what not every supported version has."""

from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from lightning_easier import ExportError


def _records_symbolic_strides() -> bool:
    try:
        fx.symbolic_trace(lambda x: F.conv1d(x, x, stride=x.size(0)))
    except TypeError:
        return False
    return True


needs_symbolic_strides = pytest.mark.skipif(
    not _records_symbolic_strides(), reason=f"torch.fx of torch {torch.__version__} records no size as a stride"
)

keeps_a_batch_of_attention = pytest.mark.xfail(
    torch.__version__.startswith("2.6."),
    reason=f"torch.export of torch {torch.__version__} takes the number of samples behind attention for a constant",
    strict=True,
    raises=pytest.RaisesExc(ExportError, match="torch.export does not take .*Constraints violated"),
)

needs_later_operators = pytest.mark.xfail(
    version("onnxscript").startswith("0.2."),
    reason=f"onnxscript {version('onnxscript')} writes version 18 of ONNX's operators only",
    strict=True,
    raises=pytest.RaisesExc(ExportError, match="can't write the model in version .* it wrote 18"),
)
