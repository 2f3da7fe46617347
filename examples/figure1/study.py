"""The paper's Figure 1 as data: sizes, cells and methods, their candidate settings, how one is chosen."""

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
"""Sequences in the batch of the gradient and of the curvature: the presets', which are the paper's.

All are scaled down with the data but the curvature batch of the subspace steps, which has to distinguish
directions.
"""
BATCHES["adam"] = BATCHES["bgd"]  # as the others of today: few passes are what is asked for


class Tuned(NamedTuple):
    """The setting of a method that is tuned, its candidates, and which of them is the first of three.

    While the best of those tried is at their edge, the next one is tried too.
    """

    setting: str
    values: tuple[float, ...]
    first: int = 2


RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Lengths of a step of gradient descent; 2 is the preset's."""

DAMPINGS = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)
"""The first lambda of Hessian-free, in nats per character; shf has 0.1, bhf-short 0.01."""

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
"""Share of a run's time that every candidate gets; the best one then goes on to the end."""

TIMES = dict.fromkeys(METHODS, 1) | {"bhf": 4, "bhf-short": 2}
TIMES |= {"subspace": 4, "subspace-whole": 4, "subspace-rows": 4}
"""Time of a method's runs in units of the size's seconds: a step of BHF takes that of hundreds of SGD."""


@dataclass(frozen=True)
class Size:
    """A size of the study: the paper's, or the paper's divided by one factor each.

    Attributes
    ----------
    batches, parameters : int
        The paper's batches and its sequences, and its parameters, are divided by these.
    length : int
        Characters of a sequence.
    seconds : float
        Unit of the training time of a run, see `Candidate.seconds`.
    """

    batches: int
    parameters: int
    length: int
    seconds: float

    @property
    def sequences(self) -> int:
        """Training sequences."""
        return SEQUENCES // self.batches

    @property
    def train_chars(self) -> int:
        """Training characters."""
        return self.sequences * self.length

    @property
    def valid_chars(self) -> int:
        """Validation characters: a fourteenth, as in the paper, in whole sequences."""
        return self.sequences // 14 * self.length


SIZES = {
    "small": Size(batches=8, parameters=16, length=100, seconds=80),
    "medium": Size(batches=4, parameters=4, length=200, seconds=480),
    "paper": Size(batches=1, parameters=1, length=200, seconds=10_800),
}


def arguments(doc: str | None, *paths: str, sized: bool = False) -> argparse.ArgumentParser:
    """Make the parser of a script: its paths by the names shown, and whether it is for any size."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    for path in paths:
        parser.add_argument(path.lower().removesuffix(".h5"), type=Path, metavar=path)
    if sized:
        parser.add_argument("--size", choices=SIZES, default="small")
        parser.add_argument("--seconds", type=float, help="unit of the training times [that of the size]")
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
        """Name of its folder."""
        seed = (f"seed{self.seed}",) if self.seed else ()
        return "-".join((self.model, self.method, self.setting, *seed))

    def seconds(self, unit: float) -> float:
        """Return its training time, on the ranks that it is started with."""
        return TIMES[self.method] * unit

    def epoch(self, size: Size) -> int:
        """Return the steps of an epoch."""
        return size.sequences // round(BATCHES[self.method][0] / size.batches)

    def options(self, size: Size) -> list[str]:
        """Return its options of `hfmpi train`, but for data, folder and time."""
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
    """Return all candidates in order: lengths of a step, or for second order the first lambda."""
    tuned = TUNED[method]
    return [Candidate(model, method, f"{tuned.setting}={value:g}") for value in tuned.values]


def untried(out: Path, unit: float, model: str, method: str) -> list[Candidate]:
    """Return the candidates to try next: the first three, then one outside of a best one at the edge."""
    known, first = candidates(model, method), TUNED[method].first
    left = [c for c in known if not tuned(out, unit, c)]
    missing = [c for c in known[first : first + 3] if c in left]
    if missing:
        return missing
    at = known.index(best(out, unit, model, method))
    return [c for c in known[max(at - 1, 0) : at + 2] if c in left]


def part(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return the reader of an option that names some of what is known, with commas between."""

    def read(words: str) -> tuple[str, ...]:
        found = words.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return tuple(one for one in known if one in found)

    return read


def read_corpus(data: Path, out: Path) -> Corpus:
    """Read the corpus of a study; raise a UserError if a run that is there was trained on another."""
    corpus = Corpus.read(data)
    for folder in sorted(out.iterdir()):
        if trained_on(folder)[0] not in (None, corpus.digest):
            raise UserError(f"{folder} was trained on other data than {data}: name another OUT")
    return corpus


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the steps of a run that have a training loss; none if it has not begun."""
    if not (folder / "history.jsonl").exists():
        return []
    return [r for r in History.read(folder) if r["train_bpc"] is not None]


def tuned(out: Path, unit: float, c: Candidate) -> list[dict[str, Any]]:
    """Return the steps of a candidate within the time for tuning, or the first one; none if not tried."""
    records = history(out / c.name)
    return [r for r in records if r["seconds"] <= TUNING * c.seconds(unit) * 1.01] or records[:1]


def best(out: Path, unit: float, model: str, method: str) -> Candidate:
    """Choose the candidate whose training loss was lowest in the tuning time, at the same cost for all.

    The cost is the P_D of everything executed, up to the least that a candidate came to in the tuning time,
    so that a noisy machine does not choose; the loss is the mean over the last fifth of it. What came later
    does not count, so that a resumed study chooses alike.
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
    """Return the chosen candidate of each cell and method that has begun, with every seed that has."""
    found = []
    for model, method in product(MODELS, METHODS):
        known = candidates(model, method)
        if any(history(out / c.name) for c in known):
            known = [best(out, unit, model, method)]  # else it was chosen elsewhere
        for c in known:
            seeds = (at.name.removeprefix(f"{c.name}-seed") for at in out.glob(f"{c.name}-seed*"))
            every = [replace(c, seed=seed) for seed in (0, *sorted(int(s) for s in seeds if s.isdecimal()))]
            found += [one for one in every if history(out / one.name)]
    return found
