"""Load a pruned checkpoint right or fail loudly.

The record of what was pruned lives in the state dict itself (see :mod:`lightning_easier.structure.linearize`), so it is
there in a weights-only checkpoint and in a bare ``torch.save(model.state_dict())`` too.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.sites.activations import unwrap
from lightning_easier.structure.linearize import dense_keys, read_marks, restructure_as_marked
from lightning_easier.support import loading


def load_pruned(
    model: nn.Module | type[LightningModule],
    checkpoint_path: str | Path,
    *,
    map_location: Any = "cpu",
    weights_only: bool | None = True,
    **init_kwargs: Any,
) -> nn.Module:
    """Load a checkpoint of a pruned model: its structure first, then its weights, strictly.

    Args:
        model: An instance built as the one that was trained, which is changed in place, or a LightningModule class,
            which is built from the checkpoint's hyperparameters and ``init_kwargs``.
        checkpoint_path: A Lightning checkpoint, or a file with a state dict alone.
        map_location: Where the tensors go, as for :func:`torch.load`.
        weights_only: As for :func:`torch.load`; ``False`` unpickles any object, so only for files that you trust.
        **init_kwargs: Arguments of the class that the checkpoint does not hold.

    Returns:
        The model.

    Warns:
        UserWarning: If the checkpoint was saved at the end of a round that was taken back.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``model`` is neither a module nor a LightningModule class, or ``init_kwargs`` come with an
            instance.
        ValueError: If the checkpoint has no record of linearized activations, nor of a pruning run, or does not fit the
            model. An instance is as it was then.
    """
    path = Path(checkpoint_path)
    checkpoint = read_checkpoint(path, map_location=map_location, weights_only=weights_only)
    for state in callback_states(checkpoint):
        warn_if_rejected(state)
    if isinstance(model, type):
        if not issubclass(model, LightningModule):
            raise TypeError(
                f"Expected argument `model` to be an instance or a LightningModule class, but got {model}; pass an "
                f"instance of it"
            )
        _marked_state_dict(checkpoint, path)
        with warnings.catch_warnings(), _restructuring(model):
            warnings.simplefilter("ignore")  # of what a first, non-strict pass does not find
            instance = model.load_from_checkpoint(
                path, map_location=map_location, strict=False, weights_only=weights_only, **init_kwargs
            )
        instance.on_load_checkpoint(checkpoint)
        _load(instance, _marked_state_dict(checkpoint, path), path)
        return instance
    if init_kwargs:
        raise TypeError(f"Expected no arguments {sorted(init_kwargs)} with an instance of a model: it is built already")
    inner = unwrap(model)
    if isinstance(inner, LightningModule) and "state_dict" in checkpoint:
        inner.on_load_checkpoint(checkpoint)
    _load(inner, _marked_state_dict(checkpoint, path), path)
    return model


@contextmanager
def _restructuring(cls: type[LightningModule]) -> Iterator[None]:
    """Have the instances of a class take the structure of what they load, until the end.

    Lightning builds an instance and loads its weights in one go, and fitted operators may have other shapes.
    """
    own, load = vars(cls).get("load_state_dict"), cls.load_state_dict

    def restructure_and_load(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        restructure_as_marked(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    cls.load_state_dict = restructure_and_load  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del cls.load_state_dict
        else:
            cls.load_state_dict = own  # type: ignore[method-assign]


def read_checkpoint(
    path: str | Path,
    *,
    argument: str = "checkpoint_path",
    map_location: Any = "cpu",
    weights_only: bool | None = True,
) -> dict[str, Any]:
    """Read what ``torch.save`` has written, and blame the named argument where that fails.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file can't be read, or holds neither a checkpoint nor a state dict.
    """
    found = read_saved(path, argument=argument, map_location=map_location, weights_only=weights_only)
    if isinstance(found, nn.Module):
        raise ValueError(_holds_no_state_dict(argument, path, found))
    return found


def read_saved(
    path: str | Path,
    *,
    argument: str = "checkpoint_path",
    map_location: Any = "cpu",
    weights_only: bool | None = True,
) -> dict[str, Any] | nn.Module:
    """Read a checkpoint as :func:`read_checkpoint` does, or a network that was saved whole.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file can't be read, or holds neither a checkpoint nor a state dict nor a network, as
            one of TorchScript is none: nothing here can be done with it.
    """
    if not isfile(path):
        raise FileNotFoundError(f"Expected argument `{argument}` to be a checkpoint file, but {str(path)!r} is none")
    what, opt_in = f"argument `{argument}` to be a checkpoint file", "pass `weights_only=False`"
    found = loading.read(Path(path), what, opt_in, map_location=map_location, weights_only=weights_only)
    if isinstance(found, nn.Module) and not isinstance(found, torch.jit.ScriptModule):
        return found
    state_dict = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(state_dict, Mapping):
        raise ValueError(_holds_no_state_dict(argument, path, state_dict))
    checkpoint: dict[str, Any] = found
    return checkpoint


def _holds_no_state_dict(argument: str, path: str | Path, found: Any) -> str:
    return (
        f"Expected argument `{argument}` to be a checkpoint file, but {path} holds a {type(found).__name__} and no "
        f"state dict"
    )


def callback_states(checkpoint: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the states of callbacks that a checkpoint holds."""
    states = checkpoint.get("callbacks")
    return [state for state in states.values() if isinstance(state, Mapping)] if isinstance(states, Mapping) else []


def warn_if_rejected(state: Mapping[str, Any]) -> None:
    """Warn if the state of a pruning callback is that of a round that was about to be taken back."""
    decision, snapshot = state.get("decision"), state.get("snapshot")
    if isinstance(decision, Mapping) and decision.get("go_back") and isinstance(snapshot, Mapping):
        rank_zero_warn(
            f"This checkpoint was saved at the end of a round whose score fell beyond the tolerance; the run went back "
            f"after it. Its last good model is {snapshot.get('file')} in {state.get('folder')}."
        )


def restructure_on_load(module: nn.Module) -> RemovableHandle:
    """Have a module take the structure of every state dict that it is about to load.

    Lightning loads the weights before any callback's load hook runs; this is how the structure gets there first. The
    hook holds no reference to whoever registers it, so a deep copy of the module copies nothing else.
    """
    return module.register_load_state_dict_pre_hook(_restructure)


def restore_structure_on_load(model: nn.Module) -> nn.Module:
    """Have a model take the structure of every state dict that it loads from now on, in place.

    Without it a pruned state dict fails to load into a model as it was built; with it ``load_state_dict``, a Trainer
    without the pruning callback, and strategies that spawn processes bring structure and weights together. Called in
    the ``__init__`` of a LightningModule, it makes ``load_from_checkpoint`` do so.

    Args:
        model: Any module, whole: the activations are there already.

    Returns:
        The same model.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule.

    Example:
        >>> from torch import nn
        >>> from lightning_easier import linearize
        >>> pruned = linearize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])
        >>> model = restore_structure_on_load(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> model.load_state_dict(pruned.state_dict())
        <All keys matched successfully>
        >>> model[1]
        IdentityStandIn(in place of ReLU())
    """
    inner = unwrap(model)
    if not will_restore_structure(inner):
        inner.register_load_state_dict_pre_hook(_restructure_for_good)
    return model


def will_restore_structure(model: nn.Module) -> bool:
    """Tell whether :func:`restore_structure_on_load` was called for a model."""
    return any(
        getattr(hook, "hook", None) is _restructure_for_good for hook in model._load_state_dict_pre_hooks.values()
    )


def _restructure_for_good(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
    _restructure(module, state_dict, prefix, *others)


def _restructure(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if read_marks(own) or dense_keys(module) <= own.keys():  # a part without marks says nothing of the structure
        restructure_as_marked(module, own)


def _marked_state_dict(checkpoint: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    state_dict = checkpoint.get("state_dict", checkpoint)
    is_of_a_run = any("rounds" in state and "snapshot" in state for state in callback_states(checkpoint))
    if not isinstance(state_dict, Mapping) or not (read_marks(state_dict) or is_of_a_run):
        raise ValueError(
            f"Expected argument `checkpoint_path` to be a checkpoint with a record of linearized activations, but "
            f"{path} has none. If no activation is linear, load it as any other checkpoint (`load_from_checkpoint`): "
            f"weights that were pruned are zero in it."
        )
    return state_dict


def _load(model: nn.Module, state_dict: Mapping[str, Any], path: Path) -> None:
    """Load structure and weights, or neither: what would not fit is found out before anything is written."""
    restructuring = restructure_as_marked(model, state_dict)
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in own]
    problems += [
        f"{key} of shape {tuple(state_dict[key].shape)} for {tuple(value.shape)}"
        for key, value in own.items()
        if isinstance(value, torch.Tensor) and key in state_dict and state_dict[key].shape != value.shape
    ]
    if problems:
        restructuring.undo(model)
        raise ValueError(
            f"Expected the checkpoint {path} to fit {type(model).__name__}, but it does not: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}. Build the model as the one that was "
            f"saved."
        )
    model.load_state_dict(state_dict)
