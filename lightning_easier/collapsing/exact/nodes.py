"""What a node of a captured graph is asked: its shape, its name, whether it writes, whether it is a constant."""

import operator as operators
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lightning_easier.collapsing.algebra.affine import AFFINES
from lightning_easier.collapsing.exact import guards
from lightning_easier.sites.rectifiers import is_activation
from lightning_easier.support.inference import has_hooks

ALIASES = "aliases"
"""Key in a node's ``meta``: the inputs that its value shares memory with."""
WRITES = "writes"
"""Key in a node's ``meta``: whether it wrote into what it reads."""
NUMBER = "number"
"""Key in a node's ``meta``: its value, if that is a whole number."""

IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
"""Operators that write, and what they compute."""
_WRITING = (*IN_PLACE, "setitem", "imod", "ipow", "ifloordiv", "iand", "ior", "ixor", "imatmul")
_VIEWS_OF_CONSTANTS = ("view", "reshape", "unsqueeze", "permute", "transpose", "t", "getitem", "squeeze", "flatten")


def shape_of(node: Any) -> torch.Size | None:
    """Return the shape of a node's value at the example inputs, None for what is not one tensor."""
    return getattr(node.meta.get("tensor_meta"), "shape", None) if isinstance(node, fx.Node) else None


def name_of(node: fx.Node) -> str:
    """Return the name of the torch function or method that a node calls, whatever its spelling; "" for another."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::") if target.namespace == "aten" else ""
    if target is getattr:
        return "getattr"
    name = getattr(target, "__name__", "")
    return name if any(getattr(room, name, None) is target for room in (torch, F, operators, guards)) else ""


def is_number_of_samples(node: fx.Node) -> bool:
    """Tell whether a node is the first size of a value."""
    first: bool = list(node.args[1:]) == [0]
    if name_of(node) in ("size", "sym_size"):
        return first
    asked = node.args[0] if name_of(node) == "getitem" and first else None
    return isinstance(asked, fx.Node) and name_of(asked) == "getattr" and str(asked.args[1]) == "shape"


def changes_its_input(captured: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node may write into what it reads."""
    if node.meta.get(WRITES, False):
        return True
    if node.op == "call_module":
        module = captured.get_submodule(str(node.target))
        # What is not torch's, or has hooks, may do anything on other values
        known = isinstance(module, AFFINES) or is_activation(module) or type(module).__module__.startswith("torch.nn.")
        return has_hooks(module) or not known or any(getattr(part, "inplace", False) for part in module.modules())
    name = name_of(node)
    if node.op == "call_function" and not name:
        return True
    written = name.endswith("_") and not name.endswith("__")
    return written or name in _WRITING or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def is_shared(node: fx.Node) -> bool:
    """Tell whether something besides its one reader sees what is written into a value."""
    while len(node.users) == 1 and node.op not in ("placeholder", "get_attr"):
        aliases = node.meta.get(ALIASES, [])
        if not aliases:
            return False
        (node, *others) = aliases
        if others:
            return True
    return True


def is_written_through(captured: fx.GraphModule, view: fx.Node) -> bool:
    """Tell whether something may write into a value by a view of it."""
    aliases = (user for user in view.users if view in user.meta.get(ALIASES, ()))
    return any(changes_its_input(captured, user) for user in view.users) or any(
        is_written_through(captured, alias) for alias in aliases
    )


def is_constant(node: fx.Node) -> bool:
    """Tell whether a node is a parameter, a buffer, or a view of one."""
    while is_view(node):
        (node,) = node.all_input_nodes
    return node.op == "get_attr"


def is_view(node: fx.Node) -> bool:
    """Tell whether a node is a view of one value, of a shape that nothing else tells."""
    named = name_of(node) in _VIEWS_OF_CONSTANTS or (name_of(node) == "getattr" and node.args[1] in ("T", "mT"))
    return named and node.all_input_nodes == list(node.args[:1])


def constants_of(node: fx.Node) -> list[fx.Node]:
    """List the ``get_attr`` nodes that a node reads, also through views."""
    found = []
    for other in node.all_input_nodes:
        if is_constant(other):
            found += [other] if other.op == "get_attr" else constants_of(other)
    return found


def call_alone(node: fx.Node, value: Tensor) -> Tensor:
    """Call what a node calls on another value, its other arguments being plain."""
    arguments = (value, *node.args[1:])
    if node.op == "call_method":
        return getattr(value, str(node.target))(*arguments[1:], **node.kwargs)
    return node.target(*arguments, **node.kwargs)  # type: ignore[operator]


def bind(node: fx.Node, names: str) -> dict[str, Any]:
    """Name the arguments of a node; those that are not given are left out."""
    return {**dict(zip(names.split(), node.args, strict=False)), **node.kwargs}
