r"""Train on tiny Shakespeare for one, three and ten minutes on two cores, next to nanoGPT.

    git clone https://github.com/karpathy/nanoGPT        # revision 3adf61e was measured
    python examples/shakespeare/run.py TEXT OUT [--nanogpt nanoGPT] [--seeds 0 1 2] [--runs NAME ...]
    python examples/shakespeare/table.py OUT [--nanogpt nanoGPT]

TEXT is tinyshakespeare.txt, with 1,115,394 characters, from
https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt. The first
1,003,854 characters are for training and the last 111,540 for validation, as nanoGPT splits them.

Runs alternate: each seed has one run of each kind. A run of hfmpi is `mpirun -n 2 hfmpi train` with the
options in HFMPI. A run of nanoGPT is its `train.py` with the options that its README recommends for a CPU and
the numbers of iterations in NANOGPT. Finished runs are not repeated. nanoGPT needs PyTorch in the environment
of this Python; without --nanogpt only hfmpi runs.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

TRAIN, VALID = 1_003_854, 111_540

BLOCKS = "--sequence-length 256 --evaluate-every 50"
"""Validation is on nanoGPT's blocks of 256 characters, each from a zero state."""

HFMPI = {
    "60s": f"{BLOCKS} --layers 2 --input-noise 0.02 --max-seconds 60",
    "180s": f"{BLOCKS} --layers 2 --parameters 350000 --input-noise 0.03 --max-seconds 180",
    "600s": f"{BLOCKS} --layers 2 --parameters 600000 --input-noise 0.05 --dropout 0.2 --max-seconds 600",
    "default": "--evaluate-every 50 --max-seconds 180",
}
"""Options of `hfmpi train`."""

README = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
)
NANOGPT = {"nanogpt": 2000, "nanogpt-180s": 5000, "nanogpt-600s": 17_000}
"""Iterations of nanoGPT, over which its rate falls: those of its README, and those of 180 and 600 seconds."""


def call(words: list[str], log: Path, folder: Path, threads: int) -> None:
    """Run a command and write its output to a file, each line with the seconds since the start."""
    part, start = log.with_suffix(".part"), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (
        part.open("w") as file,
        subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(f"{time.perf_counter() - start:.2f} {line}")
    if process.returncode:
        sys.exit(f"{shlex.join(words)} failed: see {part}")
    part.rename(log)


def hfmpi(data: Path, out: Path, name: str, seed: int) -> None:
    """Train by hfmpi, with two ranks of one thread."""
    run = out / f"{name}.{seed}"
    words = shlex.split(f"mpirun -n 2 hfmpi train {shlex.quote(str(data))} --seed {seed} {HFMPI[name]}")
    call([*words, "--out", str(run)], out / f"{name}.{seed}.log", out, threads=1)


def nanogpt(folder: Path, out: Path, name: str, seed: int) -> None:
    """Train by nanoGPT's train.py, with two threads.

    It has no option for the seed: a copy of the script with a different seed runs.
    """
    source = (folder / "train.py").read_text().replace("manual_seed(1337", f"manual_seed({1337 + seed}")
    script = folder / f"train_seed{seed}.py"
    script.write_text(source)
    count, run = NANOGPT[name], out / f"{name}.{seed}"
    words = f"{README} --max_iters={count} --lr_decay_iters={count} --out_dir={run}"
    command = [sys.executable, "-u", script.name, *shlex.split(words)]
    call(command, out / f"{name}.{seed}.log", folder, threads=2)


def prepare(text: Path, out: Path, folder: Path | None) -> Path:
    """Write the data of hfmpi and of nanoGPT, unless they exist, and return those of hfmpi."""
    out.mkdir(parents=True, exist_ok=True)
    data = out / "tiny.h5"
    if not data.exists():
        sizes = ["--train-chars", str(TRAIN), "--valid-chars", str(VALID)]
        subprocess.run(["hfmpi", "prepare", str(text), str(data), *sizes], check=True)
    if folder and not (folder / "data/shakespeare_char/train.bin").exists():
        (folder / "data/shakespeare_char/input.txt").write_bytes(text.read_bytes())
        subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=folder, check=True)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=[*HFMPI, *NANOGPT], help="default: all")
    options = parser.parse_args()
    folder = options.nanogpt and options.nanogpt.resolve()
    out = options.out.resolve()
    data = prepare(options.text, out, folder)
    names = options.runs or [*HFMPI, *(NANOGPT if folder else ())]
    for seed, name in product(options.seeds, names):
        if (out / f"{name}.{seed}.log").exists():
            continue
        print(f"{name}, seed {seed}", flush=True)
        if name in HFMPI:
            hfmpi(data, out, name, seed)
        elif folder:
            nanogpt(folder, out, name, seed)


if __name__ == "__main__":
    main()
