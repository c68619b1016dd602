"""Inputs are copied with their channels last where convolutions on a CPU are faster with that, and nothing changes."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_easier import Finetuning, collapse, compress, isolate_activations
from lightning_easier.collapsing import engine
from lightning_easier.collapsing.fit.replacing import replace_chains
from lightning_easier.pruning.search import Search
from lightning_easier.support.calls import Arguments, copies, layout_of, mapped
from lightning_easier.support.layouts import in_fast_layout
from lightning_easier.zoo import CifarResNet

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="convolutions are torch's own")
LAST = torch.channels_last


class Seen(nn.Sequential):
    """A convolution that remembers in which layouts it was called."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3))
        self.layouts: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.layouts.append(x.is_contiguous(memory_format=LAST))
        return super().forward(x)


class Viewed(nn.Module):
    """Flattens what two convolutions make by ``view``, which channels that come last don't allow, but for one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x.view(x.shape[0], -1).reshape(x.shape[0], 4, -1).mean(2)


class Strided(nn.Module):
    """Returns values in the order in which they lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return x.as_strided((x.numel(),), (1,))


@needs_onednn
def test_images_come_with_their_channels_last() -> None:
    batches = [(torch.randn(2, 3, 6, 7),), (torch.randn(1, 3, 6, 7),)]
    found = in_fast_layout(nn.Conv2d(3, 4, 3), batches)
    assert [each is given for (each,), (given,) in zip(found, batches, strict=True)] == [True, True], "no copy is kept"
    for each, (given,) in zip(found, batches, strict=True):
        (made,) = copies(each)
        assert made.is_contiguous(memory_format=LAST)
        assert torch.equal(made, given)


@needs_onednn
def test_what_goes_with_an_image_stays_as_it_is() -> None:
    class WithMask(nn.Sequential):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self[0](x) * mask

    arguments = Arguments([torch.randn(2, 3, 6, 7), torch.ones(2, 4, 1)[..., None]], ["mask"])
    (found,) = in_fast_layout(WithMask(nn.Conv2d(3, 4, 3)), [arguments])
    made = copies(found)
    assert made.names == ("mask",)
    assert layout_of(mapped(torch.neg, found)) == layout_of(made) == LAST
    leaves, form = pytree.tree_flatten(made)
    again = pytree.tree_unflatten(leaves, form)
    assert (again.names, again.layout) == (("mask",), LAST)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Viewed(), torch.randn(2, 3, 8, 9)),
        (Strided(), torch.randn(2, 3, 8, 9)),
        (nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 8, 9).double()),
        (nn.Conv2d(1, 4, 3), torch.randn(2, 1, 8, 9)),
        (nn.Linear(9, 4), torch.randn(2, 3, 8, 9)),
        (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 8)),
    ],
    ids=["view", "strides", "float64", "one channel", "no convolution", "one axis"],
)
def test_others_stay_as_they_are(model: nn.Module, batch: Tensor) -> None:
    batches = [(batch,)]
    assert in_fast_layout(model, batches) is batches


def test_each_size_has_to_agree() -> None:
    """Maps of one pixel can be flattened in either layout."""
    batches = [(torch.randn(2, 3, 1, 1),), (torch.randn(2, 3, 8, 9),)]
    assert in_fast_layout(Viewed(), batches) is batches


@needs_onednn
def test_a_model_in_training_mode_stays_in_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    in_fast_layout(model, [(torch.randn(2, 3, 6, 7),)])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Noted(nn.Module):
    """Notes of each call whether channels came last, and whether it was trained."""

    calls: ClassVar[set[tuple[bool, bool]]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(is_last := x.is_contiguous(memory_format=LAST), bool):  # else it is traced
            self.calls.add((is_last, torch.is_grad_enabled()))
        return self.body(x)


@needs_onednn
@pytest.mark.parametrize("size", [1, 8])
def test_both_the_search_and_its_training_have_channels_last(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample alone can be viewed in more ways than several: what is stacked of such was never tried."""
    torch.manual_seed(0)
    layouts: set[torch.memory_format] = set()

    def searched(source: nn.Module, batches: Any, *others: Any) -> Search:
        Noted.calls.clear()  # the layout was tried before
        layouts.update(map(layout_of, batches))
        return Search(source, batches, *others)

    monkeypatch.setattr("lightning_easier.pruning.compress.Search", searched)
    batches = [torch.randn(size, 3, 9, 7) for _ in range(64 // size)]
    compress(Noted(), batches, objective="macs", max_drift=1.0, finetune=Finetuning(2, samples=4))
    assert layouts == {LAST}
    assert ((True, True) in Noted.calls) == (size > 1)


@needs_onednn
def test_a_fitting_collapse_has_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[torch.memory_format] = []

    def noting(model: nn.Module, sites: Any, batches: Any, *others: Any) -> Any:
        layouts.extend(map(layout_of, batches))
        return replace_chains(model, sites, batches, *others)

    monkeypatch.setattr(engine, "replace_chains", noting)
    batches = [torch.randn(16, 3, 9, 7) for _ in range(3)]
    collapse(Noted(), batches[0], mode="fit", sites=["body.1"], calibration=batches[1:], objective="macs")
    assert layouts == [LAST, LAST]


class Flattened(nn.Module):
    """Takes channels for samples, by a view that channels that come last allow of one sample alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.view(x.shape[0] * 3, 9, 7).mean((1, 2)).view(x.shape[0], 3, 1, 1)
        return self.body(x - mean)


@pytest.mark.parametrize("finetune", [None, Finetuning(2, samples=4)])
def test_examples_are_tried_as_well(finetune: Finetuning | None) -> None:
    torch.manual_seed(0)
    batches, examples = [torch.randn(1, 3, 9, 7) for _ in range(64)], torch.randn(4, 3, 9, 7)
    result = compress(Flattened(), batches, example_inputs=examples, objective="macs", max_drift=1.0, finetune=finetune)
    assert any(trial.kept for trial in result.report.trials)


@pytest.mark.parametrize(
    "given", [torch.eye(3).to_sparse_csr(), torch.eye(3)[None, None].to_sparse()], ids=["csr", "4-D"]
)
def test_sparse_arguments_are_copied(given: Tensor) -> None:
    (made,) = copies([given])
    assert made is not given
    assert torch.equal(made.to_dense(), given.to_dense())


def test_what_a_model_keeps_of_a_call_is_left_as_it_was() -> None:
    model = Seen()
    in_fast_layout(model, [(torch.randn(2, 3, 6, 7),)])
    assert model.layouts == []


def random_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model


@needs_onednn
@pytest.mark.parametrize("finetune", [None, Finetuning(3, samples=8)])
def test_compress_finds_the_same_in_either_layout(finetune: Finetuning | None, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.randn(16, 3, 12, 10) for _ in range(4)]

    def compressed() -> tuple[list[str], nn.Module]:
        result = compress(random_resnet(), batches, objective="macs", max_drift=0.3, finetune=finetune)
        return [f"{trial.operators} {trial.kind} {trial.kept}" for trial in result.report.trials], result.model

    trials, model = compressed()
    monkeypatch.setattr("lightning_easier.pruning.compress.in_fast_layout", lambda model, batches: batches)
    trials_before, model_before = compressed()
    assert trials == trials_before
    assert any(trial.endswith("True") for trial in trials)
    for value in model.parameters():
        assert value.is_contiguous()
    torch.testing.assert_close(model(batches[0]), model_before(batches[0]), rtol=1e-3, atol=1e-3)


@needs_onednn
def test_a_fit_is_the_same_in_either_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.randn(16, 3, 12, 10) for _ in range(4)]
    model = random_resnet()
    sites = [name for name in isolate_activations(copy.deepcopy(model)) if name.endswith("relu1")]

    def fitted() -> nn.Module:
        return collapse(model, batches[0], mode="fit", sites=sites, calibration=batches, objective="macs").model

    found = fitted()
    monkeypatch.setattr("lightning_easier.collapsing.engine.in_fast_layout", lambda model, batches: batches)
    torch.testing.assert_close(found(batches[0]), fitted()(batches[0]), rtol=1e-3, atol=1e-3)


def test_compress_takes_a_model_that_reads_its_inputs_by_strides() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(64, 3, 8, 9) for _ in range(2)]
    result = compress(Viewed(), batches, objective="macs", max_drift=1.0)
    assert any(trial.kept for trial in result.report.trials)
    result.model(torch.randn(2, 3, 8, 9))
