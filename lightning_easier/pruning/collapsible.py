"""Which submodules could be taken out whole, and what would that save? The table to read before a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_easier.pruning.without_blocks import can_be_passed_again, fails_without
from lightning_easier.report import BlockReport, CollapsibleBlock
from lightning_easier.sites.activations import match_names, unwrap
from lightning_easier.sites.blocks import Block, find_blocks
from lightning_easier.support.arguments import as_globs
from lightning_easier.support.batches import as_arguments
from lightning_easier.support.calls import call, copies, mapped
from lightning_easier.support.costs import count_macs
from lightning_easier.support.finite import is_finite
from lightning_easier.support.hooks import HookOfOneModel
from lightning_easier.support.inference import check_weights, evaluation_mode, forward, tensors_in
from lightning_easier.support.timing import speed_up, time_interleaved

_SAMPLES = 7
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


def collapsible_blocks(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    *,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
) -> BlockReport:
    """List the submodules of a model that can be taken out whole: residual blocks, and branches of residual additions.

    The model is looked at as in eval mode, and not touched. No example inputs are needed to find them; with some, each
    block is checked on them, and its share of the cost is measured.

    Args:
        model: Any module.
        example_inputs: A tensor, the positional arguments of the forward, or a dictionary of arguments by name,
            ``(N, *)`` each. The model is run on them, and with one sample more where it takes that, and without each
            block: one whose output has not the shape and dtype of its input, or without which the model does not run or
            returns what is not finite, is left out, with the reason.
        include: Name globs of the blocks to list; all by default.
        exclude: Name globs of those not to list.

    Returns:
        A report with one row a block, in execution order, an outer one before those in it: its name, class, what takes
        its place (the identity, or zeros), the block that it lies in, and its shares of the model's
        multiply-accumulates and measured time. It is empty if there is none.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule, if the inputs are not tensors, or the globs not
            strings.
        ValueError: If a glob matches no block, the forward doesn't accept the inputs, or there are no weights to run
            with.

    Example:
        >>> from lightning_easier.zoo import CifarResNet
        >>> [block.name for block in collapsible_blocks(CifarResNet(8)).blocks]
        ['layer1.0']
    """
    inner = unwrap(model)
    globs = as_globs("include", include), as_globs("exclude", exclude)
    arguments = None if example_inputs is None else as_arguments(example_inputs, inner)
    found = {block.name: block for block in find_blocks(inner)}
    blocks = [found[name] for name in match_names(list(found), *globs, kind="blocks")]
    if arguments is None:
        return BlockReport([_row(block) for block in blocks], {}, [])
    check_weights(inner)
    with evaluation_mode(inner):
        calls = _calls(inner, blocks, arguments)
        left_out = _misfits(blocks, calls)
        notes = []
        more = _one_more(arguments)
        try:
            calls_with_more = None if more is None else _calls(inner, blocks, more)
        except ValueError as error:
            calls_with_more = None
            notes.append(f"The shapes were checked with the batch as given only; with one sample more: {error}")
        if calls_with_more is not None:
            left_out = _misfits(blocks, calls_with_more) | left_out
        run = partial(_run, inner, arguments)
        is_finite_with = is_finite(*tensors_in(run()))
        left_out |= {
            block.name: reason
            for block in blocks
            if block.name not in left_out
            and (reason := fails_without(inner, block, run, is_finite_with=is_finite_with)) is not None
        }
        blocks = [block for block in blocks if block.name not in left_out]
        macs, times = _shares(inner, arguments, {block.name: calls[block.name][0] for block in blocks})
    rows = [_row(block, macs.get(block.name), times.get(block.name)) for block in blocks]
    return BlockReport(rows, left_out, notes)


def _row(block: Block, macs: float | None = None, time: float | None = None) -> CollapsibleBlock:
    return CollapsibleBlock(block.name, type(block.module).__name__, block.leaves, block.inside, macs, time)


class _Call:
    """What a block was called with, and whether what came out would be missed if it were gone."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.run: Callable[[], Any] | None = None
        self.reason: str | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what it is called with; the block may write to it."""
        again = {key: value for key, value in kwargs.items() if can_be_passed_again(value)}
        args, again = pytree.tree_map_only(Tensor, torch.clone, (args, again))
        self.given = next((value for value in (*args, *again.values()) if isinstance(value, Tensor)), None)
        self.run = partial(module, *args, **again)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Compare what came out."""
        returns = self.block.returns
        is_tuple = isinstance(output, tuple | list)
        value = output[0] if is_tuple and output else output
        if is_tuple != (returns is not None) or (is_tuple and len(output) != returns) or not isinstance(value, Tensor):
            self.reason = f"it returns a {type(output).__name__} of something else than was expected"
        elif self.given is None:
            self.reason = "it is given no tensor"
        elif value.shape != self.given.shape or value.dtype != self.given.dtype:
            self.reason = (
                f"its output has shape {tuple(value.shape)} and dtype {value.dtype}, its input "
                f"{tuple(self.given.shape)} and {self.given.dtype}"
            )


def _calls(model: nn.Module, blocks: Iterable[Block], arguments: Sequence[Tensor]) -> dict[str, list[_Call]]:
    """Run a model and watch the calls of its blocks."""
    calls: dict[str, list[_Call]] = {block.name: [] for block in blocks}

    def watch(block: Block, stack: ExitStack) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[block.name].append(_Call(block))
            calls[block.name][-1].before(module, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[block.name][-1].after(module, args, output)

        stack.callback(block.module.register_forward_pre_hook(HookOfOneModel(before), with_kwargs=True).remove)
        stack.callback(block.module.register_forward_hook(HookOfOneModel(after)).remove)

    with ExitStack() as stack:
        for block in blocks:
            watch(block, stack)
        forward(model, copies(arguments), "example_inputs")
    return calls


def _misfits(blocks: Iterable[Block], calls: Mapping[str, Sequence[_Call]]) -> dict[str, str]:
    """Return name -> reason of the blocks that can't be taken out after all."""
    reasons: dict[str, str] = {}
    for block in blocks:
        made = calls[block.name]
        reason = next((each.reason for each in made if each.reason is not None), None)
        if len(made) != 1:
            reason = f"it is called {len(made)} times" if made else "it is not called"
        if reason is not None:
            reasons[block.name] = reason
    return reasons


def _run(model: nn.Module, arguments: Sequence[Tensor]) -> Any:
    return forward(model, copies(arguments), "example_inputs")


def _one_more(arguments: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Return the arguments with one sample more; None where they seem to have no samples in common."""
    if any(each.ndim == 0 or len(each) != len(arguments[0]) for each in arguments):
        return None
    return mapped(lambda each: torch.cat([each, each[:1]]), arguments)


def _shares(
    model: nn.Module, arguments: Sequence[Tensor], calls: Mapping[str, _Call]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the shares of the multiply-accumulates and of the time that blocks take, by name."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, each in calls.items():
        assert each.run is not None
        try:
            each.run()
        except _FAILURES:  # without what can't be passed again; then there is no share to tell
            continue
        runs[name] = each.run
    total = count_macs(model, copies(arguments))
    macs = {name: count_macs(run, ()) / total for name, run in runs.items()} if total else {}  # type: ignore[arg-type]
    inputs = copies(arguments)
    if not runs:
        return macs, {}
    timed: dict[str, Callable[[], Any]] = {"": partial(call, model, inputs), **runs}
    seconds = time_interleaved(timed, samples=_SAMPLES, progress="Timing blocks", device=inputs[0].device)
    return macs, {name: speed_up(seconds[name], seconds[""]).median for name in runs}
