"""What the command line keeps of a network that it can't export, where other files and other runs are."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_easier.cli import keeping
from lightning_easier.cli.keeping import kept
from lightning_easier.command import main

TINY = """
import torch
from lightning.pytorch import LightningModule
from torch import nn

class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.net(x)

    def loader(self):
        return torch.utils.data.DataLoader(torch.linspace(-1, 1, 128).reshape(32, 4), 16)

    train_dataloader = val_dataloader = loader
"""
CONFIG = """
model: tiny.Tiny
trainer: {accelerator: cpu, enable_progress_bar: false, logger: false}
ckpt_path: null
"""
OPTIONS = ["--objective=macs", "--no-score", "--max_drift=10", "--samples=32"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The module of a folder that is the working one: it has a config and weights, and a space in its name."""
    folder = tmp_path / "of two  words"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    Path("tiny.py").write_text(TINY)
    Path("c.yaml").write_text(CONFIG)
    import tiny

    torch.save(tiny.Tiny().state_dict(), "weights.pt")
    yield tiny
    sys.modules.pop("tiny", None)


def failed(capsys, words) -> str:
    """Return the line that a command says why it fails in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-easier"))


def no_room(*_, **__):
    raise OSError(28, "no room. Make some.")


def test_the_fitted_network_may_be_called_as_what_is_kept(tiny):
    main(["compress", "--config=c.yaml", *OPTIONS, "--output=m.pt2", "--fitted=./m.pt2.pt"])
    assert isinstance(torch.load("m.pt2.pt", weights_only=False), tiny.Tiny)
    assert not Path("m.pt2.1.pt").exists()


def test_the_command_that_is_told_runs_as_it_is_copied(tiny, capsys, monkeypatch):
    output = Path.cwd() / "a folder that is " / ("long" * 50) / ("long" * 50) / "m.pt2"
    with monkeypatch.context() as patch:
        patch.setattr("lightning_easier.cli.commands.export_network", no_room)
        told = failed(capsys, ["collapse", "--config=c.yaml", "--ckpt_path=weights.pt", f"--output={output}"])
    words = shlex.split(re.search("`(export .*?)`", told)[1])
    main(["c.yaml" if word == "FILE" else word for word in words])
    assert sorted(each.name for each in output.parent.iterdir()) == ["m.pt2", "m.pt2.pt"]


def test_a_report_without_room_does_not_hide_where_the_network_is(tiny, capsys, monkeypatch):
    monkeypatch.setattr("lightning_easier.cli.commands.export_network", no_room)
    monkeypatch.setattr("lightning_easier.cli.commands.save_report", no_room)
    told = failed(capsys, ["collapse", "--config=c.yaml", "--ckpt_path=weights.pt", "--output=m.pt2", "--report=r.md"])
    assert "no room. Make some. The network is kept in m.pt2.pt" in told
    assert "The report could not be shown, either: OSError" in told


def test_two_at_once_keep_their_own(tmp_path, monkeypatch):
    output, save = tmp_path / "m.pt2", keeping.save_whole

    def save_while_another_run_does(network, path):
        monkeypatch.setattr(keeping, "save_whole", save)
        with pytest.raises(OSError, match="no room"), kept(nn.Linear(1, 1), output, lambda: False):
            no_room()
        save(network, path)

    monkeypatch.setattr(keeping, "save_whole", save_while_another_run_does)
    with pytest.raises(OSError, match="no room"), kept(nn.Linear(2, 2), output, lambda: False):
        no_room()
    found = {torch.load(each, weights_only=False).in_features for each in tmp_path.iterdir()}
    assert found == {1, 2}


def test_a_link_to_what_is_not_there_stays(tmp_path):
    link = tmp_path / "m.pt2.pt"
    link.symlink_to("not there")
    with kept(nn.Linear(1, 1), tmp_path / "m.pt2", lambda: True):
        assert (tmp_path / "m.pt2.1.pt").is_file()
    assert [*tmp_path.iterdir()] == [link]
    assert link.is_symlink()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_what_is_not_kept_whole_is_not_there(kind, tmp_path, monkeypatch):
    def fail(network, path):
        path.write_bytes(b"half")
        raise kind

    monkeypatch.setattr(keeping, "save_whole", fail)
    with pytest.raises(kind) as raised, kept(nn.Linear(1, 1), tmp_path / "m.pt2", lambda: False):
        raise kind("in the block")
    assert [*tmp_path.iterdir()] == []
    assert ("could not be kept" in "".join(getattr(raised.value, "__notes__", ()))) == (kind is OSError)


@pytest.mark.parametrize("name", ["--config", "-c"])
def test_a_checkpoint_that_a_config_has_another_for_is_not_left_out_silently(tiny, name, capsys):
    Path("other.yaml").write_text(CONFIG.replace("null", "weights.pt"))
    told = failed(capsys, ["candidates", "--ckpt_path=best.pt", name, "other.yaml"])
    assert "`--ckpt_path` to come after `--config`, but got `--ckpt_path best.pt` before it" in told
    assert "a `ckpt_path` of its own, weights.pt, which took its place" in told
    main(["candidates", "--ckpt_path=weights.pt", name, "other.yaml"])  # the same
    main(["candidates", name, "other.yaml", "--ckpt_path=best.pt", "--ckpt_path=Null"])
    main(["candidates", "--ckpt_path=NULL", name, "c.yaml"])


def test_what_holds_no_network_of_python_says_so(tiny, capsys):
    torch.jit.save(torch.jit.trace(nn.Linear(4, 2), torch.ones(1, 4)), "scripted.pt")
    torch.save(tiny.Tiny(), "whole.pt")
    own = ["export", "--config=c.yaml", "--weights_only=false", "--output=m.pt2", "--ckpt_path"]
    assert "scripted.pt holds a RecursiveScriptModule and no state dict" in failed(capsys, [*own, "scripted.pt"])
    Path("tiny.py").write_text(TINY.replace("Tiny", "Renamed"))
    Path("c.yaml").write_text(CONFIG.replace("Tiny", "Renamed"))
    del sys.modules["tiny"]
    told = failed(capsys, [*own, "whole.pt"])
    assert "a class or function that it names is not found (AttributeError: " in told
    assert "cut short" not in told
