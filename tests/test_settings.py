"""The 28 settings of the EASIER paper, composed on the command line as docs/settings.md has them."""

import csv
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_easier import isolate_activations, recipes
from lightning_easier.cli import EasierCLI
from lightning_easier.zoo import (
    CIFAR10DataModule,
    DTDDataModule,
    FGVCAircraftDataModule,
    Flowers102DataModule,
    PACSDataModule,
    TinyImageNetDataModule,
    VLCSDataModule,
    build_backbone,
)
from lightning_easier.zoo.datamodules.mixing import MixedBatches
from tests.tiny_data import write_all

ROOT = Path(__file__).parents[1]
CLASSES = {
    "CIFAR-10": 10, "Tiny-ImageNet-200": 200, "PACS": 7, "VLCS": 5, "Flowers-102": 102, "DTD": 47, "Aircraft": 100,
}  # fmt: skip
NETWORKS = ("ResNet-18", "Swin-T", "MobileNetV2", "VGG-16")
PRETRAINED = {(network, dataset) for network in ("Swin-T", "VGG-16") for dataset in CLASSES}
PRETRAINED |= {("MobileNetV2", dataset) for dataset in CLASSES if dataset != "CIFAR-10"}
PRETRAINED |= {("ResNet-18", dataset) for dataset in ("Flowers-102", "DTD", "Aircraft")}
RATES = {"ResNet-18": 0.1, "MobileNetV2": 0.1, "VGG-16": 0.01, "Swin-T": 0.001}
BACKBONES = {"ResNet-18": "resnet18", "Swin-T": "swin_t", "MobileNetV2": "mobilenet_v2", "VGG-16": "vgg16_bn"}
DATA = {
    "CIFAR-10": CIFAR10DataModule, "Tiny-ImageNet-200": TinyImageNetDataModule, "PACS": PACSDataModule,
    "VLCS": VLCSDataModule, "Flowers-102": Flowers102DataModule, "DTD": DTDDataModule,
    "Aircraft": FGVCAircraftDataModule,
}  # fmt: skip
MIXED = ("Flowers-102", "DTD")
FLIP, FLIP_BOTH_WAYS = (
    {"RandomHorizontalFlip": {"p": 0.5}},
    {f"Random{way}Flip": {"p": 0.5} for way in ("Horizontal", "Vertical")},
)
CROP = {"RandomResizedCrop": {"size": [224, 224], "scale": [0.08, 1.0]}}
MIDDLE = {"CenterCrop": {"size": [224, 224]}}
_OF_DOMAINS = (
    {"RandomResizedCrop": {"size": [224, 224], "scale": [0.8, 1.0]}} | FLIP
    | {"ColorJitter": {name: [0.6, 1.4] for name in ("brightness", "contrast", "saturation")} | {"hue": [-0.4, 0.4]}},
    {"Resize": {"size": [224, 224]}},
)  # fmt: skip
# Of training images, and of others
TRANSFORMS = {
    "CIFAR-10": ({"RandomCrop": {"size": [32, 32], "padding": [4] * 4}} | FLIP, {}),
    "Tiny-ImageNet-200": ({"RandomCrop": {"size": [64, 64], "padding": [4] * 4}} | FLIP, {}),
    "PACS": _OF_DOMAINS,
    "VLCS": _OF_DOMAINS,
    "Flowers-102": (
        {"RandomRotation": {"degrees": [-30, 30]}} | CROP
        | {"RandomHorizontalFlip": {"p": 0.6}, "RandomVerticalFlip": {"p": 0.4}},
        {"Resize": {"size": [256]}} | MIDDLE,
    ),
    "DTD": ({"Resize": {"size": [252]}} | CROP | FLIP_BOTH_WAYS, {"Resize": {"size": [252]}} | MIDDLE),
    "Aircraft": (
        {"Resize": {"size": [512]}, "RandomCrop": {"size": [224, 224], "padding": None}} | FLIP,
        {"Resize": {"size": [512]}} | MIDDLE,
    ),
}  # fmt: skip
with (ROOT / "configs" / "settings.csv").open(newline="") as file:
    SETTINGS = list(csv.DictReader(file))
# What keeps a step small: no download, small images, few of them
SMALL = [
    "--model.weights=null", "--data.num_workers=0", "--data.batch_size=2", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false",
]  # fmt: skip
SIZES = {"CIFAR-10": ["--data.val_size=2"], "Tiny-ImageNet-200": []}


class Narrow(nn.Linear):
    """One of VGG's last layers, of 32 features in the place of 4096: these have 120 of its 134 million weights."""

    def __init__(self, in_features, out_features):
        in_features, out_features = (32 if width == 4096 else width for width in (in_features, out_features))
        super().__init__(in_features, out_features)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets, small; torchvision does not compare their digests with those of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        patch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *args: True)
        patch.setattr("torchvision.models.vgg.nn", SimpleNamespace(**vars(nn) | {"Linear": Narrow}))
        yield folder


def composed(setting, root, *options):
    """Compose a setting on the command line; its steps are small, its last checkpoint is not written."""
    parts = [f"--config={setting[part]}" for part in ("model", "data", "recipe")]
    sizes = SIZES.get(setting["dataset"], ["--data.image_size=32"])
    cli = EasierCLI(args=[*parts, *SMALL, *sizes, f"--data.root={root}", *options], run=False)
    cli.trainer.checkpoint_callback.save_last = False
    return cli


def named(setting):
    return f"{setting['network']}-{setting['dataset']}"


def schedule(network, dataset):
    """Return how the paper trains: optimizer, learning rate, weight decay, milestones, epochs of a round, batch."""
    if dataset in ("CIFAR-10", "Tiny-ImageNet-200"):
        return "sgd", RATES[network], 1e-4, [80, 120], 160, 128
    if dataset in ("PACS", "VLCS"):
        return "sgd", 1e-3, 5e-4, [24], 30, 16
    return "adam", 1e-4, 0, [], 50, 16


def backbone(network, dataset):
    """Return the name of the network, which makes small maps smaller later."""
    small = {"ResNet-18": ("CIFAR-10", "PACS", "VLCS"), "MobileNetV2": ("CIFAR-10",)}
    suffix = {"ResNet-18": "_small_stem", "MobileNetV2": "_small_strides"}
    return BACKBONES[network] + (suffix[network] if dataset in small.get(network, ()) else "")


@pytest.mark.parametrize("setting", SETTINGS, ids=named)
def test_a_setting_trains_and_validates_a_step(setting, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = composed(setting, root, "--trainer.fast_dev_run=true")
    head = [module for module in cli.model.modules() if isinstance(module, nn.Linear)][-1]
    before = head.weight.detach().clone()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert not torch.equal(head.weight, before)
    assert {"train_loss", "val_loss", "val_acc"} <= set(cli.trainer.callback_metrics)
    assert head.out_features == CLASSES[setting["dataset"]]
    (curve,) = recipes.published([setting["model"], setting["data"]]).values()
    assert len(isolate_activations(cli.model)) == len(curve)
    assert not list(tmp_path.iterdir())
    kind, rate, decay, milestones, *_ = schedule(setting["network"], setting["dataset"])
    (optimizer,) = cli.trainer.optimizers
    (group,) = optimizer.param_groups
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind]
    assert (group["lr"], group["weight_decay"], group.get("momentum", 0.9)) == (rate, decay, 0.9)
    schedulers = [each.scheduler for each in cli.trainer.lr_scheduler_configs]
    assert [(sorted(each.milestones), each.gamma) for each in schedulers] == ([(milestones, 0.1)] if milestones else [])


def test_the_settings_are_those_of_the_paper():
    pairs = [(setting["network"], setting["dataset"]) for setting in SETTINGS]
    assert sorted(pairs) == sorted((network, dataset) for network in NETWORKS for dataset in CLASSES)
    for setting, (network, dataset) in zip(SETTINGS, pairs, strict=True):
        config = recipes.composed([setting[part] for part in ("model", "data", "recipe")])
        assert set(config) == {"seed_everything", "model", "data", "trainer"}
        assert config["seed_everything"] == 0
        optimizer, rate, decay, milestones, epochs, batch = schedule(network, dataset)
        model = {"num_classes": 10} | config["model"]["init_args"]
        assert model.pop("optimizer", "sgd") == optimizer
        assert model == {
            "backbone": backbone(network, dataset), "num_classes": CLASSES[dataset], "lr": rate, "weight_decay": decay,
            "milestones": milestones, "weights": "IMAGENET1K_V1" if (network, dataset) in PRETRAINED else None,
        }  # fmt: skip
        assert config["data"]["init_args"]["batch_size"] == batch
        assert config["data"]["init_args"].get("mix_alpha") == (0.8 if dataset in MIXED else None)
        assert set(config["trainer"]) == {"max_epochs", "callbacks"}
        assert config["trainer"]["max_epochs"] == 36 * epochs  # MobileNetV2 has 35 activations
        checkpoint, pruning = config["trainer"]["callbacks"]
        assert checkpoint["init_args"] == {"save_last": True}
        assert pruning["class_path"] == "lightning_easier.EntropyPruningCallback"
        assert pruning["init_args"] == {
            "monitor": "val_acc", "mode": "max", "tolerance": 1.0, "measuring": {"on": "training"},
            "rounds": {"epochs": epochs, "restart": "optimizer"}, "files": {"best_per_depth": True},
        }  # fmt: skip


def datamodule(dataset, **options):
    """Make the data of a setting as its config says."""
    (name,) = {setting["data"] for setting in SETTINGS if setting["dataset"] == dataset}
    config = recipes.composed([name])["data"]
    assert config["class_path"] == f"lightning_easier.zoo.{DATA[dataset].__name__}"
    return DATA[dataset](**config["init_args"] | options)


def steps(images):
    """Return the transforms of images: each with its name and what it is told."""
    while hasattr(images, "dataset") or hasattr(images, "datasets"):
        images = images.dataset if hasattr(images, "dataset") else images.datasets[0]
    return {type(each).__name__: each for each in images.transform.transforms}


@pytest.mark.parametrize("dataset", DATA)
def test_images_are_augmented_resized_and_normalized_as_in_the_paper(dataset, root):
    sizes = {"val_size": 2} if dataset == "CIFAR-10" else {}
    data = datamodule(dataset, root=str(root), num_workers=0, **sizes)
    data.setup("fit")
    augmented, plain = TRANSFORMS[dataset]
    for images, expected in ((data.train_set, augmented), (data.val_set, plain), (data.test_set, plain)):
        found = steps(images)
        assert list(found) == [*expected, "ToImage", "ToDtype", "Normalize"]
        for name, told in expected.items():
            values = {key: getattr(found[name], key) for key in told}
            assert values == {key: pytest.approx(value) for key, value in told.items()}, name
        normalize = found["Normalize"]
        assert (*normalize.mean, *normalize.std) == (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)
    collate = data.train_dataloader().collate_fn
    if dataset in MIXED:
        assert [(type(each).__name__, each.alpha) for each in collate.mix.transforms] == [
            ("MixUp", 0.8),
            ("CutMix", 0.8),
        ]
    else:
        assert not isinstance(collate, MixedBatches)


def test_images_are_split_as_in_the_paper():
    assert (datamodule("CIFAR-10").val_size, datamodule("CIFAR-10").seed) == (5000, 0)
    assert datamodule("PACS").domains == ["art_painting", "cartoon", "photo", "sketch"]
    assert datamodule("VLCS").domains == ["Caltech101", "LabelMe", "SUN09", "VOC2007"]
    assert datamodule("PACS").seed == datamodule("VLCS").seed == 0
    assert all(datamodule(dataset).num_classes == count for dataset, count in CLASSES.items())


def test_a_new_stem_begins_as_that_of_torchvision():
    weights = [build_backbone(name, 10).conv1.weight.detach() for name in ("resnet18_small_stem", "resnet18")]
    fans_out = [64 * 3**2, 64 * 7**2]
    for weight, fan_out in zip(weights, fans_out, strict=True):
        assert float(weight.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize("setting", SETTINGS[:2] + SETTINGS[-4:-2], ids=named)
def test_what_is_shown_is_what_is_run(setting, root):
    parts = [setting[part] for part in ("model", "data", "recipe")]
    given = [f"--config={part}" for part in parts]
    cli = EasierCLI(args=[*given, "--model.weights=null", "--trainer.accelerator=cpu"], run=False)

    def check(shown, run):
        for key, value in shown.items():
            if isinstance(value, dict):
                check(value, run[key])
            elif isinstance(value, list) and isinstance(value[0] if value else None, dict):
                for each, other in zip(value, run[key], strict=True):
                    check(each, other)
            elif key != "weights":
                assert run[key] == value, key

    check(recipes.composed(parts), cli.config.as_dict())


def test_a_setting_runs_to_the_next_round_and_ends_with_another_network(root, tmp_path):
    (setting,) = [each for each in SETTINGS if (each["network"], each["dataset"]) == ("MobileNetV2", "DTD")]
    cli = composed(
        setting, root, "--trainer.max_epochs=2", "--trainer.callbacks.rounds.epochs=1",
        "--trainer.callbacks.files.best_per_depth=false", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.num_sanity_val_steps=0",
    )  # fmt: skip
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert len(isolate_activations(cli.model)) == 34
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)


def test_the_commands_of_the_page_are_the_settings():
    text = (ROOT / "docs" / "settings.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|") and "`--config" in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = []
    for row in rows:
        words = shlex.split(row[-1].strip("`"))
        assert words[::2] == ["--config"] * 3
        shown.append([*row[:2], *words[1::2]])
    assert shown == [list(setting.values()) for setting in SETTINGS]
