"""The live line of a run on a terminal, and the messages while kernels are compiled."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

import click
import pytest
from small import train, write_corpus

from hfmpi.backends.compilation import listening, notify
from hfmpi.runs import live
from hfmpi.runs.live import COMPILING, LiveLine, Patience, announced


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def shown(steps, max_steps=0, max_seconds=0.0, compiled=False, each=0.1, **more):
    """Return the line and its clock 0.4 seconds after the last of a number of steps from step 100 on."""
    clock = Clock()
    line = LiveLine(100, max_steps, max_seconds, clock)
    if compiled:
        line.compiling(True)
        clock.seconds += 60.0
        line.compiling(False)
    for step in range(101, 101 + steps):
        clock.seconds += each
        line.update(step, 7.0 + clock.seconds, 2.0, 1.5 if step == 101 else None, **more)
    clock.seconds += 0.4
    return line


def test_the_line_of_many_steps_a_second():
    assert shown(0, 500).text(79) == "step 100/500  0:00"
    line = shown(50, 500)
    assert line.text(79) == "step 150/500  0:12  0:35 left  10 steps/s  train 2.0000  valid 1.5000"
    assert line.part() == 0.3
    assert shown(50).text(79) == "step 150  0:12  10 steps/s  train 2.0000  valid 1.5000"
    assert shown(50).part() is None
    assert "  4,000 steps/s  " in shown(8_000, each=1 / 4000).text(79)


def test_the_line_of_slow_steps():
    details = ["lambda 1.00e-01", "rho 0.94", "cg 15"]
    whole = shown(3, 110, each=5.0, details=details).text(200)
    assert whole.startswith("step 103/110  0:22  0:35 left  5 s/step  train 2.0000  valid 1.5000  lambda 1.0")
    assert whole.endswith("  rho 0.94  cg 15")
    assert shown(3, 110, each=5.0, details=details).text(len(whole) - 1) == whole.removesuffix("  cg 15")
    assert shown(1, 110, each=5.0).text(79).startswith("step 101/110  0:12  0:45 left  5 s/step")
    assert "103/999,999  24,997:24:00 left  90 s/step" in shown(3, 999_999, each=90.0).text(79)


def test_the_limit_that_is_reached_first_counts():
    assert "  0:20 left" in shown(50, 500, max_seconds=32.5).text(79)
    line = shown(50, 100_000, max_seconds=25.0)
    assert line.part() == pytest.approx(0.496)
    line.clock.seconds += 60
    assert "  0:00 left" in line.text(79)
    assert line.part() == 1.0


def test_a_step_that_compiles_tells_nothing_of_the_next_ones():
    assert shown(1, 110, compiled=True, each=5.0).text(79) == "step 101/110  1:12  train 2.0000  valid 1.5000"
    assert "0:40 left  5 s/step" in shown(2, 110, compiled=True, each=5.0).text(79)


@pytest.mark.parametrize("compiling", [False, True])
def test_a_line_of_any_width(compiling):
    line = shown(50, 500, details=["lambda 1.00e-01"])
    line.compiling(compiling)
    for width in range(1, 100):
        text = line.text(width)
        assert 0 < len(text) <= width
        if not compiling:
            assert text.startswith("step 150/500"[:width])
        elif width >= len(COMPILING) + 2:
            assert COMPILING in text


COMMAND = "from hfmpi.cli.main import entry; entry()"


def on_terminal(columns, source, *words, **options):
    """Run Python on a terminal with a number of columns; return its output without colours."""
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    program = [sys.executable, "-c", source, *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    environment |= options.pop("env", {})
    written = b""
    with subprocess.Popen(
        program, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, **options
    ) as process:
        os.close(terminal)
        while True:
            try:
                written += os.read(master, 10**6)
            except OSError:  # its end
                break
    os.close(master)
    assert process.returncode == 0, written
    return re.sub(r"\x1b\[[0-9;]*m", "", written.decode())


def test_a_run_on_a_terminal(tmp_path):
    data, run = write_corpus(tmp_path / "small.h5"), tmp_path / "run"
    options = "--optimizer shf --hidden 8 --sequence-length 20 --gradient-batch 10 --curvature-batch 4"
    words = ["train", data, *options.split()]
    written = on_terminal(70, COMMAND, *words, "--backend", "numpy", "--out", run, "--max-seconds", 1.2)
    # Each state of the live line: it is redrawn after a carriage return that clears it.
    lines = re.findall(r"\r\x1b\[2K(step \d[^\r\n\x1b]*)", written)
    assert max(map(len, lines)) < 70
    part = r"step [\d,]+  (0:0\d  )?0:0\d left  [\d.e+]+ (steps/s|s/step)  train \d"
    assert any(re.match(part, line) for line in lines), lines
    assert re.search(r"Stopped at step [\d,]+: 1.2 seconds have passed", written)
    assert "\x1b[?25h" in written  # the cursor is visible again


PROGRAM = """
import numpy as np
import hfmpi
from hfmpi.backends import create
from hfmpi.backends.compilation import notify

class Slow(hfmpi.Network):  # a stand-in for kernels that are compiled when the model is tried
    def loss(self, theta, batch):
        if not hasattr(self, "tried"):
            notify(True)
            notify(False)
            self.tried = True
        return super().loss(theta, batch)

model = Slow(cell="rnn", inputs=3, outputs=2, hidden=4, backend=create("numpy"))
data = np.ones((9, 5, 3)), np.ones((9, 5), int)
hfmpi.train(model, data, data, metric=lambda outputs, targets: outputs.argmax(1) == targets, max_steps=9,
            evaluate_every=1)
"""


def test_a_python_program_on_a_terminal():
    written = on_terminal(120, PROGRAM)
    begin, *_ = written.partition("rnn, 4 units")
    assert COMPILING in begin
    part = r"step [1-9]/9  .*train 0\.0[\d.]{5,}  valid [\d.e-]+  metric 1"
    lines = re.findall(r"\r\x1b\[2K(step [^\r\n\x1b]*)", written)
    assert any(re.match(part, line) for line in lines), written
    assert re.search(
        r"Stopped at step 9: 9 steps were taken, loss [\d.e-]+, metric 1 on validation\.\r\n$", written
    )


def test_what_is_no_terminal_sees_plain_lines(tmp_path, capsys):
    from hfmpi.runs.reporter import make_reporter

    with make_reporter(0) as reporter:
        train(tmp_path / "run", write_corpus(tmp_path / "small.h5"), max_steps=2, reporter=reporter)
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    lines = [line[:13] for line in said.out.splitlines()[3:]]
    assert lines == ["step      1  ", "step      2  ", "Stopped at st"]
    assert said.err == ""


@pytest.mark.parametrize("controls", [False, True])
def test_the_terminal_that_open_mpi_gives_a_rank_is_nobodys(controls, tmp_path):
    """Open MPI's mpirun copies this output, often to a file; one rank of srun --pty has the user's."""
    data, run = write_corpus(tmp_path / "small.h5"), tmp_path / "run"
    options = "--optimizer adam --hidden 8 --sequence-length 20 --gradient-batch 10 --backend numpy"
    written = on_terminal(
        70,
        COMMAND,
        *["train", data, *options.split(), "--out", run, "--max-steps", 3],
        env={"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        start_new_session=True,
        preexec_fn=lambda: controls and fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    assert "Stopped at step 3" in written
    assert ("\x1b" in written) == controls


def test_a_terminal_that_cannot_go_back_sees_plain_lines(monkeypatch):
    from hfmpi.runs import reporter as progress

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for kind, reporter in (("dumb", progress.Log), ("xterm", progress.Live)):
        monkeypatch.setenv("TERM", kind)
        with progress.make_reporter(0) as made:
            assert type(made) is reporter


# Compiling -------------------------------------------------------------------------------------


def test_who_listens_is_told():
    seen = []
    with listening(seen.append):
        notify(True)
        notify(False)
    notify(True)
    assert seen == [True, False]


class Timer:
    """A timer that only uses a simulated clock."""

    now, running = 0.0, None

    def __init__(self, seconds, function):
        self.due, self.function = Timer.now + seconds, function

    def start(self):
        Timer.running = self

    def cancel(self):
        Timer.running = None

    @classmethod
    def wait(cls, seconds):
        cls.now += seconds
        if cls.running and cls.now >= cls.running.due:
            timer, cls.running = cls.running, None
            timer.function()


def test_a_log_hears_of_it_after_a_while_and_then_every_few_seconds(monkeypatch):
    monkeypatch.setattr(live.threading, "Timer", Timer)
    monkeypatch.setattr(live.time, "monotonic", lambda: Timer.now)
    said = []
    patience = Patience(said.append)
    expected = [COMPILING, "compiling kernels: 4 s so far ...", "compiling kernels: 7 s so far ..."]
    for seconds, lines in ((0.4, 0), (0.5, 0), (0.2, 1), (2.7, 1), (0.3, 2), (2.8, 2), (0.2, 3)):
        patience(True)
        Timer.wait(seconds)
        patience(False)
        assert said == expected[:lines]
        Timer.wait(5.0)  # without compiling
        assert said == expected[:lines]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_that_prints_a_result_says_it_on_standard_error(rank, monkeypatch, capsys):
    monkeypatch.setattr(live.threading, "Timer", Timer)
    with announced(rank):
        click.echo("a result")
        notify(True)
        Timer.wait(2.0)
        notify(False)
    said = capsys.readouterr()
    assert said.out == "a result\n"
    assert said.err == ("" if rank else f"{COMPILING}\n")
