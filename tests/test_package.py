"""The contents of a release: source and wheel, and the command as a wheel installs it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import hfmpi

ROOT = Path(__file__).parents[1]
NAME = f"hfmpi-{hfmpi.__version__}"

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout: git knows the files")


def run(*command, cwd, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | more
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return {name for name in listed if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """Build both from a copy with unrelated files; the wheel is built from the source distribution."""
    at = tmp_path_factory.mktemp("release")
    for name in tracked:
        (at / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, at / "tree" / name)
    for stranger in ("notes.txt", "kjv.h5", "run/history.jsonl", ".venv/lib/a.py"):
        (at / "tree" / stranger).parent.mkdir(parents=True, exist_ok=True)
        (at / "tree" / stranger).write_text("no part of it")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", at, at / "tree", cwd=at)
    return at


def test_the_source_distribution_has_what_git_has(built, tracked):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    assert names == tracked | {"PKG-INFO"}


def test_the_wheel_has_the_whole_package_and_nothing_else(built, tracked):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked if name.startswith("hfmpi/")}
    assert {"hfmpi/backends/kernels.cu", "hfmpi/py.typed"} <= names


def test_the_installed_command_trains(built, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    places = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # The dependencies come from this environment, but not hfmpi, whose editable install is ignored there.
    (Path(places.strip()) / "beside.pth").write_text(sysconfig.get_path("purelib"))
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python
    run(*pip, "install", "--no-deps", "--no-index", built / f"{NAME}-py3-none-any.whl", cwd=tmp_path)

    hfmpi_there = tmp_path / "venv" / "bin" / "hfmpi"
    assert "prepare" in run(hfmpi_there, "--help", cwd=tmp_path)
    assert hfmpi.__version__ in run(hfmpi_there, "--version", cwd=tmp_path)
    where = run(python, "-c", "import hfmpi.runs; print(hfmpi.runs.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "venv"))
    (tmp_path / "book.txt").write_bytes((ROOT / "CHANGELOG.md").read_bytes())
    run(hfmpi_there, "prepare", "book.txt", "book.h5", cwd=tmp_path)
    batches = (
        "--optimizer",
        "shf",
        "--sequence-length",
        "10",
        "--gradient-batch",
        "4",
        "--curvature-batch",
        "2",
    )
    small = "--backend", "numpy", "--hidden", "4", *batches, "--max-steps", "2"
    run(hfmpi_there, "train", "book.h5", "--out", "run", *small, cwd=tmp_path)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 2
