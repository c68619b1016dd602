"""Real networks give the rows that docs/networks.md has of them."""

import pytest

from tests.network_table import COLUMNS, PATH, rendered, row
from tests.networks import NETWORKS


@pytest.fixture(scope="module")
def documented() -> list[str]:
    return PATH.read_text().splitlines()


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_real_network_gives_the_row_that_is_documented(network, documented):
    if not network.installed:
        pytest.skip(f"{network.library} is not installed")
    cells = row(network)
    assert rendered(cells) in documented
    facts = dict(zip(COLUMNS, cells, strict=True))
    assert facts["difference"] == "0"
    found, _, called = facts["finite entropies"].partition(" of ")
    assert found == called
    if not facts["notes"]:
        assert facts["calls"] == facts["sites"] == called


def test_the_document_holds_these_networks_and_no_others(documented):
    rows = [line.split(" | ")[0].removeprefix("| ") for line in documented if line.startswith("| t")]
    assert rows == [f"{network.library} {network.name}" for network in NETWORKS]
