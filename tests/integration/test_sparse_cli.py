"""NEPENTHE and EGP from the command line: recipes, options, and what is made of their checkpoints."""

import onnxruntime
import pytest
import torch
import yaml

from lightning_easier import PruningCallback, Sparsify, load_pruned
from lightning_easier.cli import EasierCLI, read_pruning_report
from lightning_easier.command import main
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.zoo import ImageClassifier
from tests.integration.test_cli import CONFIGS, SHORT
from tests.integration.tiny import assert_equal_states

DIGITS = f"--config={CONFIGS / 'digits.yaml'}"
RECIPES = {"nepenthe": CONFIGS / "recipe" / "nepenthe.yaml", "egp": CONFIGS / "recipe" / "egp.yaml"}
OPTIONS = "--trainer.callbacks"


def fit(root, recipe, *options):
    """Run a recipe on a small network, in rounds of one epoch that are all kept; return its log folder."""
    small = "--model.backbone_args.widths=[4,8]", "--model.backbone_args.blocks=1", "--trainer.limit_val_batches=2"
    loose = f"{OPTIONS}.rounds.epochs=1", f"{OPTIONS}.tolerance=1"
    where = f"--trainer.default_root_dir={root}"
    main(["fit", DIGITS, f"--trainer={recipe}", *SHORT, *small, *loose, where, *options])
    return root / "lightning_logs" / "version_0"


def settings_of(*arguments):
    cli = EasierCLI(args=[DIGITS, *arguments, "--trainer.accelerator=cpu"], run=False)
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, PruningCallback)]
    return callback.settings, cli


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A run in which weights were pruned, and nothing became linear: its log folder."""
    return fit(tmp_path_factory.mktemp("masked"), RECIPES["nepenthe"], f"{OPTIONS}.guard=1e9")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_rounds_of_its_paper(name):
    settings, cli = settings_of(f"--trainer={RECIPES[name]}")
    assert settings.method == Sparsify(amount=0.5, variant=name)
    assert (settings.rules.rounds.epochs, settings.rules.rounds.restart) == (160, "optimizer")
    assert cli.trainer.max_epochs == 10 * 160  # the dense network, and nine rounds


def test_options_of_a_recipe_are_overridden():
    given = (
        "amount=0.25", "variant=egp", "rounds.epochs=3", "importance=neuron", "guard=2", "keep_zeros=true",
        "exclude=[model.relu]",
    )  # fmt: skip
    settings, _ = settings_of(f"--trainer={RECIPES['nepenthe']}", *(f"{OPTIONS}.{each}" for each in given))
    assert settings.method == Sparsify(0.25, "egp", 2.0, "neuron", keep_zeros=True)
    assert (settings.rules.rounds.epochs, settings.exclude) == (3, ["model.relu"])


@pytest.mark.parametrize(
    ("argument", "messages"),
    [
        ("amount=1", ["`amount` to be in (0, 1), but got 1"]),
        ("variant=lottery", ["lottery", "'nepenthe', 'egp', 'magnitude', 'uniform'"]),
        ("guard=-1", ["`guard` to be finite and at least 0"]),
        ("measuring.sample=0.5", ["`sample` of Measuring to be 1.0 with Sparsify"]),
    ],
)
def test_bad_values_are_named(argument, messages, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        settings_of(f"--trainer={RECIPES['nepenthe']}", f"{OPTIONS}.{argument}")
    shown = capsys.readouterr().err + str(error.value)
    assert all(message in shown for message in messages)


def test_the_method_is_asked_for_as_any_other(tmp_path):
    method = {"class_path": "lightning_easier.Sparsify", "init_args": {"amount": 0.3, "variant": "magnitude"}}
    options = {"monitor": "val_acc", "method": method, "rounds": {"epochs": 1}, "tolerance": 1.0}
    recipe = {"callbacks": [{"class_path": "lightning_easier.PruningCallback", "init_args": options}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = fit(tmp_path, tmp_path / "recipe.yaml", "--trainer.max_epochs=2", f"{OPTIONS}.method.amount=0.25")
    (this,) = read_pruning_report(folder / "entropy_pruning" / "round_1.ckpt").rounds[1:]
    assert this.chosen == ["weights"]
    assert this.notes["weights"][0].startswith("297 of")  # a quarter of the 1,188 before activations, not 0.3 of them


def test_the_saved_config_of_a_run_loads_again(masked, tmp_path):
    saved = masked / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    assert content["trainer"]["callbacks"][-1]["class_path"] == "lightning_easier.EntropyGuidedPruningCallback"
    main(["fit", f"--config={saved}", "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"])
    again = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text())
    content["trainer"].update(max_epochs=1, default_root_dir=str(tmp_path))
    assert again == content


def test_a_report_says_what_each_round_has_pruned(masked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("rich._console", None)  # another test may have made one of another width
    checkpoint = masked / "entropy_pruning" / "round_2.ckpt"
    main(["report", str(checkpoint)])
    shown = capsys.readouterr().out
    rounds = read_pruning_report(checkpoint).rounds
    assert [this.chosen for this in rounds] == [[], ["weights"], ["weights"]]
    assert all(this.notes["weights"][0].split(",")[0] in shown for this in rounds[1:])
    assert shown.count("are zero") == 2


def exported(folder, checkpoint, root, *options):
    """Return what the exported file computes of some images, and what the model does."""
    file = root / "model.onnx"
    main(["export", f"--config={folder / 'config.yaml'}", f"--ckpt_path={checkpoint}", f"--output={file}", *options])
    images = torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        return torch.from_numpy(found), load_pruned(ImageClassifier, checkpoint).eval()(images)


@pytest.mark.parametrize("collapsed", ["--collapse", "--no-collapse"])
def test_a_round_of_masks_alone_is_exported(masked, tmp_path, collapsed):
    checkpoint = masked / "entropy_pruning" / "round_2.ckpt"
    model = load_pruned(ImageClassifier, checkpoint)
    assert not stand_ins(model)
    assert sum(int((value == 0).sum()) for value in model.parameters() if value.ndim > 1) > 0
    found, expected = exported(masked, checkpoint, tmp_path, "--objective=macs", collapsed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_weights_alone_of_such_a_round_load_as_any_other(masked, tmp_path):
    """They have no record of anything linear, nor of a run; they are plain weights with zeros."""
    checkpoint = torch.load(masked / "entropy_pruning" / "round_2.ckpt", weights_only=True)
    expected = dict(checkpoint["state_dict"])
    del checkpoint["callbacks"]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="If no activation is linear, load it as any other .*pruned are zero in it"):
        load_pruned(ImageClassifier, tmp_path / "weights.ckpt")
    model = ImageClassifier.load_from_checkpoint(tmp_path / "weights.ckpt", map_location="cpu", weights_only=True)
    assert_equal_states(dict(model.state_dict()), expected)


def test_a_round_that_made_activations_linear_is_collapsed_and_exported(tmp_path, capsys):
    folder = fit(tmp_path, RECIPES["nepenthe"], f"{OPTIONS}.amount=0.9", "--trainer.max_epochs=6")
    checkpoint = max((folder / "entropy_pruning").glob("round_*.ckpt"))
    assert stand_ins(load_pruned(ImageClassifier, checkpoint))
    found, expected = exported(folder, checkpoint, tmp_path, "--objective=macs")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "Collapse" in capsys.readouterr().out
