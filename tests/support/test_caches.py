"""How much is worked on at a time grows with the cores that torch uses, and stays exact."""

import pytest
import torch

from lightning_easier.support.caches import values_in_caches


@pytest.mark.parametrize(("threads", "values"), [(1, 2**17), (2, 2**18), (3, 3 * 2**17), (256, 2**23)])
def test_each_core_gets_what_fits_into_its_cache(threads: int, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert values_in_caches() == values


def test_a_sum_of_as_many_signs_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    signs = torch.ones(values_in_caches() - 1)  # odd
    assert signs.sum().item() == len(signs)
    assert torch.dot(signs, signs).item() == len(signs)
