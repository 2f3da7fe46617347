"""bin/quickstart: its behaviour after an interruption."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

BIN = Path(__file__).parents[1] / "bin"


def program(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_ctrl_c_stops_all_of_it(tmp_path):
    """A run that stops in an orderly way exits with code 0, so that the shell would start the next one."""
    (tmp_path / "bin").mkdir()
    shutil.copy(BIN / "quickstart", tmp_path / "bin")
    (tmp_path / "bin" / "environment.sh").write_text(f"cd '{tmp_path}'\nmake_environment() {{ :; }}\n")
    program(tmp_path / "hfmpi", "echo $1 >>calls")
    program(tmp_path / "mpirun", "trap 'exit 0' INT\necho train >>calls\nwhile :; do sleep 0.1; done")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(
        [tmp_path / "bin" / "quickstart"],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        calls = tmp_path / "calls"
        while not calls.exists() or "train" not in calls.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            said = process.communicate(timeout=20)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "continues from the last checkpoint" in said
    assert calls.read_text().split() == ["prepare", "train"]
