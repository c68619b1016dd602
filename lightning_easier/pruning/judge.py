"""Whether a compressed model is still good enough: by its score, by how much its outputs have changed, or both."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.pruning.rules import Tolerance
from lightning_easier.support.inference import describe

# What keeps a network usable where nobody says how good it has to be, see docs/collapse.md.
MAX_DRIFT = 0.1


class Judge:
    """Tells whether a model is still good enough.

    Args:
        source: The model as it was given.
        evaluate: Returns its score; None if there is none.
        tolerance: How far the score may fall.
        max_drift: How much of the variance of the outputs may change; None for the default.
        device: Where the model belongs.

    Attributes:
        dense_score: The score of the model as it was given; None if there is none.
        has_refused: Whether something was refused that a larger tolerance or drift would allow.

    Raises:
        ValueError: If that is not finite.
    """

    def __init__(
        self,
        source: nn.Module,
        evaluate: Callable[[nn.Module], float] | None,
        tolerance: Tolerance,
        max_drift: float | None,
        device: torch.device,
    ) -> None:
        self._evaluate = evaluate
        self._tolerance = tolerance
        self._device = device
        self._max_drift = max_drift if max_drift is not None else math.inf if evaluate is not None else MAX_DRIFT
        self._went_beyond = False
        self.has_refused = False
        self.dense_score = self.score(source)
        if self.dense_score is not None and not math.isfinite(self.dense_score):
            raise ValueError(
                f"Expected argument `evaluate` to return a finite score of the model, but got {self.dense_score}"
            )

    def score(self, model: nn.Module) -> float | None:
        """Return the score of a model, None if there is none; the model is in eval mode and in its place afterwards.

        Raises:
            TypeError: If what is returned is no number.
        """
        return None if self._evaluate is None else _score(self._evaluate, model, self._device)

    def why_not(self, score: float | None, drift: float) -> str | None:
        """Say why a model of this score and drift is not good enough; None if it is."""
        if not math.isfinite(drift):
            return "the outputs of the model with it are not finite"
        if score is not None and not math.isfinite(score):
            return f"the score of the model with it is not finite: {score}"
        if drift > self._max_drift:
            self._went_beyond = self.has_refused = True
            return (
                f"{drift:.2%} of the variance of the outputs changed, beyond the {self._max_drift:.2%} of `max_drift`"
            )
        if score is None or self.dense_score is None:
            return None
        if self._tolerance.allows(score, self.dense_score):
            return None
        self.has_refused = True
        return f"beyond the tolerance {self._tolerance.amount:g} of {self.dense_score:.4f}"

    def is_no_worse(self, score: float | None, than: float | None) -> bool:
        """Tell whether a score is at least as good as another; without scores it is."""
        if score is None or than is None:
            return True
        return Tolerance(0.0, self._tolerance.mode).allows(score, than)

    def why_nothing_is_left(self, was_cut: bool) -> str:
        """Say why nothing is left to try.

        Args:
            was_cut: Whether the time was over before all was looked at.
        """
        ended = "nothing is left to try"
        if was_cut:
            ended += " of what was found in half of the time of `max_minutes`"
        if self._went_beyond:
            ended += f" within the {self._max_drift:.0%} of `max_drift`; pass `evaluate` or a larger one to go on"
        return ended


@torch.no_grad()
def _put_back(held: dict[str, Any], tensors: Mapping[str, Tensor | None]) -> None:
    """Have a module hold the tensors that it held, with the values of those that it holds now.

    A module that was on another device meanwhile, as after a Trainer's validation, has new buffers, and a search knows
    those that were there.
    """
    for name, tensor in tensors.items():
        now = held.get(name)
        if tensor is None or now is None or now is tensor or not _is_writable(tensor):
            continue
        alike = [(each.shape, each.dtype, each.device, each.layout) for each in (now, tensor)]
        if alike[0] == alike[1]:
            held[name] = tensor.copy_(now)


def _is_writable(tensor: Tensor) -> bool:
    """Tell whether a tensor may be written into, and has a place of its own for each value."""
    if tensor.layout != torch.strided or tensor.is_inference():
        return False
    return all(stride or length < 2 for stride, length in zip(tensor.stride(), tensor.shape, strict=True))


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module, device: torch.device) -> float:
    """Evaluate a model in eval mode, and have it in that mode and place afterwards, with the tensors that it had.

    Raises:
        TypeError: If what is returned is no number.
        ValueError: If the model is in another dtype afterwards.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(held, dict(held)) for module in modules for held in (module._parameters, module._buffers)]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    score = evaluate(model.eval())
    model.to(device).eval()
    for held, tensors in before:
        _put_back(held, tensors)
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            raise ValueError(
                f"Expected argument `evaluate` to leave the model in its dtype, but `{name}` was {dtypes[name]} and is "
                f"{parameter.dtype}. Evaluate a copy: `evaluate=lambda model: score(copy.deepcopy(model))`"
            )
        if parameter.is_inference() and not torch.is_inference_mode_enabled():  # moved in it; it may be trained yet
            parameter.data = parameter.detach().clone()
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Expected argument `evaluate` to return the score, a number, but it returned {describe(score)}"
        ) from error
