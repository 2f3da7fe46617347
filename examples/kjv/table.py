"""Print runs as a Markdown table: validation bits/char after equal times, and their costs.

python examples/kjv/table.py RUN...
"""

import sys
from pathlib import Path

from hfmpi.files import checkpoint
from hfmpi.files.history import History

TIMES = (60, 120, 300, 600, 1200)


def row(folder):
    records, meta = History.read(folder), checkpoint.latest(folder).meta
    seen = [(r["seconds"], r["valid_bpc"]) for r in records if r["valid_bpc"] is not None]
    seen.append((meta["seconds"], meta["valid_bpc"]))
    cells = [Path(folder).name]
    for limit in TIMES:
        before = [bpc for seconds, bpc in seen if seconds <= limit * 1.01]
        reached = meta["seconds"] >= limit
        cells.append(f"{before[-1]:.3f}" if before and reached else "–")
    rejected = sum(not r["accepted"] for r in records)
    last = records[-1]
    cells += [f"{last['step']:,}", f"{last['step'] / last['seconds']:.2f}", str(rejected)]
    return [*cells, f"{last['P_I']:,}", f"{last['P_D']:,}", f"{last['P_D_full']:,}"]


def main():
    if len({checkpoint.trained_on(folder)[0] for folder in sys.argv[1:]}) > 1:
        sys.exit("these runs were trained on different data: their losses cannot be compared")
    head = ["run", *(f"{t} s" for t in TIMES), "steps", "steps/s", "rejected", "P_I", "P_D", "P_D full"]
    for cells in (head, ["---"] * len(head), *map(row, sys.argv[1:])):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
