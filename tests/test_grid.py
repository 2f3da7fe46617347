"""V G V' with more slices or ranks than sequences: the same numbers on any grid, and the work shared."""

import itertools

import numpy as np
import pytest
from test_objective import make, relative

from hfmpi.data.batches import shard
from hfmpi.errors import UserError
from hfmpi.networks.tape import Tape
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.objective.grid import groups
from hfmpi.parallel.communicator import Communicator, MPICommunicator, digest

DIRECTIONS, MOST = 11, 2
"""How many there are, and how many a pass takes: six parts."""


def sliced(communicator, slices, dtype="float64", backend="numpy"):
    owner, sequences, theta = make(comm=communicator, dtype=dtype, backend=backend)
    owner = DataParallel(owner.model, communicator, slices=slices)
    owner.model.backend.directions = MOST
    v = np.random.default_rng(3).standard_normal((DIRECTIONS, theta.size)).astype(dtype)
    return owner, sequences, theta, v


@pytest.mark.parametrize(("slices", "ranks"), [(8, 1), (8, 2), (8, 4), (8, 8), (7, 7), (3, 3), (2, 2)])
def test_groups_share_all_of_an_example(slices, ranks):
    for examples in range(1, slices + 1):
        every, indices = groups(examples, slices, ranks), np.arange(examples)
        assert len(every) == examples
        assert [group.first for group in every] == [0, *(group.last for group in every[:-1])]
        assert every[-1].last == slices
        for i, group in enumerate(every):
            owners = [s for s in range(slices) if i in shard(indices, s, slices)]
            assert owners == [group.last - 1]
            own = [s for rank in group.ranks for s in group.slices(rank)]
            assert own == [*range(group.first, group.last)]
            parts = [part for rank in group.ranks for part in group.parts(rank, [*range(6)])]
            assert parts == [*range(6)]
            for count in (1, 5, 200):
                outputs = [group.outputs(group.slices(rank), count) for rank in group.ranks]
                ends = [0, *(part.stop for part in outputs)]
                assert [(part.start, part.stop) for part in outputs] == [*itertools.pairwise(ends)]
                assert ends[-1] == count
        others = [rank for rank in range(ranks) if not any(group.slices(rank) for group in every)]
        assert others == []


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("examples", [1, 2, 3, 5])
def test_slices_without_a_sequence_share_those_of_others(backend, dtype, examples):
    results = []
    for slices in (0, 2, 8):
        owner, sequences, theta, v = sliced(Communicator(), slices, dtype, backend)
        risk = owner.on(sequences, np.arange(examples))
        projection = risk.project(theta)
        results.append(projection(v))
        assert relative(projection(v[:1]), results[-1][:1, :1]) < 1e-5
        np.testing.assert_array_equal(results[-1], projection(v))
    for found in results[1:]:
        assert relative(found, results[0]) < (1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.mpi(ranks=4, timeout=100, unit="s")
def test_any_grid_has_the_same_numbers_and_shares_the_work(mpi_ranks, comm, monkeypatch):
    assert comm.size == mpi_ranks
    done, original = list[int](), Tape.jvp
    monkeypatch.setattr(Tape, "jvp", lambda self, v: done.append(len(v)) or original(self, v))
    for dtype, slices, examples in itertools.product(("float32", "float64"), (0, 4, 8), (1, 2, 3)):
        owner, sequences, theta, v = sliced(Communicator(), slices, dtype)
        expected = owner.on(sequences, np.arange(examples)).project(theta)(v)
        for ranks in (1, 2, 3, 4):
            if slices % ranks:
                continue
            part = comm.Split(color=comm.rank < ranks, key=comm.rank)
            if comm.rank < ranks:
                communicator = MPICommunicator(part)
                owner, sequences, theta, v = sliced(communicator, slices, dtype)
                done.clear()
                found = owner.on(sequences, np.arange(examples)).project(theta)(v)
                if slices:
                    np.testing.assert_array_equal(found, expected)
                assert relative(found, expected) < (1e-5 if dtype == "float32" else 1e-12)
                assert communicator.same(digest(found)) == []
                each = part.allgather(sum(done))
                if examples < (slices or ranks):  # they share the sequences
                    assert sum(each) == DIRECTIONS * examples
                if examples < ranks and ranks % examples == 0:
                    assert max(each) <= -(-6 * examples // ranks) * MOST
                communicator.close()
            part.Free()


@pytest.mark.mpi(ranks=3, timeout=60, unit="s")
def test_a_rank_that_fails_ends_all(mpi_ranks, comm):
    communicator = MPICommunicator(comm)
    owner, sequences, theta, v = sliced(communicator, 0)
    projection = owner.on(sequences, np.arange(1)).project(theta)
    expected = projection(v)
    if comm.rank == 1:
        original = owner.model.linearise
        owner.model.linearise = lambda *given: (_ for _ in ()).throw(UserError("no"))
    with pytest.raises(UserError, match="no"):
        projection(v)
    if comm.rank == 1:
        owner.model.linearise = original
    np.testing.assert_array_equal(projection(v), expected)
    communicator.close()
