"""Print measured times of steps over wires with several delays, and the model's predictions; run.sh calls it.

python examples/latency/report.py 0 DELAY...

The model uses the run and the benchmarks of one rank, and the link in two forms: as `hfmpi bench allreduce`
measured it, and as expected, with the delay added to the latency of the wire without delay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def model(delay: str, *link: str) -> dict[str, Any]:
    """Return the output of `hfmpi speedup --model` for a run."""
    words = ["hfmpi", "speedup", "alone", f"wire-{delay}", "--model", "--json"]
    words += ["--bench", "products.json", "--bench", "gradients.json", *link]
    found: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["model"]
    return found


def main() -> None:
    heads = (
        "delay",
        "latency, bandwidth",
        "s/step measured",
        "predicted, link measured",
        "predicted, link told",
    )
    for row in (heads, ("---",) * len(heads)):
        print("| " + " | ".join(row) + " |")
    delays = sys.argv[1:]
    wireless = model("0", "--bench", "link-0.json")
    for delay in delays:
        measured = model(delay, "--bench", f"link-{delay}.json")
        latency = wireless["latency"] + float(delay)
        told = model(
            delay,
            "--latency",
            f"{1e6 * latency:.3f}us",
            "--bandwidth",
            f"{wireless['bandwidth'] / 1e6:.3f}MB/s",
        )
        cells = [f"{1e3 * float(delay):g} ms"]
        cells.append(f"{1e3 * measured['latency']:.3g} ms, {measured['bandwidth'] / 1e6:.0f} MB/s")
        cells.append(f"{measured['check'][0]['measured_seconds']:.2f}")
        for found in (measured, told):
            check = found["check"][0]
            cells.append(f"{check['predicted_seconds']:.2f} ({check['error']:+.1%})")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
