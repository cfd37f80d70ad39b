"""benchmarks/gpu.sh: its parts leave no process behind, whichever way they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

# in place of Python: starts a process that ignores interruptions, and ends at once or not at all
STARTER = """#!/usr/bin/env bash
[ "$1" = - ] && exec {python} "$@"
(trap "" INT TERM; echo $BASHPID >> {pids}; exec sleep 600) &
until [ -s {pids} ]; do :; done
{then}
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends_soon(pid: int) -> bool:
    until = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        pass
    return not is_running(pid)


def start(folder: Path, then: str) -> tuple[subprocess.Popen, Path]:
    pids, starter = folder / "pids", folder / "starter"
    starter.write_text(STARTER.format(python=sys.executable, pids=pids, then=then))
    starter.chmod(0o755)
    environment = {**os.environ, "DEVICE": "cpu", "TINY": "1", "PARTS": "tests", "PYTHON": str(starter)}
    environment["OUT"] = str(folder / "out")
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh")]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True), pids


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_part_that_ends_leaves_nothing_behind(tmp_path):
    script, pids = start(tmp_path, "exit 3")
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 0 and "tests: ended with 3" in output
    assert all(ends_soon(int(pid)) for pid in pids.read_text().split())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_an_interrupted_script_leaves_nothing_behind(tmp_path):
    script, pids = start(tmp_path, "exec sleep 600")
    while not pids.exists() or not pids.read_text().strip():
        assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=60)
    assert script.returncode == 130
    assert all(ends_soon(int(pid)) for pid in pids.read_text().split())
