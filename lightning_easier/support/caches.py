"""How much a processor works on at a time without fetching it from memory again."""

import torch

# With what is computed of them, in float32, they fit into the cache that a core has for itself.
_VALUES_OF_A_CORE = 2**17
# A float32 holds every integer up to 2**24: a sum of so many signs is exact.
_MOST = 2**23


def values_in_caches() -> int:
    """Return how many values the caches of all cores hold that torch uses, with as many computed from them beside.

    An operator spreads what it is given over the cores: what fits into one cache alone would keep each of several busy
    for so short a time that starting them takes longer.
    """
    return min(_VALUES_OF_A_CORE * torch.get_num_threads(), _MOST)
