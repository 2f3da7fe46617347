"""Examples in memory: batches with examples first, and error messages if the arrays do not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfmpi.data.batches import Batch
from hfmpi.data.examples import Arrays
from hfmpi.errors import UserError

RNG = np.random.default_rng(0)


def symbols(*shape):
    return RNG.integers(0, 9, shape)


def vectors(*shape):
    return RNG.standard_normal(shape)


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.data(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["f4", "f8"]),
)
def test_a_batch_is_examples_first(cases, steps, data, real_inputs, real_targets, kind):
    scored = data.draw(st.integers(1, steps))
    inputs = vectors(cases, steps, 3).astype(kind) if real_inputs else symbols(cases, steps)
    targets = vectors(cases, scored, 2).astype(kind) if real_targets else symbols(cases, scored)
    mask = data.draw(st.none() | st.just(RNG.integers(0, 2, (cases, scored))))
    arrays = Arrays(inputs, targets, mask, burn_in=steps - scored)
    assert arrays.count == cases
    indices = np.array(data.draw(st.lists(st.integers(0, cases - 1), max_size=7)), np.int64)
    batch = arrays.take(indices)
    assert isinstance(batch, Batch)
    for found, given_ in zip(batch, (inputs, targets, mask, steps - scored, False, None), strict=True):
        if given_ is None or isinstance(given_, int):
            assert found == given_
            continue
        assert found.flags.c_contiguous
        assert found.shape == (len(indices), *given_.shape[1:])
        for k, index in enumerate(indices):
            np.testing.assert_array_equal(found[k], given_[index])
    assert batch.inputs.dtype == (kind if real_inputs else np.int32)
    assert batch.targets.dtype == (kind if real_targets else np.int32)
    expected = len(indices) * scored if mask is None else sum(mask[i].sum() for i in indices)
    assert arrays.scored(indices) == expected
    assert type(arrays.scored(indices)) is int


@pytest.mark.parametrize("index", [-1, 5])
def test_a_case_that_is_not_there_is_an_error(index):
    with pytest.raises(IndexError, match=r"0 \.\.\. 4"):
        Arrays(symbols(5, 3), symbols(5, 3)).take(np.array([0, index]))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            (symbols(5), symbols(5, 1)),
            r"inputs must be symbols \(examples, steps\) or real vectors .*, not int64",
        ),
        ((vectors(5, 3), symbols(5, 3)), r"inputs must be .* not float64 of shape \(5, 3\)"),
        ((symbols(5, 3, 2), symbols(5, 3)), r"inputs must be .* not int64 of shape \(5, 3, 2\)"),
        ((symbols(5, 3), vectors(5, 3)), "targets must be"),
        ((symbols(0, 3), symbols(0, 3)), "inputs must be"),
        ((symbols(5, 3), symbols(5, 0)), "targets must be"),
        ((symbols(5, 3) - 9, symbols(5, 3)), "inputs must be symbols 0, 1, 2"),
        ((symbols(5, 3) + 2**31, symbols(5, 3)), "inputs must be symbols 0, 1, 2"),
        ((symbols(5, 3), symbols(4, 3)), "inputs have 5 examples, but targets have 4"),
        (
            (symbols(5, 3), symbols(5, 4)),
            r"shape \(5, 3\) need a target .*have shape \(5, 4\)",
        ),
        ((symbols(5, 3), symbols(5, 2), np.ones((5, 3))), r"the mask has shape \(5, 3\), not \(5, 2\)"),
        ((symbols(5, 3), vectors(5, 2, 4), np.ones((5, 2, 4))), "the mask has shape"),
        (
            (symbols(5, 3), symbols(5, 3), np.full((5, 3), -0.5)),
            "the mask must be finite numbers, 0 or more, not -0.5",
        ),
        ((symbols(5, 3), symbols(5, 2)), r"have shape \(5, 2\); pass burn_in=1 if the first 1 steps"),
    ],
)
def test_arrays_that_do_not_fit_are_one_sentence(arrays, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        Arrays(*arrays)
    assert not str(caught.value).endswith(".")
