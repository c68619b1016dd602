"""Whether the rows of a batch are samples."""

import torch
from torch import nn

from lightning_easier.support.rows import rows_are_samples


def test_rows_are_samples_though_a_gpu_may_compute_another_number_of_them_with_another_kernel(monkeypatch):
    compute = nn.Linear.forward

    def forward(self, input):
        output = compute(self, input)
        is_full = torch.get_float32_matmul_precision() == "highest"
        return output if is_full or len(input) > 16 else output.bfloat16().float()

    monkeypatch.setattr(nn.Linear, "forward", forward)
    try:
        torch.set_float32_matmul_precision("high")
        assert rows_are_samples(nn.Sequential(nn.Linear(8, 4)), (torch.randn(32, 8),))
    finally:
        torch.set_float32_matmul_precision("highest")
