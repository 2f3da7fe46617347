"""Small runs for tests: a learnable text, its corpus, and a run in one call."""

import time

import numpy as np

from hfmpi.data.prepare import prepare
from hfmpi.files.history import History
from hfmpi.files.run_folder import find_checkpoint
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import Placement
from hfmpi.runs.config import Config
from hfmpi.runs.session import Session
from hfmpi.runs.stop import StopSignals
from hfmpi.runs.text_task import TextTask
from hfmpi.runs.train import Run

WORDS = b"in the beginning was word and with god it all things were made by him".split()
SMALL = {
    "optimizer": "shf",
    "hidden": 8,
    "sequence_length": 20,
    "gradient_batch": 10,
    "curvature_batch": 4,
    "evaluate_every": 1,
    "dtype": "float64",
    "backend": "numpy",
}
"""A step of about ten milliseconds, with a loss on the validation text after each."""


def text(size=4500):
    """Return words in random order, the same ones in every call."""
    rng = np.random.default_rng(0)
    return b" ".join(WORDS[k] for k in rng.integers(len(WORDS), size=size))[:size]


def write_corpus(path):
    """Write the corpus of the text: 4,200 + 300 characters, 210 training sequences of 20."""
    prepare(text())[0].write(path)
    return path


def shared_corpus(comm, folder):
    """Write the corpus on rank 0 of an MPI communicator; return its path on all ranks when it exists."""
    path = folder / "small.h5"
    if comm.rank == 0:
        write_corpus(path)
    comm.Barrier()
    return path


def decoded(corpus, ids):
    """Return the text that corresponds to ids of a corpus."""
    return np.frombuffer(corpus.symbols, np.uint8)[ids].tobytes()


class Recorder:
    """A reporter that collects its messages, and can call a function after each step."""

    def __init__(self, after_step=None):
        self.facts, self.records, self.notes, self.ending = None, [], [], None
        self.after_step = after_step

    def start(self, facts):
        self.facts = facts

    def step(self, record):
        self.records.append(record)
        if self.after_step:
            self.after_step(record)

    def note(self, sentence):
        self.notes.append(sentence)

    def end(self, ending):
        self.ending = ending


def make_run(
    folder, data, comm=None, resume="auto", reporter=None, signals=None, clock=time.perf_counter, **options
):
    """Create a run as `hfmpi train` does, new or resumed."""
    comm = comm or Communicator()
    if options.get("optimizer") in ("sgd", "bgd", "adam", "soap", "soap-muon", "muon", "lm", "lbfgs"):
        options = {"curvature_batch": 0} | options
    place = Placement("here", comm.rank, comm.size, comm.local_rank, comm.local_size, 1, 1, 2**30)
    found = find_checkpoint(folder, resume)
    task = TextTask.read(Config(**SMALL | options), data, comm.local_rank)
    session = Session(comm, place, reporter or Recorder(), signals or StopSignals(), clock=clock)
    return Run(folder, task, session, found)


def train(folder, data, comm=None, resume="auto", reporter=None, clock=time.perf_counter, **options):
    """Train; return the run and its result."""
    with StopSignals() as signals:
        run = make_run(folder, data, comm, resume, reporter, signals, clock, **options)
        return run, run.train()


def history(folder, leave=("seconds", "step_seconds")):
    """Return the history without the fields that may differ between equal runs."""
    return [{k: v for k, v in record.items() if k not in leave} for record in History.read(folder)]


def state_of(run):
    """Return everything that the next step depends on, as a dict of arrays."""
    return {"theta": run.theta} | {k: np.asarray(v) for k, v in vars(run.state).items()}


def same(a, b):
    """Assert that two runs have the same state, bit for bit."""
    assert a.step == b.step
    assert a.progress.counts == b.progress.counts
    ours, theirs = state_of(a), state_of(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(value, theirs[name], name)
