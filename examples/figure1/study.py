"""The paper's Figure 1 as data: sizes, cells and methods, their candidate settings, and the choice of one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from hfmpi.data.corpus import Corpus
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import trained_on
from hfmpi.files.history import History
from hfmpi.networks.architecture import PAPER_PARAMETERS
from hfmpi.optim.presets import preset

MODELS = ("lstm", "mlstm")
PAPER = ("sgd", "bgd", "shf", "bhf")
TODAY = ("adam", "soap", "muon", "bhf-short", "subspace", "subspace-whole", "subspace-rows")
METHODS = PAPER + TODAY

SEQUENCES = 14_000
"""Training sequences of the paper: 2.8 million characters in sequences of 200."""

BATCHES = {m: (preset(m).gradient_batch, preset(m).curvature_batch) for m in METHODS}
"""Sequences in the batches of the gradient and the curvature: those of the presets, as in the paper.

All are scaled down with the data except the curvature batch of the subspace steps, which must distinguish
directions.
"""
BATCHES["adam"] = BATCHES["bgd"]  # as for other current methods, because the goal is few passes


class Tuned(NamedTuple):
    """The tuned setting of a method, its candidates, and the index of the first of three to try.

    While the best value is at the edge of those tried, the next one is tried too.
    """

    setting: str
    values: tuple[float, ...]
    first: int = 2


RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Step lengths of gradient descent; 2 is the preset's."""

DAMPINGS = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Initial lambda of Hessian-free, in nats per character; the preset of shf has 0.1, bhf-short 0.01."""

TUNED = {
    "sgd": Tuned("rate", RATES),
    "bgd": Tuned("rate", RATES),
    "shf": Tuned("damping", DAMPINGS),
    "bhf": Tuned("damping", DAMPINGS),
    "adam": Tuned("rate", (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
    "soap": Tuned("rate", (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)),
    "muon": Tuned("rate", (0.0375, 0.075, 0.15, 0.3, 0.6, 1.2, 2.4)),
    "bhf-short": Tuned("damping", DAMPINGS, 1),
    "subspace": Tuned("damping", (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0), 1),
}
TUNED["subspace-whole"] = TUNED["subspace-rows"] = TUNED["subspace"]

TUNING = 0.2
"""Share of a run's time that every candidate gets; the best one is then continued to the end."""

TIMES = dict.fromkeys(METHODS, 1) | {"bhf": 4, "bhf-short": 2}
TIMES |= {"subspace": 4, "subspace-whole": 4, "subspace-rows": 4}
"""Time of a method's runs, in units of the size's seconds: a step of BHF takes as long as hundreds of SGD."""


@dataclass(frozen=True)
class Size:
    """A size of the study: the paper's size, or the paper's size divided by a factor for each quantity.

    Attributes
    ----------
    batches, parameters : int
        The paper's batches, sequences and parameters are divided by these factors.
    length : int
        Characters of a sequence.
    seconds : float
        The unit of the training time of a run, see `Candidate.seconds`.
    """

    batches: int
    parameters: int
    length: int
    seconds: float

    @property
    def sequences(self) -> int:
        """The number of training sequences."""
        return SEQUENCES // self.batches

    @property
    def train_chars(self) -> int:
        """The number of training characters."""
        return self.sequences * self.length

    @property
    def valid_chars(self) -> int:
        """The number of validation characters: a fourteenth, as in the paper, in full sequences."""
        return self.sequences // 14 * self.length


SIZES = {
    "small": Size(batches=8, parameters=16, length=100, seconds=80),
    "medium": Size(batches=4, parameters=4, length=200, seconds=480),
    "paper": Size(batches=1, parameters=1, length=200, seconds=10_800),
}


def arguments(doc: str | None, *paths: str, sized: bool = False) -> argparse.ArgumentParser:
    """Create the parser of a script, with its paths under these names, and --size if `sized`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    for path in paths:
        parser.add_argument(path.lower().removesuffix(".h5"), type=Path, metavar=path)
    if sized:
        parser.add_argument("--size", choices=SIZES, default="small")
        parser.add_argument("--seconds", type=float, help="unit of the training times [the unit of the size]")
    return parser


@dataclass(frozen=True)
class Candidate:
    """One run of the study with one choice of settings."""

    model: str
    method: str
    setting: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        seed = (f"seed{self.seed}",) if self.seed else ()
        return "-".join((self.model, self.method, self.setting, *seed))

    def seconds(self, unit: float) -> float:
        """Return the training time of the run on the ranks with which it is started."""
        return TIMES[self.method] * unit

    def epoch(self, size: Size) -> int:
        """Return the number of steps of an epoch."""
        return size.sequences // round(BATCHES[self.method][0] / size.batches)

    def options(self, size: Size) -> list[str]:
        """Return the options of `hfmpi train`, except data, folder and time."""
        gradient, curvature = BATCHES[self.method]
        given = {
            "model": self.model,
            "parameters": round(PAPER_PARAMETERS[self.model] / size.parameters),
            "optimizer": self.method,
            "gradient-batch": round(gradient / size.batches),
            "sequence-length": size.length,
            "seed": self.seed,
        }
        if curvature:
            scale = 1 if self.method.startswith("subspace") else size.batches
            given["curvature-batch"] = min(round(curvature / scale), given["gradient-batch"])
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [*words, "--set", self.setting]


def candidates(model: str, method: str) -> list[Candidate]:
    """Return all candidates in order of the step length, or of the initial lambda for second order."""
    tuned = TUNED[method]
    return [Candidate(model, method, f"{tuned.setting}={value:g}") for value in tuned.values]


def untried(out: Path, unit: float, model: str, method: str) -> list[Candidate]:
    """Return the candidates to try next: the first three, then the one next to a best one at the edge."""
    known, first = candidates(model, method), TUNED[method].first
    left = [c for c in known if not tuned(out, unit, c)]
    missing = [c for c in known[first : first + 3] if c in left]
    if missing:
        return missing
    at = known.index(best(out, unit, model, method))
    return [c for c in known[max(at - 1, 0) : at + 2] if c in left]


def part(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return the parser of an option that selects some of the `known` names, separated by commas."""

    def read(words: str) -> tuple[str, ...]:
        found = words.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return tuple(one for one in known if one in found)

    return read


def read_corpus(data: Path, out: Path) -> Corpus:
    """Read the corpus of a study; raise a UserError if an existing run was trained on a different corpus."""
    corpus = Corpus.read(data)
    for folder in sorted(out.iterdir()):
        if trained_on(folder)[0] not in (None, corpus.digest):
            raise UserError(f"{folder} was trained on data that differ from {data}: choose a different OUT")
    return corpus


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the steps of a run that have a training loss; an empty list if it has not started."""
    if not (folder / "history.jsonl").exists():
        return []
    return [r for r in History.read(folder) if r["train_bpc"] is not None]


def tuned(out: Path, unit: float, c: Candidate) -> list[dict[str, Any]]:
    """Return the steps of a candidate in the tuning time, at least one; an empty list if it was not tried."""
    records = history(out / c.name)
    return [r for r in records if r["seconds"] <= TUNING * c.seconds(unit) * 1.01] or records[:1]


def best(out: Path, unit: float, model: str, method: str) -> Candidate:
    """Choose the candidate with the lowest training loss in the tuning time, at the same cost for all.

    The cost is the P_D of everything executed, up to the lowest that a candidate reached in the tuning time,
    so that the choice does not depend on noise of the machine; the loss is the mean over the last fifth of
    it. Later steps do not count, so that a resumed study makes the same choice.
    """
    tried = {c: records for c in candidates(model, method) if (records := tuned(out, unit, c))}
    if not tried:
        raise UserError(f"{out} has no steps of {model} {method}")
    least = min(records[-1]["P_D_full"] for records in tried.values())
    return min(tried, key=lambda c: score(tried[c], least))


def score(records: list[dict[str, Any]], cost: float) -> float:
    """Return the mean training bits/char over the last fifth of a cost, or of the last step within it."""
    within = [r for r in records if r["P_D_full"] <= cost] or records[:1]
    late = [r["train_bpc"] for r in within if r["P_D_full"] >= 0.8 * cost] or [within[-1]["train_bpc"]]
    return sum(late) / len(late)


def chosen(out: Path, unit: float) -> list[Candidate]:
    """Return the chosen candidate of each cell and method that has started, with every seed that has."""
    found = []
    for model, method in product(MODELS, METHODS):
        known = candidates(model, method)
        if any(history(out / c.name) for c in known):
            known = [best(out, unit, model, method)]  # otherwise it was chosen elsewhere
        for c in known:
            seeds = (at.name.removeprefix(f"{c.name}-seed") for at in out.glob(f"{c.name}-seed*"))
            every = [replace(c, seed=seed) for seed in (0, *sorted(int(s) for s in seeds if s.isdecimal()))]
            found += [one for one in every if history(out / one.name)]
    return found
