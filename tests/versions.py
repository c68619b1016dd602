"""Marks for tests that lean on what not every supported torch has."""

import pytest
import torch

from lightning_easier.support.versions import SAYS_SIZES

needs_sizes = pytest.mark.skipif(
    not SAYS_SIZES, reason=f"torch.export of torch {torch.__version__} does not say for which sizes its graph holds"
)
