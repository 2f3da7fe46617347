"""Kinds of faults: texts from pipes and in any encoding, and invalid arguments."""

import bz2
import contextlib
import gzip
import lzma
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import click
from trial import ENCODINGS, HFMPI, TRAIN, kind

# Texts ------------------------------------------------------------------------------------------

LETTERS = (
    "the quick brown fox jumps over the lazy dog \n",
    "été crème garçon ",
    "привет мир и всем ",
    "日本語の文 ",
)
TEXT_ENCODINGS = "utf-8", "latin-1", "cp1251", "koi8-r", "shift_jis", "gb18030", "euc-jp", "cp437"
COMPRESSORS = {"gz": (gzip.compress, "zcat"), "bz2": (bz2.compress, "bzcat"), "xz": (lzma.compress, "xzcat")}


def text(trial, least, most):
    """Return the bytes of a text in a random encoding, or bytes that are not a text in any encoding."""
    if trial.rng.random() < 0.2:
        return bytes(
            trial.rng.choices([10, *range(32, 127), *range(128, 256)], k=trial.rng.randint(least, most))
        )
    encoding, letters = trial.rng.choice(TEXT_ENCODINGS), trial.rng.choice(LETTERS)
    size = trial.rng.randint(least, most)
    trial.note = f"{encoding}, {size} characters"
    written = "".join(trial.rng.choices(letters, k=size)).encode(encoding, "ignore")
    if len(set(written)) < 2:  # an encoding without these letters only leaves spaces: nothing to learn
        written = b"ab"
    return (written * (1 + least // len(written)))[:most]


def pour(pipe, content, rng):
    """Write a text in parts of random sizes; the reader may close the pipe."""
    with contextlib.suppress(BrokenPipeError), pipe:
        while content:
            size = rng.choice([1, 2, 3, 1000, 2**16, 2**20])
            pipe.write(content[:size])
            pipe.flush()
            content = content[size:]


@kind("prepare from a pipe")
def pipe(trial):
    content = text(trial, 3000, trial.rng.choice([4000, 200_000, 2_500_000]))
    cuts = sorted(trial.rng.randint(0, len(content)) for _ in range(2))
    parts = content[: cuts[0]], content[cuts[0] : cuts[1]], content[cuts[1] :]
    for name, part in zip(("whole", "a", "c"), (content, parts[0], parts[2]), strict=True):
        (trial.folder / name).write_bytes(part)
    sizes = []
    if trial.rng.random() < 0.5:
        sizes = ["--train-chars", trial.rng.randint(1, 10**6), "--valid-chars", trial.rng.randint(1, 10**6)]
    code, plain, said = trial.command("prepare", "whole", "plain.h5", *sizes)
    assert code == 0, said
    several = trial.rng.random() < 0.5
    words = ["prepare", *(["a", "-", "c"] if several else ["-"]), "piped.h5", *map(str, sizes)]
    process = subprocess.Popen(
        [*HFMPI, *words],
        cwd=trial.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    writer = threading.Thread(target=pour, args=(process.stdin, parts[1] if several else content, trial.rng))
    writer.start()
    out, said = process.stdout.read().decode(), process.stderr.read().decode()
    writer.join()
    assert process.wait() == 0, said
    assert out.replace("piped", "plain") == plain, f"{out}\n{plain}"


@kind("prepare, compressed")
def compressed(trial):
    content, ending = text(trial, 3000, 50_000), trial.rng.choice(sorted(COMPRESSORS))
    squeeze, program = COMPRESSORS[ending]
    name = trial.rng.choice(["text", "a text", "l'été $x", "--text"])
    (trial.folder / "plain").write_bytes(content)
    path = trial.folder / f"{name}.{ending}"
    path.write_bytes(squeeze(content))
    code, plain, said = trial.command("prepare", "plain", "plain.h5")
    assert code == 0, said
    code, _, said = trial.command("prepare", path, "OUT.h5")
    assert trial.refused(code, said), "not refused"
    way = said.partition("to prepare the text in it: ")[2].strip()
    assert way.startswith(program), said
    code, _, said = trial.command("prepare", "-", "OUT.h5", input=path.read_bytes(), errors=None)
    assert trial.refused(code, said.decode()), "not refused from a pipe"
    assert not (trial.folder / "OUT.h5").exists(), "written"
    # The command that the message recommends works unchanged.
    shell = f'hfmpi() {{ {shlex.join(HFMPI)} "$@"; }}; {way}'
    done = subprocess.run(
        ["sh", "-c", shell], cwd=trial.folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.replace("OUT", "plain") == plain, f"{way}: {done.stderr}"


@kind("prepare, no text")
def no_text(trial):
    size, letters = trial.rng.randint(3000, 50_000), trial.rng.choice(LETTERS)
    content = {
        "random": lambda: trial.rng.randbytes(size),
        "HDF5": trial.bench.data.read_bytes,
        "program": lambda: Path(sys.executable).read_bytes()[:size],
        **{
            name: lambda name=name: "".join(trial.rng.choices(letters, k=size)).encode(name)
            for name in ("utf-16", "utf-32", "utf-16-le", "utf-16-be")
        },
    }
    trial.note = trial.rng.choice(sorted(content))
    (trial.folder / "text").write_bytes(content[trial.note]())
    code, _, said = trial.command("prepare", "text", "OUT.h5")
    assert trial.refused(code, said), "not refused"
    assert [path.name for path in trial.folder.iterdir()] == ["text"], "written"


@kind("sample of any encoding")
def sample(trial):
    content = text(trial, 3000, 5000)
    (trial.folder / "text").write_bytes(content)
    alphabet = sorted(set(content))
    for words in ("prepare text text.h5", f"train text.h5 --out run {' '.join(TRAIN)} --max-steps 1"):
        code, _, said = trial.command(*words.split())
        assert (code, said) == (0, ""), said
    environment = trial.rng.choice([{}, *ENCODINGS])
    known = [byte for byte in alphabet if byte]  # arguments cannot contain a zero byte
    prime = bytes(trial.rng.choices(known, k=trial.rng.randint(0, 5)))
    length = trial.rng.randint(0, 60)
    words = ["--length", str(length), f"--prime={os.fsdecode(prime)}"]
    options = {"env": os.environ | environment, "errors": None}
    code, out, said = trial.command("sample", "run", *words, **options)
    assert (code, said or b"") == (0, b""), said
    assert out[: len(prime)] == prime, out
    assert out[-1:] == b"\n", out
    assert len(out) == len(prime) + length + 1, out
    assert set(out[:-1]) <= set(alphabet), out
    others = [byte for byte in range(1, 256) if byte not in alphabet]
    if others:
        prime = os.fsdecode(bytes([trial.rng.choice(others)]))
        code, out, said = trial.command("sample", "run", f"--prime={prime}", **options)
        said = (said or b"").replace(b"\0", b"").decode(errors="replace")  # in UTF-16 too
        assert trial.refused(code, said), out
        assert "does not know the character(s)" in said, said


# Arguments --------------------------------------------------------------------------------------

GOOD = {  # arguments with which a command works, by its name
    "prepare": "TEXT OUT.h5",
    "train": f"DATA --out new {' '.join(TRAIN)} --max-steps 2",
    "evaluate": "RUN",
    "sample": "RUN --length 5",
    "plot": "RUN --out figure.png",
    "speedup": "RUN",
    "bench products": "--hidden 4 --length 5 --batch 2 --repeats 1 --backend numpy",
    "bench gradients": "--hidden 4 --length 5 --batch 2 --repeats 1 --backend numpy",
    "bench step": "--hidden 4 --length 5 --repeats 1 --backend numpy",
}
REFUSED = "nan", "inf", "-inf", "NaN", "1e400", "", "x", "-1e999", "9" * 400, "0x10", "1,5"
ALLOWED = "1e30", "1e300", "1e-300", "999999999", "9223372036854775807", "4294967296", "0", "1", "-0.0"


def parameters(command):
    """Return the parameters of a command that take a path or a number."""
    import importlib

    name, _, below = command.partition(" ")
    found = getattr(importlib.import_module(f"hfmpi.cli.{name}"), name)
    found = found.commands[below] if below else found
    words = click.Choice, click.types.StringParamType, click.types.BoolParamType
    return [param for param in found.params if not isinstance(param.type, words)]


def spoil(trial, words, param, value):
    """Set a parameter to a value."""
    if isinstance(param, click.Option):
        words += [trial.rng.choice(param.opts), value]
    else:
        words[trial.rng.randrange(param.nargs) if param.nargs > 0 else 0] = value


def words_of(trial, command):
    """Return valid arguments for a command, with the positional arguments first."""
    places = {"RUN": trial.good, "DATA": trial.data, "TEXT": trial.bench.text}
    return [str(places.get(word, word)) for word in GOOD[command].split()]


@kind("arguments that cannot be")
def arguments(trial):
    command = trial.rng.choice(sorted(GOOD))
    words, found = words_of(trial, command), parameters(command)
    for param in trial.rng.sample(found, min(len(found), trial.rng.randint(1, 3))):
        path = isinstance(param.type, click.Path)
        spoil(trial, words, param, "" if path else trial.rng.choice(REFUSED))
    trial.note = shlex.join([*command.split(), *words])
    code, out, said = trial.command(*command.split(), *words)
    assert trial.refused(code, said), out
    left = [path.name for path in trial.folder.iterdir()]
    assert not left, f"{left} written"


@kind("numbers that are hardly meant")
def numbers(trial):
    # `sample` and `bench` are excluded: they accept any length, and would run forever.
    command = trial.rng.choice(["prepare", "train", "train", "train", "speedup"])
    words = words_of(trial, command)
    if command == "train" and trial.rng.random() < 0.4:
        name = trial.rng.choice(
            [
                "damping",
                "damping_factor",
                "cg_max_steps",
                "keep_ratio",
                "warm_start",
                "step_scale_decay",
                "cg_refresh",
            ]
        )
        words += ["--set", f"{name}={trial.rng.choice([*REFUSED, *ALLOWED])}"]
    else:
        free = "max_steps", "threads", "layers"
        found = [
            param
            for param in parameters(command)
            if not isinstance(param.type, click.Path) and param.name not in free
        ]
        spoil(trial, words, trial.rng.choice(found), trial.rng.choice(ALLOWED))
    trial.note = shlex.join([command, *words])
    code, _, said = trial.command(command, *words)
    if trial.refused(code, said):
        left = [path.name for path in trial.folder.iterdir()]
        assert not left, f"{left} written"


@kind("lengths and batches too large")
def lengths(trial):
    asked = {"--burn-in": 0}
    for name, most in (("--sequence-length", 5000), ("--burn-in", 3000), ("--gradient-batch", 500),
                       ("--curvature-batch", 500)):  # fmt: skip
        if trial.rng.random() < 0.6:
            asked[name] = max(1, int(most ** trial.rng.random() * trial.rng.choice([1, 1, 3])))

    def run():
        given = [word for pair in asked.items() for word in map(str, pair)]
        trial.note = " ".join(given)
        words = ["train", trial.data, "--out", trial.run, *TRAIN, "--max-steps", 1, *given]
        return trial.command(*words)

    code, _, said = run()
    if not trial.refused(code, said):
        return
    found = re.findall(r"(--[a-z-]+)( and --burn-in together)? can be at most ([\d,]+)", said)
    assert found, said
    for name, together, most in found:
        asked[name] = int(most.replace(",", ""))
        if together:
            asked["--burn-in"] = min(asked["--burn-in"], asked[name] - 1)
            asked[name] -= asked["--burn-in"]
    before = trial.note
    code, _, again = run()
    assert code == 0, f"{before}: {said}, {trial.note}: {again}"
