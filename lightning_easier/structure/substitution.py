"""A fitted operator in the place of a chain, within the modules that are there, reversibly.

While a model is trained, an optimizer and a wrapper hold its parameters. A fitted operator therefore moves into the
first operator of its chain, the *host*: its parameters stay the same objects, with other values and, where needed, in
another shape. What is after it in the chain becomes identities. A batch norm after the chain stays, and gets the
statistics of what is fitted.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _reverse_repeat_tuple

from lightning_easier.measure.affines import AffineFit
from lightning_easier.structure.names import resolved
from lightning_easier.support.finite import is_finite

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys(
        CONVOLUTIONS,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    ),
}


class Absorbed(nn.Identity):
    """What was after the first operator of a chain that one fitted operator has taken the place of."""

    forward_is_alike = True  # as in stand-ins

    @classmethod
    def of(cls, module: nn.Module) -> "Absorbed":
        """Return one in the place of a module, with its plain attributes: a forward may read ``fc2.out_features``."""
        absorbed = cls().train(module.training)
        for name, value in vars(module).items():
            if isinstance(value, int | float | str | tuple) and name not in vars(absorbed):
                setattr(absorbed, name, value)
        return absorbed


@dataclass(frozen=True)
class Form:
    """What a substitution does to the structure, as plain data; modules by their names, seen from the activation.

    Attributes:
        host: The operator that takes the place of the chain; None if the stand-in of the activation does.
        attributes: Those that the host gets, such as its kernel size.
        absorbed: What becomes an identity.
        order: Its number among the substitutions of the model: a later one may build on an earlier one.
    """

    host: str | None
    attributes: dict[str, Any]
    absorbed: tuple[str, ...]
    order: int = 0

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Form":
        """Rebuild a form from what became of it in JSON."""
        attributes = {name: tuple(v) if isinstance(v, list) else v for name, v in plain["attributes"].items()}
        return cls(plain["host"], attributes, tuple(plain["absorbed"]), int(plain["order"]))

    def shapes(self, has_bias: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the host's parameters by name."""
        if self.host is None:
            return {}
        its = self.attributes
        outputs = its.get("out_channels", its.get("out_features"))
        inputs = its["in_channels"] // its["groups"] if "in_channels" in its else its["in_features"]
        shapes = {"weight": (outputs, inputs, *its.get("kernel_size", ()))}
        return shapes | ({"bias": (outputs,)} if has_bias else {})


@dataclass(frozen=True)
class ChainFit:
    """An operator that was fitted to a chain around one activation, to move into the chain's own modules.

    Attributes:
        kind: Of the operator, as in :class:`~lightning_easier.report.Fitted`.
        explained: Share of the variance of the chain's output that it explains on data held out.
        form: What becomes of the modules.
        tensors: Values of their parameters and buffers, by name seen from the activation.
        affine: What the stand-in of the activation computes; None for the identity.
    """

    kind: str
    explained: float
    form: Form
    tensors: dict[str, Tensor]
    affine: AffineFit | None = None

    def is_finite_in(self, dtype: torch.dtype) -> bool:
        """Tell whether all its numbers are finite in a dtype, which may hold less than their own."""
        tensors = is_finite(*(value.to(dtype) for value in self.tensors.values()))
        return tensors and (self.affine is None or self.affine.is_finite_in(dtype))

    def to_plain(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts: what a checkpoint may hold, and another process read."""
        affine = None if self.affine is None else self.affine.to_plain()
        tensors = {name: value.cpu() for name, value in self.tensors.items()}
        return {**vars(self), "form": asdict(self.form), "tensors": tensors, "affine": affine}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "ChainFit":
        """Rebuild a fit from what :meth:`to_plain` returned."""
        affine = None if plain["affine"] is None else AffineFit(**plain["affine"])
        return cls(**{**plain, "form": Form.from_plain(plain["form"]), "affine": affine})


def attributes_of(operator: nn.Module) -> dict[str, Any]:
    """Return the attributes that tell what an operator is, its weights aside.

    Raises:
        KeyError: If it is neither a Linear nor a convolution.
    """
    return {name: getattr(operator, name) for name in _ATTRIBUTES[type(operator)]}


class Substitution:
    """Carries out what a :class:`ChainFit` says, and takes it back.

    Args:
        form: What becomes of the modules.
        tensors: Values of their parameters and buffers.
    """

    def __init__(self, form: Form, tensors: Mapping[str, Tensor]) -> None:
        self.form = form
        self._tensors = {name: value.clone() for name, value in tensors.items()}  # those that are not in force
        self._attributes = dict(form.attributes)  # so are these
        self._modules: dict[str, nn.Module] = {}  # what was absorbed, while it is
        self._like: tuple[torch.dtype, torch.device] | None = None  # what is left in its place was, while it is

    @classmethod
    def blank(cls, form: Form, model: nn.Module, site: str) -> "Substitution":
        """Return one of a form whose numbers are still to be loaded."""
        if form.host is None:
            return cls(form, {})
        host: Any = model.get_submodule(resolved(site, form.host))
        shapes = form.shapes(getattr(host, "bias", None) is not None)
        return cls(form, {f"{form.host}.{name}": torch.zeros(shape) for name, shape in shapes.items()})

    @property
    def absorbed(self) -> list[nn.Module]:
        """The modules that are identities now."""
        return list(self._modules.values())

    def absorbed_by_name(self, site: str) -> dict[str, nn.Module]:
        """Return the same by qualified name."""
        return {resolved(site, name): module for name, module in self._modules.items()}

    def names(self, site: str) -> list[str]:
        """Return the qualified names of the host and of what is absorbed."""
        host = [] if self.form.host is None else [self.form.host]
        return [resolved(site, name) for name in (*host, *self.form.absorbed)]

    def host(self, model: nn.Module, site: str) -> nn.Module | None:
        """Return the operator that takes the place of the chain, if one does."""
        return None if self.form.host is None else model.get_submodule(resolved(site, self.form.host))

    def apply(self, model: nn.Module, site: str) -> None:
        """Carry it out."""
        for name in self.form.absorbed:
            module = self._modules[name] = model.get_submodule(resolved(site, name))
            model.set_submodule(resolved(site, name), Absorbed.of(module))
        self._swap(model, site)
        self._like = self._like_now(model, site)

    def undo(self, model: nn.Module, site: str) -> None:
        """Take it back; what was trained since is kept for the next time."""
        self._swap(model, site)
        before, now = self._like, self._like_now(model, site)
        for name, module in self.absorbed_by_name(site).items():
            module.train(model.get_submodule(name).training)
            if before is not None and now is not None:  # it was not cast or moved with the model
                if now[0] != before[0]:
                    module.to(now[0])
                if now[1] != before[1]:
                    module.to(now[1])
            model.set_submodule(name, module)
        self._modules = {}

    def _like_now(self, model: nn.Module, site: str) -> tuple[torch.dtype, torch.device] | None:
        """Return dtype and device of what is left: the host, the stand-in of the activation, or any of the model."""
        for module in (self.host(model, site), model.get_submodule(site), model):
            likes = [] if module is None else [*module.parameters(), *module.buffers()]
            for tensor in likes:
                if tensor.is_floating_point():
                    return tensor.dtype, tensor.device
        return None

    def _swap(self, model: nn.Module, site: str) -> None:
        """Exchange values and attributes with those that are not in force."""
        for name, value in self._tensors.items():
            owner, _, attribute = resolved(site, name).rpartition(".")
            tensor: Tensor = getattr(model.get_submodule(owner), attribute)
            self._tensors[name] = tensor.data
            value = value.to(tensor)
            if tensor.shape != value.shape:
                tensor.grad = None
                # Another dtype has autograd forget the shape, which a graph that is still alive would keep
                other = torch.float32 if tensor.dtype == torch.float16 else torch.float16
                tensor.data = torch.empty(0, dtype=other, device=tensor.device)
            tensor.data = value
        host = self.host(model, site)
        if host is None:
            return
        now = {name: getattr(host, name) for name in self._attributes}
        for name, value in self._attributes.items():
            setattr(host, name, value)
        padding = self._attributes.get("padding")
        if padding is not None and not isinstance(padding, str):
            host._reversed_padding_repeated_twice = _reverse_repeat_tuple(padding, 2)
        self._attributes = now
