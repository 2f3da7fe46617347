"""Print what the paper says of its Figure 1 beside what a study found, each with a verdict.

python examples/figure1/table.py [--size small|medium|paper] OUT

How the words are judged: `very little difference` is a ratio between 2/3 and 3/2, `far more efficient` one
above 2, and `stalls` a training loss more than 0.1 bits/char above that of SHF with the mLSTM at equal P_I.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

from figure import curve, reached
from study import METHODS, MODELS, SIZES, Candidate, Histories, arguments, chosen, histories

from hfmpi.parallel import guard

Row = tuple[str, str, str, str]


def common(histories: Histories, model: str, methods: tuple[str, ...]) -> float:
    """Give the lowest multiple of 0.1 bits/char that the smoothed training loss of all methods reaches."""
    worst = max(min(curve(histories[model, m], "train_bpc", "P_I")[1]) for m in methods)
    return math.ceil(worst * 10 - 1e-9) / 10


def ratio(histories: Histories, model: str, slow: str, quick: str) -> tuple[float, str]:
    """Give by how much `quick` needs less P_I than `slow` to their common level, and a sentence of it.

    The sentence has the ratios to levels 0.5 and 1 bits/char above too: a ratio depends on where it is read.
    """
    level = common(histories, model, (slow, quick))
    found, words = [], []
    for at in (level, level + 0.5, level + 1):
        costs = [reached(histories[model, m], "train_bpc", "P_I", at) for m in (slow, quick)]
        found.append(costs[0] / costs[1])
        words.append(f"{found[-1]:.2g} to {at:.1f} bits/char ({costs[0]:,} against {costs[1]:,})")
    return found[0], "; ".join(words)


def final(histories: Histories, model: str, method: str, key: str) -> float:
    """Give the last training loss, smoothed, or the lowest validation loss."""
    values = curve(histories[model, method], key, "P_I")[1]
    return values[-1] if key == "train_bpc" else min(values)


def after(histories: Histories, model: str, method: str, p_i: float) -> float:
    """Give the smoothed training loss at a cost P_I."""
    xs, ys = curve(histories[model, method], "train_bpc", "P_I")
    return [y for x, y in zip(xs, ys, strict=True) if x <= p_i][-1]


def verdict(agrees: bool, partly: bool = False) -> str:
    """Put it in a word."""
    return "agrees" if agrees else "same direction" if partly else "differs"


def claims(histories: Histories) -> list[Row]:
    """Give a row for each claim: what, the paper, here, verdict."""
    rows = []
    for model in MODELS:
        found, words = ratio(histories, model, "sgd", "bhf")
        judged = verdict(found > 10, found > 1)
        rows.append((f"{model}: P_I of SGD over BHF", "more than 10 times", words, judged))
    for model in MODELS:
        found, words = ratio(histories, model, "bgd", "bhf")
        judged = verdict(found > 2, found > 1)
        rows.append((f"{model}: P_I of BGD over BHF", "BHF far more efficient", words, judged))
    found, words = ratio(histories, "lstm", "sgd", "bgd")
    rows.append(
        ("lstm: P_I of SGD over BGD", "very little difference", words, verdict(2 / 3 < found < 3 / 2))
    )
    found, words = ratio(histories, "mlstm", "sgd", "bgd")
    rows.append(("mlstm: P_I of SGD over BGD", "BGD faster, fairly early on", words, verdict(found > 1)))

    shared = min(histories[model, "shf"][-1]["P_I"] for model in MODELS)
    lstm, mlstm = (after(histories, model, "shf", shared) for model in MODELS)
    words = f"after a P_I of {shared:,} LSTM {lstm:.3f} training bits/char, mLSTM {mlstm:.3f}"
    rows.append(("SHF with LSTM", "stalls", words, verdict(lstm > mlstm + 0.1)))
    for key, name in (("train_bpc", "trains"), ("valid_bpc", "generalises")):
        order = sorted(histories, key=lambda run: final(histories, *run, key))
        words = ", ".join(
            f"{m} {method.upper()} {final(histories, m, method, key):.3f}" for m, method in order
        )
        judged = verdict(order[0] == ("mlstm", "shf"))
        paper = "best of all" + (": 1.82 against 1.89 to 1.93" if key == "valid_bpc" else "")
        rows.append((f"SHF with mLSTM {name}", paper, words, judged))
    for model in MODELS:
        for axis in ("P_I", "P_D"):
            level = common(histories, model, METHODS)
            costs = sorted(
                (reached(histories[model, m], "train_bpc", axis, level), m.upper()) for m in METHODS
            )
            words = ", ".join(f"{m} {value:,}" for value, m in costs)
            rows.append(
                (f"{model}: {axis} of all to {level:.1f} bits/char", "only in its figure", words, "–")
            )
    return rows


def ends(picked: dict[tuple[str, str], Candidate], histories: Histories) -> list[tuple[str, ...]]:
    """Give a row for each run: its chosen setting, how far it came, and the losses there."""
    rows = []
    for (model, method), records in histories.items():
        last = records[-1]
        valid = [r["valid_bpc"] for r in records if r["valid_bpc"] is not None]
        costs = [f"{last[key]:,}" for key in ("step", "P_I", "P_D", "P_D_full")]
        loss = curve(records, "train_bpc", "P_I")[1][-1]
        setting = picked[model, method].setting
        end = f"{valid[-1]:.3f}" if valid else "–"
        rows.append((f"{model} {method}", setting, f"{last['seconds']:.0f}", *costs, f"{loss:.3f}", end))
    return rows


def write(picked: dict[tuple[str, str], Candidate], histories: Histories) -> None:
    """Print both tables in Markdown: where the runs ended, and the claims."""
    heads = ("run", "chosen", "seconds", "steps", "P_I", "P_D", "P_D full", "training", "validation")
    show(heads, ends(picked, histories))
    print()
    show(("claim", "paper", "here", "verdict"), claims(histories))


def show(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown, each row as soon as it is there."""
    for row in chain((heads, ["---"] * len(heads)), rows):
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    given = arguments(__doc__, "OUT", sized=True).parse_args()
    picked = chosen(given.out, given.seconds or SIZES[given.size].seconds)
    write(picked, histories(given.out, picked))


if __name__ == "__main__":
    with guard():
        main()
