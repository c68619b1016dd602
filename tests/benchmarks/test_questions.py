"""Variants are timed in turn, their ratio does not notice other work, and a bar is kept or missed only beyond doubt."""

import pytest
from questions import Bar, Measurement, Quartiles, Variant, compared, in_turn


def slowness(*moments):
    """Return a clock of a machine that is so many times slower at the moment of each round, for two variants."""
    calls = iter(each for moment in moments for each in (moment, moment))
    return lambda seconds: lambda: seconds * next(calls)


def test_variants_are_sampled_in_turn_and_their_ratio_does_not_notice_other_work():
    order = []

    def variant(name, seconds, clock):
        def sample():
            order.append(name)
            return clock(seconds)()

        return Variant(sample)

    clock = slowness(1, 1, 5, 5, 1)
    latencies = in_turn({"a": variant("a", 1.0, clock), "b": variant("b", 2.0, clock)}, samples=4)
    assert order == [*"ab", *"ba", *"ab", *"ba", *"ab"]  # after a warm-up every other round in the opposite order
    ratio, bounds = compared(latencies["b"], latencies["a"])
    assert ratio == Quartiles(2.0, 2.0, 2.0)
    assert bounds == (2.0, 2.0)
    ratio, _ = compared(latencies["b"], latencies["a"], work=4.0)
    assert ratio.median == 0.5
    assert latencies["a"].spread > 1


def test_a_time_limit_leaves_the_fewest_samples():
    calls = []
    in_turn({"a": Variant(lambda: calls.append(0) or 1.0)}, samples=50, seconds=0.0)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [((1.01, 1.02, 1.03), "kept"), ((1.06, 1.07, 1.08), "missed"), ((1.0, 1.02, 1.2), "open")],
)
def test_a_bar_is_kept_or_missed_where_all_samples_say_so(samples, verdict):
    latencies = in_turn({"a": Variant(lambda: 1.0), "b": Variant(iter((1.0, *samples)).__next__)}, samples=3)
    ratio, bounds = compared(latencies["b"], latencies["a"])
    measured = Measurement(*["x"] * 6, 1, "dry", ratio=ratio, bounds=bounds, bar=Bar(time=1.05))
    assert list(measured.verdicts()) == [f"≤ 1.05×: {verdict}"]
