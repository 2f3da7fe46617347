"""The cost account compared with calculations by hand, the timer with a simulated clock, and smoothing."""

import contextlib
from dataclasses import fields, replace

import numpy as np
import pytest

from hfmpi.measure.cost import Counts, ForwardPass, executed, full, paper, ranks
from hfmpi.measure.smoothing import smoothed
from hfmpi.measure.timer import Timer, split_waiting


@pytest.mark.parametrize(
    ("counts", "batches", "expected"),
    [
        # One step of each of the paper's optimizers, with 5 CG iterations where there are any.
        (Counts(steps=1), (32, 0), (96, 3)),
        (Counts(steps=1), (3500, 0), (10_500, 3)),
        (Counts(steps=1, cg_steps=5), (320, 32), (960 + 640, 23)),
        (Counts(steps=1, cg_steps=5), (14_000, 3500), (42_000 + 70_000, 23)),
        (Counts(steps=7, cg_steps=90), (320, 32), (6720 + 11_520, 21 + 360)),
        (Counts(), (320, 32), (0, 0)),
    ],
)
def test_the_papers_formulas(counts, batches, expected):
    assert paper(counts, *batches) == expected


def test_cost_on_some_ranks():
    counts = Counts(steps=2, cg_steps=10)
    assert ranks(counts, 320, 32, 3) == 6 * 107 + 40 * 11
    assert ranks(counts, 320, 32, 64) == 6 * 5 + 40 * 1
    p_d, p_i = paper(counts, 320, 32)
    assert ranks(counts, 320, 32, 1) == p_d
    assert ranks(counts, 320, 32, 319) > p_i
    assert ranks(counts, 320, 32, 320) == ranks(counts, 320, 32, 10_000) == p_i


def test_all_passes_that_were_executed():
    counts = Counts(steps=1, cg_steps=5, gradients=1, products=6, losses=4, linearisations=1)
    assert executed(counts, 320, 32) == ((4 + 3) * 320 + (1 + 24) * 32, 32)


def test_vectors_of_one_pass_count_once_on_parallel_hardware_and_each_for_itself_elsewhere():
    counts = Counts(
        steps=2, gradients=2, losses=2, linearisations=2, projections=2,
        candidates=4, directions=76,
    )  # fmt: skip
    assert executed(counts, 1750, 109) == ((2 + 6 + 4) * 1750 + (2 + 2 * 78) * 109, 2 + 6 + 2 + 4)
    p_d, p_i = paper(counts, 1750, 109)
    assert (p_d, p_i) == (6 * 1750 + 2 * 78 * 109, 6 + 4)
    assert ranks(counts, 1750, 109, 1) == p_d
    assert ranks(counts, 1750, 109, 109) == 6 * 17 + 2 * 2 * 39
    assert ranks(counts, 1750, 109, 10_000) == p_i


def test_adjoints_of_segments_run_beside_that_of_the_gradient():
    counts = Counts(steps=2, gradients=2, adjoints=2 * 5)  # six segments of each example
    expected = 2 * (1 + 2 * 6) * 1750
    assert paper(counts, 1750, 109) == executed(counts, 1750, 109) == (expected, 2 * 3)
    assert ranks(counts, 1750, 109, 1) == expected
    assert ranks(counts, 1750, 109, 16) == 2 * (110 + 2 * 657)  # ceil(1750 / 16), ceil(6 * 1750 / 16)
    assert ranks(counts, 1750, 109, 1750) == 2 * (1 + 2 * 6)
    assert ranks(counts, 1750, 109, 6 * 1750) == 2 * 3
    one_row = Counts(steps=2, gradients=2)  # an intermediate of the gradient
    assert paper(one_row, 1750, 109) == (2 * 3 * 1750, 6)


def test_adjoints_of_a_sketch_run_beside_that_of_the_gradient():
    counts = Counts(steps=2, gradients=2, sketches=2 * 4, directions=2 * 90)
    expected = 2 * (3 * 1750 + 2 * 4 * 109)
    assert paper(counts, 1750, 109) == executed(counts, 1750, 109) == (expected, 2 * 3)
    assert ranks(counts, 1750, 109, 1) == expected
    assert ranks(counts, 1750, 109, 16) == 2 * (110 + 2 * 137)  # ceil((1750 + 4 * 109) / 16)
    assert ranks(counts, 1750, 109, 10_000) == 2 * 3


def test_linear_algebra_is_counted_in_forward_passes_and_rounded_up_once():
    step, unit = Counts(steps=1, gradients=1, operations=1_250, depth=40), ForwardPass(1_000, 100)
    assert full(step, 10, 0, unit) == (30 + 2, 3 + 1)
    assert full(sum([step] * 5, Counts()), 10, 0, unit) == (5 * 30 + 7, 5 * 3 + 2)
    assert full(replace(step, operations=1_000, depth=100), 10, 0, unit) == (31, 4)
    assert full(replace(step, operations=3 * 10**30, depth=0), 10, 0, unit) == (30 + 3 * 10**27, 3)
    assert paper(step, 10, 0) == executed(step, 10, 0) == (30, 3)
    assert ranks(step, 10, 0, 4) == 3 * 3


def test_counts_add_up():
    names = [field.name for field in fields(Counts)]
    one, two, both = (Counts(**{name: k * i for i, name in enumerate(names, 1)}) for k in (1, 10, 11))
    assert one + two == both


class Clock:
    """A clock that is advanced explicitly."""

    now = 1000.0

    def __call__(self):
        return self.now


def test_spans_are_exclusive():
    clock = Clock()
    timer = Timer(clock)
    clock.now += 50  # in no span
    with timer.span("step"):
        clock.now += 1
        with timer.span("gradient"):
            clock.now += 2
            with timer.span("allreduce"):
                clock.now += 4
            clock.now += 8
            with timer.span("allreduce"):
                clock.now += 16
            assert timer.totals == {"step": 1, "gradient": 10, "allreduce": 20}
        clock.now += 32
    clock.now += 50
    with timer.span("step"):
        clock.now += 64
    assert timer.totals == {"step": 97, "gradient": 10, "allreduce": 20}
    np.testing.assert_array_equal(timer.series("allreduce"), [4, 16])
    with pytest.raises(KeyError):
        timer.series("gradient")


def test_span_of_the_same_name_inside_and_exceptions():
    clock = Clock()
    timer = Timer(clock, recorded=("a",))
    with contextlib.suppress(ZeroDivisionError), timer.span("a"):
        clock.now += 1
        with timer.span("a"):
            clock.now += 2
            raise ZeroDivisionError
    with timer.span("b"):
        clock.now += 4
    assert timer.totals == {"a": 3, "b": 4}
    np.testing.assert_array_equal(timer.series("a"), [2, 1])


def test_waiting_is_what_exceeds_the_fastest():
    communication, waiting = split_waiting([[1.0, 5.0, 2.0], [3.0, 0.5, 2.0]])
    np.testing.assert_allclose(communication, [3.5, 3.5])
    np.testing.assert_allclose(waiting, [4.5, 2.0])
    communication, waiting = split_waiting([np.array([1.0, 2.0])])
    assert (communication, waiting) == (3.0, 0.0)
    communication, waiting = split_waiting([np.zeros(0)] * 2)
    np.testing.assert_array_equal([communication, waiting], np.zeros((2, 2)))
    with pytest.raises(ValueError, match="same shape"):
        split_waiting([np.zeros(2), np.zeros(3)])


def test_the_window_of_a_drawn_loss_grows_without_a_kink():
    assert smoothed([3.0, 1.0, 2.0]) == pytest.approx([3, 1, 2])  # few steps are not smoothed
    steps = np.arange(1.0, 5001)
    lag = steps - smoothed(steps)
    assert lag == pytest.approx((np.maximum(steps / 20, 1) - 1) / 2, abs=0.13)  # half of the window
    assert np.abs(np.diff(lag, 2)).max() < 0.06  # a mean of 50 that begins with all has 0.5
    jump = smoothed([1.0] * 100 + [0.0] * 100)
    assert np.all(np.diff(jump) <= 1e-12)
    assert (jump[99], jump[-1]) == pytest.approx((1, 0))
    gaps = np.where(steps % 7 == 0, np.nan, steps)
    assert smoothed(gaps)[~np.isnan(gaps)] == pytest.approx(smoothed(gaps[~np.isnan(gaps)]))
    assert np.isnan(smoothed(gaps)[6])
    assert smoothed([]).size == 0
