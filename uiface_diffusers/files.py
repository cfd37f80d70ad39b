import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and renames at the end: `path` is complete or not there at all, also
    when two processes write it."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
