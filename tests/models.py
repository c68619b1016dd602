"""Small models with the habits of real ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Functional(nn.Module):
    """Every spelling of a functional rectifier, dropout that depends on the mode, and a bounded gate."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x), inplace=True)
        x = torch.relu(x - 0.1)
        x = F.gelu(x, approximate="tanh")
        x = F.leaky_relu(input=x - 0.2, negative_slope=0.3)
        x = F.dropout(x, 0.5, training=self.training)
        x = torch.sigmoid(x).relu()
        return (x - 0.3).relu_()


class Residual(nn.Module):
    """One ReLU module called twice, as in torchvision's ResNet, between convolutions."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + x)


class OptionalArgument(nn.Module):
    """A forward that takes another way when an argument is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, shortcut: Tensor | None = None, scale: float = 1.0) -> Tensor:
        out = self.fc(x) * scale
        if shortcut is not None:
            out = out + shortcut
        return F.relu(out)


def randomize_batch_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and weights that no test can confuse with the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            with torch.no_grad():
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                if module.affine:
                    module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
    return model


def narrow(model: nn.Module, by: int) -> nn.Module:
    """Divide the widths of a network that was built on the meta device, all but those of its inputs and outputs."""
    first, *_, last = (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))

    def make(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.BatchNorm2d):
            return nn.BatchNorm2d(module.num_features // by, module.eps)
        if isinstance(module, nn.Linear):
            inputs = module.in_features // by
            return nn.Linear(inputs, module.out_features if module is last else module.out_features // by)
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            inputs = module.in_channels if module is first else module.in_channels // by
            options = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
            return nn.Conv2d(
                inputs, module.out_channels // by, module.kernel_size, bias=module.bias is not None, **options
            )
        return None

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (made := make(child)) is not None:
                setattr(parent, name, made)
    return model
