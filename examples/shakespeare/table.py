"""Print the results of run.py: seconds to a validation loss, and the lowest loss after a time.

    python examples/shakespeare/table.py OUT [--nanogpt nanoGPT]

Losses are in nats a character; `bits` is the last column in bits/char. The seconds of hfmpi count from the
start of training, those of nanoGPT from its first evaluation, before the first iteration; both include
validations. hfmpi is validated on all blocks of its sequence length (256; the default: 200), each from a
zero state. nanoGPT prints an estimate on 240 random blocks of 64 characters. With --nanogpt the table also
has `all blocks`, the loss of nanoGPT's best checkpoint on all blocks of the validation text; for hfmpi that
is the lowest loss.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from statistics import median

from run import HFMPI, NANOGPT

from hfmpi.files.history import History

LEVELS = 1.886, 1.4697
TIMES = 60, 180, 600
STEP = re.compile(r"([\d.]+) step \d+: train loss [\d.]+, val loss ([\d.]+)")
STARTED = re.compile(r"([\d.]+) (?:number of parameters|num decayed)")

Curve = list[tuple[float, float]]


def curve_of_hfmpi(run: Path) -> Curve:
    """Return (seconds, validation loss in nats) at each validation."""
    return [
        (record["seconds"], record["valid_bpc"] * math.log(2))
        for record in History.read(run)
        if record["valid_bpc"] is not None
    ]


def curve_of_nanogpt(log: Path) -> Curve:
    """Return (seconds, estimate of the validation loss) at each evaluation."""
    found = [tuple(map(float, match)) for match in STEP.findall(log.read_text())]
    return [(seconds - found[0][0], loss) for seconds, loss in found]


def all_blocks(folder: Path, run: Path) -> float:
    """Return the loss of nanoGPT's best checkpoint on all blocks of the validation text."""
    import numpy as np
    import torch

    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    saved = torch.load(run / "ckpt.pt", map_location="cpu", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    ids = torch.from_numpy(np.fromfile(folder / "data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
    length = saved["model_args"]["block_size"]
    count = (len(ids) - 1) // length
    x, y = (ids[i : i + count * length].reshape(count, length) for i in (0, 1))
    with torch.no_grad():
        losses = [float(model(a, b)[1]) * len(a) for a, b in zip(x.split(64), y.split(64), strict=True)]
    return sum(losses) / count


def first(curve: Curve, level: float) -> float:
    """Return the seconds to a level, infinity if it was not reached."""
    return next((seconds for seconds, loss in curve if loss <= level), math.inf)


def lowest(curve: Curve, seconds: float) -> float:
    """Return the lowest loss up to a time, NaN if the run was over by half of it."""
    if curve[-1][0] < seconds / 2:
        return math.nan
    return min((loss for at, loss in curve if at <= seconds), default=math.nan)


def cell(values: list[float], digits: int) -> str:
    """Return the median of the seeds, with the lowest and the highest."""
    known = sorted(value for value in values if not math.isnan(value))
    if not known or math.isinf(known[0]):
        return "–"
    text = [f"{value:.{digits}f}" if math.isfinite(value) else "–" for value in known]
    middle = f"{median(known):.{digits}f}" if math.isfinite(median(known)) else "–"
    return middle if len(known) == 1 else f"{middle} ({text[0]} to {text[-1]})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    options = parser.parse_args()
    folder = options.nanogpt and options.nanogpt.resolve()
    head = ["run", "seeds", *(f"s to {level}" for level in LEVELS), *(f"{time} s" for time in TIMES)]
    head += ["lowest", "all blocks", "bits"]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for name in [*HFMPI, *NANOGPT]:
        logs = sorted(options.out.glob(f"{name}.?.log"))
        if not logs:
            continue
        runs = [log.with_suffix("") for log in logs]
        curves = [curve_of_hfmpi(run) for run in runs] if name in HFMPI else [*map(curve_of_nanogpt, logs)]
        best = [min(loss for _, loss in curve) for curve in curves]
        final = best if name in HFMPI else [all_blocks(folder, run) for run in runs] if folder else []
        cells = [name, str(len(logs))]
        cells += [cell([first(curve, level) for curve in curves], 1) for level in LEVELS]
        cells += [cell([lowest(curve, time) for curve in curves], 3) for time in TIMES]
        cells += [cell(best, 4), cell(final, 4), cell([loss / math.log(2) for loss in final], 3)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
