"""Draw the front page's panel: four methods, the training loss against sequential passes (P_I).

python examples/figure1/front.py STUDY SUBSPACE OUT

STUDY is docs/results/fewest-passes.json, SUBSPACE docs/results/fewest-passes-subspace.json. The network is
the mLSTM of the small study. The curve of each method is that of the median seed. The curve of the preset
`subspace` is from the second file, those of the other methods are from the first. Linear algebra is not
counted.
"""

from __future__ import annotations

from typing import NamedTuple

import curves
from figure import LOOKS, drawn, middle
from study import arguments

from hfmpi.display import need_matplotlib
from hfmpi.parallel import guard

MODEL, KEY, COST = "mlstm", "train_bpc", "P_I"


class Line(NamedTuple):
    """A method, its name in the figure, the loss where the name is placed, and its offset from the curve."""

    method: str
    name: str
    loss: float
    offset: tuple[int, int]


LINES = (
    Line("sgd", "SGD", 2.06, (0, 8)),
    Line("bhf", "Hessian-free (BHF)", 3.3, (8, 2)),
    Line("soap", "SOAP", 2.2, (8, 8)),
    Line("subspace", "subspace", 2.5, (-76, -6)),
)


def main() -> None:
    parser = arguments(__doc__, "STUDY", "SUBSPACE", "OUT")
    given = parser.parse_args()
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    before, today = (curves.load([path], "small", None).runs for path in (given.study, given.subspace))
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axis = figure.subplots()
    for method, name, loss, offset in LINES:
        every = curves.seeds(today if method == "subspace" else before, MODEL, method)
        xs, ys = drawn(method, middle([*every.values()], KEY), KEY, COST)
        look, main_line = LOOKS[method], method == "subspace"
        colour = "black" if main_line else look.colour
        axis.plot(xs, ys, color=colour, linewidth=3.0 if main_line else 2.0)
        at = next(i for i, y in enumerate(ys) if y <= loss)
        axis.annotate(
            name, (xs[at], ys[at]), xytext=offset, textcoords="offset points", fontsize=12, color=colour,
            fontweight="bold" if main_line else "normal",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.set_xlim(5, 60_000)
    axis.set_ylim(1.65, 4.7)
    axis.set_xlabel("sequential passes (the time on unlimited hardware)", fontsize=12)
    axis.set_ylabel("training loss, bits/char", fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.3)
    figure.savefig(given.out, dpi=150)
    print(given.out)


if __name__ == "__main__":
    with guard():
        main()
