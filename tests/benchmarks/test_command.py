"""``python -m benchmarks``: every part ends in one table and one file, and what fails or makes no sense is told."""

import json
import math
import os
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import answers
import children
import command
import pytest
import results
import torch
from questions import Case, Question, Variant

from tests.benchmarks.tiny import rows_of


def test_every_part_runs_and_is_in_one_table_and_one_file(tmp_path, monkeypatch, capfd):
    parts = ["gpu", "scale", "fitting"]  # that of tuning.py is run in test_tuning.py
    monkeypatch.setattr(sys, "argv", ["benchmarks", *parts, "--dry", "--threads", "1", "--output", str(tmp_path)])
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as the program sets it
    if torch.cuda.is_available():  # autograd may have threads here, one for each GPU, which a fork would not have
        monkeypatch.setattr(children, "_start_method", "spawn")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks", run_name="__main__")
    printed = capfd.readouterr()
    assert ended.value.code == 0, printed.err

    written = json.loads((tmp_path / "results.json").read_text())
    measured = written["measurements"]
    assert {each["part"] for each in measured} == set(answers.PARTS)
    for each in measured:
        assert (each["failure"], each["effort"], each["threads"]) == ("", "dry", 1)
        for figures in (each["seconds"], each["ratio"]):
            assert 0 < figures["median"] < math.inf
            assert figures["first"] <= figures["median"] <= figures["third"]
        assert each["samples"] == 2
        if each["against"] == each["variant"]:
            assert each["ratio"]["median"] == 1.0
        if each["part"] in ("measuring", "collapsing", "fitting", "large"):
            assert each["memory"] >= 0
    told = {each["variant"] for each in measured if each["part"] in ("measuring", "rounds")}
    assert told == {"plain", "all", "sample=0.1", "masks", "transport", "distillation"}
    assert os.uname().nodename not in json.dumps(written["machine"])
    assert set(written["machine"]) == {"processor", "cores"}
    assert written["versions"]["torch"] == metadata.version("torch")

    markdown = (tmp_path / "results.md").read_text()
    assert printed.out.endswith(f"{markdown}\n")
    titles = [line for line in markdown.splitlines() if line.startswith("**")]
    assert len(titles) == 2  # the table, and EASIER's curve
    assert len([line for line in markdown.splitlines() if line.startswith("| ")]) > len(measured)
    rounds = [cells for number, cells in rows_of(written["tables"]["curve"]).items() if number.isdigit()]
    assert len(rounds) == 3
    assert all(0 <= float(score) <= 100 for score, _ in rounds)


def test_cases_of_a_part_may_leave_something_for_the_next(monkeypatch):
    there = []

    def questions(effort):
        def make(device):
            there.append([file.name for file in Path(effort.folder).iterdir()])
            (Path(effort.folder) / str(len(there))).touch()
            return {"a": Variant(lambda: 1.0), "b": Variant(lambda: 1.0)}

        yield Question("question", (Case("first", make, has_memory=False), Case("second", make, has_memory=False)))

    monkeypatch.setitem(sys.modules, "a_part", SimpleNamespace(questions=questions))
    monkeypatch.setitem(answers.PARTS, "a part", "a_part")
    monkeypatch.setattr(answers, "in_child", lambda function, *arguments, seconds: function(*arguments))
    # not that of a process of its own: levels of loggers, filters and the allocator are those of all tests
    monkeypatch.setattr(answers.Setting, "prepare", lambda self: torch.device(self.device))
    monkeypatch.setattr(answers, "give_back_freed_memory", lambda: None)
    monkeypatch.setattr(answers, "keep_freed_memory", lambda: None)
    for _ in range(2):  # what is left is gone when the part is done
        there.clear()
        measured = [*answers.answers(answers.Setting("a part", "cpu", torch.get_num_threads(), "dry", None))]
        assert [each.case for case in measured for each in case] == ["first", "first", "second", "second"]
        assert there == [[], ["1"]]


def test_what_fails_is_told_and_the_next_follows():
    setting = answers.Setting("collapsing", "cpu", 1, "dry", seconds=0.0)
    failures = [each.failure for measured in answers.answers(setting) for each in measured]
    assert failures == ["was stopped after 0 seconds"] * len(list(setting.cases()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measurings"], "expected parts to be some of"),
        (["measuring", "--batches", "3"], "unrecognized arguments: --batches 3"),
        (["profile", "tests"], "followed by one of measuring, compress, but got 'tests'"),
        (["--compare", "nowhere.json"], "there is no such file"),
        (["--quick", "--dry"], "not allowed with"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["measuring", "compress"])
def test_what_takes_the_most_time_is_listed(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_available():
        monkeypatch.setattr(children, "_start_method", "spawn")
    assert command.main(["profile", what, "--dry", "--threads", "1", "--output", str(tmp_path)]) == 0
    table = results.read(tmp_path / "results.json").tables[f"profile {what}"]
    assert table in capsys.readouterr().out
    title, *_ = table.splitlines()
    assert title.startswith(f"**{what}: ")
    rows = {name: cells for name, cells in rows_of(table).items() if name not in ("operator", "---")}
    assert 10 < len(rows) <= 25
    assert any("conv" in name for name in rows)
    seconds, shares, calls = (list(map(float, column)) for column in zip(*rows.values(), strict=True))
    assert seconds == sorted(seconds, reverse=True)
    assert 50 < sum(shares) <= 101  # the rest is in operators that take less
    assert min(calls) >= 1
