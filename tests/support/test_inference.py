"""What is compared is computed in full, and what a user has set of that stays so."""

import pytest
import torch

from lightning_easier.support.inference import full_float32

needs_kinds = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 tells kinds apart")


def settings():
    kinds = [getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn")]
    each = [getattr(kind, "fp32_precision", None) for kind in (*kinds, torch.backends.cuda.matmul)]
    return [torch._C._get_float32_matmul_precision(), *each]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_float32_is_computed_in_full_and_what_was_set_comes_back(precision, convolutions):
    try:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        before = settings()
        for fails in (False, True):
            with pytest.raises(KeyError) if fails else full_float32(), full_float32():
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cudnn.allow_tf32
                assert not torch.backends.cuda.matmul.allow_tf32
                if fails:
                    raise KeyError
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, convolutions)
            assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


@needs_kinds
def test_so_it_is_where_kinds_of_operators_are_told_apart():
    convolutions, recurrent = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    try:
        convolutions.fp32_precision = "ieee"  # what torch has told of both before is an error now
        with pytest.raises(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
        with full_float32():
            assert (convolutions.fp32_precision, recurrent.fp32_precision) == ("ieee", "ieee")
        assert (convolutions.fp32_precision, recurrent.fp32_precision) == ("ieee", "tf32")
    finally:
        convolutions.fp32_precision = recurrent.fp32_precision = "tf32"
    assert torch.backends.cudnn.allow_tf32


@needs_kinds
@pytest.mark.parametrize(
    ("backend", "name", "precision"),
    [("cudnn", "conv", "tf32"), ("cudnn", "rnn", "tf32"), ("mkldnn", "conv", "bf16"), ("mkldnn", "rnn", "bf16"),
     ("mkldnn", "matmul", "bf16")],
)  # fmt: skip
def test_each_kind_of_operator_is_computed_in_full_and_is_as_it_was(backend, name, precision):
    assert_full(getattr(getattr(torch.backends, backend), name), precision)


@needs_kinds
def test_products_of_a_gpu_are_computed_in_full_where_they_are_set_alone():
    assert_full(torch.backends.cuda.matmul, "tf32")


def assert_full(kind, precision):
    before = kind.fp32_precision
    try:
        kind.fp32_precision = precision
        for fails in (False, True):
            with pytest.raises(KeyError) if fails else full_float32(), full_float32():
                assert kind.fp32_precision in ("ieee", "none")
                if fails:
                    raise KeyError
            assert kind.fp32_precision == precision
    finally:
        kind.fp32_precision = before
