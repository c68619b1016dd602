"""Move the padding between two convolutions to the first, so that they can be merged exactly.

The second convolution pads its input with zeros where the first would have computed something, which no single
convolution does. If the first pads :math:`p_1 + s_1 p_2` instead, and the second nothing, the first computes those
values, and the two are one convolution.

In a chain of convolutions the padding moves on to the head. Shifts are carried out from the end of the chain to its
head, and taken back in the opposite order, so that the result depends on which there are and not on when they came.
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from torch.nn.modules.utils import _reverse_repeat_tuple

from lightning_easier.sites.neighbourhood import Neighbourhood
from lightning_easier.structure.names import resolved, seen_from

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PaddingShift:
    """Two convolutions around an activation, the second of which gives its padding to the first.

    Their names are kept as they are seen from the activation: they hold in a part of the model, too.

    Args:
        site: Qualified name of the activation.
        first: Qualified name of the convolution before it.
        second: Qualified name of the one after it.
    """

    def __init__(self, site: str, first: str, second: str) -> None:
        self.first = seen_from(site, first)
        self.second = seen_from(site, second)
        self._paddings: tuple[Any, Any] | None = None  # of the two, before the shift
        self._left: tuple[Any, Any] | None = None  # and after it

    def names(self, site: str) -> tuple[str, str]:
        """Return the qualified names of the two, given that of the activation."""
        return resolved(site, self.first), resolved(site, self.second)

    def apply(self, model: nn.Module, site: str) -> None:
        """Carry out the shift."""
        first, second = (cast("Any", model.get_submodule(name)) for name in self.names(site))
        self._paddings = (first.padding, second.padding)
        p1, p2 = numeric_padding(first), numeric_padding(second)
        assert p1 is not None
        assert p2 is not None
        _set_padding(first, tuple(a + s * b for a, s, b in zip(p1, first.stride, p2, strict=True)))
        _set_padding(second, (0,) * len(p2))
        self._left = first.padding, second.padding

    def undo(self, model: nn.Module, site: str) -> None:
        """Take the shift back."""
        assert self._paddings is not None
        for name, padding in zip(self.names(site), self._paddings, strict=True):
            _set_padding(model.get_submodule(name), padding)
        self._paddings = None

    @property
    def before(self) -> tuple[Any, Any]:
        """The paddings of the two before the shift."""
        assert self._paddings is not None
        return self._paddings

    @property
    def left(self) -> tuple[Any, Any]:
        """The paddings of the two after it."""
        assert self._left is not None
        return self._left

    @property
    def moves_padding(self) -> bool:
        """Whether the second convolution had a padding to give."""
        return self._paddings is not None and self._paddings[1] not in ("valid", (0,) * len(self._paddings[1]))

    def described(self, site: str) -> str:
        """Say what was done, given the name of the activation."""
        first, second = self.names(site)
        return f"the padding of {second} moves to {first}"


def possible_shift(site: str, around: Neighbourhood) -> PaddingShift | None:
    """Return the shift that makes the merge around an activation exact; None if there is none.

    A second convolution that pads nothing yet may come to, by a later shift from after it; it passes that on.

    Args:
        site: Qualified name of the activation.
        around: What lies around it.
    """
    if len(around.meetings) != 1:
        return None
    (meeting,) = around.meetings
    first, second = meeting.operators
    if not set(meeting.through) <= {"batch norm"} or type(first) is not type(second):
        return None
    if type(first) not in _CONVOLUTIONS:
        return None
    assert isinstance(first, _CONVOLUTIONS)
    assert isinstance(second, _CONVOLUTIONS)
    p1, p2 = numeric_padding(first), numeric_padding(second)
    if p1 is None or p2 is None:
        return None
    if second.padding_mode != "zeros" or (any(p1) and first.padding_mode != "zeros"):
        return None
    return PaddingShift(site, meeting.first, meeting.second)


def apply_shifts(model: nn.Module, shifts: Mapping[str, PaddingShift]) -> None:
    """Carry out the shifts around activations, those at the end of a chain first."""
    for site in _from_end_to_head(shifts):
        shifts[site].apply(model, site)


def undo_shifts(model: nn.Module, shifts: Mapping[str, PaddingShift]) -> None:
    """Take the shifts around activations back, those at the head of a chain first."""
    for site in reversed(_from_end_to_head(shifts)):
        shifts[site].undo(model, site)


def check_undoable(model: nn.Module, shifts: Mapping[str, PaddingShift]) -> None:
    """Refuse shifts that can't be taken back: something else has changed the paddings since.

    Raises:
        ValueError: If so.
    """
    now: dict[str, Any] = {}
    for site in reversed(_from_end_to_head(shifts)):
        shift = shifts[site]
        names = shift.names(site)
        for name in names:
            now.setdefault(name, getattr(model.get_submodule(name), "padding", None))
        if tuple(now[name] for name in names) != shift.left:
            raise ValueError(
                f"Expected argument `model` to be a whole model, but where {site!r} became linear the paddings of "
                f"{' and '.join(map(repr, names))} were changed, and are others now: by what was made linear outside "
                f"of this part, for example. Pass the model that it is in."
            )
        now.update(zip(names, shift.before, strict=True))


def numeric_padding(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...] | None:
    """Return the padding per axis; None for a ``"same"`` that is uneven, which one convolution can't be told."""
    if convolution.padding == "valid":
        return (0,) * len(convolution.kernel_size)
    if not isinstance(convolution.padding, str):
        return tuple(convolution.padding)
    totals = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


def _from_end_to_head(shifts: Mapping[str, PaddingShift]) -> list[str]:
    """Return the activations in the order in which the shifts around them are carried out."""
    by_first = {shift.names(site)[0]: site for site, shift in shifts.items()}
    ordered: list[str] = []
    for start in shifts:
        chain: list[str] = []
        site: str | None = start
        while site is not None and site not in ordered and site not in chain:
            chain.append(site)
            site = by_first.get(shifts[site].names(site)[1])
        ordered += reversed(chain)
    return ordered


def _set_padding(convolution: Any, padding: Any) -> None:
    convolution.padding = padding
    if not isinstance(padding, str):  # what modes other than zeros are padded by
        convolution._reversed_padding_repeated_twice = _reverse_repeat_tuple(padding, 2)
