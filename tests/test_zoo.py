import pickle
import sys

import pytest
import torch
from torchvision import datasets

from lightning_easier import collapse, isolate_activations, linearize
from lightning_easier.zoo import (
    CIFAR10DataModule,
    CifarResNet,
    DigitsDataModule,
    FusedResNet,
    ImageFolderDataModule,
    build_backbone,
)
from tests.models import randomize_batch_norms


@pytest.mark.parametrize(("name", "sites"), [("cifar_resnet20", 19), ("cifar_resnet56", 55), ("fused_resnet", 7),
                                             ("resnet18", 17), ("timm/resnet18", 17)])  # fmt: skip
def test_backbones_by_name(name, sites):
    model = build_backbone(name, 7).eval()
    assert len(isolate_activations(model)) == sites
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7)


def test_cifar_resnet_has_the_published_names_and_option_a_shortcuts():
    model = build_backbone("cifar_resnet20", 10).eval()
    keys = set(model.state_dict())
    assert {"conv1.weight", "bn1.weight", "layer3.2.conv2.weight", "layer3.2.bn2.bias", "linear.bias"} <= keys
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 M, table 6 of the paper
    block = model.layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 6, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_fused_blocks_merge_exactly():
    model = randomize_batch_norms(FusedResNet(in_channels=1, widths=(4, 6), blocks=2)).double()
    inner = [name for name in isolate_activations(model) if name.startswith("stages")]
    linearize(model, inner)
    x = torch.randn(2, 1, 9, 7, dtype=torch.float64)
    report = collapse(model, x, objective="depth").report
    assert len(report.merges) == 4
    assert report.relative_difference < 1e-12


def test_unknown_backbones_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"but got 'resnet19'\. Did you mean one of \['resnet18'"):
        build_backbone("resnet19", 10)
    with pytest.raises(ValueError, match="6n . 2.*but got 21"):
        CifarResNet(21)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="'timm/convnext_atto' needs timm: `pip install"):
        build_backbone("timm/convnext_atto", 10)


def test_without_torchvision_the_rest_of_the_zoo_is_there(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert isinstance(build_backbone("fused_resnet", 10), FusedResNet)
    with pytest.raises(ValueError, match=r"'resnet19'.*torchvision is not installed"):
        build_backbone("resnet19", 10)
    for data in (CIFAR10DataModule(str(tmp_path)), ImageFolderDataModule(str(tmp_path))):
        with pytest.raises(ModuleNotFoundError, match=f"{type(data).__name__} needs torchvision: `pip install"):
            data.setup("fit")


def test_digits_are_split_once_and_for_all():
    data, again = DigitsDataModule(), DigitsDataModule()
    for module in (data, again):
        module.setup("fit")
    sets = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in sets] == [1078, 359, 360]
    assert torch.equal(data.val_set.tensors[0], again.val_set.tensors[0])
    images = torch.cat([part.tensors[0] for part in sets])
    assert (images.min(), images.max()) == (-1, 1)
    for part in sets:  # each class in proportion
        assert torch.bincount(part.tensors[1]).div(len(part)).sub(0.1).abs().max() < 0.01


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        DigitsDataModule().setup("fit")


def write_cifar10(root) -> None:
    """A CIFAR-10 of two images a batch, in the format of the real one."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": torch.randint(0, 255, (2, 3072), dtype=torch.uint8).numpy(), "labels": [0, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_cifar10_holds_out_training_images_without_augmenting_them(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = CIFAR10DataModule(str(tmp_path), batch_size=4, num_workers=0, val_size=3)
    data.setup("fit")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [7, 3, 2]
    assert not set(data.train_set.indices) & set(data.val_set.indices)
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="`batch_size` to be at least 1, but got 0"):
        DigitsDataModule(0)
    with pytest.raises(FileNotFoundError, match="`root` to hold a folder 'train'"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")
