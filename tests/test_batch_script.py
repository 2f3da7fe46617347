"""bin/train.sbatch with stand-ins for Slurm's commands: environments, job arrays, requeues."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bin" / "train.sbatch"
COMMANDS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": 'echo "$@" >>scontrol.log',
    "squeue": 'echo "$@" >>squeue.log; echo N/A',
    "hfmpi": 'echo "$@" >>hfmpi.log; mkdir -p "$4"; eval "$TRAIN"',  # hfmpi train DATA --out RUN
}
DONE, STOPPED = 'touch "$4/DONE"', 'echo {} >>"$4/history.jsonl"'
ARRAY = {"SLURM_ARRAY_JOB_ID": "700", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def submit(tmp_path):
    """Return a function that runs the script in an environment without bin/activate, as conda's are."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)

    def run(*arguments, train=DONE, **variables):
        env = {"PATH": os.defpath, "TRAIN": train, "VENV": "environment", "SLURM_JOB_ID": "702", **variables}
        words = ["bash", SCRIPT, *arguments]
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    return run


def test_a_stopped_run_is_requeued_until_it_is_done(submit, tmp_path):
    words = "text.h5", "run", "--max-steps", "5"
    assert submit(*words, train=STOPPED).returncode == 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 702\n"
    assert submit(*words).returncode == 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 702\n"
    assert (tmp_path / "hfmpi.log").read_text() == "train text.h5 --out run --max-steps 5\n" * 2


def test_a_run_without_progress_is_not_requeued(submit, tmp_path):
    ended = submit("text.h5", "run", "--max-steps", "5", train="true")
    assert ended.returncode == 1
    assert "No step was finished" in ended.stderr
    assert not (tmp_path / "scontrol.log").exists()


def test_a_task_of_an_array_has_its_arguments_and_is_requeued_alone(submit, tmp_path):
    words = "text.h5", "runs/%A/r-%a", "--seed", "%a", "--config", "c-%a.toml", "--max-steps=4"
    ended = submit(*words, train=STOPPED, **ARRAY)
    assert ended.returncode == 0, ended.stderr
    expected = "train text.h5 --out runs/700/r-3 --seed 3 --config c-3.toml --max-steps=4\n"
    assert (tmp_path / "hfmpi.log").read_text() == expected
    assert (tmp_path / "scontrol.log").read_text() == "requeue 700_3\n"
    assert "--jobs=700_3" in (tmp_path / "squeue.log").read_text()


def test_without_an_array_arguments_are_not_changed(submit, tmp_path):
    assert submit("text.h5", "run-%a", "--max-steps", "5").returncode == 0
    assert (tmp_path / "hfmpi.log").read_text() == "train text.h5 --out run-%a --max-steps 5\n"


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (("text.h5", "run", "--max-steps", "5"), ARRAY, "put %a into its name, such as run-%a"),
        (("text.h5", "run", "--max-steps", "5"), {"VENV": "absent"}, "absent/bin/hfmpi does not exist"),
        (("text.h5", "run"), {}, "Set --max-steps or --max-seconds"),
        (("text.h5", "--max-steps", "5"), {}, "Put the corpus and the folder of the run"),
    ],
)
def test_a_wrong_submission_ends_with_a_sentence(submit, tmp_path, words, variables, message):
    ended = submit(*words, **variables)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "hfmpi.log").exists()
