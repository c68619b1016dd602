"""Rank the activations that may become linear."""

from collections.abc import Mapping


def lowest_entropy(entropies: Mapping[str, float], count: int) -> list[str]:
    """Choose the activations of lowest entropy; where several are equal, the earlier in execution order.

    Low entropy means that the rectifier hardly switches, so that the layer is nearly linear already.

    Args:
        entropies: Name -> entropy in bits, in execution order.
        count: How many to choose; fewer where there are not as many.

    Source: EASIER, arXiv 2404.18949.

    Example:
        >>> lowest_entropy({"a": 0.9, "b": 0.1, "c": 0.1}, 2)
        ['b', 'c']
    """
    return sorted(entropies, key=entropies.__getitem__)[:count]
