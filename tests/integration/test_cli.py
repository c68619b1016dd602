"""The command line through the configs of the repository."""

import json
import runpy
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from torchvision.utils import save_image

from lightning_easier import (
    Distillation,
    EntropyPruningCallback,
    FitChains,
    Measuring,
    Order,
    Rounds,
    Target,
    load_pruned,
)
from lightning_easier.cli import EasierCLI, main, read_pruning_report
from lightning_easier.pruning.rules import Rules, Tolerance
from lightning_easier.zoo import CIFAR10DataModule, DigitsDataModule, ImageClassifier, ImageFolderDataModule

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SHORT = [
    "--trainer.max_epochs=3", "--trainer.limit_train_batches=3", "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu", "--trainer.enable_model_summary=false",
]  # fmt: skip
LOOSE = [
    "--trainer.callbacks=lightning_easier.EntropyPruningCallback", "--trainer.callbacks.monitor=val_acc",
    "--trainer.callbacks.tolerance=1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run from the digits config, its log folder."""
    root = tmp_path_factory.mktemp("cli")
    main(["fit", f"--config={CONFIGS / 'digits.yaml'}", *SHORT, *LOOSE, f"--trainer.default_root_dir={root}"])
    return root / "lightning_logs" / "version_0"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_builds_what_it_says(config):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Argument `monitor`")
        cli = EasierCLI([f"--config={config}", "--trainer.accelerator=cpu"], run=False)
    assert isinstance(cli.model, ImageClassifier)
    assert isinstance(cli.datamodule, CIFAR10DataModule | DigitsDataModule | ImageFolderDataModule)
    assert any(isinstance(callback, EntropyPruningCallback) for callback in cli.trainer.callbacks)


def test_parts_can_be_swapped_on_the_command_line():
    cli = EasierCLI(
        [f"--config={CONFIGS / 'digits.yaml'}", f"--model={CONFIGS / 'model' / 'cifar_resnet56.yaml'}",
         "--model.init_args.lr=0.5", "--trainer.accelerator=cpu"], run=False,
    )  # fmt: skip
    assert cli.model.hparams["backbone"] == "cifar_resnet56"
    assert cli.model.lr == 0.5


def test_options_are_asked_for_in_a_config_that_loads_again(tmp_path):
    given = [
        f"--trainer.callbacks.{argument}" for argument in (
            "distillation.weight=0.25", "rounds.reference=best", "method=FitChains", "method.stand_in=on_off",
            "method.blocks=true", "method.order.criterion=tlc", "method.order.gain=macs",
            "measuring.neuron_dim={act*: 1}", "exclude=[conv1.act]", "target.depth=4",
        )
    ]  # fmt: skip
    arguments = [f"--config={CONFIGS / 'digits.yaml'}", *LOOSE, *given, "--trainer.accelerator=cpu"]
    first = EasierCLI(arguments, run=False)
    saved = tmp_path / "config.yaml"
    saved.write_text(first.parser.dump(first.config, skip_none=False))
    cli = EasierCLI([f"--config={saved}"], run=False)
    for each in (first, cli):
        (callback,) = [one for one in each.trainer.callbacks if isinstance(one, EntropyPruningCallback)]
        settings = callback.settings
        assert settings.method == FitChains(stand_in="on_off", order=Order("tlc", "macs"), blocks=True)
        assert settings.rules == Rules(Tolerance(1.0, "max"), Rounds(reference="best"))
        assert (settings.distillation, settings.target) == (Distillation(weight=0.25), Target(depth=4))
        assert (settings.measuring, settings.exclude) == (Measuring(neuron_dim={"act*": 1}), ["conv1.act"])
    assert first.config["trainer"]["callbacks"] == cli.config["trainer"]["callbacks"]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_options_of_the_readme_go_with_every_config(config):
    given = ["rounds.epochs=2", "method=FitChains", "method.order.gain=latency"]
    arguments = [f"--config={config}", *(f"--trainer.callbacks.{argument}" for argument in given)]
    cli = EasierCLI([*arguments, "--trainer.accelerator=cpu"], run=False)
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, EntropyPruningCallback)]
    assert callback.settings.rules.rounds.epochs == 2
    assert callback.settings.method == FitChains(order=Order(gain="latency"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [("rounds.epochs=-1", "`epochs` to be at least 0, but got -1"), ("distillation.weight=2", "`weight` to be"),
     ("target.speedup=1", "`speedup` to be above 1"), ("method.trainable=true", "identity has nothing to train"),
     ("rounds.on_reject=next", "on_reject")],
)  # fmt: skip
def test_bad_options_are_named_on_the_command_line(argument, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        EasierCLI([f"--config={CONFIGS / 'digits.yaml'}", *LOOSE, f"--trainer.callbacks.{argument}"], run=False)
    assert message in capsys.readouterr().err + str(error.value)


def test_the_saved_config_loads_again(run, tmp_path):
    saved = run / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    (block,) = content["trainer"]["callbacks"]
    assert block["class_path"] == "lightning_easier.EntropyPruningCallback"
    main(["fit", f"--config={saved}", "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"])
    again = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text())
    content["trainer"].update(max_epochs=1, default_root_dir=str(tmp_path))
    assert again == content


def test_fitted_rounds_run_are_saved_and_are_exported_from_the_command_line(tmp_path):
    recipe = yaml.safe_load((CONFIGS / "recipe" / "fitted.yaml").read_text())
    pruning = recipe["callbacks"][-1]["init_args"]
    pruning.update(rounds={"warmup_epochs": 1, "epochs": 2}, tolerance=1.0, target={"speedup": 1e6})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    short = [
        *SHORT,
        "--trainer.max_epochs=7",
        "--trainer.limit_val_batches=2",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    main(["fit", f"--config={CONFIGS / 'digits.yaml'}", f"--trainer={tmp_path / 'recipe.yaml'}", *short])
    folder = tmp_path / "lightning_logs" / "version_0"
    (_, block) = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    assert pruning["method"]["init_args"]["order"] == block["init_args"]["method"]["init_args"]["order"]
    assert pruning["rounds"].items() <= block["init_args"]["rounds"].items()
    checkpoint = folder / "entropy_pruning" / "round_2.ckpt"
    rounds = read_pruning_report(checkpoint).rounds
    assert all(this.notes.keys() == set(this.removed) != set() for this in rounds[1:])
    common = [f"--config={folder / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    main(["export", *common, f"--output={tmp_path / 'model.onnx'}"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    model = load_pruned(ImageClassifier, checkpoint).eval()
    images = torch.randn(3, 1, 8, 8)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-4)


def test_report_collapse_and_export_take_its_checkpoint(run, tmp_path, capsys):
    checkpoint = run / "entropy_pruning" / "round_2.ckpt"
    common = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    main(["report", *common])
    shown = capsys.readouterr().out
    report = read_pruning_report(checkpoint)
    assert len(report.rounds) == 3
    assert all(f"{this.score_after:.4f}" in shown for this in report.rounds)

    main(["collapse", *common, "--objective=macs", f"--output={tmp_path / 'm.pt2'}"])
    assert "Collapse" in capsys.readouterr().out
    main(["export", *common, "--batch_size=5", f"--output={tmp_path / 'm.onnx'}"])
    assert "relative difference" in capsys.readouterr().out
    main(["export", *common, "--collapsed=false", f"--output={tmp_path / 'whole.onnx'}"])

    images = torch.rand(7, 1, 8, 8)
    outputs = [torch.export.load(tmp_path / "m.pt2").module()(images)]
    for name in ("m.onnx", "whole.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name)
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        outputs.append(torch.from_numpy(output))
    assert all(torch.allclose(output, outputs[0], rtol=1e-4, atol=1e-4) for output in outputs)


def test_a_dense_checkpoint_is_exported_too_and_bad_options_are_named(run, tmp_path):
    common = ["export", f"--config={run / 'config.yaml'}", f"--output={tmp_path / 'm.pt2'}"]
    dense = f"--ckpt_path={run / 'entropy_pruning' / 'round_0.ckpt'}"
    main([*common, dense])
    assert (tmp_path / "m.pt2").is_file()
    with pytest.raises(ValueError, match="`batch_size` to be at least 1, but got 0"):
        main([*common, dense, "--batch_size=0"])
    with pytest.raises(FileNotFoundError, match="`--ckpt_path` to be a checkpoint file, but nowhere is none"):
        main([*common, "--ckpt_path=nowhere"])


@pytest.mark.parametrize("flag", ["--candidates", "--candidates=true"])
def test_report_lists_the_candidates_of_a_model(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("rich._console", None)  # another test may have made one of another width
    main(["report", f"--config={CONFIGS / 'digits.yaml'}", flag])
    shown = capsys.readouterr().out
    assert "│ model.stages.0.0.relu │ ReLU │             - │" in shown
    assert ".expand + .project   " in shown
    assert "not: its value has 2 readers:   " in shown


def test_report_measures_the_candidates_of_a_checkpoint_on_request(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("rich._console", None)  # another test may have made one of another width
    arguments = ["report", f"--config={run / 'config.yaml'}", "--candidates"]
    main([*arguments, f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}", "--max_batches=1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ model.")]
    assert len(rows) >= 4
    assert all(0 < float(row.split("│")[3]) < 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "`--ckpt_path` to be a checkpoint of a pruning run"), (["--candidates", "--max_batches=-1"], "at least 0")],
)
def test_a_report_that_can_not_be_made_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["report", f"--config={CONFIGS / 'digits.yaml'}", *arguments])


def test_lightnings_own_subcommands_take_the_checkpoint_too(run, capsys):
    main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}"])
    assert "test_acc" in capsys.readouterr().out


def test_a_checkpoint_without_a_record_is_named(run, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"a checkpoint of a pruning run.*none\.ckpt.*has none"):
        read_pruning_report(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match="to be a checkpoint file"):
        read_pruning_report(tmp_path / "nowhere.ckpt")


def test_an_image_folder_of_other_sizes_and_classes(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        for number in range(count):
            folder = tmp_path / "data" / split / "abc"[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            save_image(torch.rand(3, 20 + number, 30), folder / f"{number}.png")
    main(
        ["fit", f"--config={CONFIGS / 'image_folder_resnet56.yaml'}", "--model.backbone=cifar_resnet20",
         "--model.num_classes=3", f"--data.root={tmp_path / 'data'}", "--data.val_size=4", "--data.num_workers=0",
         "--data.batch_size=4", *SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}",
         "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_last=true",
         "--trainer.callbacks+=lightning_easier.EntropyPruningCallback", "--trainer.callbacks.monitor=val_acc"]
    )  # fmt: skip
    assert (tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt").is_file()


def test_the_installed_command_says_what_it_can_do(monkeypatch, capsys):
    (command,) = entry_points(group="console_scripts", name="lightning-easier")
    assert (Path(sys.executable).parent / command.name).is_file()
    monkeypatch.setattr(sys, "argv", [command.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command.load()()  # as its script does, without another import of torch
    assert ended.value.code == 0
    assert "{fit,validate,test,predict,collapse,export,report}" in capsys.readouterr().out.replace(" ", "")


def test_the_demo_runs_from_training_to_the_verified_file(tmp_path, monkeypatch, capsys):
    options = ["--output", str(tmp_path), "--warmup-epochs=2", "--epochs-per-round=1", "--tolerance=1"]
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    monkeypatch.delitem(sys.modules, "lightning_easier.zoo.demo", raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Argument `monitor`")
        runpy.run_module("lightning_easier.zoo.demo", run_name="__main__")  # python -m, without another import of torch
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["pruning"]["rounds"]) >= 4
    assert report["collapse"]["after"]["macs"] < report["collapse"]["before"]["macs"]
    assert report["test_accuracy"]["collapsed"] == report["test_accuracy"]["pruned"]
    assert all(p["relative_difference"] <= report["export"]["tolerance"] for p in report["export"]["parity"])
    assert {"report.md", "pruning.png", "collapse.png", "model.onnx", "logs"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert f"--logdir {tmp_path}" in capsys.readouterr().out
