"""Data sets of a few small images, in the layouts of the real ones."""

import pickle
from pathlib import Path

import torch
from scipy.io import savemat
from torchvision.utils import save_image

DOMAINS = {
    "PACS": (
        ["art_painting", "cartoon", "photo", "sketch"],
        ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"],
    ),
    "VLCS": (["Caltech101", "LabelMe", "SUN09", "VOC2007"], ["bird", "car", "chair", "dog", "person"]),
}


def write_cifar10(root: Path) -> None:
    """Write ten training images and two test images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": torch.randint(0, 255, (2, 3072), dtype=torch.uint8).numpy(), "labels": [0, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def write_tiny_imagenet(root: Path) -> None:
    """Write three classes of two training images, and a validation image of each but the first, the last first."""
    folder = root / "tiny-imagenet-200"
    classes = ["n01443537", "n01629819", "n02085620"]
    for wnid in classes:
        for number in range(2):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 64)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    lines = []
    for number, wnid in enumerate(classes[:0:-1]):
        write_image(folder / "val" / "images" / f"val_{number}.JPEG", 64)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    write_image(folder / "test" / "images" / "test_0.JPEG", 64)


def write_domains(root: Path, name: str) -> None:
    """Write an image a class and domain of PACS or VLCS."""
    domains, classes = DOMAINS[name]
    for domain in domains:
        for each in classes:
            write_image(root / name / domain / each / "pic_001.jpg", 40)


def write_flowers102(root: Path) -> None:
    """Write two training, two validation and two test images; torchvision's check of their digests has to be off."""
    folder = root / "flowers-102"
    for number in range(1, 7):
        write_image(folder / "jpg" / f"image_{number:05d}.jpg", 50)
    savemat(folder / "imagelabels.mat", {"labels": [1, 102, 3, 4, 5, 6]})
    savemat(folder / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})


def write_dtd(root: Path) -> None:
    """Write two textures of a training, a validation and a test image."""
    folder = root / "dtd" / "dtd"
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{texture}/{texture}_{number:04d}.jpg" for texture in ("banded", "zigzagged")]
        for name in names:
            write_image(folder / "images" / name, 50)
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))


def write_aircraft(root: Path) -> None:
    """Write two variants of a training, a validation and a test image."""
    folder = root / "fgvc-aircraft-2013b" / "data"
    for number, split in enumerate(("train", "val", "test")):
        lines = []
        for place, variant in enumerate(("707-320", "Boeing 717")):
            name = f"{number}{place:06d}"
            write_image(folder / "images" / f"{name}.jpg", 80)
            lines.append(f"{name} {variant}\n")
        (folder / f"images_variant_{split}.txt").write_text("".join(lines))
    (folder / "variants.txt").write_text("707-320\nBoeing 717\n")


def write_all(root: Path) -> None:
    """Write each of the data sets."""
    for write in (write_cifar10, write_tiny_imagenet, write_flowers102, write_dtd, write_aircraft):
        write(root)
    for name in DOMAINS:
        write_domains(root, name)


def write_image(path: Path, size: int) -> None:
    """Write an image of random values that is wider than it is high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.rand(3, size, size if size == 64 else size + 6), path, format="jpeg")
