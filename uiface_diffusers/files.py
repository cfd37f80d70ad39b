import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and renames at the end: `path` is complete or not there at all, also
    when two processes write it."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{uuid4().hex[:12]}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with complete_file(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def check_settings(path: Path, settings: dict[str, Any], **notes: Any) -> None:
    """Begins a folder with `settings` in a JSON file, or refuses to go on in one that was begun with others.

    Args:
        path: the file; its folder is made.
        settings: of JSON's types; tuples count as lists.
        notes: go into the file but are not compared, as versions.

    Raises:
        ValueError: the file has other settings, or is damaged.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": settings, **notes})
        return
    try:
        begun = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: restore it, or choose another folder. ({error!r})") from error
    differing = sorted(k for k in settings.keys() | begun.keys() if settings.get(k) != begun.get(k))
    if differing:
        detail = "; ".join(f"{k}: {begun.get(k)!r} there, {settings.get(k)!r} now" for k in differing)
        raise ValueError(f"{path.parent} was begun with other settings ({detail}): choose another folder.")
