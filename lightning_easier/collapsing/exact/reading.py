"""Which linear step is a node of a captured graph?

A :class:`~lightning_easier.collapsing.exact.links.Link` is the answer: the operator that it equals, or what it does to
the positions (averages them) or to the place of the channels (a layout). For each kind of call there is a rule
(:mod:`lightning_easier.collapsing.exact.rules`); modules, functions, methods and the ATen operators of ``torch.export``
are read alike.
"""

import logging

from torch import fx, nn

from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import shape_of
from lightning_easier.collapsing.exact.rules import convolving, elementwise, layouts, operators, poolings, selections
from lightning_easier.collapsing.exact.rules.rule import Call, Rule, require

RULES: tuple[Rule, ...] = (
    *operators.RULES, *convolving.RULES, *elementwise.RULES, *poolings.RULES, *layouts.RULES, *selections.RULES,
)  # fmt: skip
_BY_CLASS: dict[type[nn.Module], Rule] = {kind: rule for rule in RULES for kind in rule.modules}
_BY_NAME: dict[str, Rule] = {name: rule for rule in RULES for name in rule.functions}

_logger = logging.getLogger(__name__)


class Reader:
    """Reads the nodes of one captured graph.

    Args:
        captured: The graph, with the shapes met on the way.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured

    def read(self, node: fx.Node) -> Link | None:
        """Return the linear step that a node is, None if it is none."""
        try:
            return self.link(node)
        except CannotMergeError as error:
            _logger.debug("%s is not read as a linear step: %s", node.format_node(), error)
            return None

    def link(self, node: fx.Node) -> Link:
        """Return the linear step that a node is.

        Raises:
            CannotMergeError: With the reason, when it is none.
        """
        require(bool(shape_of(node)), "its value is no tensor that has axes")  # a single number has no channels
        call = Call(self._captured, node)
        try:
            return rule_of(call).read(call)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            # an argument that is not what it is in all other calls: another library's spelling is no error of ours
            raise CannotMergeError(f"its arguments are spelled in another way ({error})") from error


def rule_of(call: Call) -> Rule:
    """Return the rule for a call.

    Raises:
        CannotMergeError: If there is none.
    """
    kind = type(call.module)
    rule = _BY_NAME.get(call.function) if call.module is None else _BY_CLASS.get(kind)
    if rule is None:
        called = kind.__name__ if call.module is not None else call.function or str(call.node.target)
        raise CannotMergeError(f"no rule reads `{called}`")
    return rule
