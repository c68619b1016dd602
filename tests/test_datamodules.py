"""The data of the published settings: what is read, how it is split, and what is said where it is missing."""

import pickle
import shutil

import pytest
import torch

from lightning_easier.zoo import (
    CIFAR10DataModule,
    DTDDataModule,
    FGVCAircraftDataModule,
    Flowers102DataModule,
    PACSDataModule,
    TinyImageNetDataModule,
    VLCSDataModule,
)
from lightning_easier.zoo.datamodules.mixing import MixedBatches
from tests.tiny_data import DOMAINS, write_aircraft, write_domains, write_dtd, write_flowers102, write_tiny_imagenet


def opened(data):
    data.setup("fit")
    return data


@pytest.fixture
def unchecked(monkeypatch):
    """Small files are not those whose digests torchvision knows."""
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *args: True)


def test_tiny_imagenet_has_the_labels_of_its_annotations(tmp_path):
    write_tiny_imagenet(tmp_path)
    data = opened(TinyImageNetDataModule(str(tmp_path), batch_size=6, num_workers=0))
    assert [label for _, label in data.train_set] == [0, 0, 1, 1, 2, 2]
    assert [label for _, label in data.val_set] == [2, 1]
    assert data.test_set is data.val_set
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.shape) == ((6, 3, 64, 64), torch.float32, (6,))
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])
    assert any(not torch.equal(data.train_set[0][0], data.train_set[0][0]) for _ in range(8))


@pytest.mark.parametrize("kind", [PACSDataModule, VLCSDataModule])
def test_domains_are_pooled_and_split_in_tenths(kind, tmp_path):
    write_domains(tmp_path, kind.dataset)
    domains, classes = DOMAINS[kind.dataset]
    data, again = (opened(kind(str(tmp_path), image_size=32, batch_size=4, num_workers=0)) for _ in range(2))
    count = len(domains) * len(classes)
    parts = [data.train_set.indices, data.val_set.indices, data.test_set.indices]
    assert sorted(index for part in parts for index in part) == list(range(count))
    assert [len(part) for part in parts] == [count - 2 * (count // 10), count // 10, count // 10]
    assert data.train_set.indices == again.train_set.indices
    everything = data.val_set.dataset
    assert [everything[index][1] for index in range(count)] == list(range(len(classes))) * len(domains)
    assert len(classes) == kind.num_classes
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])
    place = data.train_set.indices[0]
    assert not torch.equal(data.train_set[0][0], everything[place][0])
    assert data.train_set[0][1] == everything[place][1]


def test_only_the_domains_that_are_asked_for_are_read_and_they_have_the_same_classes(tmp_path):
    write_domains(tmp_path, "PACS")
    data = opened(PACSDataModule(str(tmp_path), image_size=32, num_workers=0, domains=["photo", "sketch"]))
    assert len(data.train_set.dataset) == 14
    shutil.rmtree(tmp_path / "PACS" / "sketch" / "horse")
    with pytest.raises(ValueError, match=r"PACS to have the same classes, but .*art_painting are .*'horse'.*sketch"):
        PACSDataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("kind", "write", "labels"),
    [(Flowers102DataModule, write_flowers102, [[0, 101], [2, 3], [4, 5]]),
     (DTDDataModule, write_dtd, [[0, 1]] * 3), (FGVCAircraftDataModule, write_aircraft, [[0, 1]] * 3)],
)  # fmt: skip
def test_official_splits_are_kept(kind, write, labels, tmp_path, unchecked):
    write(tmp_path)
    data = opened(kind(str(tmp_path), image_size=32, batch_size=2, num_workers=0))
    assert [[label for _, label in part] for part in (data.train_set, data.val_set, data.test_set)] == labels
    images, targets = next(iter(data.train_dataloader()))
    assert (images.shape, targets.shape) == ((2, 3, 32, 32), (2,))
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])
    assert any(not torch.equal(data.train_set[0][0], data.train_set[0][0]) for _ in range(8))


def test_training_batches_are_mixed_and_no_others(tmp_path):
    write_dtd(tmp_path)
    data = opened(DTDDataModule(str(tmp_path), image_size=32, batch_size=2, num_workers=0, mix_alpha=0.8))
    _, shares = next(iter(data.train_dataloader()))
    assert shares.shape == (2, 47)
    assert next(iter(data.val_dataloader()))[1].shape == next(iter(data.test_dataloader()))[1].shape == (2,)
    with pytest.raises(ValueError, match="`mix_alpha` .*but got -1"):
        DTDDataModule(mix_alpha=-1)


def test_labels_tell_how_much_of_each_image_is_in_a_mixture():
    collate = pickle.loads(pickle.dumps(MixedBatches(5, alpha=0.8)))  # as a worker process gets it
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    samples = [(torch.full((3, 12, 10), float(values[label])), label) for label in (3, 1, 4)]
    kinds = set()
    for _ in range(12):
        images, shares = collate(samples)
        assert torch.allclose(shares.sum(1), torch.ones(3))
        assert torch.allclose(images.mean((1, 2, 3)), shares @ values, rtol=1e-4)
        kinds.add(all(len(image.unique()) == 1 for image in images))
    assert kinds == {True, False}  # MixUp leaves an image even, CutMix does not


@pytest.mark.parametrize(
    ("kind", "folder", "remedy"),
    [(CIFAR10DataModule, "cifar-10-batches-py", "--data.download true.*cs.toronto.edu"),
     (TinyImageNetDataModule, "tiny-imagenet-200", "download http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
     (PACSDataModule, "PACS/art_painting", "download PACS with DomainBed.*PACS/<domain>/<class>/<image>"),
     (VLCSDataModule, "VLCS/Caltech101", "download VLCS with DomainBed.*VLCS/<domain>/<class>/<image>"),
     (Flowers102DataModule, "flowers-102", "--data.download true.*robots.ox.ac.uk/~vgg/data/flowers/102"),
     (DTDDataModule, "dtd", "--data.download true.*robots.ox.ac.uk/~vgg/data/dtd"),
     (FGVCAircraftDataModule, "fgvc-aircraft-2013b", "--data.download true.*vgg/data/fgvc-aircraft")],
)  # fmt: skip
def test_missing_data_say_what_to_download_and_where_it_goes(kind, folder, remedy, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`root` to hold .*, but {tmp_path / folder} is missing.*{remedy}"):
        kind(str(tmp_path)).setup("fit")


def test_data_that_are_incomplete_are_missing(tmp_path):
    write_dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "labels" / "val1.txt").unlink()
    with pytest.raises(FileNotFoundError, match="DTD, but .* is missing or incomplete"):
        DTDDataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("kind", [CIFAR10DataModule, Flowers102DataModule, DTDDataModule, FGVCAircraftDataModule])
def test_downloads_are_made_on_request_only(kind, tmp_path, monkeypatch):
    asked = []
    name = getattr(kind, "dataset", "CIFAR10")
    monkeypatch.setattr(
        f"torchvision.datasets.{name}", lambda root, **options: asked.append((root, options["download"]))
    )
    kind(str(tmp_path)).prepare_data()
    assert asked == []
    kind(str(tmp_path), download=True).prepare_data()
    assert set(asked) == {(str(tmp_path), True)}
