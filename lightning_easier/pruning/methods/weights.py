"""Whether the weights of a model can be pruned, found out before anything is changed."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune

from lightning_easier.collapsing.engine import is_collapsed
from lightning_easier.sites.activations import plan_isolation
from lightning_easier.sites.feeding import feeding_weights
from lightning_easier.support.calibration import tell

_LISTED = 5


def check_weights_can_be_pruned(model: nn.Module, names: Sequence[str], *, named: bool) -> None:
    """Refuse a model of which no weights can be pruned; it is not changed.

    Args:
        model: The model.
        names: The activations whose layers are pruned.
        named: Whether a user has named them; else those without weights are left out, with a warning.

    Raises:
        ValueError: If the model was collapsed or quantized, its weights have masks or parametrizations already, or are
            no plain tensors, or an activation has none.

    Warns:
        UserWarning: If activations that nobody has named have no weights.
    """
    kind = type(model).__name__
    for name, module in model.named_modules():
        where = f"`{name}`" if name else kind
        if is_collapsed(module):
            raise ValueError(
                f"Expected a model to prune that is not collapsed, but {where} is: batch norms are folded and layers "
                f"merged. Prune the model that it was made from, and collapse afterwards."
            )
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise ValueError(
                f"Expected a model to prune that is not quantized, but {where} is a {type(module).__name__}. Prune "
                f"first, and quantize afterwards."
            )
    plan = plan_isolation(model)
    feeding = feeding_weights(model, plan)
    parameters = dict(model.named_parameters())
    frozen = {
        name for name, parameter in parameters.items() if not parameter.requires_grad and parameter.is_floating_point()
    }
    without = []
    for site in names:
        if site not in feeding.weights:  # linear already
            continue
        weights = feeding.weights[site] or feeding.weights.get(feeding.shared.get(site, ""), ())
        weights = tuple(each for each in weights if each.name not in frozen)
        for weight in weights:
            if weight.name not in parameters:
                raise ValueError(why_computed(model, weight.operator))
            _check_is_plain(weight.name, parameters[weight.name])
        if not weights:
            without.append(site)
    if without and (named or len(without) == len(names)):
        raise ValueError(
            f"Expected activations with weights before them, which can be pruned, but {_listing(without)} have none "
            f"that the data flow leads to. Pass them as `exclude`."
        )
    if without:
        tell(
            f"No weights are pruned before {_listing(without)}: the data flow leads to none that are theirs. They "
            f"become linear if they do not switch. Pass them as `exclude` to keep them."
        )


def why_computed(model: nn.Module, operator: str) -> str:
    """Say of an operator that its weight is computed from other tensors."""
    if any(
        isinstance(hook, prune.BasePruningMethod) for hook in model.get_submodule(operator)._forward_pre_hooks.values()
    ):
        return (
            f"Expected weights without masks, but those of `{operator}` have some of torch.nn.utils.prune. Make them "
            f"permanent with `prune.remove(module, 'weight')`: weights that are zero count as pruned."
        )
    return (
        f"Expected weights that are parameters of their own, but those of `{operator}` are parametrized. Make them "
        f"plain first: `torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')`, "
        f"`remove_weight_norm` or `remove_spectral_norm`; or pass the activation after it as `exclude`."
    )


def _check_is_plain(name: str, parameter: Tensor) -> None:
    """Refuse what only looks like a tensor of numbers: torchao and bitsandbytes keep quantized ones so."""
    is_plain = type(parameter.data) in (Tensor, nn.Parameter, DTensor)
    if not is_plain or not parameter.is_floating_point() or parameter.is_complex():
        raise ValueError(
            f"Expected weights to prune that are floating point, but `{name}` is a {type(parameter.data).__name__} of "
            f"{parameter.dtype}. Prune first, and quantize afterwards."
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"Expected weights to prune, but `{name}` is not initialized. Run the model once before.")


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more
