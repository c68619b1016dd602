"""Put together what several processes have, many tensors in one communication.

Sums of one shape on all processes are added up by torch's own ``all_reduce``, which needs no room for those of the
others. What has other shapes on other processes, or is put together in another way than by a sum, is gathered, and goes
together in the order of the ranks on each of them. Either way all processes hold the same bits.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.fsdp import FSDPModule
from torchmetrics.metric import jit_distributed_available
from torchmetrics.utilities.distributed import gather_all_tensors


def sum_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums of tensors over all processes, in their own dtypes, with one communication for each dtype.

    Every process has to call this, with tensors of the same shapes.
    """
    if not jit_distributed_available():
        return list(tensors)
    sums = list(tensors)
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if (tensor.dtype, tensor.device) == kind]
        packed = torch.cat([tensors[place].reshape(-1) for place in places])
        all_reduce(packed)
        for place, total in zip(places, packed.split([tensors[place].numel() for place in places]), strict=True):
            sums[place] = total.reshape(tensors[place].shape).clone()  # as its own, it is aligned
    return sums


def gather_from_processes(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors of each process, in the order of the ranks, with one communication for all of them.

    Every process has to call this, with as many tensors of the same dtypes and numbers of axes. Their sizes may differ:
    a process that got no batch does not know them.

    Returns:
        For each process, bit for bit what it had, on the CPU; of one process alone, what is given.
    """
    if not tensors or not jit_distributed_available():
        return [[tensor.cpu() for tensor in tensors]]
    sizes = torch.tensor([size for tensor in tensors for size in tensor.shape], dtype=torch.int64)
    device = tensors[0].device
    packed = torch.cat([_as_bytes(part).to(device) for part in (sizes, *tensors)])
    return [list(_unpacked(each.cpu(), tensors)) for each in gather_all_tensors(packed)]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _unpacked(packed: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield tensors of other shapes than those that they are like, in bytes after their sizes."""
    axes = sum(tensor.ndim for tensor in like)
    sizes = iter(packed[: 8 * axes].clone().view(torch.int64).tolist())
    place = 8 * axes
    for tensor in like:
        shape = [next(sizes) for _ in range(tensor.ndim)]
        length = prod(shape) * tensor.element_size()
        yield packed[place : place + length].clone().view(tensor.dtype).reshape(shape)
        place += length


def reshard(model: nn.Module) -> None:
    """Have the parameters be those that optimizers hold; FSDP2 may have left them whole after a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
