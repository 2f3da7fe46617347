"""Single changes of settings that may be cheaper than the paper's Hessian-free, or than subspace.

python examples/figure1/better.py [--group bhf|subspace|all] [--jobs N] DATA.h5 OUT

Data, batches and networks are those of the small study. The cost of a variant is the P_I or P_D at which the
loss first reaches a level, on the training set (the gradient is that of the full set, except for two
variants) or in validation. Finished runs are not repeated. DATA.h5 is created from the King James Bible if it
does not exist.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import NamedTuple

from curves import followed, reached
from run import call, prepare, side_by_side
from study import MODELS, SIZES, Candidate, arguments, history
from table import show

from hfmpi.parallel import guard

SEEDS = (0, 1, 2)
LEVELS = {"train_bpc": 2.0, "valid_bpc": 2.1}
SIZE = SIZES["small"]

BASES = {"BHF": ("bhf", "damping=0.01"), "subspace": ("subspace", "damping=0.001")}
"""The presets that variants are compared with: the method and the setting that the study tunes."""


class Variant(NamedTuple):
    """The base, the changed settings, the maximum number of steps, and the cells for which it is run."""

    base: str
    options: tuple[str, ...]
    steps: int = 60
    models: tuple[str, ...] = ("mlstm",)


def settings(*changes: str) -> tuple[str, ...]:
    """Return the options of changed settings."""
    return tuple(word for change in changes for word in ("--set", change))


VARIANTS = {
    "BHF": Variant("BHF", (), 30, MODELS),
    "at most 10 iterations": Variant("BHF", settings("cg_max_steps=10"), 34, MODELS),
    "at most 6": Variant("BHF", settings("cg_max_steps=6"), 44),
    "at most 10, a quarter of the curvature batch": Variant(
        "BHF", (*settings("cg_max_steps=10"), "--curvature-batch", "109"), 34
    ),
    "at most 10, no preconditioner": Variant("BHF", settings("cg_max_steps=10", "preconditioner=none")),
    "at most 10, CG starts at zero": Variant("BHF", settings("cg_max_steps=10", "warm_start=0")),
    "subspace": Variant("subspace", (), models=MODELS),
    "3 candidates of lambda": Variant("subspace", settings("candidates=3")),
    "no last steps": Variant("subspace", settings("memory=0")),
    "6 last steps": Variant("subspace", settings("memory=6")),
    "1 damping of K-FAC": Variant("subspace", settings("kfac_dampings=1")),
    "2 dampings of K-FAC": Variant("subspace", settings("kfac_dampings=2")),
    "gradient and its RMS, no K-FAC": Variant("subspace", settings("directions=gradient+rms")),
    "K-FAC and gradient": Variant("subspace", settings("directions=kfac+gradient")),
    "directions not cut": Variant("subspace", settings("cut=false")),
    "running means of factors": Variant("subspace", settings("factor_decay=0.9")),
    "curvature batch 438": Variant("subspace", ("--curvature-batch", "438")),
    "curvature batch 27": Variant("subspace", ("--curvature-batch", "27")),
    "gradient batch 438, 3 candidates": Variant(
        "subspace", (*settings("candidates=3"), "--gradient-batch", "438")
    ),
    "factors decomposed every 5 steps": Variant("subspace", settings("refresh=5")),
}


def folder(out: Path, model: str, name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return out / f"{model}-{list(VARIANTS).index(name)}-{seed}"


def train(data: Path, out: Path, model: str, name: str, seed: int) -> None:
    """Train a run, unless it is finished."""
    at = folder(out, model, name, seed)
    if (at / "DONE").exists():
        return
    variant = VARIANTS[name]
    words = ["hfmpi", "train", str(data), "--out", str(at)]
    words += [*Candidate(model, *BASES[variant.base], seed).options(SIZE), *variant.options]
    words += ["--max-steps", str(variant.steps), "--checkpoint-every", "1000"]
    call(words, at.with_suffix(".log"))
    print(f"{at.name}: {history(at)[-1]['train_bpc']:.3f} bits/char", flush=True)


def row(out: Path, model: str, name: str, key: str) -> list[str]:
    """Return the medians over seeds of a variant's costs, and the ratios of its base's costs to them."""
    cells = [model, name]
    pair = name, VARIANTS[name].base  # not smoothed: there are too few steps for a mean
    both = [[followed(history(folder(out, model, which, seed))) for seed in SEEDS] for which in pair]
    for axis in ("P_I", "P_I_full", "P_D"):
        found, base = ([reached(points, key, axis, LEVELS[key]) for points in each] for each in both)
        known = [value for value in found if value is not None]
        if len(known) < len(SEEDS):
            cells += [f"{len(known)} of {len(SEEDS)} seeds", "–"]
            continue
        ratios = [b / f for b, f in zip(base, known, strict=True) if b is not None]
        words = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "–"
        cells += [f"{median(known):,}", words]
    return cells


def main() -> None:
    parser = arguments(__doc__, "DATA.h5", "OUT")
    parser.add_argument("--group", choices=("bhf", "subspace", "all"), default="all", help="[all]")
    parser.add_argument("--jobs", type=int, default=1, help="number of simultaneous runs [1]")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prepare(given.data, given.out, SIZE)
    bases = [base for base in BASES if given.group in ("all", base.lower())]
    wanted = [(m, name) for name, v in VARIANTS.items() if v.base in bases for m in v.models]
    side_by_side(given.jobs, train, [(given.data, given.out, *run, s) for run in wanted for s in SEEDS])
    for key, level in LEVELS.items():
        for base in bases:
            print(f"\n{key} of {level:.1f}\n")
            heads = ["cell", "variant"]
            for axis in ("P_I", "P_I full", "P_D"):
                heads += [axis, f"{axis} of {base} over it"]
            show(heads, [row(given.out, *run, key) for run in wanted if VARIANTS[run[1]].base == base])


if __name__ == "__main__":
    with guard():
        main()
