"""Networks, classifiers and data of the zoo: as published, by name, and with pretrained weights that run no code."""

import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torchvision import datasets, models

from lightning_easier import collapse, isolate_activations, linearize
from lightning_easier.zoo import (
    CIFAR10DataModule,
    CifarResNet,
    DigitsDataModule,
    FusedResNet,
    ImageClassifier,
    ImageFolderDataModule,
    build_backbone,
)
from tests.models import randomize_batch_norms
from tests.tiny_data import write_cifar10


@pytest.mark.parametrize(("name", "sites"), [("cifar_resnet20", 19), ("cifar_resnet56", 55), ("fused_resnet", 7),
                                             ("resnet18", 17), ("timm/resnet18", 17), ("resnet18_small_stem", 17),
                                             ("mobilenet_v2_small_strides", 35)])  # fmt: skip
def test_backbones_by_name(name, sites):
    model = build_backbone(name, 7).eval()
    assert len(isolate_activations(model)) == sites
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "stages", "sizes"),
    [("resnet18_small_stem", ["conv1", "maxpool", "layer4"], [(32, 48), (16, 24), (2, 3)]),
     ("mobilenet_v2_small_strides", ["features.0", "features.3", "features.18"], [(32, 48), (32, 48), (4, 6)])],
)  # fmt: skip
def test_networks_for_small_images_make_maps_smaller_later(name, stages, sizes):
    model = build_backbone(name, 7).eval()
    seen = {}
    for stage in stages:
        module = model.get_submodule(stage)
        module.register_forward_hook(lambda _, __, out, stage=stage: seen.update({stage: tuple(out.shape[2:])}))
    model(torch.randn(1, 3, 32, 48))
    assert [seen[stage] for stage in stages] == sizes


def pretrained(monkeypatch, state_dict):
    """Have torchvision's pretrained weights be these, without a download."""
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(state_dict))


def test_pretrained_weights_are_all_taken_but_the_last_layer(monkeypatch, tmp_path):
    given = models.resnet18().state_dict()
    pretrained(monkeypatch, given)
    torch.manual_seed(1)
    module = ImageClassifier("resnet18", num_classes=7, weights="IMAGENET1K_V1")
    state = module.model.state_dict()
    assert [key for key in state if not torch.equal(state[key], given[key])] == ["fc.weight", "fc.bias"]
    torch.manual_seed(1)
    assert torch.equal(state["fc.weight"], build_backbone("resnet18", 7).fc.weight)
    assert "weights" not in module.hparams


def test_pretrained_weights_that_there_are_not_or_that_do_not_fit_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"`weights` to be one of \['IMAGENET1K_V1', .*'resnet18', but got 'best'"):
        build_backbone("resnet18", 7, weights="best")
    with pytest.raises(ValueError, match="`weights` to be left out with 'cifar_resnet20'.*`pretrained=True`"):
        build_backbone("cifar_resnet20", 7, weights="DEFAULT")
    given = models.resnet18().state_dict()
    pretrained(monkeypatch, given | {"conv1.weight": torch.zeros(64, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V1' do not: (.|\n)*conv1\.weight"):
        build_backbone("resnet18", 7, weights="IMAGENET1K_V1")
    pretrained(
        monkeypatch, {key: value for key, value in given.items() if key != "bn1.weight"} | {"more": given["fc.bias"]}
    )
    with pytest.raises(ValueError, match=r"they differ in \['bn1\.weight', 'more'\]"):
        build_backbone("resnet18", 7, weights="IMAGENET1K_V1")


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """torch's folder of downloaded weights, an empty one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("name", "num_classes", "weights", "file"),
    [("squeezenet1_1", 1000, "IMAGENET1K_V1", models.SqueezeNet1_1_Weights.IMAGENET1K_V1),
     ("squeezenet1_1", 7, "IMAGENET1K_V1", models.SqueezeNet1_1_Weights.IMAGENET1K_V1),
     # torchvision takes these for the backbone where it is told nothing
     ("lraspp_mobilenet_v3_large", 21, None, models.MobileNet_V3_Large_Weights.IMAGENET1K_V1)],
)  # fmt: skip
def test_what_was_put_in_the_place_of_pretrained_weights_runs_nothing(name, num_classes, weights, file, downloads):
    made = downloads / "made"
    planted = downloads / Path(file.url).name
    torch.save({"features.0.weight": Malicious(made)}, planted)
    torch.load(planted, weights_only=False)
    assert made.exists()
    made.unlink()
    with pytest.raises(ValueError, match=rf"weights of '{name}' to be tensors and plain data(.|\n)*{downloads.parent}"):
        build_backbone(name, num_classes, weights=weights)
    assert not made.exists()


@pytest.mark.parametrize("given", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_pretrained_weights_of_the_same_classes_are_all_taken(given, downloads, monkeypatch):
    for key in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    pretrained = models.squeezenet1_1().state_dict()
    torch.save(pretrained, downloads / Path(models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url).name)
    state = build_backbone("squeezenet1_1", 1000, weights="IMAGENET1K_V1").state_dict()
    assert state.keys() == pretrained.keys()
    assert all(torch.equal(state[key], pretrained[key]) for key in state)
    assert {key: value for key, value in os.environ.items() if key.endswith("WEIGHTS_ONLY_LOAD")} == given


def test_a_network_is_built_as_its_pretrained_weights_need_it(downloads):
    pretrained = models.googlenet(init_weights=False, aux_logits=True).state_dict()
    torch.save(pretrained, downloads / Path(models.GoogLeNet_Weights.IMAGENET1K_V1.url).name)
    model = build_backbone("googlenet", 1000, weights="IMAGENET1K_V1")
    assert model.transform_input
    assert torch.equal(model.fc.weight, pretrained["fc.weight"])


def test_a_checkpoint_of_a_pretrained_network_loads_without_a_download(monkeypatch, tmp_path):
    pretrained(monkeypatch, models.mobilenet_v2(width_mult=0.25).state_dict())
    module = ImageClassifier("mobilenet_v2", 7, {"width_mult": 0.25}, weights="IMAGENET1K_V1", optimizer="adam")
    trainer = Trainer(barebones=True, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "it.ckpt")
    assert torch.equal(loaded.model.features[0][0].weight, module.model.features[0][0].weight)
    assert isinstance(loaded.configure_optimizers(), torch.optim.Adam)


def test_a_classifier_has_the_optimizer_that_is_asked_for():
    module = ImageClassifier(optimizer="adam", lr=0.1, weight_decay=0.2)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.1, 0.2)
    with pytest.raises(ValueError, match=r"`optimizer` to be one of \('sgd', 'adam'\), but got 'lion'"):
        ImageClassifier(optimizer="lion")


def test_a_classifier_takes_shares_of_the_classes_as_labels():
    module = ImageClassifier("cifar_resnet20", num_classes=3).eval()
    module.log = lambda *args, **kwargs: None
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([2, 0])
    each = [module.training_step((images, torch.full((2,), label)), 0) for label in range(3)]
    shares = torch.tensor([[0.25, 0.0, 0.75], [0.25, 0.0, 0.75]])
    assert torch.allclose(module.training_step((images, shares), 0), 0.25 * each[0] + 0.75 * each[2])
    assert torch.allclose(
        module.training_step((images, torch.eye(3)[labels]), 0), module.training_step((images, labels), 0)
    )


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
