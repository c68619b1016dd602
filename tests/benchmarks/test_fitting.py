"""The table of what a fit costs tells its size and what it explains."""

import fitting


def test_a_fit_is_told_with_its_size_and_what_it_explains():
    channels, unknowns, positions, *_, explained = fitting.measure(4)
    assert (channels, unknowns) == ("4", "37")  # the last is a constant
    assert positions == f"{fitting.BATCHES * fitting.IMAGES * fitting.SIZE**2:,}"
    assert 0 < float(explained) < 1
