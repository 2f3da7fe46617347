r"""Replace the optimizer of an existing training script by hfmpi, with five changed lines.

    git clone https://github.com/karpathy/nanoGPT
    python examples/facades/change.py nanogpt nanoGPT/train.py

    git clone --branch v0.8.4 https://github.com/google/flax
    python examples/facades/change.py flax-mnist flax/examples/mnist/train.py

The changed script is written next to the original as train_hfmpi.py, and the difference is printed. It is
started like the original, with or without mpirun:

    cd nanoGPT
    python data/shakespeare_char/prepare.py
    mpirun -n 2 python train_hfmpi.py config/train_shakespeare_char.py \
        --device=cpu --compile=False --dropout=0.0

The steps of hfmpi do not support dropout: hence --dropout=0.0. A step takes its full batch at once, which
hfmpi divides if memory requires it: hence gradient_accumulation_steps=1, as in this configuration. In later
versions of flax the MNIST example uses dropout and batch statistics; the example of 0.8.4 also runs with
later versions of the library.
"""

import argparse
import difflib
from pathlib import Path
from typing import NamedTuple


class Script(NamedTuple):
    """A third-party training script.

    Attributes
    ----------
    revision : str
        The revision for which the changes were tested.
    method : str
        The method and its settings, as arguments.
    changes : list of (str, str)
        A string that occurs once in the script, and its replacement; {} stands for the method.
    """

    revision: str
    method: str
    changes: list[tuple[str, str]]


SCRIPTS = {
    "nanogpt": Script(
        "github.com/karpathy/nanoGPT, 3adf61e154c3fe3fca428ad6bc3818b27a3b8291",
        '"subspace"',
        [
            ("from model import GPTConfig, GPT\n", "from model import GPTConfig, GPT\nimport hfmpi.torch\n"),
            (
                "    seed_offset = 0\n",
                "    seed_offset = hfmpi.connect().rank; master_process = seed_offset == 0\n",
            ),
            (
                "model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)\n",
                'hfmpi.torch.Optimizer(model, "cross-entropy", {}, outputs=lambda result: result[0])\n',
            ),
            (
                "            logits, loss = model(X, Y)\n            loss =",
                "            loss = torch.tensor(optimizer.step((X, Y), Y), requires_grad=True)\n"
                "            loss =",
            ),
            ("    scaler.step(optimizer)\n", ""),
        ],
    ),
    "flax-mnist": Script(
        "github.com/google/flax, v0.8.4 (c84510d02477c6c2739355c1a41214a5732c10ce)",
        '"bhf-short"',
        [
            (
                "import tensorflow_datasets as tfds\n",
                "import tensorflow_datasets as tfds\nimport hfmpi.jax\n",
            ),
            ("@jax.jit\ndef update_model", "def update_model"),
            (
                "    state = update_model(state, grads)\n",
                '    state = update_model(state, {{"x": batch_images, "y": batch_labels}})\n',
            ),
            ("  for perm in perms:\n", "  for perm in perms[:, state.tx.rank :: state.tx.ranks]:\n"),
            (
                "  tx = optax.sgd(config.learning_rate, config.momentum)\n",
                '  tx = hfmpi.jax.Optimizer(lambda p, x: cnn.apply({{"params": p}}, x), '
                '"cross-entropy", {})\n',
            ),
        ],
    ),
}


def changed(name, text, method=None):
    """Return the text of a script with its changes; exit if the script is not of the known revision."""
    script = SCRIPTS[name]
    for old, new in script.changes:
        if text.count(old) != 1:
            raise SystemExit(
                f"the script contains {old.strip().splitlines()[0]!r} {text.count(old)} times instead of "
                f"once: use the revision {script.revision}"
            )
        text = text.replace(old, new.format(method or script.method))
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=SCRIPTS)
    parser.add_argument("script", type=Path)
    parser.add_argument(
        "--method", help="method and settings as Python arguments, such as '\"soap\", rate=3e-3'"
    )
    options = parser.parse_args()
    before = options.script.read_text()
    after = changed(options.name, before, options.method)
    target = options.script.with_name("train_hfmpi.py")
    target.write_text(after)
    lines = [text.splitlines(keepends=True) for text in (before, after)]
    print(*difflib.unified_diff(*lines, str(options.script), str(target), n=0), sep="", end="")


if __name__ == "__main__":
    main()
