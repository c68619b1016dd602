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


def test_the_settings_are_those_of_the_paper():
    pairs = [(setting["network"], setting["dataset"]) for setting in SETTINGS]
    assert sorted(pairs) == sorted((network, dataset) for network in NETWORKS for dataset in CLASSES)
    for setting, (network, dataset) in zip(SETTINGS, pairs, strict=True):
        config = recipes.composed([setting[part] for part in ("model", "data", "recipe")])
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        assert (model["weights"] is not None) == ((network, dataset) in PRETRAINED)
        small = dataset in ("CIFAR-10", "PACS", "VLCS") if network == "ResNet-18" else dataset == "CIFAR-10"
        assert ("small" in model["backbone"]) == (small and network in ("ResNet-18", "MobileNetV2"))
        trained = (
            model.get("optimizer", "sgd"), model["lr"], data["batch_size"], model["weight_decay"], model["milestones"],
            config["trainer"]["callbacks"][-1]["init_args"]["rounds"]["epochs"],
        )  # fmt: skip
        if dataset in ("CIFAR-10", "Tiny-ImageNet-200"):
            assert trained == ("sgd", RATES[network], 128, 1e-4, [80, 120], 160)
        elif dataset in ("PACS", "VLCS"):
            assert trained == ("sgd", 1e-3, 16, 5e-4, [24], 30)
        else:
            assert trained == ("adam", 1e-4, 16, 0, [], 50)
        assert data.get("mix_alpha") == (0.8 if dataset in ("Flowers-102", "DTD") else None)
        assert config["seed_everything"] == 0


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
