"""The networks and images that the benchmarks of removals share: a trained CIFAR ResNet, images in folders, tuning.

The images come as ``<root>/train/<class>`` and ``<root>/test/<class>``; the weights as a file with a ``state_dict``
whose keys may begin with ``module.``.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_easier.zoo import CifarResNet

# What networks are trained in: without AVX-512 a CPU takes ten times as long in bfloat16 as in float32.
PRECISION = torch.bfloat16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else torch.float32

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Images:
    """All images of a folder, in memory.

    Args:
        folder: With a folder of images for each class.
    """

    def __init__(self, folder: str) -> None:
        files = datasets.ImageFolder(folder, v2.PILToTensor())
        self.labels = torch.tensor(files.targets)
        self.pixels = torch.stack([files[place][0] for place in tqdm(range(len(files)), desc=folder, leave=False)])

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.labels)

    def batch(self, places: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return normalized images; shifted by up to four pixels and flipped if there is a generator."""
        images = self.pixels[places]
        if generator is not None:
            count, size = len(images), images.shape[-1]
            images = F.pad(images, (4, 4, 4, 4))
            down, right = torch.randint(0, 9, (2, count, 1), generator=generator)
            rows, columns = (start + torch.arange(size) for start in (down, right))
            images = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            images = images.movedim(-1, 1)
            flipped = torch.rand(count, generator=generator) < 0.5
            images[flipped] = images[flipped].flip(-1)
        return (images.float() / 255 - MEAN) / STD

    def calibration(self, count: int, seed: int) -> list[Tensor]:
        """Return so many images without augmentation, in batches of 250."""
        return [self.batch(places) for places in drawn(self, count, seed).split(250)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all of these benchmarks take."""
    parser.add_argument("--data.root", dest="root", required=True, help="folder of the images")
    parser.add_argument("--weights", required=True, help="file of the weights")
    parser.add_argument("--depth", type=int, default=56, help="of the ResNet")


def load(path: str, depth: int) -> nn.Module:
    """Load the network of He et al."""
    return load_weights(CifarResNet(depth), path)


def load_weights(model: nn.Module, path: str) -> nn.Module:
    """Load weights into a model, in place, and return it in eval mode."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def drawn(images: Images, count: int, seed: int) -> Tensor:
    """Return the places of so many images."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], images: Images) -> float:
    """Return top-1 accuracy in per cent, in float32."""
    hits = sum(
        int((model(images.batch(places)).argmax(1) == images.labels[places]).sum())
        for places in torch.arange(len(images)).split(500)
    )
    return 100 * hits / len(images)


def sgd(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Return what suits convolutions."""
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=1e-4, nesterov=True)


def adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Return what suits transformers."""
    return torch.optim.AdamW(parameters, rate, weight_decay=0.05)


def tune(
    model: nn.Module,
    images: Images,
    subset: Tensor,
    epochs: float,
    seed: int,
    rate: float = 0.01,
    teacher: nn.Module | None = None,
    batch: int = 128,
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = sgd,
    dtype: torch.dtype = PRECISION,
) -> nn.Module:
    """Train a model in place, and return it in eval mode.

    With a cosine schedule; by default SGD with momentum, and bfloat16 where the CPU is fast in it.

    Args:
        model: To be trained.
        images: What ``subset`` has places in.
        subset: The images an epoch goes over.
        epochs: Need not be a whole number.
        seed: Of the order and the augmentation.
        rate: The largest learning rate.
        teacher: Its logits are followed, at temperature 4, with a weight of 0.7 (Hinton et al., 2015).
        batch: Images a step.
        optimizer: Makes the optimizer, of parameters and the largest learning rate.
        dtype: Of the autocast; none if it is float32.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = int(epochs * (len(subset) // batch))
    stepper = optimizer(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        stepper, rate, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    model.train().to(memory_format=torch.channels_last)  # A fifth faster on a CPU.
    batches: Sequence[Tensor] = ()
    for step in tqdm(range(steps), leave=False, mininterval=10):
        place = step % (len(subset) // batch)
        if place == 0:
            batches = subset[torch.randperm(len(subset), generator=generator)].split(batch)
        values = images.batch(batches[place], generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(values).float()
            loss = F.cross_entropy(logits, images.labels[batches[place]])
            if teacher is not None:
                with torch.no_grad():
                    wanted = (teacher(values).float() / 4).log_softmax(1)
                divergence = F.kl_div((logits / 4).log_softmax(1), wanted, log_target=True, reduction="batchmean")
                loss = 0.3 * loss + 0.7 * 16 * divergence
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        schedule.step()
    return model.eval().to(memory_format=torch.contiguous_format)
