"""Verification benchmarks: pairs of faces in any of the registered kinds of files.

A new kind is a module in this folder with a function that reads a file to a `Benchmark`, and a line in `KINDS`.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ...files import local_path, why_unreadable
from ..pairs import check_pairs
from ..photographs import is_system_entry
from .benchmark import Benchmark
from .insightface_bin import STAND_INS, read_bin
from .making import central_face, make_benchmark

# suffix of a file -> what reads it
KINDS: dict[str, Callable[[Path], Benchmark]] = {".bin": read_bin}

__all__ = ["KINDS", "STAND_INS", "Benchmark", "central_face", "make_benchmark", "read_benchmark", "read_benchmarks"]


def read_benchmark(path: str | os.PathLike) -> Benchmark:
    """Reads a benchmark of the kind that its suffix says; of any other suffix, as InsightFace's `.bin`. Nothing that
    the file refers to is executed.

    Raises:
        ValueError: the file is missing or damaged, refers to more than data, or has not two images a label.
    """
    path = local_path(path)
    if not path.is_file():
        raise ValueError(f"no benchmark: {why_unreadable(path, 'no file')}.")
    return KINDS.get(path.suffix.lower(), read_bin)(path)


def read_benchmarks(path: str | os.PathLike) -> list[Benchmark]:
    """Reads benchmarks whole, with every picture in them.

    Args:
        path: a folder of files of the `KINDS`, or one file.

    Raises:
        ValueError: there are none, or two of one name; or one is damaged, or cannot be measured.
    """
    path = local_path(path)
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in KINDS) if path.is_dir() else [path]
    files = [file for file in found if not is_system_entry(file.name)]
    if not files:
        raise ValueError(f"{path} has no {' or '.join(KINDS)} files: make them with `uiface make-benchmark`.")
    twice = [name for name, number in Counter(file.stem for file in files).items() if number > 1]
    if twice:
        names = ", ".join(file.name for file in files if file.stem == twice[0])
        raise ValueError(f"{path} has two benchmarks of one name, {names}: rename one.")
    read = [read_benchmark(file) for file in files]
    for benchmark in read:
        check_pairs(f"benchmark `{benchmark.name}`", benchmark.same.tolist())
        for position in {image: position for position, image in enumerate(benchmark.images)}.values():
            benchmark.face(position)
    return read
