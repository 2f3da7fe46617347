"""The commands: their results, and invalid input: one sentence, exit code 2, no hang, unchanged files."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from small import decoded, history, text, write_corpus
from threadpoolctl import threadpool_limits

from hfmpi.cli.main import entry
from hfmpi.data.corpus import Corpus
from hfmpi.data.prepare import prepare
from hfmpi.files import checkpoint
from hfmpi.parallel import library

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
TINY = ["--hidden", "6", "--sequence-length", "20", "--gradient-batch", "9", "--curvature-batch", "4"]
TINY += ["--backend", "numpy", "--optimizer", "shf"]


@pytest.fixture(scope="module", name="made")
def fixture_made(tmp_path_factory):
    """Create a folder with a corpus and a run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "small.h5")
    with pytest.MonkeyPatch.context() as patch:
        code = call(patch, "train", folder / "small.h5", "--out", folder / "run", *TINY, "--max-steps", "2")
    assert code == 0
    return folder


@pytest.fixture(name="here")
def fixture_here(made, tmp_path, monkeypatch):
    """Copy it to a new folder, which becomes the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, *words):
    """Run the command in this process; return its exit code."""
    for names in library._LAUNCHERS:
        for name in filter(None, names):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["hfmpi", *map(str, words)])
    with np.errstate(), threadpool_limits(limits=None, user_api="blas"):
        try:
            entry()
        except SystemExit as leaving:
            return leaving.code
    return 0


def content(folder):
    """Return the contents of all files below a folder, for later comparison."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(name="refused")
def fixture_refused(here, monkeypatch, capsys):
    """Return a function that runs a command which must fail, and returns its error message."""

    def refused(*words):
        before = content(here)
        capsys.readouterr()
        code = call(monkeypatch, *words)
        said = capsys.readouterr()
        assert code == 2, said
        assert said.out == ""
        assert said.err.startswith("Error: ")
        assert said.err.count("\n") == 1, said.err
        assert content(here) == before
        return said.err.removeprefix("Error: ")

    return refused


# What works ------------------------------------------------------------------------------------


def test_from_text_to_sample(here, monkeypatch, capsys):
    (here / "book.txt").write_bytes(text())
    assert call(monkeypatch, "prepare", "book.txt", "book.h5") == 0
    assert "4,200 characters" in capsys.readouterr().out
    (here / "options.toml").write_text(
        'model = "lstm"\nhidden = 50\nseed = 7\n[settings]\ncg_max_steps = 3\n'
    )
    words = [
        "train",
        "book.h5",
        "--config",
        "options.toml",
        *TINY,
        "--set",
        "damping=0.5",
        "--forget-bias",
        "-1.5",
        "--max-steps",
        "2",
    ]
    assert call(monkeypatch, *words) == 0
    assert "Stopped at step 2: 2 steps were taken" in capsys.readouterr().out
    found = checkpoint.latest(here / "book.run").meta["config"]
    assert (found["model"], found["hidden"], found["seed"]) == ("lstm", 6, 7)  # the command line has priority
    assert (found["settings"], found["forget_bias"]) == ({"cg_max_steps": 3, "damping": 0.5}, -1.5)
    assert [record["cg_steps"] for record in history(here / "book.run")] == [3, 3]

    # The same command resumes the run, also with fewer options, explicit defaults, or a different limit.
    assert call(monkeypatch, *words[:-1], "3") == 0
    assert "continuing from step 2" in capsys.readouterr().out
    assert call(monkeypatch, "train", "book.h5", "--max-steps", "4", "--set", "damping_factor=0.9") == 0
    assert [record["step"] for record in history(here / "book.run")] == [1, 2, 3, 4]
    capsys.readouterr()

    assert call(monkeypatch, "evaluate", "book.run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 4
    last = history(here / "book.run")[-1]
    assert found["valid_bpc"] == pytest.approx(last["valid_bpc"], rel=1e-6)

    assert call(monkeypatch, "sample", "book.run", "--length", "40", "--prime", "the") == 0
    written = capsys.readouterr().out
    assert written.startswith("the")
    assert len(written) == len("the") + 40 + 1
    assert call(monkeypatch, "sample", "book.run", "--length", "40", "--prime", "the") == 0
    assert capsys.readouterr().out == written


@pytest.mark.parametrize(("encoding", "unit"), [("latin-1", "byte"), ("utf-8", "byte"), ("ascii", "char")])
def test_a_text_of_any_encoding(encoding, unit, here, monkeypatch, capsys):
    words = "été, crème, garçon" if encoding != "ascii" else "summer, cream, boy"
    (here / "book.txt").write_bytes(f"{words} ".encode(encoding) * 200)
    assert call(monkeypatch, "prepare", "book.txt", "book.h5") == 0
    assert call(monkeypatch, "train", "book.h5", *TINY, "--max-steps", "1") == 0
    assert f" bits/{unit} on validation" in capsys.readouterr().out
    assert call(monkeypatch, "evaluate", "book.run") == 0
    assert f" bits/{unit} on " in capsys.readouterr().out

    def sample(*words):
        """Return the bytes of a sample; standard output is not a terminal."""
        with io.TextIOWrapper(io.BytesIO(), "ascii") as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert call(monkeypatch, "sample", "book.run", "--length", "42", *words) == 0
            out.flush()
            return out.buffer.getvalue()

    written = sample()
    assert len(written) == 42 + 1
    assert set(written[:-1]) <= set(f"{words} ".encode(encoding))
    assert any(byte > 127 for byte in written) == (encoding != "ascii")
    prime = words[:2].encode(encoding)
    assert sample("--prime", os.fsdecode(prime)).startswith(prime)


def test_an_unknown_character_is_named_as_it_was_typed(refused):
    hint = f" in the encoding {sys.getfilesystemencoding()}\n"
    begin = "the network does not know the character(s) "
    assert refused("sample", "run", "--prime", "thé ñ日") == f"{begin}'é' 'ñ' '日'{hint}"
    assert refused("sample", "run", "--prime", os.fsdecode(b"\xe9\n")) == f"{begin}'\\n' '\\xe9'{hint}"
    assert refused("sample", "run", "--prime", "A the") == f"{begin}'A'\n"


def test_a_figure_without_an_end_is_a_png_and_said_to_be(here, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert call(monkeypatch, "plot", "run", "--out", "figure") == 0
    assert capsys.readouterr().out == "figure.png: 1 run(s)\n"
    assert (here / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_one_step_is_drawn():
    pytest.importorskip("matplotlib")
    from hfmpi.report.figure import draw

    one = [{"train_bpc": 5.0, "valid_bpc": None, "P_I": 3, "P_D": 9, "seconds": 0.1}]
    low, high = draw([("a", one), ("b", one)], "bits/char").axes[0].get_ylim()
    assert low < 5 <= high


def test_a_figure_of_internals_has_no_empty_panel():
    pytest.importorskip("matplotlib")
    from hfmpi.report.figure import draw_internals

    one = [{"step": 1, "cg_steps": 5, "rho": 1.0, "gradient_norm": 0.5}]
    labels = [axis.get_ylabel() for axis in draw_internals([("a", one)]).axes]
    assert labels == ["reduction ratio ρ", "CG iterations", "norm of the gradient"]


def test_a_name_that_is_no_utf_8_is_told_as_far_as_it_can_be(here, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (here / "book.txt").write_bytes(text())
    (here / "run").rename(here / os.fsdecode(b"r\xfcn"))
    assert call(monkeypatch, "prepare", "book.txt", os.fsdecode(b"b\xfcch.h5")) == 0
    assert "b\ufffdch.h5: 4,500 of 4,500 characters" in capsys.readouterr().out
    assert call(monkeypatch, "plot", os.fsdecode(b"r\xfcn")) == 0
    assert "r\ufffdn" in capsys.readouterr().out
    assert call(monkeypatch, "plot", os.fsdecode(b"r\xfcn"), "--out", os.fsdecode(b"\xfc.png")) == 0
    assert capsys.readouterr().out == "\ufffd.png: 1 run(s)\n"


@pytest.mark.parametrize("words", [[], ["train"], ["bench"]])
def test_help_loads_neither_mpi_nor_compilers(words):
    program = (
        f"import sys; sys.argv = ['hfmpi', *{words}, '--help']\nfrom hfmpi.cli.main import entry\nentry()\n"
        "print([name for name in ('mpi4py', 'numba', 'cupy', 'h5py') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    if not words:
        for command in ("prepare", "train", "evaluate", "sample", "plot", "speedup", "info"):
            assert f"  {command} " in done.stdout


def test_python_m_hfmpi_is_the_command():
    def run(*words):
        program = [sys.executable, "-m", "hfmpi", *words]
        return subprocess.run(program, capture_output=True, text=True, timeout=60)

    assert run("prepare", "--help").stdout.startswith("Usage: hfmpi prepare ")
    is_one_sentence(run("trian"), "did you mean train?")


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_a_group_without_a_command_helps(words, monkeypatch, capsys):
    assert call(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert said.startswith("Usage: ")
    assert call(monkeypatch, *words, "--help") == 0
    assert capsys.readouterr().out == said


# What cannot work ------------------------------------------------------------------------------


def not_hdf5(path):
    path.write_text("Call me Ishmael.")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def cut_to_the_first_bytes(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


def other_schema(path):
    with h5py.File(path, "w") as file:
        file["tokens"] = np.arange(5)


def other_version(path):
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 3


def ids_outside_the_vocabulary(path):
    with h5py.File(path, "r+") as file:
        file["train"][17] = 200


def changed(path):
    with h5py.File(path, "r+") as file:
        file["train"][17] = (file["train"][17] + 1) % 3


def removed(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("damage", "reason"), [
    (not_hdf5, "is not an HDF5 file"),
    (empty, "is not an HDF5 file"),
    (truncated, "damaged or truncated"),
    (cut_to_the_first_bytes, "damaged or truncated"),
    (other_schema, "is an HDF5 file but not an hfmpi corpus"),
    (other_version, "is a corpus of version 3"),
    (ids_outside_the_vocabulary, "has ids outside the vocabulary"),
    (changed, "do not match its digest"),
    (removed, "No such file"),
    (a_folder, "is not a regular file"),
])  # fmt: skip
def test_damaged_data(damage, reason, here, refused):
    damage(here / "small.h5")
    for words in (("train", "small.h5", *TINY), ("train", "small.h5", "--out", "run")):
        sentence = refused(*words)
        assert reason in sentence
        assert "small.h5" in sentence
    assert reason in refused("evaluate", "run", "--data", "small.h5")


@pytest.mark.parametrize(("words", "reason"), [
    ("--sequence-length 301 --gradient-batch 5", "--sequence-length can be at most 300, not 301"),
    ("--sequence-length 5000 --gradient-batch 20", "at most 300, not 5,000; the training text of small.h5 "
     "makes 14 sequences of 300 characters: --gradient-batch can be at most 14, not 20\n"),
    ("--layers 0", "--layers"),
    ("--input-noise 1", "input_noise must lie in [0, 1)"),
    ("--dropout 1", "dropout must lie in [0, 1)"),
    ("--burn-in 290", "--burn-in together can be at most 300, not 310"),
    ("--gradient-batch 211", "--gradient-batch can be at most 210, not 211"),
    ("--curvature-batch 10", "--curvature-batch can be at most 9, the gradient batch, not 10"),
    ("--optimizer adam", "has no curvature batch"),
    ("--model elman", "there is no model 'elman'"),
    ("--model rnn --variant krause", "the krause variant is for lstm and mlstm"),
    ("--variant mine", "there is no variant 'mine'"),
    ("--initialisation zeros", "there is no initialisation 'zeros'"),
    ("--forget-bias nan", "is not a finite number"),
    ("--optimizer newton", "there is no optimizer 'newton'"),
    ("--backend torch", "there is no backend 'torch'"),
    ("--dtype float16", "dtype must be float32 or float64"),
    ("--hidden 0", "--hidden"),
    ("--hidden many", "--hidden"),
    ("--hidden 10000000", "there is not enough memory: 1 x 10,000,000 hidden units have 500,0"),
    ("--hidden 99999999999999999", "there is not enough memory"),
    ("--layers 99999999999999999", "layers must be at most 1,000"),
    ("--threads 99999999999999999", "--threads"),
    ("--stall-timeout 1e12", "1e12 is more than 1,000,000,000"),
    ("--max-seconds nan", "is not a finite number"),
    ("--max-steps -1", "--max-steps"),
    ("--momentum 0.9", "--momentum"),
    ("--set momentum=0.9", "optimizer shf has no setting 'momentum'"),
    ("--set name=x", "optimizer shf has no setting 'name'"),
    ("--set damping=strong", "setting damping of shf must be of type float"),
    ("--set damping=-1", "damping must not be negative"),
    ("--set damping=inf", "setting damping must be a finite number"),
    ("--patience -1", "-1 is less than 0"),
    ("--set cg_max_steps=5.5", "must be of type int"),
    ("--set damping", "--set needs NAME=VALUE"),
    ("--config absent.toml", "cannot read absent.toml"),
    ("--config run", "cannot read run"),
    ("--config run/checkpoint.h5", "is not a TOML file"),
    ("--out small.h5", "cannot create the folder small.h5"),
    ("--out small.h5/run", "cannot create the folder small.h5/run"),
    (f"--out {'x' * 300}", "cannot create the folder xxx"),
    ("--resume absent", "there is no checkpoint absent"),
    ("--resume small.h5", "small.h5"),
    ("--out run --resume never", "run already contains a run"),
    ("--out run --resume run", "run already contains a run"),
])  # fmt: skip
def test_options_that_cannot_be(words, reason, refused):
    assert reason in refused("train", "small.h5", *TINY, *words.split())


@pytest.mark.parametrize(("toml", "reason"), [
    ("hiden = 5", "unknown option 'hiden'"),
    ('hidden = "five"', "option hidden must be of type int"),
    ("hidden = 5.0", "option hidden must be of type int"),
    ("seed = true", "option seed must be of type int"),
    ("layers = 0", "layers must be at least 1"),
    ("seed = -1", "seed must not be negative"),
    ("memory_budget = -1", "memory_budget must not be negative"),
    ("max_seconds = inf", "max_seconds must be a finite number"),
    ("max_seconds = nan", "max_seconds must be a finite number"),
    ("forget_bias = -inf", "forget_bias must be a finite number"),
    ("layers = 100_000", "layers must be at most 1,000"),
    (f"seed = 1{'0' * 30}", "seed must be below 2**63"),
    ("[settings]\ndamping = nan", "setting damping must be a finite number"),
    (f"max_seconds = 1{'0' * 400}", "option max_seconds must be of type float"),
    ("model = ", "is not a TOML file"),
    ("hidden = 5\nhidden = 6", "is not a TOML file"),
    ("x = " + "[" * 5000, "is not a TOML file"),
    ("settings = 3", "settings in a configuration file must be a table"),
    ("[settings]\nmomentum = 1", "has no setting 'momentum'"),
    ("[settings]\ndamping = [1]", "setting damping of shf must be of type float"),
    ("[settings]\ndamping = 1979-05-27", "setting damping of shf must be of type float"),
    (f"[settings]\ndamping = 1{'0' * 400}", "setting damping must be a finite number"),
])  # fmt: skip
def test_configuration_files_that_cannot_be(toml, reason, here, refused):
    (here / "options.toml").write_text(toml)
    words = [word for word in TINY if word not in ("--hidden", "6")]
    assert reason in refused("train", "small.h5", *words, "--config", "options.toml")


def test_a_configuration_file_that_is_not_text(here, refused):
    (here / "options.toml").write_bytes(b"model = \xff\xfe")
    assert "is not a TOML file" in refused("train", "small.h5", "--config", "options.toml")


@pytest.mark.parametrize(("words", "reason"), [
    ("--model lstm", "this run has model = 'mlstm', not 'lstm'"),
    ("--hidden 7", "the checkpoint contains a model of"),
    ("--parameters 5000", "the checkpoint contains a model of"),
    ("--optimizer sgd", "this run has optimizer = 'shf', not 'sgd'"),
    ("--dtype float64", "this run has dtype = 'float32', not 'float64'"),
    ("--seed 1", "this run has seed = 0, not 1"),
    ("--sequence-length 10", "this run has sequence_length = 20, not 10"),
    ("--set cg_max_steps=2", "this run has cg_max_steps = 15, not 2"),
    ("--gradient-batch 10", "this run has gradient_batch = 9, not 10"),
    ("--input-noise 0.1", "this run has input_noise = 0.0, not 0.1"),
    ("--warmup 2", "this run has burn_in = 0, not 2"),
    ("--layers 2", "this run has layers = 1, not 2"),
    ("--config other.toml", "this run has burn_in = 0, not 2"),
])  # fmt: skip
def test_a_run_does_not_go_on_as_another(words, reason, here, refused):
    (here / "other.toml").write_text("warmup = 2")
    assert reason in refused("train", "small.h5", "--out", "run", "--max-steps", "9", *words.split())


def test_a_run_does_not_go_on_with_another_vocabulary(here, refused):
    for name, other in (("same size", text().replace(b"w", b"W")), ("more", text().replace(b"god", b"GOD"))):
        prepare(other)[0].write(here / "other.h5")
        size = Corpus.read(here / "small.h5").vocabulary
        assert (Corpus.read(here / "other.h5").vocabulary == size) == (name == "same size")
        assert "vocabulary" in refused("train", "other.h5", "--out", "run", "--max-steps", "9")
        way = "prepare the text with `hfmpi prepare --vocabulary "
        assert f"{way}RUN`" in refused("train", "other.h5", "--out", "new", "--resume", "run")
        assert f"{way}run`" in refused("evaluate", "run", "--data", "other.h5")
        (here / "other.h5").unlink()


def test_a_run_does_not_go_on_with_other_data(here, monkeypatch, capsys, refused):
    prepare(text()[::-1])[0].write(here / "other.h5")
    assert "different data" in refused("train", "other.h5", "--out", "run", "--max-steps", "9")
    # A new run may start from it.
    assert call(monkeypatch, "train", "other.h5", "--out", "new", "--resume", "run", "--max-steps", "3") == 0
    assert capsys.readouterr().err == "Note: run was trained on different data than other.h5.\n"


def test_a_run_is_not_evaluated_on_other_data_without_a_word(here, monkeypatch, capsys, refused):
    def evaluated(*words):
        assert call(monkeypatch, "evaluate", "run", *words, "--json", "--backend", "numpy") == 0
        said = capsys.readouterr()
        return json.loads(said.out), said.err

    own, word = evaluated()
    assert (own["corpus"], word) == (Corpus.read(here / "small.h5").digest, "")
    (here / "small.h5").rename(here / "moved.h5")
    # The run was created in a different folder; its corpus is still there.
    path = here / "run" / checkpoint.NEWEST
    found = checkpoint.load(path)
    corpus = here / "small.h5"
    checkpoint.save(path, found.theta, found.state, found.meta | {"data": str(corpus)})
    sentence = f"cannot read {corpus}: No such file or directory; if the corpus of the run was moved, "
    assert refused("evaluate", "run") == sentence + "use --data with its new path\n"
    assert evaluated("--data", "moved.h5") == (own, "")
    assert "use its new path and --out run" in refused("train", "small.h5", "--out", "run")

    prepare(text()[::-1])[0].write(corpus)
    sentence = (
        f"{corpus} no longer contains the data that the run was trained on; to evaluate on it anyway, use "
    )
    assert refused("evaluate", "run") == sentence + f"--data {corpus}\n"
    other, word = evaluated("--data", "small.h5")
    assert word == "Note: small.h5 contains different data than run was trained on.\n"
    assert other["corpus"] == Corpus.read(corpus).digest
    assert other["valid_bpc"] != own["valid_bpc"]


@pytest.mark.parametrize("source", ["run", f"run/{checkpoint.NEWEST}", "small.h5"])
def test_a_network_is_evaluated_on_a_new_text_in_its_vocabulary(source, here, monkeypatch, capsys, refused):
    (here / "new.txt").write_text("a word, made by him. " * 60)
    prepared = ["prepare", "new.txt", "new.h5", "--test-chars", "200000", "--vocabulary", source]
    assert "the text contains 120 characters (2 distinct) that" in refused(*prepared)
    assert call(monkeypatch, *prepared, "--unknown", " ") == 0
    assert "',' (60), '.' (60)" in capsys.readouterr().out
    corpus = Corpus.read(here / "new.h5")
    assert corpus.symbols == Corpus.read(here / "small.h5").symbols
    assert decoded(corpus, corpus.train).startswith(b"a word  made by him  a")
    found = {}
    for split in corpus.splits:
        assert call(monkeypatch, "evaluate", "run", "--data", "new.h5", "--split", split, "--json") == 0
        found[split] = json.loads(capsys.readouterr().out)
        assert found[split]["split"] == split
        assert found[split]["sequences"] == len(corpus.splits[split]) // 20
        assert found[split]["corpus"] == corpus.digest
    assert len({found[split][f"{split}_bpc"] for split in found}) == 3
    assert call(monkeypatch, "evaluate", "run", "--data", "new.h5", "--split", "test") == 0
    assert f" bits/char on {found['test']['sequences']} test sequences" in capsys.readouterr().out


def test_a_split_that_is_not_there(here, refused):
    way = "small.h5 has no test text: prepare one with `hfmpi prepare --test-chars N`\n"
    assert refused("evaluate", "run", "--data", "small.h5", "--split", "test") == way
    prepare(text(), 400, 19)[0].write(here / "short.h5")
    assert refused("evaluate", "run", "--data", "short.h5").startswith(
        "the validation text of short.h5: a text of 19 characters is too short for a sequence of 20"
    )


def test_a_checkpoint_of_another_run_in_the_folder(here, monkeypatch, refused):
    newest, previous = here / "run" / checkpoint.NEWEST, here / "run" / checkpoint.PREVIOUS
    assert (
        call(monkeypatch, "train", "small.h5", "--out", "new", *TINY, "--seed", "1", "--max-steps", "1") == 0
    )
    shutil.move(newest, previous)
    shutil.copy(here / "new" / checkpoint.NEWEST, newest)
    for words in ("train small.h5 --out run --max-steps 9", "evaluate run", "sample run", "speedup run"):
        assert refused(*words.split()) == (
            "run/checkpoint.h5 and checkpoint.previous.h5 belong to different runs (the seed differs): "
            "remove one of them\n"
        )
    newest.unlink()
    assert call(monkeypatch, "train", "small.h5", "--out", "run", "--max-steps", "3") == 0
    assert [record["step"] for record in history(here / "run")] == [1, 2, 3]


def open_elsewhere(path):
    """Leave a file in the state in which a program holds it that writes to it, or that died while writing."""
    program = "import h5py, os, sys; file = h5py.File(sys.argv[1], 'r+'); os._exit(0)"
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=60)


def test_files_that_are_open_in_another_program_are_not_called_damaged(here, refused):
    open_elsewhere(here / "small.h5")
    (here / "book.txt").write_bytes(text())
    for words in (
        "train small.h5 --out new",
        "evaluate run --data small.h5",
        "prepare book.txt small.h5",
        "bench step --data small.h5",
    ):
        assert refused(*words.split()).startswith("small.h5 is open for writing in another program: close it")
    # The newest checkpoint may be valid: steps after the previous one are not discarded.
    shutil.copy(here / "run" / checkpoint.NEWEST, here / "run" / checkpoint.PREVIOUS)
    open_elsewhere(here / "run" / checkpoint.NEWEST)
    for words in ("train small.h5 --out run", "evaluate run"):
        assert "run/checkpoint.h5 is open for writing" in refused(*words.split())


def test_a_file_that_another_program_locks(here, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    with (here / "small.h5").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = outside(1, here, "evaluate", "run", "--data", "small.h5")
    is_one_sentence(done, "small.h5 is locked by another program")


def test_a_working_folder_that_is_gone(here, monkeypatch, refused, capsys):
    gone = here / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    sentence = "the working folder has been removed: change to another folder, for example by cd ~\n"
    for words in ("prepare a.txt a.h5", "train small.h5", "evaluate run", "sample run", "plot run"):
        assert refused(*words.split()) == sentence
    for words in (f"evaluate {here}/run --backend numba", "bench products --backend numba"):
        assert refused(*words.split()) == sentence  # Numba needs it too
    assert call(monkeypatch, "sample", here / "run", "--length", "3") == 0
    assert call(monkeypatch, "info") == 0


@pytest.mark.parametrize("change", [
    {"step": None}, {"step": True}, {"step": -1}, {"step": 2.5}, {"seconds": "soon"}, {"seconds": -1},
    {"counts": {"steps": 2, "naps": 1}}, {"counts": 7}, {"vocabulary": 3}, {"vocabulary": [32] * 17},
    {"corpus": 5}, {"data": 6}, {"config": {"hidden": "six"}}, {"config": {"units": 6}}, {"config": 6},
])  # fmt: skip
def test_checkpoints_that_describe_no_run(change, here, refused):
    path = here / "run" / checkpoint.NEWEST
    found = checkpoint.load(path)
    checkpoint.save(path, found.theta, found.state, found.meta | change)
    if change.keys() != {"data"}:  # the command line names it
        refused("train", "small.h5", "--out", "run", "--max-steps", "9")
    refused("evaluate", "run", "--data", "small.h5")
    refused("sample", "run")


def test_parameters_that_are_no_numbers(here, refused):
    path = here / "run" / checkpoint.NEWEST
    found = checkpoint.load(path)
    checkpoint.save(path, found.theta * np.nan, found.state, found.meta)
    for words in (
        "evaluate run --json --data small.h5 --backend numpy --keep last",
        "sample run --keep last",
    ):
        assert refused(*words.split()) == "the parameters in the checkpoint in run are not finite\n"
    checkpoint.save(path, found.theta * np.float32(3e37), found.state, found.meta)
    for words in (
        "evaluate run --json --data small.h5 --backend numpy --keep last",
        "sample run --keep last",
    ):
        assert " not finite" in refused(*words.split())


def test_checkpoints_that_cannot_be_read(here, refused):
    newest = here / "run" / checkpoint.NEWEST
    whole = newest.read_bytes()
    for bad in (
        b"",
        b"not a checkpoint",
        whole[:-100],
        whole[: len(whole) // 2],
        (here / "small.h5").read_bytes(),
    ):
        newest.write_bytes(bad)
        for words in (("train", "small.h5", "--out", "run"), ("evaluate", "run"), ("sample", "run")):
            assert checkpoint.NEWEST in refused(*words)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(here, monkeypatch, capsys):
    newest = here / "run" / checkpoint.NEWEST
    shutil.copy(newest, here / "run" / checkpoint.PREVIOUS)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert call(monkeypatch, "train", "small.h5", "--out", "run", "--max-steps", "3") == 0
    said = capsys.readouterr()
    assert said.err.startswith("Note: run/checkpoint.h5 is damaged")
    assert said.err.count("\n") == 1
    assert [record["step"] for record in history(here / "run")] == [1, 2, 3]


@pytest.mark.parametrize(("book", "words", "reason"), [
    (b"", "prepare book.txt new.h5", "the text is empty"),
    (b"x", "prepare book.txt new.h5", "too short to split"),
    (b"xyz" * 9, "prepare book.txt small.h5/new.h5", "cannot write small.h5/new.h5"),
    (b"xyz" * 9, "prepare book.txt absent/new.h5", "cannot write absent/new.h5"),
    (b"xyz" * 9, "prepare book.txt book.txt", "is one of the texts"),
    (b"xyz" * 9, "prepare absent.txt new.h5", "cannot read absent.txt"),
    (b"xyz" * 9, "prepare new.h5", "use one of TEXT files"),
    (b"xyz" * 9, "prepare book.txt new.h5 --train-chars 0", "--train-chars"),
    (
        b"xyz" * 9,
        "prepare book.txt new.h5 --train-chars alle",
        "'alle' is neither a whole number nor the word all",
    ),
    (b"xyz" * 9, "prepare book.txt new.h5 --valid-chars all", "'all' is not a whole number"),
    (b"xyz" * 9, "prepare book.txt new.h5 --train-chars all", "has none left for training after 200,000"),
    (b"xyz" * 9, "prepare book.txt new.h5 --test-chars -1", "--test-chars"),
    (b"xyz" * 9, "prepare book.txt new.h5 --vocabulary absent", "there is no corpus or run absent"),
    (b"xyz" * 9, "prepare book.txt new.h5 --vocabulary book.txt", "book.txt is not an HDF5 file"),
    (b"xyz" * 9, "prepare book.txt new.h5 --vocabulary .", "there is no checkpoint"),
    (b"xyz" * 9, "prepare book.txt small.h5 --vocabulary small.h5", "small.h5 is the corpus of --vocabulary"),
    (b"xyz" * 9, "prepare book.txt new.h5 --vocabulary run", "18 characters (2 distinct) that are not in"),
    (b"xyz" * 9, "prepare book.txt new.h5 --vocabulary run --unknown wo", "takes one character, not 'wo'"),
    (b"xyz" * 9, "prepare book.txt new.h5 --vocabulary run --unknown Q", "'Q' is not in the vocabulary of"),
    (b"xyz" * 9, "prepare book.txt new.h5 --unknown w", "--unknown needs --vocabulary"),
    (b"", "evaluate run --split all", "'all' is not one of 'train', 'valid', 'test'"),
    (b"xyz" * 9, "prepare new.h5 --ptb-raw run", "contains no raw Penn Treebank files"),
    (b"", "train", "Missing argument"),
    (b"", "train .", "is not a corpus file"),
    (b"", "trian small.h5", "there is no command 'trian' (did you mean train?); `hfmpi --help` lists"),
    (b"", "SAMPLE run", "there is no command 'SAMPLE' (did you mean sample?); `hfmpi --help` lists"),
    (b"", "quit", "there is no command 'quit'; `hfmpi --help` lists the commands"),
    (b"", "train small.h5 --hiddne 4", "--hidden"),
    (b"", "evaluate absent", "there is no checkpoint"),
    (b"", "evaluate small.h5", "small.h5"),
    (b"", "sample run --prime THE", "does not know the character(s) 'E' 'H' 'T'"),
    (b"", "sample run --length -1", "--length"),
    (b"", "plot absent --out figure.png", "absent/history.jsonl"),
    (b"", "plot run --out run", "cannot write run: it is a folder"),
    (b"", "plot run --out figure.xyz", "cannot write figure.xyz: Format 'xyz' is not supported"),
    (b"", "speedup absent", "absent"),
])  # fmt: skip
def test_other_commands(book, words, reason, here, refused):
    (here / "book.txt").write_bytes(book)
    if words.startswith("plot"):
        pytest.importorskip("matplotlib")
    assert reason in refused(*words.split())


# As commands of their own, and under mpirun ----------------------------------------------------

FULL_DISK = """
import resource
from hfmpi.parallel import launch
from hfmpi.cli.main import entry
connect = launch.connect
def connect_then_fill(*arguments):
    comm = connect(*arguments)  # before the limit, because MPI itself needs files
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    return comm
launch.connect = connect_then_fill
entry()
"""
"""The command on a disk that takes the small files of a run, but no checkpoint."""


def outside(ranks, here, *words, program="from hfmpi.cli.main import entry; entry()"):
    """Run the command in separate processes; return their results."""
    if ranks > 1 and MPIRUN is None:
        pytest.skip("there is no mpirun")
    launcher = [MPIRUN, "-n", str(ranks)] if ranks > 1 else []
    begin = time.monotonic()
    done = subprocess.run(
        [*launcher, sys.executable, "-c", program, *map(str, words)],
        capture_output=True, text=True, timeout=60, cwd=here,
    )  # fmt: skip
    assert time.monotonic() - begin < 40
    return done


def is_one_sentence(done, reason):
    assert done.returncode == 2, (done.args, done.stdout, done.stderr)
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


def is_told_once_and_in_the_end(done, reason, lost):
    assert done.returncode == 2, (done.args, done.stdout, done.stderr)
    *notes, error = done.stderr.splitlines()
    failures = reason, reason.replace(checkpoint.NEWEST, checkpoint.BEST)
    assert sorted(notes) == sorted(
        f"Note: {failure}; training continues, and hfmpi will try again." for failure in failures
    )
    assert error == f"Error: {reason}; {lost} are not saved"


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_disk_space_for_the_checkpoint(ranks, here):
    words = ("train", "small.h5", *TINY, "--checkpoint-every", "2", "--max-steps", "6", "--out")
    done = outside(ranks, here, *words, "new", program=FULL_DISK)
    reason = "cannot write new/checkpoint.h5: File too large"
    is_told_once_and_in_the_end(done, reason, "the steps after step 0")
    assert {path.name for path in (here / "new").iterdir()} == {
        "config.toml", "history.jsonl", "timing.json", ".lock"
    }  # fmt: skip
    assert [record["step"] for record in history(here / "new")] == [1, 2, 3, 4, 5, 6]

    before = (here / "run" / checkpoint.NEWEST).read_bytes()
    done = outside(ranks, here, *words, "run", program=FULL_DISK)
    is_told_once_and_in_the_end(done, reason.replace("new", "run"), "the steps after step 2")
    assert (here / "run" / checkpoint.NEWEST).read_bytes() == before
    assert not [path for path in (here / "run").iterdir() if path.suffix == ".tmp"]
    done = outside(ranks, here, *words, "run")  # there is free space again
    assert done.returncode == 0, done
    assert "continuing from step 2" in done.stdout
    assert [record["step"] for record in history(here / "run")] == [1, 2, 3, 4, 5, 6]


def test_bad_input_under_three_ranks(here):
    before = content(here)
    is_one_sentence(
        outside(3, here, "train", "small.h5", *TINY, "--out", "small.h5/run"), "cannot create the folder"
    )  # which rank 0 alone finds out
    is_one_sentence(
        outside(3, here, "train", "small.h5", "--out", "run", "--hidden", "7"), "contains a model of"
    )  # which all ranks detect
    assert content(here) == before
    truncated(here / "small.h5")
    before = content(here)
    is_one_sentence(outside(3, here, "train", "small.h5", *TINY), "small.h5 is damaged or truncated")
    is_one_sentence(
        outside(3, here, "train", "small.h5", "--momentum", "1"), "--momentum"
    )  # before MPI starts
    assert content(here) == before


# Memory ----------------------------------------------------------------------------------------


def test_a_memory_budget_is_told_of_and_changes_no_number(here, monkeypatch, capsys):
    asked = ["train", "small.h5", *TINY, "--micro-batch", "1", "--max-steps", "2", "--out"]
    assert call(monkeypatch, *asked, "plenty") == 0
    assert "memory budget" not in capsys.readouterr().out
    assert call(monkeypatch, *asked, "little", "--memory-budget", "4KiB") == 0
    assert (
        "its memory budget is 0.00 GiB: the part that does not fit is recomputed" in capsys.readouterr().out
    )
    plenty, little = (checkpoint.latest(here / name) for name in ("plenty", "little"))
    np.testing.assert_array_equal(plenty.theta, little.theta)
    assert plenty.meta["counts"] == little.meta["counts"]


def test_a_memory_budget_that_is_no_size(refused):
    assert "is not a memory size" in refused("train", "small.h5", "--memory-budget", "much")


def test_a_wrong_bench_is_one_sentence(refused):
    assert "no model 'elman'" in refused("bench", "products", "--model", "elman")
    assert "cannot read nothing.h5" in refused("bench", "step", "--data", "nothing.h5")
    assert "use 1 to 21, the number of sequences" in refused(
        "bench", "products", "--data", "small.h5", "--batch", "100000"
    )
    assert "has no setting" in refused("bench", "step", "--set", "x=1")
    assert refused("bench", "products", "--dtype", "half") == "dtype must be float32 or float64, not 'half'\n"
