"""Methods are compared after fine-tuning: the network is trained once, and what was cut short goes on where it was."""

from functools import partial

import networks
import pytest
import torch
import tuned
import tuning

from tests.benchmarks.tiny import Tiny, rows_of


def test_tuning_trains_a_network_without_weights_once_and_compares_what_is_made_of_it(run, tmp_path):
    weights = tmp_path / "tiny.th"
    compare = partial(
        run, tuning, Tiny, "--weights", str(weights), "--before", "3", "--after", "1", "--speedup", "1.1"
    )  # fmt: skip
    first = rows_of(compare("--methods", "dense", "compress", "blocks_kl", "blocks_cka", "practise"))
    assert set(first) == {"method", "---", "dense", "compress", "blocks_kl", "blocks_cka", "practise"}
    macs = {method: float(cells[2]) for method, cells in first.items() if method not in ("method", "---")}
    assert all(macs[method] < macs["dense"] for method in macs if method != "dense")
    trained = torch.load(weights, weights_only=True)["state_dict"]
    again = rows_of(compare("--methods", "dense"))
    assert again["dense"][0] == first["dense"][0]  # before tuning
    kept = torch.load(weights, weights_only=True)["state_dict"]
    assert all(torch.equal(kept[name], value) for name, value in trained.items())


def test_peers_end_with_as_many_steps_without_labels_as_compress(run, tmp_path, monkeypatch):
    steps, train = [], tuning.finetune

    def finetune(model, dense, names, batches, settings):
        done = train(model, dense, names, batches, settings)
        steps.append((settings.steps, done.steps, done.is_nearer))

    monkeypatch.setattr(tuning, "finetune", finetune)
    options = "--weights", str(tmp_path / "tiny.th"), "--before", "3", "--speedup", "1.1", "--finetune", "20"
    compare = partial(run, tuning, Tiny, *options, "--methods", "dense", "blocks_kl")
    plain = rows_of(compare())
    assert not steps
    followed = rows_of(compare("--finetune-peers"))
    assert steps == [(20, 20, True)]
    assert followed["dense"][0] == plain["dense"][0]
    assert followed["blocks_kl"][2] == plain["blocks_kl"][2]  # the same blocks are gone


def test_tuning_goes_on_where_it_was_cut_short(run, tmp_path):
    folder = tmp_path / "kept"
    compare = partial(
        run, tuning, Tiny, "--weights", str(tmp_path / "tiny.th"), "--before", "3", "--keep", str(folder)
    )  # fmt: skip
    first = rows_of(compare("--methods", "dense", "magnitude"))
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "magnitude-0.pt").unlink()
    again = rows_of(compare("--methods", "dense", "magnitude", "identity", "--removed", "1"))
    assert set(again) == {"method", "---", "dense", "magnitude", "identity"}
    for method in ("dense", "magnitude"):
        assert again[method][:3] == first[method][:3]
    assert (folder / "dense-0.pt").stat().st_mtime_ns == written["dense-0.pt"]
    assert (folder / "magnitude-0.pt").stat().st_mtime_ns != written["magnitude-0.pt"]


def test_tuning_refuses_what_can_not_be_made_of_a_network(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(
            tuning, Tiny, "--weights", str(tmp_path / "tiny.th"), "--methods", "dense", "scratch", unsuited=("scratch",)
        )
    assert "--methods scratch can't be made of a Tiny" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [partial(networks.vgg16, 1 / 32), partial(networks.vit, 1, 8, 2)], ids=["vgg", "vit"])
def test_networks_of_the_benchmarks_take_small_images(build):
    model, images = build(), torch.randn(3, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (3, 10)
    assert (logits[0] - logits[1]).abs().max() > 1e-6
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_part_that_calls_tuning_returns_its_table_alone():
    table = tuned.run_dry()
    assert table.startswith("**Tiny, ")
    assert set(rows_of(table)) == {"method", "---", "dense", "identity"}
    assert "tiny" not in networks.NETWORKS
