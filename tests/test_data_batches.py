"""Sequences and global batches: each character is used once, the same on any number of ranks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfmpi.data.batches import Sequences, check_batch, curvature_slice, global_indices, shard
from hfmpi.data.dropout import Dropout
from hfmpi.data.noise import Noisy
from hfmpi.errors import UserError
from hfmpi.runs.checks import enough_text

counts = st.integers(1, 40)
seeds = st.integers(0, 2**40)


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    length, burn_in = draw(st.integers(1, 12)), draw(st.integers(0, 12))
    size = draw(st.integers(length + burn_in, 80))
    return (
        np.array(draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)), np.uint8),
        length,
        burn_in,
    )


@given(splits())
def test_a_sequence_is_the_text_read_as_a_ring(split: tuple[np.ndarray, int, int]) -> None:
    ids, length, burn_in = split
    sequences = Sequences(ids, length, burn_in)
    assert sequences.count == len(ids) // length
    inputs, targets, *_ = sequences.take(np.arange(sequences.count))
    for k in range(sequences.count):
        for t in range(length):
            assert targets[k, t] == ids[(k * length + t + 1) % len(ids)]
        for t in range(-burn_in, length):
            assert inputs[k, burn_in + t] == ids[(k * length + t) % len(ids)]


@given(splits())
def test_targets_are_the_inputs_one_later_and_every_character_is_one_target(
    split: tuple[np.ndarray, int, int],
) -> None:
    ids, length, burn_in = split
    sequences = Sequences(np.arange(len(ids)), length, burn_in)  # each character is its position
    inputs, targets, *_ = sequences.take(np.arange(sequences.count))
    assert inputs.shape == (sequences.count, burn_in + length)
    assert targets.shape == (sequences.count, length)
    assert np.array_equal(targets, (inputs[:, burn_in:] + 1) % len(ids))
    assert np.array_equal(targets[:, :-1], inputs[:, burn_in + 1 :])
    covered = (np.arange(sequences.count * length) + 1) % len(ids)
    assert np.array_equal(np.sort(targets, axis=None), np.sort(covered))


@given(splits(), st.floats(0, 1, exclude_max=True), seeds, counts)
def test_noise_is_that_of_seed_step_and_sequence(
    split: tuple[np.ndarray, int, int], share: float, seed: int, step: int
) -> None:
    ids, length, burn_in = split
    sequences = Sequences(ids, length, burn_in)
    noisy = Noisy(sequences, share, seed, step)
    everything = np.arange(sequences.count)
    whole, plain = noisy.take(everything), sequences.take(everything)
    assert noisy.count == sequences.count
    assert noisy.scored(everything) == sequences.scored(everything)
    assert np.array_equal(whole.targets, plain.targets)
    assert whole.inputs.dtype == plain.inputs.dtype
    assert whole.inputs.shape == plain.inputs.shape
    assert whole.inputs.flags.c_contiguous
    assert set(whole.inputs.reshape(-1)) <= set(ids)
    some = everything[::-2]
    assert np.array_equal(noisy.take(some).inputs, whole.inputs[some])
    assert noisy.take(everything[:0]).inputs.shape == (0, burn_in + length)
    assert np.array_equal(Noisy(sequences, 0.0, seed, step).take(everything).inputs, plain.inputs)
    with pytest.raises(IndexError):
        noisy.take(np.array([sequences.count]))


def test_noise_replaces_its_share_by_what_the_text_has() -> None:
    ids = np.repeat(np.array([0, 1, 2], np.uint8), [60_000, 30_000, 10_000])
    sequences = Sequences(ids, 100)
    everything, seen = np.arange(1_000), list[np.ndarray]()
    plain = sequences.take(everything).inputs
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        inputs = Noisy(sequences, 0.2, seed, step).take(everything).inputs
        for symbol, frequency in enumerate((0.6, 0.3, 0.1)):
            of = inputs[plain == symbol]
            assert (of != symbol).mean() == pytest.approx(0.2 * (1 - frequency), abs=0.01)
        zeros = inputs[(plain != 0) & (inputs != plain)]
        assert (zeros == 0).mean() > 0.6
        seen.append(inputs != plain)
    for i, one in enumerate(seen):
        for other in seen[i + 1 :]:
            assert (one & other).mean() == pytest.approx(one.mean() * other.mean(), abs=0.01)
    # Pinned: a run must resume with the noise of its version, whatever the version of NumPy.
    changed = Noisy(sequences, 0.2, 0, 0).take(np.array([7])).inputs != sequences.take(np.array([7])).inputs
    assert np.flatnonzero(changed)[:8].tolist() == [23, 25, 47, 65, 67, 73, 83, 85]


@given(splits(), st.floats(0, 0.99), seeds, counts)
def test_dropout_is_that_of_seed_step_and_sequence(
    split: tuple[np.ndarray, int, int], rate: float, seed: int, step: int
) -> None:
    ids, length, burn_in = split
    noisy = Noisy(Sequences(ids, length, burn_in), 0.3, seed, step)
    dropped = Dropout(noisy, rate, 2, 3, seed, step)
    everything = np.arange(noisy.count)
    batch, plain = dropped.take(everything), noisy.take(everything)
    assert dropped.count == noisy.count
    assert dropped.scored(everything) == noisy.scored(everything)
    assert np.array_equal(batch.inputs, plain.inputs)
    assert np.array_equal(batch.targets, plain.targets)
    assert batch.burn_in == burn_in
    assert batch.unit_scales.shape == (noisy.count, 2, 3)
    assert set(batch.unit_scales.reshape(-1)) <= {0, 1 / (1 - rate)}
    some = everything[::-2]
    assert np.array_equal(dropped.take(some).unit_scales, batch.unit_scales[some])
    with pytest.raises(IndexError):
        dropped.take(np.array([noisy.count]))


def test_dropout_drops_its_share_of_units_independently() -> None:
    sequences = Sequences(np.zeros(1000, np.uint8), 10)
    seen = list[np.ndarray]()
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        seen.append(Dropout(sequences, 0.2, 2, 200, seed, step).take(np.arange(100)).unit_scales)
        assert (seen[-1] == 0).mean() == pytest.approx(0.2, abs=0.01)
        assert seen[-1].mean() == pytest.approx(1, abs=0.01)
    layers = [each[:, i] == 0 for each in seen for i in (0, 1)]
    for i, one in enumerate(layers):
        for other in layers[i + 1 :]:
            assert (one & other).mean() == pytest.approx(0.04, abs=0.01)
    # Pinned, as for the noise.
    assert np.flatnonzero(seen[0][7, 1] == 0)[:8].tolist() == [5, 6, 15, 18, 36, 40, 42, 56]


def test_a_batch_is_int32_examples_first_and_contiguous() -> None:
    sequences = Sequences(np.arange(100, dtype=np.uint8), 10, 3)
    for indices in (np.array([4, 0, 4]), np.array([], np.int64)):
        batch = sequences.take(indices)
        assert batch.inputs.shape == (len(indices), 13)
        assert batch.targets.shape == (len(indices), 10)
        for part in batch[:2]:
            assert part.dtype == np.int32
            assert part.flags.c_contiguous
        assert batch.mask is None
        assert sequences.scored(indices) == batch.targets.size
    batch = sequences.take(np.array([4, 0, 4]))
    assert batch.inputs[1].tolist() == [97, 98, 99, *range(10)]
    assert np.array_equal(batch.inputs[0], batch.inputs[2])


def test_the_papers_sizes_make_the_papers_sequences() -> None:
    assert Sequences(np.zeros(2_800_000, np.uint8)).count == 14_000
    assert Sequences(np.zeros(200_000, np.uint8)).count == 1_000


@pytest.mark.parametrize("index", [-1, 10])
def test_a_sequence_that_is_not_there_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        Sequences(np.zeros(109, np.uint8), 10).take(np.array([0, index]))


@pytest.mark.parametrize(
    ("size", "length", "burn_in", "words"),
    [
        (
            199,
            200,
            0,
            "199 characters is too short for a sequence of 200: use a longer text, of at least 200",
        ),
        (200, 200, 1, "with a burn-in of 1: use a longer text, of at least 201"),
        (0, 1, 0, "too short"),
        (10, 0, 0, "out of range"),
        (10, 5, -1, "out of range"),
    ],
)
def test_a_split_without_a_sequence_is_one_sentence(size: int, length: int, burn_in: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sequences(np.zeros(size, np.uint8), length, burn_in)


@given(seeds, counts, st.data())
def test_every_epoch_draws_every_sequence_once(seed: int, count: int, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, count))
    steps = -(-3 * count // batch)
    stream = np.concatenate([global_indices(seed, step, batch, count) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(seeds, counts, st.integers(0, 10**9), st.data())
def test_the_batch_is_a_function_of_seed_and_step(
    seed: int, count: int, step: int, data: st.DataObject
) -> None:
    batch = data.draw(st.integers(1, count))
    first = global_indices(seed, step, batch, count)
    assert first.dtype == np.int64
    assert first.shape == (batch,)
    global_indices(seed + 1, step + 7, batch, count)  # independent of other calls in between
    assert np.array_equal(global_indices(seed, step, batch, count), first)


def test_seeds_and_epochs_differ() -> None:
    first = [global_indices(0, epoch, 100, 100).tolist() for epoch in range(3)]
    other = [global_indices(1, epoch, 100, 100).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in first + other}) == 6


def test_the_order_is_the_same_for_ever() -> None:
    # Runs must resume with the same batches under future versions of NumPy.
    assert global_indices(1, 0, 8, 8).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]
    assert global_indices(1, 1, 5, 8).tolist() == [6, 3, 1, *global_indices(1, 1, 8, 8)[:2]]


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_the_shards_of_any_number_of_ranks_are_the_batch(batch: list[int], size: int) -> None:
    indices = np.array(batch, dtype=object)
    shards = [shard(indices, rank, size) for rank in range(size)]
    assert np.concatenate(shards).tolist() == batch
    sizes = [len(part) for part in shards]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 30), st.integers(0, 1000), st.data())
def test_the_curvature_slice_gives_every_place_its_turn(
    gradient: int, step: int, data: st.DataObject
) -> None:
    curvature = data.draw(st.integers(1, gradient))
    places = curvature_slice(step, gradient, curvature)
    assert places.shape == (curvature,)
    assert places.dtype == np.int64
    assert len(set(places.tolist())) == curvature
    assert places[0] == step * curvature % gradient
    # `gradient` steps draw `curvature` times the gradient batch, whichever step is the first.
    drawn = np.concatenate([curvature_slice(step + k, gradient, curvature) for k in range(gradient)])
    assert np.bincount(drawn, minlength=gradient).tolist() == [curvature] * gradient


@pytest.mark.parametrize("batch", [0, 11, -1])
def test_a_batch_larger_than_the_data_is_one_sentence(batch: int) -> None:
    check_batch(1, 10)
    check_batch(10, 10)
    with pytest.raises(UserError, match="out of range: use 1 to 10, the number of sequences"):
        check_batch(batch, 10)
    with pytest.raises(UserError, match="use 1 to 10, the gradient batch size"):
        curvature_slice(0, 10, batch)


@given(st.tuples(*[st.integers(1, 60)] * 3), st.integers(0, 60), st.integers(1, 60), st.integers(0, 60))
def test_one_sentence_names_all_options_that_are_too_large(
    sizes: tuple[int, int, int], burn_in: int, gradient: int, curvature: int
) -> None:
    train, valid, length = sizes
    corpus = Path("small.h5"), train, valid
    most: dict[str, int] = {}
    try:
        enough_text(*corpus, length, burn_in, gradient, curvature)
    except UserError as error:
        found = re.findall(r"(--[a-z-]+)( and --burn-in together)? can be at most (\d+)", str(error))
        most = {option: int(number) for option, _, number in found}
    # The largest values work together, and unnamed options work unchanged.
    if "--sequence-length" in most:
        both = most["--sequence-length"]
        assert both == min(train, valid) < length + burn_in
        length = both - burn_in if burn_in < both else min(length, both)
        burn_in = min(burn_in, both - length)
    assert most.get("--gradient-batch", 0) < gradient
    count = Sequences(np.zeros(train, np.uint8), length, burn_in).count
    assert Sequences(np.zeros(valid, np.uint8), length, burn_in).count
    gradient = most.get("--gradient-batch", gradient)
    check_batch(gradient, count)
    assert "--gradient-batch" not in most or gradient == count
    if curvature:
        curvature_slice(0, gradient, most.get("--curvature-batch", curvature))
    enough_text(*corpus, length, burn_in, gradient, most.get("--curvature-batch", curvature))


def test_the_sentence_on_a_text_that_is_too_short() -> None:
    with pytest.raises(UserError) as caught:
        enough_text(Path("small.h5"), 4200, 100, 200, 0, 320, 32)
    assert str(caught.value) == (
        "the validation text of small.h5 has 100 characters: --sequence-length can be at most 100, not 200; "
        "the training text of small.h5 makes 42 sequences of 100 characters: "
        "--gradient-batch can be at most 42, not 320"
    )
    with pytest.raises(UserError, match=r"^--curvature-batch can be at most 9, the gradient batch, not 32$"):
        enough_text(Path("small.h5"), 4200, 300, 20, 0, 9, 32)
