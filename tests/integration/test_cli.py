"""The command line through the configs of the repository."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from argparse import ArgumentError
from importlib.metadata import entry_points
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
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
from lightning_easier.cli import EasierCLI, EasierSubcommands, one_line_errors, read_pruning_report
from lightning_easier.cli.options import COMMANDS
from lightning_easier.command import main
from lightning_easier.pruning.rules import Rules, Tolerance
from lightning_easier.zoo import CIFAR10DataModule, DigitsDataModule, ImageClassifier, ImageFolderDataModule
from tests.once import made_once

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
# What `compress` looks at where it is not the search that is tested
FEW = ["--include", "model.stages.1.*.relu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run from the digits config, its log folder."""

    def make(root):
        main(["fit", f"--config={CONFIGS / 'digits.yaml'}", *SHORT, *LOOSE, f"--trainer.default_root_dir={root}"])

    return made_once(tmp_path_factory, "cli", make) / "lightning_logs" / "version_0"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_builds_what_it_says(config):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Argument `monitor`")
        cli = EasierCLI(args=[f"--config={config}", "--trainer.accelerator=cpu"], run=False)
    assert isinstance(cli.model, ImageClassifier)
    assert isinstance(cli.datamodule, CIFAR10DataModule | DigitsDataModule | ImageFolderDataModule)
    assert any(isinstance(callback, EntropyPruningCallback) for callback in cli.trainer.callbacks)


def test_parts_can_be_swapped_on_the_command_line():
    cli = EasierCLI(
        args=[f"--config={CONFIGS / 'digits.yaml'}", f"--model={CONFIGS / 'model' / 'cifar_resnet56.yaml'}",
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
    first = EasierCLI(args=arguments, run=False)
    saved = tmp_path / "config.yaml"
    saved.write_text(first.parser.dump(first.config, skip_none=False))
    cli = EasierCLI(args=[f"--config={saved}"], run=False)
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
    cli = EasierCLI(args=[*arguments, "--trainer.accelerator=cpu"], run=False)
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
        EasierCLI(args=[f"--config={CONFIGS / 'digits.yaml'}", *LOOSE, f"--trainer.callbacks.{argument}"], run=False)
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
    main(["collapse", *common, "--objective=macs", f"--output={tmp_path / 'm.pt2'}"])
    assert "Collapse" in capsys.readouterr().out
    main(["export", *common, "--batch_size=5", f"--output={tmp_path / 'm.onnx'}", "--input_names", "image",
          "--output_names", "scores", "--opset_version=21"])  # fmt: skip
    assert "relative difference" in capsys.readouterr().out
    main(["export", *common, "--no-collapse", f"--output={tmp_path / 'whole.onnx'}"])

    images = torch.rand(7, 1, 8, 8)
    outputs = [torch.export.load(tmp_path / "m.pt2").module()(images)]
    for name in ("m.onnx", "whole.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name)
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        outputs.append(torch.from_numpy(output))
    assert all(torch.allclose(output, outputs[0], rtol=1e-4, atol=1e-4) for output in outputs)
    named = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [each.name for each in (*named.get_inputs(), *named.get_outputs())] == ["image", "scores"]


def test_a_report_needs_no_model_and_is_written_in_every_form(run, tmp_path, capsys):
    checkpoint = run / "entropy_pruning" / "round_2.ckpt"
    report = read_pruning_report(checkpoint)
    files = [tmp_path / f"report.{suffix}" for suffix in ("md", "json", "txt", "png", "svg")]
    main(["report", str(checkpoint), "--output", *map(str, files)])
    shown = capsys.readouterr().out
    assert len(report.rounds) == 3
    markdown, data, text, png, svg = (file.read_bytes() for file in files)
    for written in (shown, markdown.decode(), text.decode()):
        assert all(f"{this.score_after:.4f}" in written for this in report.rounds)
    assert json.loads(data) == json.loads(report.to_json())
    assert markdown.decode() == report.to_markdown()
    assert png.startswith(b"\x89PNG")
    assert b"<svg" in svg


def test_a_dense_checkpoint_is_exported_too(run, tmp_path):
    dense = f"--ckpt_path={run / 'entropy_pruning' / 'round_0.ckpt'}"
    main(["export", f"--config={run / 'config.yaml'}", f"--output={tmp_path / 'm.pt2'}", dense])
    assert (tmp_path / "m.pt2").is_file()


def test_chains_around_named_activations_are_fitted_on_request(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("rich._console", None)  # another test may have made one of another width
    dense = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'entropy_pruning' / 'round_0.ckpt'}"]
    name = "model.stages.1.1.relu"
    fit = ["--mode=fit", "--samples=100", "--objective=macs", "--report", str(tmp_path / "fit.json")]
    main(["collapse", *dense, *fit, "--sites", name])
    assert "1 of 1" in capsys.readouterr().out or name in (tmp_path / "fit.json").read_text()
    (fitted,) = json.loads((tmp_path / "fit.json").read_text())["fitted"]
    assert fitted["sites"] == [name]


def test_the_candidates_of_a_model_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("rich._console", None)  # another test may have made one of another width
    main(["candidates", f"--config={CONFIGS / 'digits.yaml'}"])
    shown = capsys.readouterr().out
    assert "│ model.stages.0.0.relu │ ReLU │             - │" in shown
    assert ".expand + .project   " in shown
    assert "not: its value has 2 readers:   " in shown


def test_the_candidates_of_a_checkpoint_are_measured_on_request(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("rich._console", None)  # another test may have made one of another width
    arguments = ["candidates", f"--config={run / 'config.yaml'}", f"--report={tmp_path / 'c.json'}"]
    main([*arguments, f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}", "--max_batches=1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ model.")]
    assert len(rows) >= 4
    assert all(0 < float(row.split("│")[3]) < 1 for row in rows)
    written = json.loads((tmp_path / "c.json").read_text())["candidates"]
    assert [f"{each['entropy']:.4f}" for each in written] == [row.split("│")[3].strip() for row in rows]


def test_nothing_of_training_is_made_of_a_config(run, capsys, monkeypatch):
    made = {}

    def keep(cli):
        made.update(cli.config_init["candidates"]["trainer"].as_dict())
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    monkeypatch.setattr(EasierCLI, "instantiate_trainer", keep)
    profiler = "--trainer.profiler=lightning.pytorch.profilers.SimpleProfiler"
    strategy = "--trainer.strategy=lightning.pytorch.strategies.DDPStrategy"
    main(["candidates", f"--config={run / 'config.yaml'}", profiler, strategy, "--trainer.devices=[1, 2]"])
    assert (made["profiler"], made["strategy"], made["devices"], made["callbacks"]) == (None, "auto", [1], None)
    assert made["inference_mode"] is False


class TestCompress:
    """``compress``, from a checkpoint to a file that is shipped."""

    @staticmethod
    def arguments(run, *more):
        dense = run / "entropy_pruning" / "round_0.ckpt"
        return ["compress", f"--config={run / 'config.yaml'}", f"--ckpt_path={dense}", "--objective=macs",
                "--samples=64", "--max_drift=10", *more]  # fmt: skip

    def test_the_score_is_what_the_module_validates(self, run, tmp_path, capsys):
        files = {"output": tmp_path / "m.onnx", "fitted": tmp_path / "f.pt", "report": tmp_path / "r.json"}
        options = [f"--{name}={file}" for name, file in files.items()]
        main(self.arguments(run, "--tolerance=0.5", "--target_depth=9", *options))
        capsys.readouterr()
        report = json.loads(files["report"].read_text())
        module = ImageClassifier.load_from_checkpoint(run / "entropy_pruning" / "round_0.ckpt", map_location="cpu")
        data = DigitsDataModule()
        data.setup("validate")
        images, labels = (torch.cat(each) for each in zip(*data.val_dataloader(), strict=True))
        with torch.no_grad():
            score = float((module.eval()(images).argmax(1) == labels).float().mean())
        assert report["score"] == pytest.approx(score)
        assert any(trial["kept"] for trial in report["trials"])
        fitted = torch.load(files["fitted"], weights_only=False).eval()
        session = onnxruntime.InferenceSession(files["output"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), fitted(images), rtol=1e-3, atol=1e-4)
        assert report["score_after"] == pytest.approx(
            float((torch.from_numpy(found).argmax(1) == labels).float().mean())
        )

    def test_a_score_that_is_better_when_lower_is_told_by_its_name(self, run, tmp_path, capsys):
        options = ["--monitor=val_loss", "--tolerance=100", *FEW, f"--report={tmp_path / 'r.json'}"]
        main(self.arguments(run, *options))
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["mode"] == "min"
        assert report["score"] > 1  # a network that is hardly trained: of an accuracy it would be below

    def test_the_network_as_it_is_is_validated_once(self, run, monkeypatch):
        networks, scores = [], []

        def score(session, network, monitor):
            networks.append(network)
            monitor.name = "val_acc"
            return 0.5 / len(networks)

        def compress(network, batches, *, evaluate, **options):
            scores.extend([evaluate(network), evaluate(network)])
            raise KeyboardInterrupt

        monkeypatch.setattr("lightning_easier.cli.session.Session.score", score)
        monkeypatch.setattr("lightning_easier.cli.commands.compress_network", compress)
        with pytest.raises(SystemExit) as interrupted:
            main(self.arguments(run))
        assert interrupted.value.code == 130
        assert scores == [0.5, 0.25]
        assert len(networks) == 2

    def test_it_goes_in_double_precision(self, run, tmp_path, capsys):
        options = ["--trainer.precision=64-true", "--tolerance=1", *FEW, f"--report={tmp_path / 'r.json'}"]
        main(self.arguments(run, *options, f"--output={tmp_path / 'm.pt2'}"))
        assert any(trial["kept"] for trial in json.loads((tmp_path / "r.json").read_text())["trials"])
        scores = torch.export.load(tmp_path / "m.pt2").module()(torch.rand(3, 1, 8, 8, dtype=torch.float64))
        assert (scores.shape, scores.dtype) == ((3, 10), torch.float64)

    def test_it_goes_without_a_score(self, run, tmp_path, capsys):
        main(self.arguments(run, "--no-score", "--exclude", "model.stages.1.*", f"--report={tmp_path / 'r.json'}"))
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["score"] is None
        assert not any("stages.1" in name for trial in report["trials"] for name in trial["operators"])


def failed(capsys, arguments) -> tuple[int, str]:
    """Return the exit code of a command that fails, and the one line that it says why in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-easier")]
    assert len(told) == 1
    return ended.value.code, told[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--output=model.tflite"], "one of ('onnx', 'pt2') (or a path to end so), but got `--output`"),
        (["export", "--output=model.onnx", "--batch_size=0"], "`--batch_size` to be at least 1, but got 0"),
        (["collapse", "--output=m.pt2", "--input_names", "a"], "belong to ONNX"),
        (["export", "--output=m.onnx", "--input_names", "a", "b"], "`input_names`"),
        (["collapse", "--input_names", "a"], "`--output` with `--input_names`"),
        (["collapse", "--mode=fit"], "`--mode` and `--sites` to go together"),
        (["collapse", "--report", "a.html"], "`--report` to end in one of"),
        (["compress", "--output=m.onnx", "--opset_version=5"], "`opset_version` to be a version that can be written"),
        (["compress", "--monitor=val_ac"], "`--monitor` to be what a validation logs, but got 'val_ac'"),
        (["compress", "--no-score", "--monitor=val_acc"], "`--monitor` to be left out with `--no-score`"),
        (
            ["compress", "--no-score", "--mode=min", "--tolerance=0.01", "--monitor=val_loss"],
            "`--monitor`, `--mode`, `--tolerance` to be left out with `--no-score`",
        ),
        (["compress", "--fitted=f.bin"], "`--fitted` to end in .pt"),
        (["compress", "--tolerance=fast"], "key \"tolerance\": Expected a <class 'float'>. Got value: fast"),
        (["compress", "--trget=1"], "unrecognized arguments: --trget=1"),
        (["compress", "--tolerance=-1"], "`--tolerance` to be finite and at least 0, but got -1"),
        (["compress", "--max_drift=-1"], "`--max_drift` to be finite and at least 0, but got -1"),
        (["compress", "--max_minutes=0"], "`--max_minutes` to be above 0, but got 0"),
        (["compress", "--target_speedup=0.5"], "`--target_speedup` to be above 1"),
        (["compress", "--target_depth=0"], "`--target_depth` to be at least 1, but got 0"),
        (["compress", "--finetune=0"], "`--finetune` to be at least 1, but got 0"),
        (["compress", "--include", "nothing.*"], "'nothing.*' matches none of"),
        (["compress", "--exclude", "nothing.*"], "`exclude` to hold globs that match activations"),
        (["candidates", "--report", "a.png"], "`--report` to end in one of .md, .json, .txt, but got 'a.png'"),
        (["export", "--output=m.onnx", "--trainer.precision=bf16-true"], "`--trainer.precision` to be 32-true or"),
        (["collapse", "--output=m.onnx", "--input_names", "a", "--output_names", "a"], "other names than the inputs"),
        (["candidates", "--network=nothing"], "`--network` to name a submodule of ImageClassifier, but got 'nothing'"),
        (["candidates", "--max_batches=-1"], "`--max_batches` to be at least 0"),
    ],
)
def test_a_wrong_value_is_one_line_and_two_before_any_work(run, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("collapse_network", "compress_network", "export_network"):
        monkeypatch.setattr(f"lightning_easier.cli.commands.{name}", None)
    if "--monitor=val_ac" not in arguments:
        monkeypatch.setattr("lightning_easier.cli.session.Session.score", None)
    own = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}"]
    code, told = failed(capsys, [arguments[0], *own, *arguments[1:]])
    assert code == 2
    assert message in told
    assert not list(tmp_path.iterdir())


class Odd:
    """A class that is unpickled only where that is asked for."""


def test_a_file_that_can_not_be_read_is_named_and_one_that_is_trusted_is_taken(run, tmp_path, capsys):
    checkpoint = torch.load(run / "entropy_pruning" / "round_1.ckpt", weights_only=True)
    torch.save({**checkpoint, "odd": Odd}, tmp_path / "odd.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "odd.ckpt").read_bytes()[:3000])
    (tmp_path / "text.ckpt").write_text("model: none")
    torch.save({"state_dict": None}, tmp_path / "empty.ckpt")
    own = ["export", f"--config={run / 'config.yaml'}", f"--output={tmp_path / 'm.pt2'}", "--objective=macs"]
    reasons = {
        "odd": "`--weights_only false`", "cut": "can't be read", "none": "none.ckpt' is none",
        "n" * 300: "nnn.ckpt' is none", "empty": "holds a NoneType and no state dict",
    }  # fmt: skip
    for name, message in reasons.items():
        code, told = failed(capsys, [*own, f"--ckpt_path={tmp_path / f'{name}.ckpt'}"])
        assert code == 2
        assert message in told
    main([*own, f"--ckpt_path={tmp_path / 'odd.ckpt'}", "--weights_only=false"])
    assert (tmp_path / "m.pt2").is_file()
    code, told = failed(capsys, ["report", str(tmp_path / "odd.ckpt")])
    assert "`CKPT` to be a checkpoint file, but" in told
    assert "can't be read safely" in told
    assert "pass `--weights_only false`" in told
    main(["report", str(tmp_path / "odd.ckpt"), "--weights_only=false"])
    assert "kept" in capsys.readouterr().out
    code, told = failed(capsys, ["report", str(tmp_path / "text.ckpt"), "--weights_only=false"])
    assert code == 2
    assert "text.ckpt can't be read" in told
    assert "--weights_only" not in told  # it was given


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["candidates"], "lightning-easier candidates: error: the following arguments are required: --model (`light"),
        (["export", "--model=ImageClassifier"], "export: error: the following arguments are required: --ckpt_path ("),
        (["report"], "lightning-easier report: error: the following arguments are required: CKPT ("),
        (["candidates", "--config=empty.yaml"], "`--config` to hold options by name (YAML or JSON), but got nothing ("),
        (["candidates", "--config=digit"], "digit'. Did you mean the recipe 'digits'? (`lightning-easier candi"),
        (["fit", "--config", "digits", "--trainer", "recipe/easyer"], "Did you mean the recipe 'recipe/easier'? ("),
        (
            ["--config=several.yaml", "candidates", "--model=nearby.Net"],
            "`report` to be a list in a config, such as `report: [...]`: ",
        ),
        (["--config=number.yaml", "compress", "--model=nearby.Net"], "`include` to be a list in a config, such as `i"),
        (["candidates", "--config=bytes.yaml"], "`--config` to be a text file (YAML or JSON), but it is none: 'utf"),
        (["candidates", "--model=nearby.Net", "--trainer.accelerator=warp"], "error: You selected an invalid accele"),
        (
            ["candidates", "--model=nearby.Net", "--seed_everything=-1"],
            "`--seed_everything` to be a seed: -1 is not in",
        ),
        (["fit", "--model=nearby.Net", "--ckpt_path=nowhere.ckpt"], "`--ckpt_path` to be a checkpoint file, but 'nowh"),
        (
            ["validate", "--model=nearby.Net", "--ckpt_path=weights.ckpt"],
            "weights.ckpt has no record of a version of L",
        ),
        (["candidates", "--model=OwnNet", "--max_batches=1"], "`data`, or the module where there is none, to have a `"),
    ],
)
def test_what_is_missing_or_no_config_is_called_as_it_is_written(arguments, told, capsys, monkeypatch, tmp_path):
    (tmp_path / "nearby.py").write_text(OWN)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "several.yaml").write_text("{candidates: {report: c.json}}")
    (tmp_path / "number.yaml").write_text("{compress: {include: 5}}")
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    torch.save({"body.0.weight": torch.zeros(8, 4)}, tmp_path / "weights.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, line = failed(capsys, arguments)
    assert code == 2
    assert told in line


def test_an_interruption_is_a_line_and_its_own_code(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors("own"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["", "own: interrupted"]
    with pytest.raises(KeyboardInterrupt), one_line_errors("own", debug=True):
        raise KeyboardInterrupt


def test_an_error_of_ones_own_class_is_told_with_its_kind(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors("own"):
        raise KeyError("nothing")
    assert ended.value.code == 1
    assert "own: error: KeyError: 'nothing' (" in capsys.readouterr().err
    with pytest.raises(SystemExit), one_line_errors("own"):  # as jsonargparse tells of a value of several types
        raise RuntimeError("Does not fit\nErrors:\n  - 'nothing'\n")
    assert "own: error: RuntimeError: 'nothing' (" in capsys.readouterr().err


def test_a_module_with_loaders_of_its_own_needs_no_data(capsys, monkeypatch, tmp_path):
    (tmp_path / "loaded.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["candidates", "--model=loaded.Net", "--inputs_of=loaded.inputs", "--max_batches=1", "--report=c.json"])
    (found,) = json.loads((tmp_path / "c.json").read_text())["candidates"]
    assert found["entropy"] > 0


@pytest.mark.parametrize("command", ["compress", "candidates", "fit"])
@pytest.mark.parametrize("form", [["--ckpt_path=own.ckpt"], ["--ckpt_path", "own.ckpt"]], ids=["=", "two words"])
def test_a_checkpoint_that_a_config_takes_the_place_of_is_no_untrained_network(run, command, form, capsys, monkeypatch):
    monkeypatch.setattr("lightning_easier.cli.session.Session.load", None)
    code, told = failed(capsys, [command, *form, f"--config={run / 'config.yaml'}"])
    assert code == 2
    assert "`--ckpt_path` to come after `--config`, but got `--ckpt_path own.ckpt` before it" in told


def test_no_checkpoint_may_be_asked_for(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("rich._console", None)  # another test may have made one of another width
    main(["candidates", "--ckpt_path=null", f"--config={run / 'config.yaml'}"])
    assert "model.stages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "option"),
    [("export", "--output"), ("collapse", "--report"), ("compress", "--fitted"), ("report", "--output")],
)
def test_a_file_that_can_not_be_written_is_named_before_any_work(run, command, option, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_easier.cli.session.Session.load", None)
    Path("taken").write_text("precious")
    file = "taken/it" + {"export": ".onnx", "compress": ".pt"}.get(command, ".md")
    checkpoint = str(run / "entropy_pruning" / "round_2.ckpt")
    given = [checkpoint] if command == "report" else [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    code, told = failed(capsys, [command, *given, option, file])
    assert code == 2
    assert f"`{option}` to be a file in a folder, but got '{file}'" in told
    assert Path("taken").read_text() == "precious"


@pytest.mark.parametrize("command", ["collapse", "export", "compress"])
def test_the_network_is_there_when_the_report_can_not_be_saved(run, command, capsys, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("the folder went away")

    monkeypatch.setattr("lightning_easier.cli.commands.save_report", fail)
    files = [f"--output={tmp_path / 'm.pt2'}", f"--report={tmp_path / 'r.md'}"]
    own = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}"]
    if command == "compress":
        own += ["--no-score", "--max_drift=10", "--samples=64", *FEW, f"--fitted={tmp_path / 'f.pt'}"]
    code, told = failed(capsys, [command, *own, *files, "--objective=macs"])
    assert code == 1
    assert "the folder went away" in told
    assert (tmp_path / "m.pt2").is_file()
    assert (tmp_path / "f.pt").is_file() == (command == "compress")


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("command", ["collapse", "compress"])
def test_a_network_that_can_not_be_exported_is_kept_and_exported_from_there(
    run, command, kind, capsys, monkeypatch, tmp_path
):
    def fail(*_, **__):
        raise kind("no room")

    monkeypatch.chdir(tmp_path)
    own = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}"]
    made = [command, *own, "--objective=macs", "--output=made/m.pt2"]
    if command == "compress":
        made += ["--no-score", "--max_drift=10", "--samples=64", *FEW]
    with monkeypatch.context() as patch:
        patch.setattr("lightning_easier.cli.commands.export_network", fail)
        Path("made").mkdir()
        Path("made/m.pt2.pt").write_text("precious")
        code, told = failed(capsys, made)
    assert code == (130 if kind is KeyboardInterrupt else 1)
    assert ("no room" in told) == (kind is OSError)
    (words,) = re.findall("kept in made/m.pt2.1.pt: `(export .*?)`", told)
    assert sorted(each.name for each in Path("made").iterdir()) == ["m.pt2.1.pt", "m.pt2.pt"]
    assert Path("made/m.pt2.pt").read_text() == "precious"
    network = torch.load("made/m.pt2.1.pt", weights_only=False)
    main([*words.replace("FILE", str(run / "config.yaml")).split(), "--output=m.onnx"])
    images = torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession("m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(images), rtol=1e-3, atol=1e-4)
    main(made)
    assert sorted(each.name for each in Path("made").iterdir()) == ["m.pt2", "m.pt2.1.pt", "m.pt2.pt"]


def test_a_network_that_can_not_be_kept_is_exported_all_the_same(run, capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise AttributeError("Can't pickle local object")

    monkeypatch.setattr("lightning_easier.cli.keeping.save_whole", fail)
    own = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}"]
    made = ["collapse", *own, "--objective=macs", f"--output={tmp_path / 'm.pt2'}"]
    main(made)
    assert [each.name for each in tmp_path.iterdir()] == ["m.pt2"]
    monkeypatch.setattr("lightning_easier.cli.commands.export_network", fail)
    code, told = failed(capsys, made)
    assert code == 1
    assert "The network could not be kept: AttributeError: Can't pickle local object" in told


def test_a_network_that_was_saved_whole_is_only_taken_if_trusted_and_is_no_run_to_go_on_with(run, tmp_path, capsys):
    module = ImageClassifier.load_from_checkpoint(run / "entropy_pruning" / "round_0.ckpt", map_location="cpu")
    torch.save(module.model, tmp_path / "saved.pt")
    own = [f"--config={run / 'config.yaml'}", f"--ckpt_path={tmp_path / 'saved.pt'}"]
    code, told = failed(capsys, ["export", *own, f"--output={tmp_path / 'm.pt2'}"])
    assert code == 2
    assert "can't be read safely" in told
    assert "--weights_only false" in told
    code, told = failed(capsys, ["fit", *own, "--weights_only=false"])
    assert code == 2
    assert "to be a checkpoint that a Trainer has saved" in told


def test_the_report_is_shown_when_the_network_can_not_be_exported(run, capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr("lightning_easier.cli.commands.export_network", fail)
    own = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'entropy_pruning' / 'round_2.ckpt'}"]
    files = [f"--output={tmp_path / 'm.pt2'}", f"--report={tmp_path / 'r[bold].md'}"]
    with pytest.raises(SystemExit):
        main(["collapse", *own, "--objective=macs", *files])
    shown = capsys.readouterr()
    assert "Collapse" in shown.out
    assert f"{tmp_path / 'r[bold].md'} was written." in shown.out
    assert "no room" in shown.err
    assert (tmp_path / "r[bold].md").is_file()


def test_what_fails_is_one_line_and_one_and_debug_shows_where(run, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the disk is\non fire")

    monkeypatch.setattr("lightning_easier.cli.commands.export_network", fail)
    own = ["export", f"--config={run / 'config.yaml'}", f"--output={tmp_path / 'm.pt2'}", "--no-collapse"]
    arguments = [*own, f"--ckpt_path={run / 'entropy_pruning' / 'round_1.ckpt'}"]
    code, told = failed(capsys, arguments)
    assert code == 1
    assert "error: RuntimeError: the disk is on fire" in told
    with pytest.raises(RuntimeError, match="on fire"):
        main([*arguments, "--debug"])
    with pytest.raises(ArgumentError, match="trget"):
        main([*arguments, "--trget=1", "--debug"])


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_of_a_subcommand_is_one_screen_of_what_it_uses(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 55
    assert max(map(len, shown.splitlines())) <= 120
    assert "--optimizer" not in shown
    assert "max_epochs" not in shown
    *_, examples = shown.partition("examples:\n")
    assert examples.count("lightning-easier " + command) == 3
    for line in examples.splitlines():
        for option in re.findall(r"--[\w-]+", line):
            assert re.search(rf"^ .*{option}\b", shown, re.MULTILINE)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [("com", "compress"), ("compress --target_s", "--target_speedup"), ("export --no-c", "--no-collapse"),
     ("fit --trainer.max_ep", "--trainer.max_epochs"), ("recipes copy dig", "digits")],
)  # fmt: skip
def test_a_shell_completes_subcommands_and_options(typed, offered, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["--print_shtab=bash"])
    assert ended.value.code == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    words = ["lightning-easier", *typed.split()]
    asks = f"""
        source {tmp_path / "script"}
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        _shtab_lightning_easier
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asks], capture_output=True, text=True)
    assert offered in done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    ("words", "filled"),
    [(["fit", "--help"], 1), (["compress", "--help"], 1), (["--debug", "test", "--help"], 1), (["report", "--help"], 0),
     (["recipes", "list"], 0), (["--help"], 8), (["ft"], 8), (["fit", "--print_shtab=bash"], 8)],
)  # fmt: skip
def test_only_the_options_of_the_subcommand_that_is_asked_for_are_looked_up(words, filled, capsys):
    parsers = []

    class Counting(EasierCLI):
        def add_arguments_to_parser(self, parser):
            parsers.append(parser)

    with pytest.raises(SystemExit):
        Counting(args=words)
    assert len(parsers) == filled


def test_options_of_any_subcommand_may_stand_in_a_config_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("all.yaml").write_text("{candidates: {seed_everything: 7}, fit: {seed_everything: 8}}")
    cli = EasierCLI(OwnNet, args=["--config", "all.yaml", "candidates"])
    assert cli.config["candidates"]["seed_everything"] == 7


OWN = """
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_easier.cli import EasierSubcommands, one_line_errors


class Net(LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def validation_step(self, batch, batch_idx):
        self.log("error", nn.functional.mse_loss(self.body(batch["x"]), batch["y"]))

    def val_dataloader(self):
        return DataLoader([{"x": torch.randn(4), "y": torch.randn(2)} for _ in range(16)], 8)

    train_dataloader = val_dataloader


class OwnCLI(EasierSubcommands, LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--own_option", default=3)


def inputs(batch):
    return batch["x"]


if __name__ == "__main__":
    with one_line_errors("own"):
        OwnCLI(Net)
"""


@pytest.fixture
def own_is_forgotten():
    """What one test writes to `own.py` is not what another imports, if it runs in the same process."""
    yield
    sys.modules.pop("own", None)


@pytest.mark.usefixtures("own_is_forgotten")
def test_a_cli_of_ones_own_takes_the_subcommands_and_finds_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    own = ["own.py", "compress", "--model.width=32", "--own_option=4", "--inputs_of=own.inputs"]
    told = ["--monitor=error", "--tolerance=100", "--objective=macs", "--report=r.json", "--output=m.pt2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*own, *told])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    runpy.run_path("own.py", run_name="__main__")  # python own.py, without another import of torch
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["after"]["macs"] < report["before"]["macs"]
    assert (report["score"], report["mode"]) == (pytest.approx(report["score"]), "min")
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.randn(3, 4)).shape == (3, 2)


class OwnNet(LightningModule):
    """Needs no data to be looked at."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))


class OwnCLI(EasierSubcommands, LightningCLI):
    """As a user writes it."""


@pytest.mark.parametrize("cli", [OwnCLI, EasierCLI])
def test_a_cli_of_ones_own_takes_debug_and_is_called_by_its_name(cli, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own.py"])
    with pytest.raises(SystemExit):
        cli(OwnNet, None, args=["compress", "--help"])
    *_, examples = capsys.readouterr().out.partition("examples:\n")
    assert [line.split()[:2] for line in examples.splitlines()] == [["own.py", "compress"]] * 3
    monkeypatch.setattr(sys, "argv", ["own.py", "compress", "--debug", "--trget=1"])
    with pytest.raises(ArgumentError, match="trget"):
        cli(OwnNet, None)
    with pytest.raises(ArgumentError, match="trget"):
        cli(OwnNet, None, args=["--debug", "fit", "--trget=1"])
    with pytest.raises(SystemExit):
        cli(OwnNet, None, args=["compress", "--trget=1"])
    assert "own.py" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["own.py", "candidates", "--debug"])
    cli(OwnNet, None)
    assert "ReLU" in capsys.readouterr().out


class WithDebug(OwnCLI):
    """Has an option of that name already."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--debug", action="store_true")


def test_an_option_of_ones_own_that_is_called_debug_is_left_alone(capsys):
    cli = WithDebug(OwnNet, args=["candidates", "--debug"])
    assert cli.config["candidates"]["debug"] is True


def test_what_is_meant_for_the_parser_of_a_subcommand_gets_there(monkeypatch):
    seen = {}
    monkeypatch.setattr(OwnCLI, "parse_arguments", lambda cli, *_: seen.update(cli._subcommand_parsers) or sys.exit())
    own = {"compress": {"description": "Compress."}, "fit": {"description": "Train."}, "description": "Mine."}
    with pytest.raises(SystemExit):
        OwnCLI(OwnNet, args=[], parser_kwargs=own)
    descriptions = [seen[name].description for name in ("compress", "fit", "export")]
    assert descriptions == ["Compress.", "Train.", COMMANDS["export"].about]


def test_hyperparameters_that_do_not_fit_are_those_of_the_checkpoint(tmp_path, capsys):
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"breadth": 3}}, checkpoint)
    for debug in ([], ["--debug"]):
        with pytest.raises(ArgumentError if debug else SystemExit) as ended:
            EasierCLI(OwnNet, None, args=["candidates", f"--ckpt_path={checkpoint}", *debug])
    told = str(ended.value)
    assert "`--ckpt_path` to be a checkpoint of the model that is given" in told
    assert "breadth" in told
    assert told in " ".join(capsys.readouterr().err.split())


def test_an_error_of_torch_is_a_failure_even_if_it_expects_something(capsys):
    for fail, code, told in (
        (lambda: torch.nn.BatchNorm1d(2)(torch.randn(1, 2)), 1, "own: error: ValueError: Expected more than 1 value"),
        (lambda: Rounds(epochs=-1), 2, "own: error: Expected argument `epochs` to be at least 0, but got -1"),
    ):
        with pytest.raises(SystemExit) as ended, one_line_errors("own"):
            fail()
        assert ended.value.code == code
        assert capsys.readouterr().err.startswith(told)


def test_own_errors_show_their_traceback_where_the_process_was_asked_to(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own.py", "--debug"])
    with pytest.raises(RuntimeError, match="on fire"), one_line_errors("own"):
        raise RuntimeError("on fire")


def test_without_the_packages_of_the_command_line_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "lightning_easier.cli")
    with pytest.raises(SystemExit) as ended:
        main(["candidates"])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "needs jsonargparse: `pip install 'lightning-easier[cli]'`" in told
    assert len(told.splitlines()) == 1
    with pytest.raises(ModuleNotFoundError, match="needs jsonargparse"):
        main(["candidates", "--debug"])
    main(["recipes", "list"])
    assert "digits" in capsys.readouterr().out


def test_a_class_in_the_working_folder_is_found(tmp_path, capsys, monkeypatch):
    (tmp_path / "beside.py").write_text(
        "from lightning_easier.zoo import ImageClassifier\n\nclass Mine(ImageClassifier):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    main(["candidates", f"--config={CONFIGS / 'digits.yaml'}", "--model=beside.Mine", "--report=c.json"])
    assert json.loads((tmp_path / "c.json").read_text())["candidates"]
    code, told = failed(capsys, ["candidates", f"--config={CONFIGS / 'digits.yaml'}", "--model=beside.Yours"])
    assert code == 2
    assert "module 'beside' has no attribute 'Yours'" in told


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
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in ("fit", "predict", *COMMANDS, "recipes"))


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
