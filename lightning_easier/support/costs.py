"""What a model costs: parameters, multiply-accumulates and memory."""

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from lightning_easier.support.calls import call

_MACS_FOR_A_VALUE = 64


def price_in_words(price: float, objective: str) -> str:
    """Write a price with its unit.

    Args:
        price: In seconds, multiply-accumulates or operators.
        objective: ``"latency"``, ``"macs"`` or ``"depth"``.

    Example:
        >>> price_in_words(1.26e-5, "latency"), price_in_words(18432.0, "macs"), price_in_words(2.0, "depth")
        ('12.6 µs', '18,432 MACs', '2 operators')
    """
    unit, scale = {
        "latency": ("{:.1f} µs", 1e6), "macs": ("{:,.0f} MACs", 1), "depth": ("{:,.0f} operators", 1),
    }[objective]  # fmt: skip
    return unit.format(price * scale)


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters, each shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, arguments: Sequence[Tensor]) -> int:
    """Count the multiply-accumulates of one call, by torch's own counter (convolutions, matrix products, attention).

    The model is counted as it runs; where that fails, with the attention that is fused (of nested tensors, say)
    written out.

    Raises:
        Exception: Whatever the forward raises in both cases, while its operators are looked at.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        return _count_macs(model, arguments)
    except Exception:
        torch.backends.mha.set_fastpath_enabled(False)
        return _count_macs(model, arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def count_together(model: nn.Module, arguments: Sequence[Tensor]) -> tuple[int, int]:
    """Count multiply-accumulates and memory as :func:`count_macs` and :func:`measure_activation_memory`, in one call.

    Recurrent layers are counted as they don't run otherwise: what has any is called twice.

    Raises:
        Exception: Whatever the forward raises while its operators are looked at.
    """
    if _is_recurrent(model):
        return count_macs(model, arguments), measure_activation_memory(model, arguments)
    memory = _PeakMemory.beside(model, arguments)
    with torch.no_grad(), (counter := _counter()), memory:  # in this order: it sees what is not taken apart yet
        call(model, arguments)
    return int(counter.get_total_flops()) // 2, memory.peak


def count_work(model: nn.Module, arguments: Sequence[Tensor]) -> float:
    """Count what one call takes of a CPU, about, in multiply-accumulates.

    What operators return takes time to read and write besides, most of it where convolutions are depthwise: of six
    networks, from a ResNet-56 to ViT-S, an operator took as long for each value as for 65 multiply-accumulates.

    Raises:
        Exception: As for :func:`count_macs`.
    """
    if _is_recurrent(model):
        macs = count_macs(model, arguments)
        with torch.no_grad(), (returned := _Returned()):
            call(model, arguments)
    else:
        with torch.no_grad(), (counter := _counter()), (returned := _Returned()):  # as for count_together
            call(model, arguments)
        macs = int(counter.get_total_flops()) // 2
    return macs + _MACS_FOR_A_VALUE * returned.values


def _is_recurrent(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(part, nn.RNNBase) for part in model.modules())


def _counter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED)
    counter.mod_tracker = _Untracked()
    return counter


@contextmanager
def _left_out(backend: Any) -> Iterator[None]:
    """Have torch do without a library; its ``flags`` would set, and ask for, what is set of float32 besides."""
    was, backend.enabled = backend.enabled, False
    try:
        yield
    finally:
        backend.enabled = was


def _count_macs(model: nn.Module, arguments: Sequence[Tensor]) -> int:
    counter = _counter()
    with ExitStack() as stack:
        if _is_recurrent(model):  # fused, they have no formula; step by step they do
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.enter_context(_left_out(backend))
        stack.enter_context(counter)
        stack.enter_context(torch.no_grad())
        call(model, arguments)
    return int(counter.get_total_flops()) // 2


class _Untracked(ModuleTracker):
    """Tells no modules apart: its hooks on them don't take all that a forward may be called with."""

    def __enter__(self) -> "_Untracked":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _of_attention(query: Any, key: Any, value: Any, width: int, *_: Any, **__: Any) -> int:
    """Count the operations of attention with its four projections; batch first."""
    (samples, length, _), (_, others, _) = query, key
    return 4 * samples * width * ((length + others) * width + length * others)


def _of_transformer_layer(source: Any, width: int, *others: Any, **_: Any) -> int:
    """Count the operations of a layer of a transformer."""
    samples, length, _ = source
    hidden, _ = others[12]  # the shape of the first weight after the attention
    return _of_attention(source, source, source, width) + 4 * samples * length * width * hidden


def _of_products(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the operations of attention without projections: of queries with keys, and of the weights with values."""
    (*heads, length, width), (*_, others, _), (*_, depth) = query, key, value
    return 2 * math.prod(heads) * length * others * (width + depth)


# What torch's counter has no formulas for. Which of those of a CPU runs is for torch to choose: with a mask, some
# versions take the one, and some write the products out.
_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_products,
    torch.ops.aten._native_multi_head_attention: _of_attention,
    torch.ops.aten._transformer_encoder_layer_fwd: _of_transformer_layer,
}


class _Returned(TorchDispatchMode):
    """Count the values that operators return; views have none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not any(each.alias_info for each in func._schema.returns):
            self.values += sum(leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result


class _PeakMemory(TorchDispatchMode):
    """Follow the memory that operators allocate and release."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def beside(cls, model: nn.Module, arguments: Sequence[Tensor]) -> "_PeakMemory":
        """Follow what is not there before a call."""
        memory = cls()
        memory.ignore((*model.parameters(), *model.buffers(), *arguments))
        return memory

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def release(_: Any) -> None:
            self._now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, release)
        self._now += size
        self.peak = max(self.peak, self._now)


def measure_activation_memory(model: nn.Module, arguments: Sequence[Tensor]) -> int:
    """Measure the most bytes that the values of one call take at a time, without parameters, buffers and inputs.

    What an operator needs inside itself (the workspace of a convolution) is not seen.
    """
    memory = _PeakMemory.beside(model, arguments)
    with torch.no_grad(), memory:
        call(model, arguments)
    return memory.peak
