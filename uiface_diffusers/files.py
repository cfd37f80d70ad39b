import codecs
import json
import os
import pickle
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open


@cache
def warn_once(message: str) -> None:
    """A warning that a process shows once."""
    warnings.warn(message, stacklevel=3)


def check_no_folder(path: Path) -> None:
    """To be called before long work whose result is one file.

    Raises:
        ValueError: there is a folder of its name.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file to write to.")


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and renames at the end: `path` is complete or not there at all, also
    when two processes write it. Its folder is made."""
    path = Path(path)
    check_no_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # short: a name of 255 bytes has no room for more
    beside = path.with_name(f"{path.name[:40]}.{uuid4().hex[:12]}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# of a data set or a model, as on the Hub
CARD = "README.md"
MAX_NAME = 255  # bytes of a name in a folder, on nearly all file systems
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# suffix -> the first bytes, and what unpacks it
COMPRESSED = {
    ".gz": (b"\x1f\x8b", "gunzip"),
    ".bz2": (b"BZh", "bunzip2"),
    ".xz": (b"\xfd7zXZ\0", "unxz"),
    ".zst": (b"\x28\xb5\x2f\xfd", "unzstd"),
}
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def local_path(path: str | os.PathLike) -> Path:
    """A path with `~/` expanded, for every path that a user gives; everything else in it is taken literally.

    Raises:
        ValueError: it is empty, as a variable of the shell that is not set: `Path` would take it for the folder that
            one is in.
    """
    if not os.fspath(path):
        raise ValueError("a path is empty.")
    path = Path(path)
    return path.expanduser() if path.parts[:1] == ("~",) else path


def same_name(name: str) -> str:
    """Equal for names that differ only in their Unicode normal form: macOS decomposes accents, lists rarely do."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """A file's name as Python gives it, with the bytes that are not UTF-8 as `\\xe9`."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def why_unreadable(path: str | os.PathLike, error: object) -> str:
    """What is wrong with a file that cannot be read, and what to do: a sentence that starts with the path.

    Args:
        path: the file.
        error: what its library said; the first line is shown where nothing better is known.
    """
    path = Path(path)
    if not path.exists():
        return f"{path} is {'a link to nothing' if path.is_symlink() else 'missing'}"
    if path.is_dir():
        return f"{path} is a folder, not a file"
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as refusal:
        return f"{path} cannot be opened: {refusal.strerror}"
    if not start:
        return f"{path} is empty: copy it again"
    if start.startswith(LFS_POINTER):
        return f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
    # a safetensors file may start with b"\x80", too: the length of what follows
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{" and path.suffix not in (".npz", ".bin"):
        return f"{path} is a zip archive or a pickle, such as torch.save writes"
    for mark, program in COMPRESSED.values():
        if start.startswith(mark) and start[8:9] != b"{":
            return f"{path} is compressed: unpack it with {program} (`{program} < {path.name} > UNPACKED`)"
    return f"{path} is damaged, cut short or of another kind: {brief(error)}"


def brief(error: object, most: int = 300) -> str:
    """The first line of a library's error, without a full stop."""
    line = next(iter(str(error).strip().splitlines()), "").strip().rstrip(".") or type(error).__name__
    return line if len(line) <= most else f"{line[:most]}..."


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Raises:
        ValueError: it is missing, or has another encoding; the message names the line.
    """
    return list(iterate_lines(path))


def iterate_lines(path: str | os.PathLike) -> Iterator[str]:
    """The lines of `read_lines`, one by one: for files with millions of lines.

    Raises:
        ValueError: see `read_lines`.
    """
    path, start = local_path(path), LFS_POINTER
    if path.is_file():
        with open(path, "rb") as content:
            start = content.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise ValueError(f"no list: {why_unreadable(path, 'no text')}.")
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    try:
        with open(path, encoding=encoding) as file:
            for line in file:  # not `splitlines`, which also cuts at characters that names may have
                if "\0" in line:
                    raise UnicodeError("a zero byte")
                yield line.removesuffix("\n")
    except UnicodeError as error:
        raise ValueError(f"{path}, {_undecodable(path.read_bytes(), encoding)}") from error


def _undecodable(content: bytes, encoding: str) -> str:
    """Where a text is not of an encoding, or has a zero byte, and what to do."""
    try:
        content.decode(encoding)
        place = content.index(0)
    except UnicodeDecodeError as error:
        place = error.start
    line = content[:place].count(b"\n") + 1
    return (
        f"line {line}, is not {encoding.removesuffix('-sig').upper()} (byte 0x{content[place]:02x}): save it as UTF-8,"
        " for example by `iconv -f LATIN1 -t UTF-8`."
    )


def read_json(path: str | os.PathLike) -> Any:
    """
    Raises:
        ValueError: the file is missing or no JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"no JSON file: {why_unreadable(path, error)}.") from error


def read_torch(path: str | os.PathLike) -> Any:
    """What a file of torch.save holds, memory-mapped if possible: tensors in containers, nothing that is executed.

    Raises:
        ValueError: it is missing or damaged, or holds other objects.
    """
    if not Path(path).is_file():
        raise ValueError(f"{why_unreadable(path, 'no file')}.")
    try:
        # files of PyTorch before 1.6 are no zip archives and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged pickles raise nearly anything
        reason = why_unreadable(path, "no file of torch.save")
        if isinstance(error, pickle.UnpicklingError):  # its first lines advise to execute what is in the file
            found = re.search(r"Unsupported [^\n]*?(?= was not an allowed|\.? Please|\n|$)", str(error))
            reason = found[0] if found else reason
        raise ValueError(f"{path} is damaged, or holds more than tensors: not loaded. {reason}.") from error


@contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """A safetensors file as `safe_open` gives it.

    Raises:
        ValueError: it is missing, empty, cut short, a Git LFS pointer or of another kind; the message says which.
    """
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"no safetensors file: {why_unreadable(path, error)}.") from error
    with file:
        yield file


def read_safetensors(path: str | os.PathLike, wanted: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Args:
        path: the file.
        wanted: names that have to be among them.

    Raises:
        ValueError: see `open_safetensors`; or a tensor is not in it.
    """
    with open_safetensors(path) as file:
        missing = sorted(set(wanted) - set(file.keys()))
        if missing:
            raise ValueError(f"{path} has no tensor `{missing[0]}`: it is of another kind.")
        return {name: file.get_tensor(name) for name in file.keys()}


def check_safetensors(folder: Path) -> None:
    """Looks at the weights of a pipeline's folder for a reason why it cannot be loaded.

    Raises:
        ValueError: a file is empty, cut short, a Git LFS pointer or of another kind.
    """
    for file in sorted(folder.glob("*/*.safetensors")):
        with open_safetensors(file):
            pass


def read_entries(path: Path, **kinds: type | UnionType) -> list[Any]:
    """The values of some entries of a JSON object, by their names and types.

    Raises:
        ValueError: the file is missing or damaged, or an entry is not there or of another type.
    """
    content = read_json(path)
    values = [content.get(name) if isinstance(content, dict) else None for name in kinds]
    for (name, kind), value in zip(kinds.items(), values, strict=True):
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{path} is damaged: it has no `{name}`. Restore it, or choose another folder.")
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `check_settings` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    (settings,) = read_entries(path, settings=dict)
    return settings


def plain_numbers(value: Any) -> Any:
    """NumPy's numbers as Python's, which JSON knows; also those in lists and tuples, which become lists."""
    if isinstance(value, list | tuple):
        return [plain_numbers(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    with complete_file(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def check_settings(path: Path, settings: dict[str, Any], if_known: Collection[str] = (), **notes: Any) -> None:
    """Begins a folder with `settings` in a JSON file, or refuses to go on in one that was begun with others.

    Args:
        path: the file; its folder is made.
        settings: of JSON's types; tuples count as lists.
        if_known: settings that are compared only where both have a value. A file without one, from an earlier
            version, is warned of.
        notes: go into the file but are not compared, such as versions.

    Raises:
        ValueError: the file has other settings, or is damaged.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": settings, **notes})
        return
    begun = read_settings(path)
    for name in if_known:
        if settings.get(name) is not None and begun.get(name) is None:
            warn_once(f"{path} does not say `{name}`, which cannot be compared with {settings[name]!r}.")
        if None in (settings.get(name), begun.get(name)):
            settings.pop(name, None), begun.pop(name, None)
    differing = sorted(k for k in settings.keys() | begun.keys() if settings.get(k) != begun.get(k))
    if differing:
        detail = "; ".join(f"{k}: {begun.get(k)!r} there, {settings.get(k)!r} now" for k in differing)
        raise ValueError(f"{path.parent} was begun with other settings ({detail}): choose another folder.")
