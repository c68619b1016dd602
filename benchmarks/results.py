"""What was measured, as one Markdown table and one JSON, and what has become slower since another."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from questions import YARDSTICK, Measurement, Quartiles, is_slower

from lightning_easier.report import Table

_PACKAGES = ("lightning-easier", "torch", "lightning", "torchvision", "timm", "onnxruntime")
_COLUMNS = ("question", "case", "variant", "seconds (quartiles)", "time (quartiles)", "memory [MiB]", "memory", "bar")


def machine(device: str) -> dict[str, Any]:
    """Return what the operating system calls the processor, and the accelerator where one is used; no other names."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processor": _processor(), "cores": cores}
    if device == "cuda":
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of what is installed, and the commit of the checkout where there is one."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    with suppress(OSError):
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        if commit := subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip():
            found["commit"] = commit
    return found


class Results:
    """What was measured on one machine; what is added is written at once.

    Args:
        folder: Where ``results.md`` and ``results.json`` go; what was measured there by the same versions on the same
            machine is kept. Nothing is written by default.
        machine: What the machine is called.
        versions: Of what is installed.
    """

    def __init__(self, folder: Path | None, machine: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        self.machine, self.versions, self._folder = dict(machine), dict(versions), folder
        self._cases: dict[tuple[str, ...], list[Measurement]] = {}
        self.tables: dict[str, str] = {}
        if folder is not None and (file := folder / "results.json").exists():
            plain = json.loads(file.read_text())
            # Compared first: what others have written may have other fields
            if (plain.get("machine"), plain.get("versions")) == (self.machine, self.versions):
                self._take(plain)

    @property
    def measurements(self) -> list[Measurement]:
        """All that was measured, case by case."""
        return [each for case in self._cases.values() for each in case]

    def add(self, measurements: Iterable[Measurement]) -> None:
        """Note measurements, in the place of earlier ones of the same cases."""
        self._note(measurements)
        self._write()

    def add_table(self, name: str, markdown: str) -> None:
        """Note a table that another program has written."""
        self.tables[name] = markdown
        self._write()

    def _take(self, plain: Mapping[str, Any]) -> None:
        """Take what was written as plain data."""
        self._note(Measurement.of(each) for each in plain["measurements"])
        self.tables = plain["tables"]

    def _note(self, measurements: Iterable[Measurement]) -> None:
        cases: dict[tuple[str, ...], list[Measurement]] = {}
        for each in measurements:
            cases.setdefault(each.case_key, []).append(each)
        self._cases |= cases

    def _write(self) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("results.json", self.to_json()), ("results.md", self.to_markdown())):
            unfinished = self._folder / f"{name}.part"
            unfinished.write_text(text)
            unfinished.replace(self._folder / name)  # whoever stops this finds one or the other

    def to_json(self) -> str:
        """Return JSON."""
        measurements = [asdict(each) for each in self.measurements]
        plain = {
            "machine": self.machine,
            "versions": self.versions,
            "measurements": measurements,
            "tables": self.tables,
        }
        return json.dumps(plain, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return the table, and those of other programs after it."""
        return "\n\n".join([self.table().to_markdown(), *self.tables.values()]) + "\n"

    def table(self) -> Table:
        """Return all in one table."""
        rows, last = [], ("", "")
        settings = sorted({(each.device, each.threads, each.effort) for each in self.measurements})
        for each in self.measurements:
            heads = (
                each.question,
                each.case + (f", {each.device}" if len({device for device, *_ in settings}) > 1 else ""),
            )
            shown = ("" if heads[0] == last[0] else heads[0], "" if heads == last else heads[1])
            rows.append((*shown, each.variant, *_cells(each)))
            last = heads
        what = [f"{device}, {threads} threads, {effort}" for device, threads, effort in settings]
        names = [str(value) for key, value in self.machine.items() if key != "cores"]
        title = "; ".join([*names, f"{self.machine['cores']} cores", *what])
        return Table(f"{title}; {', '.join(map(' '.join, self.versions.items()))}", _COLUMNS, rows)


def read(path: Path) -> Results:
    """Read what was written as JSON."""
    plain = json.loads(path.read_text())
    results = Results(None, plain["machine"], plain["versions"])
    results._take(plain)
    return results


def slower(new: Results, old: Results) -> Table:
    """Return what takes longer than it did by more than the spread explains; only what is alike is compared."""
    before = {each.key: each for each in old.measurements}
    rows = [
        (each.question, each.case, each.variant, _spread(before[each.key].ratio), _spread(each.ratio))
        for each in new.measurements
        if each.key in before and is_slower(each, before[each.key])
    ]
    known = sum(each.key in before for each in new.measurements)
    note = "" if old.machine == new.machine else "; the earlier ones are of another machine"
    title = f"{len(rows)} of {known} measurements that both have are slower by more than the spread{note}"
    return Table(title, ("question", "case", "variant", "was", "is"), rows)


def _cells(each: Measurement) -> tuple[str, str, str, str, str]:
    if each.failure:
        return "–", "–", "–", "–", f"failed: {each.failure}"
    ratio = "" if each.against in (YARDSTICK, each.variant) else _spread(each.ratio)
    memory = "–" if each.memory is None else f"{each.memory / 2**20:,.1f}"
    more = "" if each.memory_ratio is None or not ratio else f"{each.memory_ratio:.3f}×"
    return _seconds(each.seconds), ratio, memory, more, "; ".join(each.verdicts())


def _spread(quartiles: Quartiles | None) -> str:
    if quartiles is None:
        return "–"
    return f"{quartiles.median:.3f}× ({quartiles.first:.3f}–{quartiles.third:.3f})"


def _seconds(quartiles: Quartiles | None) -> str:
    if quartiles is None:
        return "–"
    return f"{quartiles.median:.4g} ({quartiles.first:.4g}–{quartiles.third:.4g})"
