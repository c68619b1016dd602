"""The data of the published settings: what is read, how it is split, and what is said where it is missing."""

import pickle
import re
import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torchvision.datasets import ImageFolder

from lightning_easier.zoo import (
    CIFAR10DataModule,
    DigitsDataModule,
    DTDDataModule,
    FGVCAircraftDataModule,
    Flowers102DataModule,
    ImageClassifier,
    ImageFolderDataModule,
    PACSDataModule,
    TinyImageNetDataModule,
    VLCSDataModule,
)
from lightning_easier.zoo.datamodules.mixing import MixedBatches
from tests.tiny_data import (
    DOMAINS,
    write_aircraft,
    write_cifar10,
    write_domains,
    write_dtd,
    write_flowers102,
    write_image,
    write_tiny_imagenet,
)


def opened(data):
    data.setup("fit")
    return data


@pytest.fixture
def unchecked(monkeypatch):
    """Small files are not those whose digests torchvision knows."""
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)


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
     (PACSDataModule, "PACS/art_painting", "install gdown wilds`.*--data_dir {root}`.*PACS/<domain>/<class>/<image>"),
     (VLCSDataModule, "VLCS/Caltech101", "install gdown wilds`.*--data_dir {root}`.*VLCS/<domain>/<class>/<image>"),
     (Flowers102DataModule, "flowers-102", "--data.download true.*robots.ox.ac.uk/~vgg/data/flowers/102"),
     (DTDDataModule, "dtd", "--data.download true.*robots.ox.ac.uk/~vgg/data/dtd"),
     (FGVCAircraftDataModule, "fgvc-aircraft-2013b", "--data.download true.*vgg/data/fgvc-aircraft")],
)  # fmt: skip
def test_missing_data_say_what_to_download_and_where_it_goes(kind, folder, remedy, tmp_path):
    remedy = remedy.replace("{root}", str(tmp_path))
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


def write_image_folder(root, **splits):
    """Write an image a class, of the classes of each split."""
    for split, classes in splits.items():
        for each in classes:
            write_image(root / split / each / "pic_001.jpg", 40)


def digits(root):
    return DigitsDataModule()


def image_folder(root):
    write_image_folder(root, train="abc", val="abc")
    return ImageFolderDataModule(str(root), num_workers=0)


def written(kind, write, **options):
    def data(root):
        write(root)
        return kind(str(root), num_workers=0, **options)

    return data


EVERY_KIND = {
    "digits": digits,
    "image folder": image_folder,
    "CIFAR-10": written(CIFAR10DataModule, write_cifar10, val_size=3),
    "Tiny-ImageNet": written(TinyImageNetDataModule, write_tiny_imagenet),
    "PACS": written(PACSDataModule, partial(write_domains, name="PACS")),
    "VLCS": written(VLCSDataModule, partial(write_domains, name="VLCS")),
    "Flowers-102": written(Flowers102DataModule, write_flowers102),
    "DTD": written(DTDDataModule, write_dtd),
    "Aircraft": written(FGVCAircraftDataModule, write_aircraft),
}


@pytest.mark.parametrize("make", EVERY_KIND.values(), ids=EVERY_KIND)
def test_data_are_opened_once_whatever_the_stage(make, tmp_path, unchecked):
    data = make(tmp_path)
    data.setup("validate")
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
    for stage in ("validate", "fit", "test", "predict"):
        data.setup(stage)
        again = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
        assert all(loader.dataset is first.dataset for loader, first in zip(again, loaders, strict=True))
    assert all(len(next(iter(loader))) == 2 for loader in loaders)


def test_a_trainer_that_validates_again_and_then_fits_and_tests_opens_them_once(tmp_path, monkeypatch):
    write_tiny_imagenet(tmp_path)
    folders = []

    class Counted(ImageFolder):
        def __init__(self, root, *args, **options):
            folders.append(root)
            super().__init__(root, *args, **options)

    monkeypatch.setattr("torchvision.datasets.ImageFolder", Counted)
    data = TinyImageNetDataModule(str(tmp_path), batch_size=2, num_workers=0)
    model = ImageClassifier("cifar_resnet20", num_classes=200)
    trainer = Trainer(barebones=True, max_epochs=1, accelerator="cpu")
    for run in (trainer.validate, trainer.validate, trainer.fit, trainer.test):
        run(model, datamodule=data)
    assert folders == [tmp_path / "tiny-imagenet-200" / "train"]


def test_data_that_could_not_be_opened_are_opened_when_they_are_there(tmp_path):
    data = DTDDataModule(str(tmp_path), image_size=32, num_workers=0)
    with pytest.raises(FileNotFoundError):
        data.setup("fit")
    write_dtd(tmp_path)
    data.setup("fit")
    assert len(data.val_set) == 2


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("classes", ["ac", "abcd"])
def test_folders_with_other_classes_are_refused_since_labels_would_be_others(split, classes, tmp_path):
    write_image_folder(tmp_path, train="abc", **{"val": "abc", "test": "abc"} | {split: classes})
    lists = re.escape(str(["a", "b", "c"])), re.escape(str(list(classes)))
    with pytest.raises(ValueError, match=f"the same classes, but .*train are {lists[0]}, and in .*{split} {lists[1]};"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_folders_have_the_labels_of_their_classes(tmp_path):
    write_image_folder(tmp_path, train="abc", val="abc")
    data = opened(ImageFolderDataModule(str(tmp_path), num_workers=0))
    assert [[label for _, label in part] for part in (data.train_set, data.val_set)] == [[0, 1, 2]] * 2
    assert data.test_set is data.val_set
    write_image_folder(tmp_path, test="abc")
    data = opened(ImageFolderDataModule(str(tmp_path), num_workers=0))
    assert [label for _, label in data.test_set] == [0, 1, 2]
    assert data.test_set is not data.val_set


def test_domains_of_too_few_images_are_refused(tmp_path):
    write_domains(tmp_path, "PACS")
    with pytest.raises(ValueError, match=r"at least ten images in \['photo'\], .*but there are 7"):
        PACSDataModule(str(tmp_path), domains=["photo"]).setup("fit")
    with pytest.raises(ValueError, match=r"`domains` to be some of \['art_painting', .*, but got \[\]; leave it out"):
        PACSDataModule(str(tmp_path), domains=[])


def test_what_is_downloaded_is_looked_at_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("torchvision.datasets.DTD", lambda root, **options: asked.append(options))
    data = DTDDataModule(str(tmp_path), download=True)
    for _ in range(3):
        data.prepare_data()
    assert asked == [{"download": True}]


def test_the_number_of_classes_is_told():
    kinds = (CIFAR10DataModule, TinyImageNetDataModule, PACSDataModule, VLCSDataModule, Flowers102DataModule,
             DTDDataModule, FGVCAircraftDataModule)  # fmt: skip
    assert [kind.num_classes for kind in kinds] == [10, 200, 7, 5, 102, 47, 100]


@pytest.mark.parametrize("kind", [CIFAR10DataModule, PACSDataModule, ImageFolderDataModule])
def test_splits_are_at_random_and_the_seed_tells_them(kind, tmp_path, unchecked):
    if kind is PACSDataModule:
        write_domains(tmp_path, "PACS")
        options = {}
    else:
        write_cifar10(tmp_path)
        write_image_folder(tmp_path, train="abcdefghij")
        options = {"val_size": 3}
    seeds = [opened(kind(str(tmp_path), num_workers=0, seed=seed, **options)) for seed in (0, 0, 1)]
    parts = [(data.train_set.indices, data.val_set.indices) for data in seeds]
    assert parts[0] == parts[1] != parts[2]
    for train, val in parts:
        assert train != sorted(train)
        assert not set(train) & set(val)
