"""benchmarks/gpu.sh: its parts leave no process behind, whichever way they end."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

# in place of Python: starts a process that ignores interruptions, and ends at once or not at all
STARTER = """#!/usr/bin/env bash
[ "$1" = - ] && exec {python} "$@"
mkfifo {pids}.written
(trap "" INT TERM; echo $BASHPID >> {pids}; : > {pids}.written; exec sleep 600) &
: < {pids}.written
{then}
"""


def ends_soon(pid: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 10)[0])
    finally:
        os.close(process)


def start(folder: Path, then: str) -> tuple[subprocess.Popen, Path]:
    pids, starter = folder / "pids", folder / "starter"
    starter.write_text(STARTER.format(python=sys.executable, pids=pids, then=then))
    starter.chmod(0o755)
    environment = {**os.environ, "DEVICE": "cpu", "TINY": "1", "PARTS": "tests", "PYTHON": str(starter)}
    environment["OUT"] = str(folder / "out")
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh")]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True), pids


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_part_that_ends_leaves_nothing_behind(tmp_path):
    script, pids = start(tmp_path, "exit 3")
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 0 and "tests: ended with 3" in output
    assert all(ends_soon(int(pid)) for pid in pids.read_text().split())


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_an_interrupted_script_leaves_nothing_behind(tmp_path):
    os.mkfifo(tmp_path / "started")
    started = os.open(tmp_path / "started", os.O_RDONLY | os.O_NONBLOCK)
    script, pids = start(tmp_path, f"echo >> {tmp_path / 'started'}; exec sleep 600")
    assert select.select([started], [], [], 60)[0]
    os.close(started)
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=60)
    assert script.returncode == 130
    assert all(ends_soon(int(pid)) for pid in pids.read_text().split())
