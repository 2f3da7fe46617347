"""Cheaper than the paper's Hessian-free: BHF with single settings changed, three seeds each, to one loss.

python examples/figure1/better.py [--jobs N] DATA.h5 OUT

Data, batches and networks are those of the small study. The cost of a variant is P_I or P_D when the loss is
first at most a level, on the training set (the gradient is that of the whole set) or in validation. What is
done is not done twice. DATA.h5 is made from the King James Bible if it does not exist.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

from curves import followed, reached
from run import call, prepare
from study import MODELS, SIZES, Candidate, arguments, history
from table import show

from hfmpi.parallel import guard

SEEDS = (0, 1, 2)
DAMPING = "damping=0.01"
LEVELS = {"train_bpc": 2.0, "valid_bpc": 2.1}
SIZE = SIZES["small"]


class Variant(NamedTuple):
    """What is changed, the steps that it may take, and the cells that it is tried with."""

    options: tuple[str, ...]
    steps: int
    models: tuple[str, ...] = ("mlstm",)


VARIANTS = {
    "BHF": Variant((), 30, MODELS),
    "at most 10 iterations": Variant(("--set", "cg_max_steps=10"), 34, MODELS),
    "at most 6": Variant(("--set", "cg_max_steps=6"), 44),
    "at most 10, a quarter of the curvature batch": Variant(
        ("--set", "cg_max_steps=10", "--curvature-batch", "109"), 34
    ),
    "at most 10, no preconditioner": Variant(
        ("--set", "cg_max_steps=10", "--set", "preconditioner=none"), 60
    ),
    "at most 10, CG starts at zero": Variant(("--set", "cg_max_steps=10", "--set", "warm_start=0"), 60),
}


def folder(out: Path, model: str, name: str, seed: int) -> Path:
    """Give the folder of a run."""
    return out / f"{model}-{list(VARIANTS).index(name)}-{seed}"


def train(data: Path, out: Path, model: str, name: str, seed: int) -> None:
    """Make a run, unless it is done."""
    at = folder(out, model, name, seed)
    if (at / "DONE").exists():
        return
    variant = VARIANTS[name]
    words = ["hfmpi", "train", str(data), "--out", str(at)]
    words += [*Candidate(model, "bhf", DAMPING, seed).options(SIZE), *variant.options]
    words += ["--max-steps", str(variant.steps), "--checkpoint-every", "1000"]
    call(words, at.with_suffix(".log"))
    print(f"{at.name}: {history(at)[-1]['train_bpc']:.3f} bits/char", flush=True)


def row(out: Path, model: str, name: str, key: str) -> list[str]:
    """Give the medians over seeds of a variant's costs, and by how much BHF needs more, with the extremes."""
    cells = [model, name]
    both = [[followed(history(folder(out, model, which, seed))) for seed in SEEDS] for which in (name, "BHF")]
    for axis in ("P_I", "P_I_full", "P_D"):
        found, bhf = ([reached(points, key, axis, LEVELS[key]) for points in each] for each in both)
        known = [value for value in found if value is not None]
        if len(known) < len(SEEDS):
            cells += [f"{len(known)} of {len(SEEDS)} seeds", "–"]
            continue
        ratios = [b / f for b, f in zip(bhf, known, strict=True) if b is not None]
        words = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "–"
        cells += [f"{median(known):,}", words]
    return cells


def main() -> None:
    parser = arguments(__doc__, "DATA.h5", "OUT")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side [1]")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prepare(given.data, given.out, SIZE)
    wanted = [(m, name, s) for name, v in VARIANTS.items() for m in v.models for s in SEEDS]
    with ThreadPoolExecutor(given.jobs) as pool:
        for done in [pool.submit(train, given.data, given.out, *run) for run in wanted]:
            done.result()
    for key, level in LEVELS.items():
        print(f"\n{key} of {level:.1f}\n")
        heads = ["cell", "CG"]
        for axis in ("P_I", "P_I full", "P_D"):
            heads += [axis, f"{axis} of BHF over it"]
        show(heads, [row(given.out, m, name, key) for name, v in VARIANTS.items() for m in v.models])


if __name__ == "__main__":
    with guard():
        main()
