"""Processes of a test that have imported everything already: forks of a server that is started once, in a tenth of
the time of a new interpreter. What a library reads from the environment while it is imported, such as the Hub's
address, they cannot be told: such tests start an interpreter.

A small module, because the processes import it.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["uiface_diffusers", "uiface_cli", "uiface_diffusers.training.face_recognition", "torch.distributed"]
PRELOADED += ["uiface_diffusers.training.denoising", "uiface_diffusers.training.autoencoding", "onnxruntime"]
CONTEXT.set_forkserver_preload(PRELOADED)


def fork(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Starts a function in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        # every step is shown; tqdm reads it while it is imported, by the server
        patch.setenv("TQDM_MININTERVAL", "0")
        forkserver.ensure_running()
    process = CONTEXT.Process(target=_with_threads, args=(torch.get_num_threads(), target, *arguments))
    process.start()
    return process


def _with_threads(number: int, target: Callable[..., None], *arguments: object) -> None:
    """With as many threads as whoever compares: their number decides the order in which they add."""
    torch.set_num_threads(number)
    target(*arguments)


def _run(module: str, arguments: list[str], variables: dict[str, str], written: Connection) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of a data loader's workers, as everywhere else
    os.environ.clear()
    os.environ.update(variables)
    for stream in (1, 2):
        os.dup2(written.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    sys.path.insert(0, str(REPOSITORY / "training"))
    sys.argv = [module, *arguments]
    importlib.import_module(module).main(arguments)


class Running:
    """A `main` that runs in a process of its own, as `subprocess.Popen` would have it."""

    def __init__(self, module: str, arguments: list[str], **variables: str):
        settled = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        self._reader, writer = CONTEXT.Pipe(duplex=False)
        values = {**os.environ, **settled, **variables}
        self.process = fork(_run, module, arguments, values, writer)
        writer.close()
        self.written = b""

    def read(self) -> bool:
        """Whether it has written something more, to stdout or stderr; it waits for that, or for the end."""
        more = os.read(self._reader.fileno(), 1 << 16)
        self.written += more
        return bool(more)

    def wait(self) -> int:
        """Its exit code."""
        while self.read():
            pass
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def kill_at(self, text: str) -> None:
        """SIGKILL as soon as it has written this; an error if it ends before."""
        while text.encode() not in self.written and self.read():
            pass
        self.process.kill()
        self.process.join()  # its pipe is open as long as it has workers
        assert self.process.exitcode == -signal.SIGKILL, self.written.decode()


def run_distributed(module: str, arguments: list[str], number: int = 2) -> str:
    """Runs a `main` in as many processes as ranks, as `torchrun` starts them; gives what all of them wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number)}
    shared["LOCAL_WORLD_SIZE"] = str(number)
    ranks = [Running(module, arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(number)]
    with ThreadPoolExecutor(number) as readers:
        codes = list(readers.map(Running.wait, ranks))
    written = "".join(each.written.decode() for each in ranks)
    assert codes == [0] * number, written
    return written
