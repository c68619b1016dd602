"""What the subcommands read of a module, its data and a Trainer, as a Trainer would."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import linearize
from lightning_easier.cli.commands import _Exporting
from lightning_easier.cli.session import Monitor, Session

INPUTS = torch.arange(32.0).reshape(8, 4)
DATA = TensorDataset(INPUTS, torch.zeros(8, 2))


class Net(LightningModule):
    """Has no loader."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def validation_step(self, batch, batch_idx):
        self.log("error", nn.functional.mse_loss(self.body(batch[0]), batch[1]))


class NetWithData(Net):
    def val_dataloader(self):
        return DataLoader(DATA, 8)

    train_dataloader = val_dataloader


def session(module, datamodule=None, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    inputs_of = options.pop("inputs_of", None)
    return Session(module, datamodule, Trainer(accelerator="cpu", **quiet, **options), inputs_of=inputs_of)


class AsksTheTrainer(NetWithData):
    """Its hooks ask the Trainer, as augmentations do."""

    def setup(self, stage):
        self.is_first = self.trainer.is_global_zero

    def val_dataloader(self):
        return DataLoader(DATA, 8 // self.trainer.world_size)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch if self.trainer.training else [batch[0] + 1, batch[1]]


def test_hooks_of_the_module_find_its_trainer():
    own = session(AsksTheTrainer())
    own.load(None, None)
    (inputs,) = own.example_inputs(None)
    assert own.module.is_first
    assert torch.equal(inputs, INPUTS + 1)
    assert len(own.calibration(8)) == 1


@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_an_example_has_as_many_samples_as_asked_for(batch_size):
    (inputs,) = session(NetWithData()).example_inputs(batch_size)
    assert torch.equal(inputs, torch.stack([INPUTS[place % 8] for place in range(batch_size)]))


def test_a_batch_size_is_refused_where_there_are_no_samples():
    own = session(NetWithData(), inputs_of=lambda batch: (batch[0].sum(), batch[0]))
    assert own.example_inputs(None)[0].ndim == 0
    with pytest.raises(ValueError, match="`--batch_size` to be left out, .* no axis of samples, but got 2"):
        own.example_inputs(2)


class OnlyTraining(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(DATA, 8)


class Empty(OnlyTraining):
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0, 2)), 8)


class NoLoader(OnlyTraining):
    def val_dataloader(self):
        return []


@pytest.mark.parametrize("data", [OnlyTraining, Empty, NoLoader])
def test_without_a_validation_batch_the_array_of_the_module_is_the_example(data):
    module = Net()
    with pytest.raises(ValueError, match="`data` to yield a validation batch, .*; but there is neither"):
        session(module, data()).example_inputs(None)
    module.example_input_array = torch.ones(2, 4)
    own = session(module, data())
    assert torch.equal(own.example_inputs(None)[0], torch.ones(2, 4))
    assert own.example_inputs(5)[0].shape == (5, 4)
    assert len(own.calibration(8)) == 1


def test_loaders_that_are_set_on_the_instance_are_read():
    own = session(Net(), LightningDataModule.from_datasets(val_dataset=DATA, batch_size=8))
    assert torch.equal(own.example_inputs(None)[0], INPUTS)
    with pytest.raises(ValueError, match="to have a `train_dataloader`, but it has none"):
        own.calibration(8)


@pytest.mark.parametrize("hold", [
    lambda loaders: CombinedLoader(loaders, "sequential"), list, tuple,
    lambda loaders: dict(zip("ab", loaders, strict=True)),
], ids=["combined", "list", "tuple", "dict"])  # fmt: skip
def test_of_several_loaders_the_first_is_read(hold):
    module = Net()
    module.val_dataloader = lambda: hold([DataLoader(DATA, 8), DataLoader(TensorDataset(-INPUTS, INPUTS), 8)])
    assert torch.equal(session(module).example_inputs(None)[0], INPUTS)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)]
)
@pytest.mark.parametrize("module", [Net, NetWithData])
def test_module_and_inputs_are_in_the_precision_of_the_trainer(module, precision, dtype):
    own = session(module(), precision=precision)
    own.module.example_input_array = torch.ones(2, 4)
    own.load(None, None)
    (inputs,) = own.example_inputs(None)
    assert inputs.dtype == dtype
    with torch.no_grad():
        assert own.network(inputs).dtype == dtype
    if module is NetWithData:
        assert own.score(own.network, Monitor(None, None)) > 0
        (batch,) = own.calibration(8)
        assert (batch[0].dtype, own.network[0].weight.dtype) == (dtype, dtype)


class Renames(Net):
    """Loads checkpoints of a time when its network had another name."""

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.replace("net.", "body."): value for key, value in state.items()}
        self.version = checkpoint["version"]


def test_a_module_changes_what_it_loads_of_a_dense_checkpoint_too(tmp_path):
    saved, loaded = Net(), Renames()
    state = {key.replace("body.", "net."): value for key, value in saved.state_dict().items()}
    torch.save({"state_dict": state, "version": 3}, tmp_path / "dense.ckpt")
    session(loaded).load(str(tmp_path / "dense.ckpt"), None)
    assert loaded.version == 3
    torch.testing.assert_close(loaded.body(INPUTS), saved.body(INPUTS))


def test_weights_alone_are_loaded_whether_an_activation_is_linear_or_not(tmp_path):
    for linear in ([], ["body.1"]):
        saved, loaded = Net(), Net()
        if linear:
            linearize(saved, linear)
        torch.save(saved.state_dict(), tmp_path / "weights.ckpt")
        session(loaded).load(str(tmp_path / "weights.ckpt"), None)
        torch.testing.assert_close(loaded.body(INPUTS), saved.body(INPUTS))


class InBfloat16(NetWithData):
    """Built in bfloat16, whatever a Trainer computes in."""

    def __init__(self, converts=False):
        super().__init__()
        self.body = (Converts if converts else nn.Sequential)(*self.body).bfloat16()


class Converts(nn.Sequential):
    def forward(self, x):
        return super().forward(x.bfloat16())


def test_a_precision_that_a_network_does_not_go_with_is_named():
    own = session(InBfloat16())
    own.load(None, None)
    told = "`--trainer.precision` to be bf16-true for a network in bfloat16, but got '32-true', .* inputs in float32"
    with pytest.raises(ValueError, match=told):
        own.example_inputs(None)
    right = session(InBfloat16(), precision="bf16-true")
    right.load(None, None)
    (inputs,) = right.example_inputs(None)
    assert right.network(inputs).dtype == torch.bfloat16
    converting = session(InBfloat16(converts=True))
    converting.load(None, None)
    (inputs,) = converting.example_inputs(None)
    assert torch.equal(inputs, INPUTS)
    with pytest.raises(ValueError, match="to be 16-true for an ONNX file of a network that is built in bfloat16"):
        _Exporting("model.onnx", {}).checked(converting, None)
