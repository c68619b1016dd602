"""What all data share: loaders over three data sets."""

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_easier.support.arguments import check_integer


class ImageDataModule(LightningDataModule):
    """Loaders over the data sets that a subclass sets in ``setup``."""

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Test batches, for predictions."""
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False, collate: Any = None) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
        )
