"""The configs that come with the package, by name and as copies."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from lightning_easier import recipes
from lightning_easier.cli import EasierCLI
from lightning_easier.command import main

CONFIGS = Path(__file__).parents[1] / "configs"


def test_recipes_are_the_files_of_the_folder_configs():
    known = recipes.recipes()
    assert set(known.values()) == set(CONFIGS.rglob("*.yaml"))
    assert known["digits"] == CONFIGS / "digits.yaml"
    assert known["recipe/easier"] == CONFIGS / "recipe" / "easier.yaml"


def test_parts_of_a_config_are_taken_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config=digits", "--model", "model/cifar_resnet56", "--trainer=recipe/lacoot"]
    cli = EasierCLI(args=[*arguments, "--trainer.accelerator=cpu"], run=False)
    assert cli.model.hparams["backbone"] == "cifar_resnet56"
    assert cli.trainer.max_epochs == 160
    assert len(cli.datamodule._loader([0]).dataset) == 1


def test_a_file_of_that_name_goes_first_and_other_options_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("{}")
    given = ["fit", "--config", "digits", "--ckpt_path", "data/digits", "--model", "NoRecipe", "--data"]
    assert recipes.with_paths(given) == given
    os.remove("digits")
    assert recipes.with_paths(given) == [*given[:2], str(CONFIGS / "digits.yaml"), *given[3:]]


@pytest.mark.parametrize(
    ("given", "taken"),
    [(["--config", "model/swin_t"], ["--model", "model/swin_t"]), (["--model=model/swin_t"], ["--model=model/swin_t"]),
     (["-c", "recipe/easier"], ["--trainer", "recipe/easier"]), (["--config=data/digits"], ["--data=data/digits"]),
     (["--config=data/pacs"], ["--config=data/pacs"]), (["--data", "data/pacs"], ["--config", "data/pacs"]),
     (["-c", "recipe/easier_30_epochs"], ["-c", "recipe/easier_30_epochs"]), (["-c=digits"], ["-c=digits"]),
     (["--trainer=recipe/easier_30_epochs"], ["--config=recipe/easier_30_epochs"]),
     (["--model", "data/pacs"], ["--model", "data/pacs"]), (["--data=model/swin_t"], ["--data=model/swin_t"])],
)  # fmt: skip
def test_a_part_goes_to_the_option_that_its_file_is_for(given, taken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {name: str(path) for name, path in recipes.recipes().items()}
    *options, last = taken
    option, sign, name = last.rpartition("=")
    assert recipes.with_paths(given) == [*options, f"{option}{sign}{places[name]}"]


def test_parts_that_tell_the_model_something_come_after_it(capsys):
    composed = ["--config=model/cifar_resnet56", "--config=data/pacs"]
    cli = EasierCLI(args=[*composed, "--trainer.accelerator=cpu"], run=False)
    assert cli.model.hparams["num_classes"] == 7
    with pytest.raises(SystemExit):
        EasierCLI(args=["--config=data/pacs", "--config=model/cifar_resnet56"], run=False)
    assert "'num_classes' is not accepted" in capsys.readouterr().err


def test_the_published_curves_are_there_and_whole():
    curves = {}
    for name in ("resnet18", "resnet18_small_stem", "resnet18_pretrained", "swin_t", "mobilenet_v2",
                 "mobilenet_v2_small_strides", "vgg16_bn"):  # fmt: skip
        found = recipes.published([f"model/{name}"])
        assert not found.keys() & curves.keys()
        curves |= found
    assert len(curves) == 28
    assert sum(map(len, curves.values())) == 553
    for (_, network), curve in curves.items():
        count = {"ResNet-18": 17, "Swin-T": 12, "MobileNetV2": 35, "VGG-16": 15}[network]
        assert list(curve) == list(range(count))
    assert curves["CIFAR-10", "ResNet-18"] == recipes.published(["cifar10_resnet18"])["CIFAR-10", "ResNet-18"]
    assert curves["CIFAR-10", "VGG-16"][14] == 90.38
    # this ResNet-18 was never trained on PACS, and the digits are no setting
    assert recipes.published(["model/resnet18", "data/pacs"]) == recipes.published(["digits"]) == {}
    assert recipes.published(["recipe/easier_30_epochs"]) == {}


def test_a_recipe_is_shown_as_its_file_or_composed(capsys):
    main(["recipes", "show", "recipe/lacoot"])
    assert capsys.readouterr().out == (CONFIGS / "recipe" / "lacoot.yaml").read_text()
    main(["recipes", "show", "digits"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == recipes.composed(["digits"])
    assert shown["data"] == yaml.safe_load((CONFIGS / "data" / "digits.yaml").read_text())
    assert shown["trainer"]["max_epochs"] == 36
    # arguments of another class are none of the one that takes its place
    assert recipes.composed(["data/dtd", "data/cifar10"])["data"] == recipes.composed(["data/cifar10"])["data"]


@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_published_curve_is_shown_beside_and_its_numbers_are_whole(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("rich._console", None)
    main(["recipes", "show", "model/vgg16_bn"])
    file, _, table = capsys.readouterr().out.partition("\n\n")
    assert f"{file}\n" == (CONFIGS / "model" / "vgg16_bn.yaml").read_text()
    assert table.startswith("Published top-1 [%] of VGG-16 (EASIER")
    assert max(map(len, table.splitlines())) <= 80
    rows = [line.strip("│").split("│") for line in table.splitlines() if line.startswith("│")]
    curves = recipes.published(["model/vgg16_bn"])
    expected = [[removed, *(curve[removed] for curve in curves.values())] for removed in range(15)]
    assert [[float(cell) for cell in row] for row in rows] == expected
    main(["recipes", "show", "model/vgg16_bn", "data/dtd"])
    config, _, table = capsys.readouterr().out.partition("\n\n")
    assert yaml.safe_load(config)["model"]["init_args"]["num_classes"] == 47
    assert table.startswith("Published top-1 [%] of VGG-16 on DTD (EASIER")
    assert "│      14 │ 41.54 │" in table


def test_a_curve_that_is_shorter_ends_earlier(capsys):
    main(["recipes", "show", "data/cifar10"])
    lines = capsys.readouterr().out.splitlines()
    assert "│ removed │ ResNet-18 │ Swin-T │ MobileNetV2 │ VGG-16 │" in [line.replace("┃", "│") for line in lines]
    last = [cell.strip() for cell in lines[-2].strip("│").split("│")]
    assert (last[0], last[1], last[2], last[4]) == ("34", "", "", "")
    assert float(last[3]) == recipes.published(["data/cifar10", "model/mobilenet_v2_small_strides"])[
        "CIFAR-10", "MobileNetV2"
    ][34]  # fmt: skip


def test_the_published_curve_is_shown_without_rich_too(capsys, monkeypatch):
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    main(["recipes", "show", "model/vgg16_bn", "data/dtd"])
    *_, table = capsys.readouterr().out.partition("\n\n")
    assert table.startswith("**Published top-1 [%] of VGG-16 on DTD (EASIER, arXiv 2404.18949)**")
    assert "| 14 | 41.54 |" in table


def test_the_words_of_a_command_of_ones_own_may_be_recipes(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    main(["recipes", "list"])
    listed = capsys.readouterr().out
    for run in (lambda: EasierCLI(args=["recipes", "list"]), lambda: EasierCLI(args=["--debug", "recipes", "list"])):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 0
        assert capsys.readouterr().out == listed
    main(["--debug", "recipes", "list"])
    assert capsys.readouterr().out == listed
    with pytest.raises(SystemExit) as ended:
        EasierCLI(args=["recipes", "show", "digit"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("train.py recipes show: error: Expected argument `name`")


def test_a_copy_has_all_its_parts_and_composes_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["recipes", "copy", "digits"])
    copied = capsys.readouterr().out.split()
    assert copied[0] == "configs/digits.yaml"
    assert sorted(map(str, Path().rglob("*.yaml"))) == sorted(copied)
    for path in map(Path, copied):
        assert path.read_text() == (CONFIGS.parent / path).read_text()
    cli = EasierCLI(args=["--config=configs/digits.yaml", "--trainer.accelerator=cpu"], run=False)
    assert cli.model.hparams["backbone"] == "fused_resnet"
    Path("configs/digits.yaml").write_text("mine")
    Path("configs/data/digits.yaml").unlink()
    with pytest.raises(FileExistsError, match=r"configs/digits\.yaml, .* already: copy to another folder"):
        recipes.copy_recipe("digits")
    assert not Path("configs/data/digits.yaml").exists()
    recipes.copy_recipe("digits", overwrite=True)
    assert Path("configs/digits.yaml").read_text() != "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["copy", "digit"], "Did you mean one of ['digits'"),
        ([], "required: task"),
        (["copy"], "required: name"),
        (["show", "digit"], "Did you mean one of ['digits'"),
        (["show"], "required: name"),
    ],
)
def test_bad_recipes_end_with_two_and_say_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recipes", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1


def test_recipes_are_listed_with_what_they_are(capsys):
    main(["recipes", "list"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(recipes.recipes())
    assert lines["data/digits"] == "The handwritten digits of scikit-learn: nothing to download"
    assert len(set(lines.values())) == len(lines)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert version("lightning-easier") in capsys.readouterr().out
