"""What the benchmarks say about the machine they ran on, and how they time it."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_precision(name: str) -> torch.dtype:
    """Its dtype. float32 is rounded to TF32 in convolutions and products for `tf32`, nowhere for `float32`; beside
    half precision PyTorch's default is kept: in convolutions."""
    torch.backends.cudnn.allow_tf32 = name != "float32"
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    return PRECISIONS[name]


def synchronize() -> None:
    """Waits for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median_seconds(run: Callable, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peak_gib() -> float | None:
    """Memory of the GPU that tensors took at most since the last call; None on a CPU."""
    if not torch.cuda.is_initialized():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def matmul_rate(dtype: torch.dtype, size: int = 2048, rounds: int = 5, device: torch.device | str = "cpu") -> float:
    """GFLOP/s of a square matrix product."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    a @ b
    return 2 * size**3 / median_seconds(lambda: a @ b, rounds) / 1e9


def copy_rate(device: torch.device, size: int = 2**30) -> float:
    """GB/s that a copy within the device's memory reads and writes."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * size / median_seconds(lambda: b.copy_(a), 5) / 1e9


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


def describe_device(device: torch.device, precisions: list[str]) -> dict:
    """Of the device that `--device` names: its name, the rate of a matrix product in precisions, and of a copy."""
    is_gpu = device.type == "cuda"
    size, copied = (8192, 2**30) if is_gpu else (1024, 2**26)
    rates = {}
    for name in precisions:
        rates[name] = round(matmul_rate(use_precision(name), size, device=device))
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else processor_name(),
        "torch": torch.__version__,
        "matmul GFLOP/s": rates,
        "copy GB/s": round(copy_rate(device, copied)),
    }


class Roofline(TorchDispatchMode):
    """Within it, `seconds` adds up what every operator takes at least: its arithmetic at the rate of a matrix product,
    or its operands at the rate of a copy, whichever is slower. Fused operators can be faster than this.

    Args:
        machine: of `describe_device`.
        precision: of the matrix products.
    """

    def __init__(self, machine: dict, precision: str):
        super().__init__()
        self.flops_per_second = 1e9 * machine["matmul GFLOP/s"][precision]
        self.bytes_per_second = 1e9 * machine["copy GB/s"]
        self.seconds = self.flops = self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, returns = func.__name__.split(".")[0], func._schema.returns
        is_view = name == "_unsafe_view" or any(each.alias_info and not each.alias_info.is_write for each in returns)
        if is_view or "empty" in name:
            return out
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
        # an expanded tensor is read once
        moved = sum(min(each.numel() * each.element_size(), each.untyped_storage().nbytes()) for each in tensors)
        moved *= 1 if returns else 2  # optimizers write what they read
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=out)
        self.flops, self.bytes = self.flops + flops, self.bytes + moved
        self.seconds += max(flops / self.flops_per_second, moved / self.bytes_per_second)
        return out


def add_device_arguments(parser, precisions=("bf16",)) -> None:
    """The options of a table of rates, one row per precision and batch."""
    group = parser.add_argument_group("table of rates")
    group.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="for example cuda")
    group.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), default=list(precisions))
    group.add_argument("--batch-sizes", nargs="+", type=int, help="only the table of rates, for these batches")
    group.add_argument("--output", type=Path, help="JSON file for the table, written after every row")


class Table:
    """Rows of measured rates, printed and written one by one, so that an interruption loses nothing."""

    def __init__(self, args, **facts):
        self.file, self.rows = args.output, []
        self.settings = {name: str(value) for name, value in vars(args).items()}
        self.facts = facts

    def add(self, **row) -> None:
        row = {name: value for name, value in row.items() if value is not None}
        self.rows.append(row)
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print("  ".join(shown), flush=True)
        if self.file is not None:
            content = {"settings": self.settings, **self.facts, "rows": self.rows}
            self.file.write_text(json.dumps(content, indent=1) + "\n")

    def measure(self, run: Callable[[], dict], **row) -> None:
        """Adds what `run` measures; running out of memory is a row, too."""
        try:
            self.add(**row, **run())
        except torch.OutOfMemoryError as error:
            self.add(**row, error=str(error).split(".")[0])
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
