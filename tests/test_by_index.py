"""Data sets that are read by index, also from DataLoaders and with augmentation: same runs as in memory."""

import importlib.util

import numpy as np
import pytest
from dense import check_page

import hfmpi
from hfmpi.backends import create
from hfmpi.data import user_data
from hfmpi.data.digest import digest_of
from hfmpi.data.user_data import as_cases
from hfmpi.errors import UserError
from hfmpi.models.base import with_scoring
from hfmpi.objective.data_parallel import step_objectives
from hfmpi.optim.presets import preset
from hfmpi.parallel.communicator import Communicator, MPICommunicator
from hfmpi.runs import checks

RNG = np.random.default_rng(7)
X = RNG.integers(0, 4, (60, 5))
Y = np.roll(X, 1, axis=1)
WEIGHTS = RNG.uniform(0.5, 2, 60)
RUN = {"optimizer": "bhf-short", "gradient_batch": 20, "curvature_batch": 10, "max_steps": 3, "quiet": True}

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no PyTorch")


class Items:
    """A map-style data set that counts its reads."""

    def __init__(self, *arrays):
        self.arrays, self.read = arrays, []

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, i):
        self.read.append(i)
        return tuple(array[i] for array in self.arrays)


def network(loss="cross-entropy"):
    return hfmpi.Network(
        backend=create("numpy", dtype="float64"), loss=loss, cell="gru", inputs=4, outputs=4, hidden=3
    )


def same(runs):
    first, *others = [run if isinstance(run, np.ndarray) else run.theta for run in runs]
    for other in others:
        np.testing.assert_array_equal(other, first)


# Reading by index ------------------------------------------------------------------------------


@pytest.mark.parametrize("third", [(), (WEIGHTS,), (X > 0,), (RNG.uniform(0, 2, X.shape),)])
def test_a_run_by_index_is_the_run_in_memory(third):
    name = {0: None, 1: "weights" if third and third[0].dtype == float else "mask"}[len(third)]
    more = {name: third[0]} if third else {}
    in_memory = hfmpi.Arrays(X, Y, **more)
    runs = [
        hfmpi.train(network(), data, valid=(X[:7], Y[:7]), metric=lambda z, y: z.argmax(1) == y, **RUN)
        for data in (
            in_memory,
            Items(X, Y, *third),
            hfmpi.Dataset(Items(X, Y, *third)),
            hfmpi.Dataset(Items(X, Y, *third), kept=0),
        )
    ]
    same(runs)
    assert len({run.valid_metric for run in runs}) == 1
    valid = hfmpi.train(network(), in_memory, valid=hfmpi.Dataset(Items(X, Y, *third)), **RUN).valid_loss
    assert valid == hfmpi.train(network(), in_memory, valid=in_memory, **RUN).valid_loss


def test_a_data_set_that_does_not_fit_is_read_by_index_with_a_note(monkeypatch, capfd):
    monkeypatch.setattr(checks, "least", lambda comm, number: 4 * 60 * 5 * 16 - 4)
    monkeypatch.setattr("hfmpi.runs.call.least", checks.least)
    data = Items(X, Y)
    large = hfmpi.train(network(), data, **RUN | {"quiet": False})
    assert len(set(data.read)) == 60
    output = capfd.readouterr()
    assert "data: the data set would take" in output.out + output.err
    assert "its examples are read by index, batch by batch" in output.out + output.err
    monkeypatch.setattr("hfmpi.runs.call.least", lambda comm, number: 4 * 60 * 5 * 16)
    same([large, hfmpi.train(network(), Items(X, Y), **RUN)])


def test_few_examples_tell_the_identity_of_the_data(tmp_path):
    class Long(Items):
        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            return super().__getitem__(i % 60)

    data = Long(X, Y)
    digest_of(hfmpi.Dataset(data))
    assert len(set(data.read)) <= 65
    options = RUN | {"out": tmp_path / "run", "max_steps": 1}
    hfmpi.train(network(), hfmpi.Dataset(data), **options)
    again = hfmpi.train(network(), hfmpi.Dataset(Long(X, Y)), **options | {"max_steps": 3})
    same([again, hfmpi.train(network(), hfmpi.Dataset(Long(X, Y)), **RUN)])
    with pytest.raises(UserError, match="run belongs to a run with different training examples"):
        hfmpi.train(network(), hfmpi.Dataset(Long(X, (Y + 1) % 4)), **options)


@pytest.mark.parametrize("third", [(), (np.arange(100) > 0,)])
def test_a_resumed_run_may_read_the_same_data_otherwise(tmp_path, third):
    x = RNG.integers(0, 4, (100, 5))
    third = [np.broadcast_to(mask[:, None], x.shape) for mask in third]
    data = Items(x, np.roll(x, 1, axis=1), *third)
    whole, other = hfmpi.train(network(), data, **RUN), Items(x, (x + 1) % 4, *third)
    for i, (first, second) in enumerate([(data, hfmpi.Dataset(data)), (hfmpi.Dataset(data), data)]):
        options = RUN | {"out": tmp_path / f"run{i}", "max_steps": 1}
        hfmpi.train(network(), first, valid=first, **options)
        for wrong in {"train": other, "valid": data}, {"train": hfmpi.Dataset(other), "valid": data}:
            with pytest.raises(UserError, match="belongs to a run with different training examples"):
                hfmpi.train(network(), **wrong, **options | {"max_steps": 3})
        hfmpi.train(network(), second, valid=second, **options | {"max_steps": 2})
        same([whole, hfmpi.train(network(), first, valid=second, **options | {"max_steps": 3})])


def test_examples_that_were_read_lately_stay_in_memory():
    data = Items(X, Y)
    cases = hfmpi.Dataset(data, kept=3 * 10 * 8)
    data.read.clear()
    for indices in [0, 1, 2], [2, 1], [3], [1, 2, 3], [0]:
        assert (cases.take(np.array(indices)).inputs == X[indices]).all()
    assert data.read == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            Items(X, np.where(np.arange(60)[:, None] == 41, 9, Y)),
            "data: targets .* not 9 as in example 41: ",
        ),
        (
            Items([*X[:-1], X[:2]], Y),
            "example 59 of the data set has a different shape or type than example 0: pad them",
        ),
        (
            Items(X, Y, np.where(np.arange(60) == 8, -1.0, 1)),
            "among examples .* of the data set: weights must be finite",
        ),
        (
            Items(X, Y, np.where(np.arange(60) == 8, 2, 1)),
            "the mask of example 8 of the data set must be 0 or 1",
        ),
        (
            Items(np.where(np.arange(60)[:, None] == 41, 9, X), Y),
            "data: among examples .*: inputs must be symbols",
        ),
        (Items(X, Y, X, X), r"a data set must return \(x, y\) or \(x, y, weight\) for each index"),
    ],
)
def test_a_bad_example_is_named_when_it_is_read(data, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        hfmpi.train(network(), hfmpi.Dataset(data, kept=0), **RUN | {"max_steps": 40})
    assert "\n" not in str(caught.value)


def test_curvature_by_index():
    theta = network().initial(0)
    found = [
        hfmpi.curvature(network(), theta, data).matrix()
        for data in ((X, Y, WEIGHTS), hfmpi.Dataset(Items(X, Y, WEIGHTS)))
    ]
    np.testing.assert_array_equal(*found)
    with pytest.raises(UserError, match="kept must be a number of bytes"):
        hfmpi.Dataset(Items(X, Y), kept=-1)


def check_risks(comm, slices):
    """Check that the ranks of a communicator compute the same as one, each with the examples of its shard."""
    theta = network().initial(0)
    for third in (), (WEIGHTS,):
        data, found = Items(X, Y, *third), []
        for communicator, source in (comm, data), (Communicator(), Items(X, Y, *third)):
            cases = hfmpi.Dataset(source).of_model(hfmpi.Arrays)
            data.read.clear()
            owner = hfmpi.DataParallel(network(), communicator, slices=slices)
            risk = owner.on(cases, np.arange(50))
            squared = risk.squared_gradients(theta)
            found.append([risk.scored, risk.weight, squared.loss, squared.vector, squared.squares])
            if communicator is comm:
                assert len(set(data.read)) <= 50 // comm.size + 2 + 1
        for ours, alone in zip(*found, strict=True):
            np.testing.assert_allclose(ours, alone, rtol=0 if slices else 1e-12, atol=0 if slices else 1e-15)


@pytest.mark.mpi(ranks=[2])
def test_a_rank_reads_the_examples_of_its_shard(comm):
    check_risks(MPICommunicator(comm), 0)
    check_risks(MPICommunicator(comm), 4)
    assert checks.least(MPICommunicator(comm), 7 + comm.rank) == 7
    # An invalid example that one rank reads ends the run on all ranks, with its error message.
    data = hfmpi.Dataset(Items(X, np.where(np.arange(60)[:, None] == 41, 9, Y)))
    with pytest.raises(UserError, match="not 9 as in example 41"):
        hfmpi.train(network(), data, **RUN | {"max_steps": 40})
    noisy = hfmpi.Augmented(hfmpi.Dataset(Items(X, Y, WEIGHTS)), rolled)
    both = hfmpi.train(network(), noisy, slices=4, **RUN)
    alone = steps_alone(network(), noisy, slices=4)
    np.testing.assert_array_equal(both.theta, alone)


def steps_alone(model, data, slices):
    """Return the result of the run `RUN` of a model on one rank."""
    cases = as_cases(data, hfmpi.Arrays)
    owner = hfmpi.DataParallel(model, Communicator(), slices=slices)
    chosen = preset("bhf-short").optimizer
    theta = model.initial(0)
    state = chosen.init(theta, model.blocks)
    for step in range(3):
        objectives = step_objectives(owner, cases.at(0, step), 0, step, 20, 10, redrawn=True)
        theta, state, _ = chosen.step(theta, state, objectives)
    return theta


# Augmentation ----------------------------------------------------------------------------------


def rolled(x, y, rng):
    """Roll a sequence without changing its dtype."""
    k = rng.integers(1, 5)
    return np.roll(x, k), np.roll(y, k)


def test_an_augmentation_depends_on_seed_step_and_example():
    cases = as_cases(hfmpi.Augmented((X, Y), rolled), hfmpi.Arrays)
    step = cases.at(3, 5)
    whole = step.take(np.arange(60))
    some = step.take(np.array([40, 2]))
    assert (some.inputs == whole.inputs[[40, 2]]).all()
    assert (some.targets == whole.targets[[40, 2]]).all()
    assert (whole.inputs != X).any()
    for other in cases.at(3, 6), cases.at(4, 5):
        assert (other.take(np.arange(60)).inputs != whole.inputs).any()
    assert (cases.take(np.arange(60)).inputs == X).all()  # validation and checks use the unchanged data


def test_a_resumed_run_sees_the_same_examples(tmp_path):
    data = hfmpi.Augmented((X, Y, WEIGHTS), rolled)
    options = RUN | {"out": tmp_path / "run", "max_steps": 2}
    hfmpi.train(network(), data, **options)
    resumed = hfmpi.train(network(), data, **options | {"max_steps": 3})
    whole = hfmpi.train(network(), data, **RUN)
    same([resumed, whole, steps_alone(network(), data, 0)])
    plain = hfmpi.train(network(), (X, Y, WEIGHTS), **RUN)
    assert (plain.theta != whole.theta).any()
    with pytest.raises(UserError, match="run belongs to a run with different training examples"):
        hfmpi.train(network(), (X, Y, WEIGHTS), **options)


def test_a_model_of_real_inputs_and_several_of_them():
    x, y = RNG.standard_normal((30, 2)), RNG.standard_normal((30, 1))

    def noisy(inputs, target, rng):
        one, other = inputs
        one += rng.standard_normal(2)  # copies may be overwritten
        return (one, other), target + rng.standard_normal(1)

    cases = as_cases(hfmpi.Augmented(((x, x), y), noisy))
    batch = cases.at(0, 0).take(np.array([4, 9]))
    assert (batch.inputs[0] != x[[4, 9]]).all()
    assert (batch.inputs[1] == x[[4, 9]]).all()
    assert (batch.targets != y[[4, 9]]).all()
    assert (cases.take(np.array([4, 9])).inputs[0] == x[[4, 9]]).all()


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (None, r"the augmentation must be a function \(x, y, rng\) -> \(x, y\), not None"),
        (
            lambda x, y, rng: x,
            r"the augmentation must return \(x, y\), not an array|the augmentation must return",
        ),
        (
            lambda x, y, rng: (x[:2], y),
            r"must return x with its dtype int32 and shape \(5,\), not int32 of shape",
        ),
        (lambda x, y, rng: (x + 0.5, y), "must return x with its dtype int32 .*, not float64"),
        (lambda x, y, rng: 1 / 0, "the augmentation of example 0 raises ZeroDivisionError: division by zero"),
        (lambda x, y, rng: (RNG.permutation(x), y), "returned different examples for the same arguments"),
    ],
)
def test_a_wrong_augmentation_is_one_sentence(function, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        hfmpi.train(network(), hfmpi.Augmented((X, Y), function), out=tmp_path / "run", **RUN)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_needs_the_same_batch_takes_no_augmentation():
    data = hfmpi.Augmented((X, Y), rolled)
    with pytest.raises(
        UserError, match=r"lbfgs needs the same batch in every step, but hfmpi\.Augmented changes it"
    ):
        hfmpi.train(network(), data, optimizer="lbfgs", max_steps=2)
    with pytest.raises(UserError, match="valid: validation examples cannot be augmented"):
        hfmpi.train(network(), (X, Y), valid=data, **RUN)
    with pytest.raises(UserError, match=r"outside hfmpi\.train, hfmpi\.Augmented requires data"):
        hfmpi.DataParallel(network(), Communicator()).on(data, np.arange(3))
    with pytest.raises(UserError, match="the data are already augmented"):
        hfmpi.Augmented(data, rolled)
    model, cases = network(), as_cases(data, hfmpi.Arrays)
    assert hfmpi.train(model, data, optimizer="adam", gradient_batch=60, max_steps=2, quiet=True).done
    owner = hfmpi.DataParallel(model, Communicator())
    redrawn = step_objectives(owner, cases.at(0, 0), 0, 0, 60, 0, redrawn=True)
    assert not redrawn.repeated


# DataLoader ------------------------------------------------------------------------------------


@needs_torch
class TestLoader:
    """A PyTorch DataLoader is replaced by its data set, unless it changes the examples."""

    def loader(self, *arrays, **options):
        import torch

        tensors = [torch.as_tensor(a) for a in arrays or (X, Y)]
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), **options)

    def test_its_data_set_is_used_with_a_note(self, capfd):
        found = [hfmpi.train(network(), (X, Y, WEIGHTS), **RUN)]
        for options in {"batch_size": 7, "shuffle": True}, {"batch_size": 3, "drop_last": True}, {}:
            loader = self.loader(X, Y, WEIGHTS, **options)
            found.append(hfmpi.train(network(), loader, **RUN | {"quiet": False}))
            output = capfd.readouterr()
            note = "data: only the DataLoader's data set is used, not its batch size, shuffling and sampler"
            assert note in output.out + output.err
        same(found)

    def test_what_changes_the_data_is_refused(self):
        import torch

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield X[0], Y[0]

        sets = torch.utils.data
        weighted = sets.WeightedRandomSampler([1.0] * 60, 60)
        for loader, sentence in (
            (
                self.loader(collate_fn=lambda items: items),
                r"collate_fn \(<lambda>\) may change the examples",
            ),
            (self.loader(sampler=weighted), r"sampler \(WeightedRandomSampler\) would select the examples"),
            (self.loader(sampler=range(5)), r"sampler \(range\) would select the examples"),
            (self.loader(sampler=sets.RandomSampler(X, replacement=True)), "RandomSampler"),
            (self.loader(batch_sampler=[[0, 1], [2]]), "the DataLoader has no batch size"),
            (self.loader(batch_size=None), "the DataLoader has no batch size"),
            (
                sets.DataLoader(Stream()),
                "the DataLoader's data set is an IterableDataset: it cannot be indexed",
            ),
            (Stream(), "the data set is an IterableDataset: it cannot be indexed"),
        ):
            with pytest.raises(UserError, match=sentence) as caught:
                hfmpi.train(network(), loader, **RUN)
            assert str(caught.value).startswith("data: ")
            assert "\n" not in str(caught.value)

    def test_ignored_targets_are_counted_by_reading(self):
        import torch

        torch.manual_seed(0)
        module = torch.nn.Linear(2, 3).double()
        x, y = RNG.standard_normal((40, 2)), RNG.integers(0, 3, 40)
        y[::3] = -100
        model = hfmpi.TorchModel(module, torch.nn.CrossEntropyLoss())
        data = torch.utils.data.TensorDataset(torch.as_tensor(x), torch.as_tensor(y))
        options = RUN | {"optimizer": "subspace"}
        same([hfmpi.train(model, each, **options) for each in ((x, y), data, hfmpi.Dataset(data))])
        assert with_scoring(model, hfmpi.Dataset(data)).unread
        assert not with_scoring(hfmpi.TorchModel(module, "cross-entropy"), hfmpi.Dataset(data)).unread


def test_the_memory_decides(monkeypatch):
    said = []
    large = as_cases(Items(X, Y), memory=4 * 60 * 5 * 16 - 1, note=said.append)
    assert isinstance(large, hfmpi.Dataset)
    assert len(said) == 1
    assert isinstance(as_cases(Items(X, Y), memory=4 * 60 * 5 * 16, note=said.append), hfmpi.Examples)
    assert len(said) == 1
    monkeypatch.setattr(user_data, "free_memory", lambda: 8)
    assert isinstance(as_cases(Items(X, Y)), hfmpi.Dataset)


@pytest.mark.parametrize(
    "name", ["hfmpi.Dataset(", "weights=weights", "hfmpi.Augmented(", "class LabelSmoothing"]
)
def test_the_programs_of_the_page_lower_the_loss(name, tmp_path):
    check_page(name, tmp_path)
