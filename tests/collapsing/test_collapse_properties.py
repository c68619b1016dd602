"""Random linear networks collapse to the same function, or say why they stay apart."""

import copy
import os

import torch
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st

from lightning_easier import collapse
from lightning_easier.collapsing.exact.guards import SizeGuards
from lightning_easier.collapsing.exact.verification import in_float64
from lightning_easier.support.inference import relative_difference
from tests.linear_networks import networks

ASKED_FOR = os.environ.get("COLLAPSE_EXAMPLES")  # new ones, by `make prove`; the suite takes the same ones each time
SETTINGS = settings(
    max_examples=int(ASKED_FOR or 150),
    derandomize=ASKED_FOR is None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@SETTINGS
@given(networks(), st.sampled_from(["depth", "macs"]), st.sampled_from([torch.float64, torch.float32]))
def test_a_random_linear_network_keeps_its_function(case, objective, dtype):
    model, shape, other_shape = case
    model = model.to(dtype)
    note(str(model))
    state, description = copy.deepcopy(model.state_dict()), str(model)
    result = collapse(model, torch.randn(shape, dtype=dtype), objective=objective)
    report = result.report
    note(str(report))
    assert report.relative_difference_float64 <= 1e-9
    # at another size, and in float64 whatever it was rounded to
    (source, collapsed), (x,) = in_float64((model, result.model), (torch.randn(other_shape, dtype=dtype),))
    with torch.no_grad():
        try:
            expected = source(x.clone())
        except RuntimeError:  # its branches fit only at some sizes
            reject()
        try:
            output = collapsed(x.clone())
        except AssertionError as error:  # torch.export may ask more of a size than the model does
            guarded = any(isinstance(module, SizeGuards) for module in collapsed.modules())
            if not guarded or "What was recorded" not in str(error):
                raise
            reject()
        assert relative_difference(output, expected) <= (1e-9 if dtype == torch.float64 else 1e-4)
    assert str(model) == description
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for refusal in report.refusals:
        assert refusal.reason
        assert "report it" not in refusal.reason, refusal  # a step that went wrong, and was left out
    assert not any("please report it" in refusal.reason for refusal in report.refusals)
    assert all(merge.price_after <= merge.price_before for merge in report.merges)
    assert report.after.macs <= report.before.macs or objective == "depth"
    assert report.after.depth <= report.before.depth
