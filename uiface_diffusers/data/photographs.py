"""Photographs of identities, wherever they come from, and what is left out of them."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import PIL.Image
from tqdm import tqdm

from ..files import LFS_POINTER
from ..pictures import load_photograph

# formats that Pillow only names, hands to another program, or takes from containers that hold no photographs
NO_PHOTOGRAPHS = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")


def _image_suffixes() -> frozenset[str]:
    suffixes = PIL.Image.registered_extensions().items()
    # MPO, of cameras with two lenses, is opened as the JPEG that it starts with
    readable = {*PIL.Image.OPEN, "MPO"} - {*NO_PHOTOGRAPHS}
    return frozenset(end for end, name in suffixes if name in readable)


IMAGE_SUFFIXES = _image_suffixes()
# left behind by systems and tools; names with a dot in front are hidden anyway
SYSTEM_NAMES = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot"}
SYSTEM_NAMES |= {"$recycle.bin", "system volume information", "lost+found"}

HIDDEN = "hidden or system file"
NO_PICTURE = "not an image by its suffix"
OUTSIDE = "in no identity's folder"
NAMED = 10  # of what was left out, by each reason


class Photograph(NamedTuple):
    """Its identity, and the name by which the source finds it."""

    identity: str
    file: str


class PhotographSource(Protocol):
    """Photographs in an order that does not change, each to be read at any time.

    `left_out` has what was found beside them: name -> why it is not among them.
    """

    photographs: list[Photograph]
    left_out: dict[str, str]

    def read(self, photograph: Photograph) -> np.ndarray:
        """`(height, width, 3)` RGB bytes.

        Raises:
            OSError: it cannot be read.
        """
        return load_photograph(io.BytesIO(self.content(photograph)))

    def content(self, photograph: Photograph) -> bytes:
        """Its file, not decoded.

        Raises:
            OSError: it is missing or damaged.
        """
        ...

    def stamp(self, photograph: Photograph) -> str:
        """Another one after the photograph was changed, such as its size in bytes; without reading it."""
        ...


def source_fingerprint(
    source: PhotographSource, photographs: Sequence[Photograph] | None = None, progress: bool = False
) -> str:
    """64 hexadecimal digits: other photographs, other identities or other sizes of files, another fingerprint.

    Args:
        source: of the photographs.
        photographs (*optional*): only these; all if not given.
        progress: shows it.
    """
    photographs = source.photographs if photographs is None else photographs
    stamping = tqdm(photographs, unit="photo", desc="sizes", disable=not progress)
    stamps = [[*photograph, source.stamp(photograph)] for photograph in stamping]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def summarize_left_out(left_out: Mapping[str, str]) -> dict[str, dict]:
    """Reason -> `count` of what was left out for it, and the `first` ten names."""
    summary: dict[str, dict] = {}
    for name, reason in left_out.items():
        entry = summary.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < NAMED:
            entry["first"].append(name)
    return summary


def describe_left_out(summary: Mapping[str, dict]) -> list[str]:
    """One line for each reason of `summarize_left_out`: `3 not an image by its suffix: anna/notes.txt, ...`."""
    lines = []
    for reason, entry in summary.items():
        more = ", ..." if entry["count"] > len(entry["first"]) else ""
        lines.append(f"{entry['count']} {reason}: {', '.join(entry['first'])}{more}")
    return lines


def unreadable_reason(source: PhotographSource, photograph: Photograph, error: OSError) -> str:
    """Why a photograph cannot be read, in words that are the same for all of a kind.

    Raises:
        OSError: the given error, where it is not of the picture but of the disk or the network.
    """
    if error.errno is not None:
        raise error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PIL.Image.DecompressionBombError):
            return f"over Pillow's limit of {2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)} pixels"
        cause = cause.__cause__ or cause.__context__
    try:
        is_pointer = source.content(photograph).startswith(LFS_POINTER)
    except OSError:
        is_pointer = False
    return "a Git LFS pointer (run `git lfs pull`)" if is_pointer else "unreadable"


def is_system_entry(name: str) -> bool:
    """Whether a file or folder is hidden, or was made by an operating system or a tool."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
