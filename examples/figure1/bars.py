"""Strong first-order methods, each at its best rate: the passes with which `subspace` is compared.

python examples/figure1/bars.py [--cells A,B] [--bars NAME,NAME] DATA.h5 OUT

Data and networks are those of the small study. A bar is a method with a gradient batch: all training
sequences, or a quarter of them. Three rates are tried with seed 0 for 60 steps. While the best rate is at the
edge of those tried, the next one is tried too. The rate with the lowest mean training loss over the last
twelve of these steps is continued, and is run with the other seeds. Then the table is printed: medians over
the seeds of P_I to training levels, where losses on a quarter of the sequences are means over steps, and the
lowest validation loss. Finished runs are not repeated. DATA.h5 is created from the King James Bible if it
does not exist.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from curves import curve, followed, reached
from run import call, prepare
from study import MODELS, SIZES, arguments, history, part
from table import number, show

from hfmpi.networks.architecture import PAPER_PARAMETERS
from hfmpi.parallel import guard

SEEDS = (0, 1, 2)
SIZE = SIZES["small"]
LEVELS = (3.0, 2.5, 2.3, 2.0, 1.9, 1.8)
TUNING_STEPS = 60
LAST = 12
"""Steps of tuning, and the number of last steps whose mean loss is compared."""

ALL, QUARTER = SIZE.sequences, round(SIZE.sequences / 4)
STEPS = {ALL: 210, QUARTER: 300}
"""Steps of a chosen run, by its batch."""


class Bar(NamedTuple):
    """A preset, its gradient batch, the rates, the index of the first of three to try, and other settings."""

    preset: str
    batch: int
    rates: tuple[float, ...]
    first: int
    changes: tuple[str, ...] = ()


SOAP_RATES = (0.0375, 0.075, 0.1, 0.15, 0.2, 0.3, 0.6)
MUON_RATES = (0.0375, 0.075, 0.15, 0.3, 0.6, 1.2, 2.4)

BARS = {
    "soap-all": Bar("soap", ALL, SOAP_RATES, 2, ("refresh=1",)),
    "soap-quarter": Bar("soap", QUARTER, SOAP_RATES, 2, ("refresh=1",)),
    "soap-nesterov-all": Bar("soap", ALL, SOAP_RATES, 2, ("refresh=1", "nesterov=true")),
    "soap-nesterov-quarter": Bar("soap", QUARTER, SOAP_RATES, 2, ("refresh=1", "nesterov=true")),
    "muon-all": Bar("muon", ALL, MUON_RATES, 2),
    "muon-quarter": Bar("muon", QUARTER, MUON_RATES, 2),
    "soap-muon-all": Bar("soap-muon", ALL, SOAP_RATES, 2),
    "soap-muon-quarter": Bar("soap-muon", QUARTER, SOAP_RATES, 2),
}


class Run(NamedTuple):
    """One run of a bar."""

    model: str
    bar: str
    rate: float
    seed: int = 0

    def folder(self, out: Path) -> Path:
        """Return the folder of the run."""
        return out / f"{self.model}-{self.bar}-{self.rate:g}-{self.seed}"

    def train(self, data: Path, out: Path, steps: int) -> None:
        """Train to this step, unless the run has reached it."""
        at, bar = self.folder(out), BARS[self.bar]
        log, failed = (at.with_name(f"{at.name}.{ending}") for ending in ("log", "failed"))
        if len(history(at)) >= steps or failed.exists():
            return
        words = ["hfmpi", "train", str(data), "--out", str(at), "--model", self.model]
        words += ["--parameters", str(round(PAPER_PARAMETERS[self.model] / SIZE.parameters))]
        words += ["--optimizer", bar.preset, "--gradient-batch", str(bar.batch)]
        words += ["--sequence-length", str(SIZE.length), "--seed", str(self.seed), "--backend", "numba"]
        for change in (f"rate={self.rate:g}", *bar.changes):
            words += ["--set", change]
        words += ["--max-steps", str(steps), "--checkpoint-every", "1000", "--evaluate-every", "1"]
        if call(words, log, 2):  # exit code 2: an error message, such as that all steps are rejected
            failed.touch()
        last = history(at)[-1]
        print(f"{at.name:36} step {last['step']:4}  {last['train_bpc']:.3f} bits/char", flush=True)


def score(run: Run, out: Path) -> float:
    """Return the mean loss by which rates are compared; infinity if the run is too short."""
    losses = [record["train_bpc"] for record in history(run.folder(out))[:TUNING_STEPS]]
    return fmean(losses[-LAST:]) if len(losses) == TUNING_STEPS else float("inf")


def tune(data: Path, out: Path, model: str, name: str) -> float:
    """Return the best rate of a bar."""
    bar = BARS[name]
    low, high = bar.first, bar.first + 3  # range of the rates that were tried
    while True:
        runs = [Run(model, name, rate) for rate in bar.rates[low:high]]
        for run in runs:
            run.train(data, out, TUNING_STEPS)
        at = min(range(len(runs)), key=lambda i: score(runs[i], out))
        if at == 0 and low > 0:
            low -= 1
        elif at == len(runs) - 1 and high < len(bar.rates):
            high += 1
        else:
            return runs[at].rate


def row(out: Path, model: str, name: str, rate: float) -> list[str]:
    """Return the row of a bar: medians over seeds, with the minimum and maximum of P_I to each level."""
    batch = BARS[name].batch
    every = [followed(history(Run(model, name, rate, s).folder(out)), batch / ALL) for s in SEEDS]
    cells = [model, name, f"{rate:g}"]
    for level in LEVELS:
        found = [reached(points, "train_bpc", "P_I", level) for points in every]
        known = [value for value in found if value is not None]
        if len(known) < len(SEEDS):
            cells.append(f"{len(known)} of {len(SEEDS)} seeds" if known else "–")
        else:
            cells.append(f"{number(median(known))} ({number(min(known))} to {number(max(known))})")
    lowest = [min(zip(*reversed(curve(points, "valid_bpc", "P_I")), strict=True)) for points in every]
    cells += [f"{median(loss for loss, _ in lowest):.3f}", number(median(at for _, at in lowest))]
    full = [cost for points in every if (cost := reached(points, "train_bpc", "P_I_full", 2.0)) is not None]
    return [*cells, number(median(full) if len(full) == len(SEEDS) else None)]


def main() -> None:
    parser = arguments(__doc__, "DATA.h5", "OUT")
    parser.add_argument("--cells", type=part(MODELS), default=MODELS, help="separated by commas [all]")
    parser.add_argument(
        "--bars", type=part(tuple(BARS)), default=tuple(BARS), help="separated by commas [all]"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prepare(given.data, given.out, SIZE)
    rows = []
    for model in given.cells:
        for name in given.bars:
            rate = tune(given.data, given.out, model, name)
            for seed in SEEDS:
                Run(model, name, rate, seed).train(given.data, given.out, STEPS[BARS[name].batch])
            rows.append(row(given.out, model, name, rate))
    heads = ["cell", "bar", "rate", *(f"P_I to {level:.1f}" for level in LEVELS)]
    print()
    show([*heads, "lowest validation", "at P_I of", "P_I full to 2.0"], rows)


if __name__ == "__main__":
    with guard():
        main()
