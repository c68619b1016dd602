"""What several processes have is put together: bit for bit, whatever they have seen, in one communication."""

from functools import reduce

import pytest
import torch
from torch import Tensor, nn

from lightning_easier.collapsing.fit.chain_fits import ChainProbe
from lightning_easier.measure.affines import _merged
from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.support.processes import gather_from_processes, sum_over_processes
from tests.forks import run_together
from tests.once import made_once

WORLD = 3
# Rank 1 gets no batch.
SHARDS = (slice(0, 20), slice(0, 0), slice(20, 43))
# A float32 can't hold the first, nor a float64 the second.
LARGE = 2**24 + 1, 2**53 + 1


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3)).double().eval()
    isolated_sites(model)
    return model


def shard(rank: int) -> list[Tensor]:
    values = torch.randn(43, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2
    return [batch for batch in values[SHARDS[rank]].split(8) if len(batch)]


def what_a_process_has(rank: int) -> list[Tensor]:
    """Other sizes on each, several dtypes and numbers of axes."""
    return [
        torch.tensor([value + rank for value in LARGE]),
        torch.full((rank, 3), -0.0, dtype=torch.float64),
        torch.tensor(0.1 + rank),
        torch.arange(rank, dtype=torch.float16),
    ]


def probed(rank: int) -> tuple[EntropyProbe, ChainProbe]:
    """Measure what one process sees."""
    model = make_model()
    sites = isolated_sites(model)
    entropies = EntropyProbe(sites, affines=True)
    chains = ChainProbe(model, [site.name for site in sites], 6)
    with entropies, chains, torch.inference_mode():
        for batch in shard(rank):
            model(batch)
    return entropies, chains


def sums_of(chains: ChainProbe) -> list[list[Tensor]]:
    return [
        [
            each
            for sums in (seen.moments.fitted, seen.moments.held_out)
            for each in (sums.gram, sums.cross, sums.squares)
        ]
        for seen in chains._seen
    ]


def run_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    gathered = gather_from_processes(what_a_process_has(rank))
    summed = sum_over_processes([torch.tensor(LARGE), torch.full((2, 3), 0.1 * rank), torch.tensor(rank)])
    entropies, chains = probed(rank)
    called: list[int] = []
    gather = torch.distributed.all_gather
    torch.distributed.all_gather = lambda *args, **kwargs: called.append(rank) or gather(*args, **kwargs)
    counts = entropies.counts()
    torch.distributed.all_gather = gather
    affines = entropies.affines()
    chains.reduce()
    numbers = [(seen.calls, seen.moments.samples, int(seen.moments.left_out)) for seen in chains._seen]
    affines = {name: fit.to_plain() for name, fit in affines.items()}
    torch.save((gathered, summed, counts, affines, sums_of(chains), numbers, len(called)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory, forked):
    def make(folder):
        run_together([forked.Process(target=run_on_rank, args=(rank, str(folder))) for rank in range(WORLD)])

    folder = made_once(tmp_path_factory, "processes", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def bits(value: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_what_is_gathered_is_what_each_process_had_bit_for_bit(on_ranks):
    expected = [[bits(each) for each in what_a_process_has(rank)] for rank in range(WORLD)]
    for gathered, *_ in on_ranks:
        assert [[bits(each) for each in of_one] for of_one in gathered] == expected


def test_sums_are_in_their_own_dtypes(on_ranks):
    for _, (large, values, scalar), *_ in on_ranks:
        assert large.tolist() == [3 * value for value in LARGE]
        torch.testing.assert_close(values, torch.full((2, 3), 0.3))
        assert (scalar.item(), scalar.dtype, scalar.shape) == (3, torch.int64, ())


def test_counts_and_affines_go_together_in_the_order_of_the_ranks_in_one_communication(on_ranks):
    alone = [probed(rank)[0].counts() for rank in range(WORLD)]
    for _, _, counts, affines, _, _, communications in on_ranks:
        assert communications == 2  # of sizes, and of what there is
        for name in ("1", "3"):
            for kind in ("on", "off"):
                assert torch.equal(counts[name][kind], alone[0][name][kind] + alone[2][name][kind])
            merged = reduce(_merged, [alone[rank][name]["affine"] for rank in (0, 2)])
            assert bits(counts[name]["affine"]) == bits(merged)
            assert (counts[name]["calls"], counts[name]["samples"], counts[name]["left_out"]) == (3, 43, 0)
            assert affines[name]["scale"].isfinite().all()


def test_sums_of_chains_add_up_and_count_passes_and_samples(on_ranks):
    alone = [sums_of(probed(rank)[1]) for rank in range(WORLD)]
    for *_, sums, numbers, _ in on_ranks:
        assert numbers == [(6, 43, 0)] * 2
        for place, parts in enumerate(sums):
            for part, *mine in zip(parts, *(each[place] for each in alone), strict=True):
                torch.testing.assert_close(part, mine[0] + mine[1] + mine[2])
        assert [[bits(each) for each in parts] for parts in sums] == [
            [bits(each) for each in parts] for parts in on_ranks[0][4]
        ]


def test_one_process_alone_has_what_it_has():
    mine = what_a_process_has(2)
    assert [bits(each) for each in gather_from_processes(mine)[0]] == [bits(each) for each in mine]
    assert [bits(each) for each in sum_over_processes(mine)] == [bits(each) for each in mine]
    assert gather_from_processes([]) == [[]]
    assert EntropyProbe([]).counts() == {}
