"""A transformer of two layers that trains in a moment, its attention torch's or one of its own."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """One head."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, torchs):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True) if torchs else Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.dropout, self.torchs = nn.Dropout(0.0), torchs

    def forward(self, x):
        y = self.norm1(x)
        y = self.attention(y, y, y, need_weights=False)[0] if self.torchs else self.attention(y)
        x = x + self.dropout(y)
        return x + self.mlp(self.norm2(x))


class Transformer(LightningModule):
    """Three tokens; a score an epoch."""

    def __init__(self, scores=(0.9,), torchs=False, lr=0.01, width=4):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.stem, self.head = nn.Linear(4, 3 * width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(Layer(width, torchs) for _ in range(2))
        self.by_epoch, self.lr, self.width = scores, lr, width

    def forward(self, x):
        x = self.stem(x).unflatten(-1, (3, self.width))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("score", self.by_epoch[min(self.current_epoch, len(self.by_epoch) - 1)])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]
