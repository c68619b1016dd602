"""A GPU's way to multiply, on a CPU: of what convolutions and matrices read ten bits are kept, unless torch is told."""

import torch
from torch import Tensor, nn


def tensorfloat(value: Tensor) -> Tensor:
    """Round float32 to the ten bits of TF32; other numbers stay."""
    if value.dtype != torch.float32:
        return value
    bits = value.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def multiply_coarsely(monkeypatch) -> None:
    """Have convolutions round what they read, as they do on a GPU by default, and Linear where it is allowed to."""
    convolve, apply = nn.Conv2d._conv_forward, nn.Linear.forward

    def conv_forward(self, input, weight, bias):
        if torch.backends.cudnn.allow_tf32:
            input, weight = tensorfloat(input), tensorfloat(weight)
        return convolve(self, input, weight, bias)

    def linear_forward(self, input):
        if torch.get_float32_matmul_precision() == "highest":
            return apply(self, input)
        return nn.functional.linear(tensorfloat(input), tensorfloat(self.weight), self.bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", conv_forward)
    monkeypatch.setattr(nn.Linear, "forward", linear_forward)
