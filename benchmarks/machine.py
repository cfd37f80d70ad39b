"""What the benchmarks say about the machine they ran on."""

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def median_seconds(run: Callable, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def matmul_rate(dtype: torch.dtype, size: int = 2048, rounds: int = 5) -> float:
    """GFLOP/s of a square matrix product."""
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    a @ b
    return 2 * size**3 / median_seconds(lambda: a @ b, rounds) / 1e9


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_machine() -> dict:
    """Processor, cores, threads, torch, and the rate of a matrix product in each dtype: what a dtype can gain."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul GFLOP/s": {name: round(matmul_rate(dtype)) for name, dtype in DTYPES.items()},
    }
