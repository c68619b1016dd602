"""Runs the code blocks of a page as they stand, one after the other, in shorter runs."""

import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_easier.command import main
from lightning_easier.zoo import DigitsDataModule, ImageClassifier
from tests.tiny_data import write_domains

ROOT = Path(__file__).parents[2]
NOT_RUN = 'title="not run here: '
_FENCE = re.compile(r"^( *)```([\w-]*)[ \t]*([^\n]*)\n(.*?)^\1```[ \t]*$", re.MULTILINE | re.DOTALL)
# Fewer epochs of fewer batches, none of which is judged
SHORTER = {
    "fit": [
        "--trainer.max_epochs=4", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
        "--trainer.callbacks.rounds.warmup_epochs=0", "--trainer.callbacks.rounds.epochs=1",
        "--trainer.callbacks.tolerance=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ],
    "validate": ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
    "test": ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
    "predict": ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
    "collapse": ["--trainer.accelerator=cpu", "--objective=macs"],
    "export": ["--trainer.accelerator=cpu", "--objective=macs"],
    "candidates": ["--trainer.accelerator=cpu"],
    "compress": [
        "--trainer.accelerator=cpu", "--objective=macs", "--tolerance=1", "--samples=64", "--max_minutes=0.04",
    ],
}  # fmt: skip
# Page -> what makes the data that its commands read, and what else makes them short
ON_DATA: dict[str, tuple[Callable[[], None], Sequence[str]]] = {
    "settings.md": (
        lambda: write_domains(Path("data"), "PACS"),
        ["--trainer.fast_dev_run=true", "--data.num_workers=0", "--data.batch_size=2", "--data.image_size=32"],
    ),
}


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: What stands right after the fence.
        title: The rest of that line; a block with one is shown, not run.
        text: What is in it.
        line: The line before its first, counted from 1.
    """

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return all fenced blocks of a page, those in tabs and notes among them."""
    text = page.read_text()
    return [
        Block(found[2], found[3].strip(), textwrap.dedent(found[4]), text[: found.start(4)].count("\n"))
        for found in _FENCE.finditer(text)
    ]


def names() -> dict[str, Any]:
    """Return what the pages take for given: a model, its data, a few batches, a score."""
    data = DigitsDataModule(batch_size=64)
    data.prepare_data()
    data.setup("validate")
    batches = [images for images, _ in data.val_dataloader()][:4]

    @torch.no_grad()
    def accuracy(model):
        hits = [model(images).argmax(-1) == labels for images, labels in data.val_dataloader()]
        return float(torch.cat(hits).double().mean())

    model = ImageClassifier("fused_resnet", backbone_args={"in_channels": 1, "widths": [4, 8]}, lr=0.05)
    return {"model": model, "data": data, "batches": batches, "images": batches[0], "accuracy": accuracy,
            "MyModule": ImageClassifier}  # fmt: skip


def run(
    page: Path,
    given: dict[str, Any],
    replaced: Mapping[str, str] | None = None,
    languages: Collection[str] = ("python", "bash"),
) -> int:
    """Run the blocks of a page in the folder that the process is in.

    Args:
        page: The page.
        given: Names that the Python blocks know; what they define is added.
        replaced: Text -> what runs in its place, to make a run shorter; each has to occur.
        languages: Which blocks.

    Returns:
        How many blocks ran.
    """
    write, options = ON_DATA.get(page.name, (None, ()))
    if write is not None:
        write()
    unused = set(replaced or {})
    ran = 0
    for block in blocks(page):
        if block.title or block.language not in languages:
            continue
        text = block.text
        for old, new in (replaced or {}).items():
            unused -= {old} if old in text else set()
            text = text.replace(old, new)
        if block.language == "bash":
            for command in commands(text):
                _run_command(command, options)
        else:
            _run_python(text, block.line, page, given)
        ran += 1
    assert not unused, f"{page.name} has no {sorted(unused)} to replace"
    return ran


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def _run_python(text: str, line: int, page: Path, given: dict[str, Any]) -> None:
    shorter = re.sub(r"(max_epochs|epochs)=(\d+)", lambda found: f"{found[1]}={min(int(found[2]), 1)}", text)
    shorter = re.sub(r"max_epochs=1(, callbacks)", r"max_epochs=3\1", shorter)
    before = dict(given)
    exec(compile("\n" * line + shorter, str(page), "exec"), given)
    if "pruning =" in text and ".fit(" not in text and "pruning" in before:  # another, that no Trainer has run
        given["pruning"] = before["pruning"]


def _run_command(words: Sequence[str], options: Sequence[str]) -> None:
    """Run what is ours; of an installation, look whether there is the extra, of `make` whether there is the target."""
    place = words.index(">") if ">" in words else len(words)
    words, file = words[:place], words[place + 1 :]
    if words[0] == "lightning-easier":
        shorter = [each for each in (*SHORTER.get(words[1], ()), *options) if each.partition("=")[0] not in words]
        written = [Path(Path(each).name) for each in file]  # in the folder that the process is in
        with written[0].open("w") if written else nullcontext(sys.stdout) as output, redirect_stdout(output):
            try:
                main([*words[1:], *shorter])
            except SystemExit as ended:  # as after `--version`
                if ended.code:
                    raise
        assert all(each.stat().st_size for each in written), words
    elif words[:2] == ["pip", "install"]:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for extras in wanted for extra in extras.split(",")} <= set(known), words
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    else:
        raise AssertionError(f"{words} is neither ours nor an installation: what runs it?")
