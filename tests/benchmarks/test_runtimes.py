"""What networks are run in: what one case has made is read by the next, whatever its runtime or its batch."""

import copy
import math
from types import SimpleNamespace

import pytest
import runtimes
import torch
from fitting import tiny
from torch import nn


def test_what_is_collapsed_once_is_read_by_the_next(tmp_path, monkeypatch):
    x, file = torch.randn(2, 3, 8, 8), tmp_path / "collapsed.pt"
    original = tiny().eval()
    first = runtimes.networks_of(original, x, "macs", math.inf, file)
    monkeypatch.delattr(runtimes, "collapse")
    again = runtimes.networks_of(original, x, "macs", math.inf, file)
    expected = first["linearized"](x)
    assert not torch.allclose(original(x), expected)
    for models in (first, again):
        assert [*models] == ["original", "linearized", "collapsed"]
        torch.testing.assert_close(models["linearized"](x), expected)
        torch.testing.assert_close(models["collapsed"](x), expected)
        assert len([*models["collapsed"].modules()]) < len([*original.modules()])
    assert [*tmp_path.iterdir()] == [file]


def test_what_was_not_written_to_its_end_is_not_read(tmp_path, monkeypatch):
    def save(made, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    file = tmp_path / "collapsed.pt"
    monkeypatch.setattr(runtimes.torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        runtimes.networks_of(tiny().eval(), torch.randn(2, 3, 8, 8), "macs", math.inf, file)
    assert not file.exists()


def test_a_collapse_times_things_for_as_long_as_it_is_given(tmp_path, monkeypatch):
    left = []

    def collapse(model, x, objective, latencies):
        left.append(latencies.pace.left())
        return SimpleNamespace(model=model)

    clock = iter([10.0, 12.0])
    monkeypatch.setattr(runtimes, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(runtimes, "collapse", collapse)
    runtimes.networks_of(tiny().eval(), torch.randn(2, 3, 8, 8), "latency", 5.0, tmp_path / "collapsed.pt")
    assert left == [3.0]


def test_a_network_is_exported_once_for_batches_of_any_size(tmp_path, monkeypatch):
    model = tiny().eval()
    for size in (1, 3):
        x = torch.randn(size, 3, 8, 8)
        (output,) = runtimes._in_session(copy.deepcopy(model), x, tmp_path)()
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(runtimes, "export", no_export)
    same_weights = copy.deepcopy(model)
    same_weights[1] = nn.Tanh()
    for other in (tiny().eval(), same_weights):
        with pytest.raises(LookupError):
            runtimes._in_session(other, x, tmp_path)


def no_export(*arguments):
    raise LookupError


@pytest.mark.parametrize("is_left", [True, False])
def test_what_is_left_is_what_the_next_would_make(is_left, tmp_path, monkeypatch):
    given = {}

    def running(model, x, runtime, backend, folder):
        given.setdefault(len(x), []).append((model, folder))
        return lambda: None

    monkeypatch.setattr(runtimes, "_running", running)
    folder = str(tmp_path) if is_left else None
    for size in (2, 3):
        torch.manual_seed(size)
        runtimes._variants("tiny", tiny, (size, 3, 8, 8), "eager", torch.device("cpu"), objective="macs", folder=folder)
    for (one, there), (other, where) in zip(given[2][:2], given[3][:2], strict=True):
        assert (there == where == tmp_path) == is_left
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == ({"tiny, batch 2.pt", "tiny, batch 3.pt"} if is_left else set())
