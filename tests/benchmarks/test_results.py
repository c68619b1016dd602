"""The file of results: what is measured again takes its place, and what is slower than before is told from noise."""

import json
from dataclasses import replace

import results
from questions import Bar, Measurement, Quartiles


def measured(case, *quartiles):
    return Measurement("scale", "q", case, "new", "old", "cpu", 1, "full", ratio=Quartiles(*quartiles), bar=Bar(1.05))


def test_what_is_measured_again_takes_the_place_of_what_was_there(tmp_path):
    machine, versions = {"processor": "x", "cores": 2}, {"torch": "2"}
    first, second = measured("first", 1.0, 1.1, 1.2), measured("second", 1.0, 1.1, 1.2)
    before = results.Results(tmp_path, machine, versions)
    before.add([first, second])
    before.add_table("curve", "| 1 |")
    anew = replace(first, samples=99, bounds=(1.0, 1.2), memory=5)
    results.Results(tmp_path, machine, versions).add([anew])
    there = results.read(tmp_path / "results.json")
    assert there.measurements == [anew, second]
    failed = replace(second, variant="", failure="was stopped")
    before.add([failed])
    assert before.measurements == [first, failed]
    before.add([second])
    assert before.measurements == [first, second]
    assert there.tables == {"curve": "| 1 |"}
    assert not results.Results(tmp_path, machine | {"cores": 99}, versions).measurements
    assert not results.Results(tmp_path, machine, {"torch": "3"}).measurements


def test_slower_is_what_is_so_by_more_than_the_spread():
    spread, none = (1.0, 1.05, 1.1), (1.0, 1.0, 1.0)
    before, after = (results.Results(None, {"processor": "x", "cores": 2}, {}) for _ in range(2))
    before.add(measured(case, *spread) for case in ("slower", "as wide", "faster"))
    before.add(measured(case, *none) for case in ("by a hair", "gone"))
    after.add(
        [measured("slower", 1.2, 1.25, 1.3), measured("as wide", 1.05, 1.2, 1.4), measured("faster", 0.5, 0.5, 0.5)]
    )
    after.add([measured("by a hair", 1.01, 1.01, 1.01), measured("new", 9.0, 9.0, 9.0)])
    table = results.slower(after, before)
    assert [row[1] for row in table.rows] == ["slower"]
    assert table.title.startswith("1 of 4 measurements")
    assert "another machine" not in table.title
    before.machine["cores"] = 4
    assert "another machine" in results.slower(after, before).title


def test_results_of_other_versions_may_have_other_fields(tmp_path):
    machine = {"processor": "x", "cores": 2}
    results.Results(tmp_path, machine, {"torch": "2"}).add([measured("first", 1.0, 1.1, 1.2)])
    file = tmp_path / "results.json"
    written = json.loads(file.read_text())
    for each in written["measurements"]:
        each["another field"] = each.pop("samples")
    file.write_text(json.dumps(written))
    later = results.Results(tmp_path, machine, {"torch": "3"})
    assert not later.measurements
    second = measured("second", 1.0, 1.1, 1.2)
    later.add([second])
    assert results.read(file).measurements == [second]
    del written["machine"]
    file.write_text(json.dumps(written))
    assert not results.Results(tmp_path, machine, {"torch": "2"}).measurements
