"""A pruned checkpoint brings its structure along; what does not fit is named and leaves the model as it was."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import lightning_easier
from lightning_easier import linearize, load_pruned, restore, restore_structure_on_load
from lightning_easier.cli import read_pruning_report
from lightning_easier.structure.checkpoint import restructure_on_load
from lightning_easier.structure.linearize import bypass, stand_ins
from lightning_easier.structure.operations import TakenOut, from_plain


class Net(LightningModule):
    def __init__(self, width: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(3, width), activation(), nn.Linear(width, width), activation())

    def forward(self, x):
        return self.body(x)


class Renaming(Net):
    """Repairs old checkpoints on load, as users do."""

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {
            key.replace("old_body", "body"): value for key, value in checkpoint["state_dict"].items()
        }


def save(model: LightningModule, path) -> str:
    torch.save(
        {
            "state_dict": model.state_dict(),
            "hyper_parameters": {"width": model.hparams["width"]},
            "pytorch-lightning_version": "2.6.0",
        },
        path,
    )
    return str(path)


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    return linearize(Net(5), ["body.1"])


def test_loads_into_an_instance_in_place(pruned, tmp_path):
    model = Net(5)
    assert load_pruned(model, save(pruned, tmp_path / "a.ckpt")) is model
    x = torch.randn(4, 3)
    assert list(stand_ins(model)) == ["body.1"]
    assert torch.equal(model(x), pruned(x))


def test_builds_a_class_from_its_hyperparameters(pruned, tmp_path):
    path = save(pruned, tmp_path / "a.ckpt")
    model = load_pruned(Net, path)
    x = torch.randn(4, 3)
    assert type(model) is Net
    assert torch.equal(model(x), pruned(x))


def test_whoever_loads_a_pruned_checkpoint_as_any_other_is_told_what_to_call(pruned, tmp_path):
    for load in (lambda: Net.load_from_checkpoint(save(pruned, tmp_path / "a.ckpt")),
                 lambda: Net(5).load_state_dict(pruned.state_dict())):  # fmt: skip
        with pytest.raises(RuntimeError, match="Unexpected key") as caught:
            load()
        for name in ("lightning_easier", "load_pruned", "restore_structure_on_load"):
            assert name in str(caught.value)
            assert name == "lightning_easier" or hasattr(lightning_easier, name)  # it is one that can be called


def test_the_modules_own_load_hook_is_obeyed(pruned, tmp_path):
    checkpoint = torch.load(save(pruned, tmp_path / "a.ckpt"), weights_only=True)
    checkpoint["state_dict"] = {k.replace("body", "old_body"): v for k, v in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    x = torch.randn(4, 3)
    assert torch.equal(load_pruned(Renaming(5), tmp_path / "old.ckpt")(x), pruned(x))
    assert torch.equal(load_pruned(Renaming, tmp_path / "old.ckpt")(x), pruned(x))


def test_loads_a_bare_state_dict_into_a_plain_module(pruned, tmp_path):
    torch.save(pruned.body.state_dict(), tmp_path / "weights.pt")
    model = load_pruned(Net(5).body, tmp_path / "weights.pt")
    x = torch.randn(4, 3)
    assert torch.equal(model(x), pruned(x))


def test_a_part_of_a_state_does_not_bring_the_rectifiers_back(pruned):
    handle = restructure_on_load(pruned)
    weight = torch.full_like(pruned.body[0].weight, 3.0)
    pruned.load_state_dict({"body.0.weight": weight}, strict=False)
    assert list(stand_ins(pruned)) == ["body.1"]
    assert torch.equal(pruned.body[0].weight, weight)
    pruned.load_state_dict(Net(5).state_dict())  # a whole one does
    assert stand_ins(pruned) == {}
    handle.remove()


@pytest.mark.parametrize("other", [lambda: Net(6), lambda: Net(5, nn.GELU), lambda: nn.Sequential(nn.Linear(3, 5))])
def test_a_model_that_does_not_fit_is_left_as_it_was(pruned, tmp_path, other):
    model = other()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Expected the (checkpoint|model)"):
        load_pruned(model, save(pruned, tmp_path / "a.ckpt"))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_bad_arguments_are_named(pruned, tmp_path):
    dense = save(Net(5), tmp_path / "dense.ckpt")
    path = save(pruned, tmp_path / "a.ckpt")
    for model in (Net(5), Net):
        with pytest.raises(ValueError, match=r"a record of linearized activations, but .*dense\.ckpt has none"):
            load_pruned(model, dense)
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"to be a checkpoint file, but .*text\.ckpt can't be read"):
        load_pruned(Net(5), tmp_path / "text.ckpt")
    with pytest.raises(FileNotFoundError, match="to be a checkpoint file, but 'nowhere' is none"):
        load_pruned(Net, "nowhere")
    with pytest.raises(TypeError, match="an instance or a LightningModule class"):
        load_pruned(nn.Linear, path)
    with pytest.raises(TypeError, match=r"no arguments \['width'\] with an instance"):
        load_pruned(Net(5), path, width=5)


@pytest.mark.parametrize("width", [5, 30, 300])  # torch raises other errors for other sizes
def test_a_file_that_was_cut_short_is_named(tmp_path, width):
    path = Path(save(linearize(Net(width), ["body.1"]), tmp_path / "whole.ckpt"))
    content = path.read_bytes()
    for missing in (1, 100, len(content) // 2, len(content) - 3, len(content)):
        (tmp_path / "cut.ckpt").write_bytes(content[: len(content) - missing])
        for model in (Net(width), Net):
            with pytest.raises(
                ValueError, match=r"`checkpoint_path` to be a checkpoint file, but .*cut\.ckpt can't be"
            ):
                load_pruned(model, tmp_path / "cut.ckpt")
        with pytest.raises(ValueError, match=r"`checkpoint_path` to be a checkpoint file, but .*cut\.ckpt can't be"):
            read_pruning_report(tmp_path / "cut.ckpt")


def test_what_holds_objects_is_loaded_where_it_is_trusted(pruned, tmp_path):
    checkpoint = torch.load(save(pruned, tmp_path / "a.ckpt"), weights_only=True)
    torch.save(checkpoint | {"of": Net}, tmp_path / "objects.ckpt")
    message = (
        r"objects\.ckpt can't be read safely: .*test_checkpoint\.Net\).*pass `weights_only=False`.*add_safe_globals"
    )
    for model in (Net(5), Net):
        with pytest.raises(ValueError, match=message):
            load_pruned(model, tmp_path / "objects.ckpt")
        loaded = load_pruned(model, tmp_path / "objects.ckpt", weights_only=False)
        assert list(stand_ins(loaded)) == ["body.1"]


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), "text"])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    for read in (lambda path: load_pruned(Net(5), path), read_pruning_report):
        with pytest.raises(ValueError, match=r"other\.ckpt holds a (list|Tensor|str) and no state dict"):
            read(tmp_path / "other.ckpt")


class Expecting(Net):
    """Loads pruned and dense checkpoints alike."""

    def __init__(self, width: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(width, activation)
        restore_structure_on_load(self)


def test_a_module_that_expects_it_loads_from_a_pruned_checkpoint(pruned, tmp_path):
    x = torch.randn(4, 3)
    model = Expecting.load_from_checkpoint(save(pruned, tmp_path / "a.ckpt"))
    assert torch.equal(model(x), pruned(x))
    dense = Net(5)
    model.load_state_dict(dense.state_dict())
    assert stand_ins(model) == {}
    assert torch.equal(model(x), dense(x))
    assert restore_structure_on_load(model) is model
    assert len(model._load_state_dict_pre_hooks) == 1
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(x), pruned(x))


class Layer(nn.Module):
    """A transformer's: two branches, the first of which returns two values."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y)[0]
        return x + self.mlp(self.norms[1](x))


class Layers(LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(*(Layer() for _ in range(width)))

    def forward(self, x):
        return self.layers(x)


TAKEN_OUT = [
    ("layers.0", "identity", 0, lambda m, x: m.layers[1](x)),
    ("layers.1.attention", "zeros", 2, lambda m, x: (y := m.layers[0](x)) + m.layers[1].mlp(m.layers[1].norms[1](y))),
    ("layers.1.mlp", "zeros", 0,
     lambda m, x: (y := m.layers[0](x)) + m.layers[1].attention(*[m.layers[1].norms[0](y)] * 3)[0]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "leaves", "returns", "expected"), TAKEN_OUT)
def test_blocks_and_branches_stay_out_in_a_checkpoint_and_come_back(tmp_path, name, leaves, returns, expected):
    dense, x = Layers(), torch.randn(2, 3, 4)
    model = copy.deepcopy(dense)
    operation = TakenOut([name], leaves, returns)
    change = from_plain(operation.to_plain()).apply(model)
    assert torch.equal(model(x), expected(dense, x))
    assert len(change.lost) == sum(1 for key, _ in dense.named_parameters() if key.startswith(f"{name}."))
    assert not any(key.startswith(f"{name}.") for key, _ in model.named_parameters())

    loaded = load_pruned(Layers, save(model, tmp_path / "a.ckpt"))
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(RuntimeError, match="made_linear_by_lightning_easier"):
        Layers().load_state_dict(model.state_dict())

    assert [id(p) for p in operation.undo(model)] == [id(p) for p in change.lost]
    assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_block_that_comes_back_was_cast_with_the_model_meanwhile(dtype):
    model = bypass(Layers(), ["layers.0"]).to(dtype)
    assert {parameter.dtype for parameter in restore(model).parameters()} == {dtype}
    model(torch.randn(2, 3, 4, dtype=dtype))
    bypass(model, ["layers.0"])
    assert {parameter.dtype for parameter in restore(model).parameters()} == {dtype}


def test_what_is_no_block_can_not_be_taken_out():
    model = Layers()
    cases = ((["layers.7"], "zeros", "names"), ([""], "zeros", "names"), (["layers.0"], "ones", "leaves"))
    for names, leaves, error in cases:
        with pytest.raises(ValueError, match=error):
            bypass(model, names, leaves)
    assert not stand_ins(model)
