r"""Train a pruned network on what the dense one says besides the labels.

With the logits :math:`z` of the network, :math:`z'` of the dense one, a temperature :math:`T` and a weight :math:`w`,
the loss of a training step becomes

.. math:: (1 - w) L + w T^2\, \mathrm{KL}(\mathrm{softmax}(z'/T) \,\|\, \mathrm{softmax}(z/T)),

the divergence averaged over the batch (Hinton et al., "Distilling the knowledge in a neural network", arXiv
1503.02531), and over positions where there are any. With a weight :math:`v` of features, :math:`v D` is added, with the
distance :math:`D` of :mod:`lightning_easier.measure.features` of the features alone.

The teacher computes before the network does, from copies of the same inputs: either may write to its own. What it holds
in memory is one copy of the module, and logits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_easier.callbacks import private
from lightning_easier.callbacks.added_loss import AddedLoss
from lightning_easier.callbacks.network import copied, holders, notice_calls
from lightning_easier.measure.features import Features, distance, places_of_features, same_places
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.structure.linearize import restore, stand_ins
from lightning_easier.support.arguments import check_non_negative, check_positive, check_share

LOSS_KEY, FEATURES_KEY = "distill_loss", "feature_loss"


@dataclass(frozen=True)
class Distillation:
    """How rounds are trained on the logits of the dense network, too.

    Its weights are those at the end of the dense round, whose checkpoint is read. The network is the outermost module
    that holds all activations and that ``training_step`` calls, with gradients; it returns logits ``(N, classes, *)``,
    or an object or mapping with ``logits``. Logged as ``distill_loss``. See
    :mod:`lightning_easier.callbacks.distillation`.

    Args:
        weight: Share ``w`` of that in the loss, in (0, 1].
        temperature: ``T``, by which logits are divided for it.
        features: Weight ``v`` of the distance of the features: of what blocks return, and activations outside of them.
            0 for none. Logged as ``feature_loss``.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range.

    Source: Hinton et al., arXiv 1503.02531.
    """

    weight: float = 0.5
    temperature: float = 4.0
    features: float = 0.0

    def __post_init__(self) -> None:
        check_share("weight", self.weight)
        check_positive("temperature", self.temperature)
        check_non_negative("features", self.features)


class DenseTeacher(AddedLoss):
    """Adds the divergence from a dense network to the loss of a LightningModule's training steps.

    Args:
        distillation: How much, and at which temperature.
    """

    without = "`distillation` to be None"

    def __init__(self, distillation: Distillation) -> None:
        super().__init__()
        self._weight = distillation.weight
        self._temperature = distillation.temperature
        self._weight_of_features = distillation.features
        self._order: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._teacher: LightningModule | None = None
        self._depth = 0  # of calls inside calls
        self._taught: Tensor | None = None  # the teacher's logits for the call that goes on
        self._logits: list[tuple[Tensor, Tensor]] = []  # of the calls of this step, and the teacher's for them
        self._places: list[str] = []  # of features in the teacher
        self._features: tuple[Features, Features] | None = None  # of the network, and of the teacher
        self._taught_features: dict[str, Tensor] = {}  # the teacher's for the call that goes on
        self._followed: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # of the calls of this step

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what it does not go with.

        Raises:
            MisconfigurationException: If the module optimizes by hand, or parameters are sharded.
        """
        super().check(trainer, pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f"Expected argument `distillation` to be None under {type(trainer.strategy).__name__}, which shards "
                f"the parameters that the dense network would be copied from. Use DDP."
            )

    def start(
        self,
        pl_module: LightningModule,
        sites: Iterable[str],
        removed: list[str],
        load: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Distil from now on; a second call changes nothing.

        Args:
            pl_module: The module, some of whose activations have become linear.
            sites: Names of all activations, those that are linear among them.
            removed: Names of those that have become so in this run.
            load: Reads the checkpoint of the dense model.
        """
        if self.pl_module is not None:
            return
        sites = list(sites)
        self._teacher = _dense(pl_module, removed, load())
        self._order = holders(pl_module, sites)
        if self._weight_of_features:
            self._places = _places(self._teacher, self._order[-1], sites)
        self._handles = notice_calls(pl_module, sites, self._compare, begins=self._ask)
        self.attach(pl_module)

    def stop(self) -> None:
        """Leave the module as it was; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for each in self._features or ():
            each.detach()
        self.detach()
        self._teacher = self._features = None
        self._places = []

    def begin_step(self) -> None:
        """Forget what the last step has left."""
        self._depth, self._logits, self._followed = 0, [], []
        if self._places:
            self._follow()
        self._pause()

    def end_step(self) -> None:
        """Let go of the logits."""
        self._taught, self._logits, self._followed = None, [], []
        self._pause()

    def added_to(self, loss: Tensor) -> Tensor:
        """Mix the loss with the divergence."""
        assert self.pl_module is not None
        if not self._logits:
            raise MisconfigurationException(
                f"A round is to be distilled, but the training step of {type(self.pl_module).__name__} called "
                f"none of {[name or 'its forward' for name in self._order]}, or without gradients. Call the network as "
                f"a module (where it is checkpointed, with use_reentrant=False), or leave out `distillation`."
            )
        term = torch.stack([divergence(*pair, self._temperature) for pair in self._logits]).mean()
        self.pl_module.log(LOSS_KEY, term.detach())
        mixed = (1 - self._weight) * loss + self._weight * term
        if not self._followed:
            return mixed
        apart = torch.stack([distance(*pair) for pair in self._followed]).mean()
        self.pl_module.log(FEATURES_KEY, apart.detach())
        return mixed + self._weight_of_features * apart

    def _follow(self) -> None:
        """Note the features that network and teacher have in common, as the network is now."""
        assert self.pl_module is not None
        assert self._teacher is not None
        names = same_places(self.pl_module, self._teacher, self._places)
        if self._features is not None and self._features[0].are_of(self.pl_module, names):
            return
        for each in self._features or ():
            each.detach()
        self._features = Features(self.pl_module, names), Features(self._teacher, names)
        for each in self._features:
            each.attach()

    def _pause(self) -> None:
        """Forget all features, and note none until a call that is trained begins."""
        self._taught_features = {}
        for each in self._features or ():
            each.forget()
            each.paused = True

    def _is_trained(self) -> bool:
        """Tell whether a call is one that the loss of a training step can follow from."""
        return self.in_step and torch.is_grad_enabled()

    def _ask(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the teacher compute what a call is about to."""
        if not self._is_trained():
            return
        self._depth += 1
        if self._depth > 1:  # a part of a call that goes on
            return
        assert self._teacher is not None
        args, kwargs = pytree.tree_map_only(Tensor, lambda value: value.detach().clone(), (args, kwargs))
        if self._features is not None:
            self._features[1].paused = False
        # Gradients stay on, and nothing here asks for any: where there is one it leads to weights that are trained.
        taught = _logits(self._teacher.get_submodule(name)(*args, **kwargs))
        if taught.requires_grad:
            raise MisconfigurationException(
                f"A round is to be distilled, but the copy of {name or 'the module'} that is to be the dense "
                f"network computes with the weights that are trained: it calls a function that holds the original, "
                f"such as a `forward` that was replaced on the instance. Override `forward` in its class, or "
                f"leave out `distillation`."
            )
        self._taught = taught.detach()
        if self._features is not None:
            found, wanted = self._features
            self._taught_features = {name: value.detach() for name, value in wanted.taken().items()}
            found.paused, wanted.paused = False, True

    def _compare(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note the logits of a call, and its features, as they are before the step goes on with them.

        They are compared after the step: a call that is checkpointed is repeated in the backward pass, and has to save
        the same values then, which are none for a copy.
        """
        if not self._is_trained():
            return
        self._depth -= 1
        if self._depth == 0 and self._taught is not None:
            self._logits.append((_logits(output).clone(), self._taught))
            self._taught = None
            if self._features is not None:
                self._followed.append((self._features[0].taken(), self._taught_features))
                self._pause()


def _places(teacher: LightningModule, network: str, sites: Sequence[str]) -> list[str]:
    """Return where a network in a module has features."""
    before = f"{network}." if network else ""
    inside = [site.removeprefix(before) for site in sites]
    blocks = find_blocks(teacher.get_submodule(network))
    return [f"{before}{place}" for place in places_of_features(blocks, inside)]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence of two logits ``(N, classes, *)``, in nats times the squared temperature.

    It is computed in float32 at least, whatever the network does.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        got, wanted = ((z.to(dtype) / temperature).log_softmax(1) for z in (student, teacher))
        return temperature**2 * F.kl_div(got, wanted, reduction="none", log_target=True).sum(1).mean()


def _dense(pl_module: LightningModule, removed: list[str], checkpoint: Mapping[str, Any]) -> LightningModule:
    """Copy a module with the structure and the weights of its dense round."""
    teacher = copied(pl_module)
    assert isinstance(teacher, LightningModule)
    while names := [name for name in removed if name in stand_ins(teacher)]:  # those in a block come to light with it
        restore(teacher, names)
    for part in teacher.modules():
        if isinstance(part, LightningModule):  # it may ask its Trainer, and has nothing to log there
            private.lend_trainer(part, pl_module)
            part.log = _log_nothing  # type: ignore[method-assign]
    checkpoint = dict(checkpoint)
    teacher.on_load_checkpoint(checkpoint)  # it may put another state dict in its place
    teacher.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
    return teacher.requires_grad_(False).eval()


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in the place of a module's `log`."""


def _logits(output: Any) -> Tensor:
    """Return the logits in what a network has returned.

    Raises:
        MisconfigurationException: If there are none.
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        raise MisconfigurationException(
            f"Distillation needs logits of shape (N, classes, *), a tensor or the `logits` of an output, "
            f"but the network returned {type(output).__name__}. Leave out `distillation`."
        )
    if found.shape[1] < 2:
        raise MisconfigurationException(
            f"Distillation needs logits of at least two classes, but got {tuple(found.shape)}: a softmax "
            f"over one class says nothing. Return one logit for each class, or leave out `distillation`."
        )
    return found
