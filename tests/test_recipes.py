"""The configs that come with the package, by name and as copies."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

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
    [(["copy", "digit"], "Did you mean one of ['digits'"), ([], "required: task"), (["copy"], "required: name")],
)
def test_bad_recipes_end_with_two_and_say_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recipes", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


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
