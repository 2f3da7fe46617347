"""Where there is no GPU (or no CuPy), the stand-in takes CuPy's place for all tests."""

import shutil
import sys
from pathlib import Path

import pytest

from hfmpi.backends import gpus

STANDIN = Path(__file__).parent / "standin"

REAL_GPU = bool(gpus())
if not REAL_GPU and shutil.which("g++"):
    sys.path.insert(0, str(STANDIN))


@pytest.fixture
def cooperative(monkeypatch):
    """Let the stand-in launch kernels whose blocks wait for one another, as a GPU does."""
    if not REAL_GPU:
        cupy = pytest.importorskip("cupy")
        monkeypatch.setitem(cupy.ATTRIBUTES, "CooperativeLaunch", 1)
