"""NEPENTHE on transformers: Linear-GELU in Swin, ViT, BERT and RoBERTa, with dictionaries as batches."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset
from torchvision.models.swin_transformer import SwinTransformer
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from lightning_easier import EntropyGuidedPruningCallback, Files, Rounds, collapse

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
         "vocab_size": 40, "max_position_embeddings": 20}  # fmt: skip


class Texts(Dataset):
    """Sequences of several lengths, padded, as dictionaries."""

    def __len__(self):
        return 12

    def __getitem__(self, place):
        length = 4 + place % 4
        ids = torch.randint(3, 40, (8,), generator=torch.Generator().manual_seed(place))
        mask = (torch.arange(8) < length).long()
        return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask, "labels": ids[0] % 2}


class Pictures(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, place):
        generator = torch.Generator().manual_seed(place)
        return {"images": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(place % 2)}


class Classifier(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        if "images" in batch:
            return self.model(batch["images"])
        return self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch), batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL)), Texts()


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=1)), Texts()


def swin():
    return SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=2, stochastic_depth_prob=0.0), Pictures()


def vit():
    model = VisionTransformer(16, 4, num_classes=2, embed_dim=8, depth=2, num_heads=2, global_pool="avg")
    return model, Pictures()


@pytest.mark.parametrize(
    ("make", "pruned"),
    [
        (bert, ["bert.encoder.layer.{}.intermediate.dense.weight"]),
        (roberta, ["roberta.encoder.layer.{}.intermediate.dense.weight"]),
        (swin, ["features.1.{}.mlp.0.weight", "features.3.{}.mlp.0.weight"]),
        (vit, ["blocks.{}.mlp.fc1.weight"]),
    ],
)
def test_the_first_layers_of_mlps_are_pruned_and_nothing_else(tmp_path, make, pruned):
    torch.manual_seed(0)
    model, data = make()
    callback = EntropyGuidedPruningCallback(
        "val_loss", "min", 10.0, 0.5, rounds=Rounds(epochs=1), files=Files(dirpath=tmp_path)
    )
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=tmp_path,
    )  # fmt: skip
    module = Classifier(model)
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    assert [this.chosen for this in callback.rounds[1:3]] == [["weights"]] * 2
    zeros = {name: int((value == 0).sum()) for name, value in model.named_parameters() if value.ndim == 2}
    layers = {name.format(place) for name in pruned for place in range(2)}
    assert layers <= zeros.keys()
    # a row of an embedding is zero where it pads
    assert {name for name, count in zeros.items() if count and "embeddings" not in name} <= layers
    share = sum(zeros[name] for name in layers) / sum(model.get_parameter(name).numel() for name in layers)
    assert 0.6 < share <= 0.75


def test_hidden_neurons_without_weights_leave_the_mlp_of_a_vit():
    """What a run leaves: zeros, which a collapse turns into fewer neurons."""
    torch.manual_seed(0)
    model, _ = vit()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[::2] = 0.0
            block.mlp.fc1.bias[::2] = 0.0
    x = torch.randn(2, 3, 16, 16)
    result = collapse(model.eval(), x, objective="macs")
    assert result.report.after.macs < result.report.before.macs
    assert torch.allclose(result.model(x), model(x), atol=1e-5)
