"""Settings of all tests: the stand-in for CuPy if there is no GPU (or no CuPy), and default signals."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

from hfmpi.backends import gpus

# Children inherit ignored signals, for example from nohup or a background job, but tests send them signals.
for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python ignores these
    if signal.getsignal(number) == signal.SIG_IGN:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)

STANDIN = Path(__file__).parent / "standin"

REAL_GPU = bool(gpus())
if not REAL_GPU and shutil.which("g++"):
    sys.path.insert(0, str(STANDIN))


@pytest.fixture
def cooperative(monkeypatch):
    """Allow the stand-in to launch kernels whose blocks wait for each other, as a GPU does."""
    if not REAL_GPU:
        cupy = pytest.importorskip("cupy")
        monkeypatch.setitem(cupy.ATTRIBUTES, "CooperativeLaunch", 1)


@pytest.fixture
def small_clusters(monkeypatch):
    """Make the clusters of the stand-in quick: few threads and little memory."""
    if not REAL_GPU:
        cupy = pytest.importorskip("cupy")
        monkeypatch.setattr("hfmpi.backends.clusters.THREADS", 64)
        monkeypatch.setitem(cupy.ATTRIBUTES, "MaxSharedMemoryPerBlockOptin", 16 * 1024)
