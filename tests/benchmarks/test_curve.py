"""EASIER's curve is run on images that can be learned, and begins no round that it has no time for."""

import math

import curve
import pytest
import torch
from questions import EFFORTS


def test_images_of_the_curve_can_be_learned():
    device = torch.device("cpu")
    (images, labels), (others, truth) = (curve.learnable(count, device, seed) for count, seed in ((4000, 1), (200, 2)))
    assert images.shape == (4000, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.bfloat16
    assert len({*labels.tolist()}) == curve.CLASSES
    spectra = [torch.fft.rfft(each.float(), dim=-1).abs()[:, :, ::4, :6].flatten(1) for each in (images, others)]
    nearest = torch.cdist(spectra[1], spectra[0]).topk(5, largest=False).indices
    found = labels[nearest].mode(1).values
    assert (found == truth).float().mean() > 0.5  # a tenth by chance; shifts leave a spectrum as it is
    assert not torch.equal(images[:200], others)


@pytest.mark.parametrize(
    ("seconds", "ends"), [(math.inf, [10.0, 20.0, 30.0]), (35.0, [10.0, 20.0, 30.0]), (29.0, [10.0, 20.0])]
)
def test_a_curve_begins_no_round_that_it_has_no_time_for(seconds, ends, monkeypatch):
    clock, told = iter(range(0, 1000, 10)), []
    monkeypatch.setattr(curve, "perf_counter", lambda: float(next(clock)))
    curve.run(EFFORTS["dry"], torch.device("cpu"), told.append, seconds)
    assert [float(row[-1]) for row in told[-1].rows] == ends
    assert ("another round would have ended after 29 s" in told[-1].title) == (seconds == 29.0)
