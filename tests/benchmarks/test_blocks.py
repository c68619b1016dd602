"""Blocks are taken out of networks that were trained with the regularizer of LaCoOT and without, then all are tuned."""

import re

import blocks

SHORT = ["--epochs", "1", "--images", "128", "--held_out", "32", "--batch", "32", "--directions", "4"]


def test_blocks_are_taken_out_tuned_and_timed_beside_what_is_as_fast(tables, tmp_path, monkeypatch):
    given = ["--output", str(tmp_path), *SHORT, "--regularizers", "0", "2", "--most", "1", "--tuned", "1"]
    trained, train = [], blocks.train
    monkeypatch.setattr(blocks, "train", lambda weight, *rest: trained.append(weight) or train(weight, *rest))
    ((title, (head, *rows)),) = tables(blocks, *given).items()
    assert trained == [0.0, 2.0]
    assert title == "ResNet-8, 1 epochs of 128 images, then 1 of tuning"
    assert head[1:] == ["taken out", "top-1 [%]", "tuned", "faster, batch 1", "faster, batch 64"]
    table = {name: cells for name, *cells in rows}
    (wanted,) = (name for name in table if name.startswith("compress"))
    assert list(table) == [
        "dense", "0, 0 taken out", "0, 1 taken out", "2, 0 taken out", "2, 1 taken out", "dense, tuned",
        "0, 1 taken out, tuned", "2, 1 taken out, tuned", wanted, "easier, 1 linear, tuned",
    ]  # fmt: skip
    for name, (number, before, after, *_) in table.items():
        assert (after == "–") == (not name.endswith("tuned"))
        assert number == ("0" if "0 taken" in name or name.startswith("dense") else "1")
        assert 0 <= float(before) <= 100
    for weight in "02":  # the same network, tuned or not
        assert table[f"{weight}, 1 taken out, tuned"][1] == table[f"{weight}, 1 taken out"][1]
    assert table["0, 0 taken out"] == table["dense"]
    # by a clock that counts work
    faster = {name: [float(cell.split()[0]) for cell in cells[3:]] for name, cells in table.items()}
    assert faster["dense"] == faster["dense, tuned"] == [1.0, 1.0]
    assert min(faster["0, 1 taken out"]) > 1.2
    assert faster["0, 1 taken out"] == faster["2, 1 taken out, tuned"]
    (speed,) = re.findall(r"compress, ([\d.]+)× wanted", wanted)
    assert float(speed) == faster["0, 1 taken out"][1]
    assert min(faster[wanted]) > 1.1
    assert max(faster["easier, 1 linear, tuned"]) < 1.05

    again = {name: cells for name, *cells in next(iter(tables(blocks, *given, "--tuned").values()))[1:]}
    assert trained == [0.0, 2.0]  # nothing is trained again
    assert again["2, 1 taken out"] == table["2, 1 taken out"]
