"""Move the padding between two convolutions to the first, so that they can be merged exactly.

The second convolution pads its input with zeros where the first would have computed something, which no single
convolution does. If the first pads :math:`p_1 + s_1 p_2` instead, and the second nothing, the first computes those
values, and the two are one convolution.

In a chain of convolutions the padding moves on to the head. Shifts are carried out from the end of the chain to its
head, and taken back in the opposite order, so that the result depends on which there are and not on when they came.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.utils import _reverse_repeat_tuple

from lightning_easier.sites.neighbourhood import Neighbourhood

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PaddingShift:
    """Two convolutions, the second of which gives its padding to the first.

    Args:
        first: Qualified name of the convolution before an activation.
        second: Qualified name of the one after it.
    """

    def __init__(self, first: str, second: str) -> None:
        self.first = first
        self.second = second
        self._paddings: tuple[Any, Any] | None = None  # of the two, before the shift

    def apply(self, model: nn.Module) -> None:
        """Carry out the shift."""
        first: Any = model.get_submodule(self.first)
        second: Any = model.get_submodule(self.second)
        self._paddings = (first.padding, second.padding)
        p1, p2 = numeric_padding(first), numeric_padding(second)
        assert p1 is not None
        assert p2 is not None
        _set_padding(first, tuple(a + s * b for a, s, b in zip(p1, first.stride, p2, strict=True)))
        _set_padding(second, (0,) * len(p2))

    def undo(self, model: nn.Module) -> None:
        """Take the shift back."""
        assert self._paddings is not None
        for name, padding in zip((self.first, self.second), self._paddings, strict=True):
            _set_padding(model.get_submodule(name), padding)
        self._paddings = None

    @property
    def moves_padding(self) -> bool:
        """Whether the second convolution had a padding to give."""
        return self._paddings is not None and self._paddings[1] not in ("valid", (0,) * len(self._paddings[1]))

    def __str__(self) -> str:
        return f"the padding of {self.second} moves to {self.first}"


def possible_shift(around: Neighbourhood) -> PaddingShift | None:
    """Return the shift that makes the merge around an activation exact; None if there is none.

    A second convolution that pads nothing yet may come to, by a later shift from after it; it passes that on.

    Args:
        around: What lies around the activation.
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
    return PaddingShift(meeting.first, meeting.second)


def apply_shifts(model: nn.Module, shifts: Iterable[PaddingShift]) -> None:
    """Carry out shifts, those at the end of a chain first."""
    for shift in _from_end_to_head(list(shifts)):
        shift.apply(model)


def undo_shifts(model: nn.Module, shifts: Iterable[PaddingShift]) -> None:
    """Take shifts back, those at the head of a chain first."""
    for shift in reversed(_from_end_to_head(list(shifts))):
        shift.undo(model)


def numeric_padding(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...] | None:
    """Return the padding per axis; None for a ``"same"`` that is uneven, which one convolution can't be told."""
    if convolution.padding == "valid":
        return (0,) * len(convolution.kernel_size)
    if not isinstance(convolution.padding, str):
        return tuple(convolution.padding)
    totals = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


def _from_end_to_head(shifts: Sequence[PaddingShift]) -> list[PaddingShift]:
    by_first = {shift.first: shift for shift in shifts}
    ordered: list[PaddingShift] = []
    for shift in shifts:
        chain: list[PaddingShift] = []
        link: PaddingShift | None = shift
        while link is not None and link not in ordered and link not in chain:
            chain.append(link)
            link = by_first.get(link.second)
        ordered += reversed(chain)
    return ordered


def _set_padding(convolution: Any, padding: Any) -> None:
    convolution.padding = padding
    if not isinstance(padding, str):  # what modes other than zeros are padded by
        convolution._reversed_padding_repeated_twice = _reverse_repeat_tuple(padding, 2)
