"""A process that SIGKILL ends at a point of its own work, so that nobody has to watch it from outside.

A small module, because a process of its own imports it.
"""

import os
import signal
import sys
from collections.abc import Callable

from processes import fork

from uiface_diffusers import cli


def _command(run: Callable[[list[str]], None], arguments: list[str], renamed: str, number: int) -> None:
    complete = 0

    def count(event: str, values: tuple) -> None:
        nonlocal complete
        if event == "os.rename" and str(values[1]).endswith(renamed):
            complete += 1
        elif event == "open" and complete == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run(arguments)


def run_until_complete(
    arguments: list[str], renamed: str, number: int = 1, run: Callable[[list[str]], None] = cli.main
) -> None:
    """Runs `uiface`, or another `main`, until so many files whose names end with `renamed` are complete; it is killed
    when it opens the next file. An error if it ends before."""
    process = fork(_command, run, arguments, renamed, number)
    process.join()
    assert process.exitcode == -signal.SIGKILL, process.exitcode
