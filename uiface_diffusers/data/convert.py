"""One form of a data set -> another; the pictures' files stay as they are, byte for byte."""

import io
import os
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image
import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..files import CARD, MAX_NAME, local_path
from ..hub.lineage import card_text, derived_header
from .image_folder import IMAGES_A_SHARD, add_member, shard_name
from .lmdb_set import DatabaseWriter, import_lmdb
from .parquet_set import hub_schema, write_parquet
from .recordio import INEXACT, RecordWriter
from .sources import (
    FolderSource,
    Photograph,
    PhotographSource,
    RecordIOSource,
    WebDatasetSource,
    has_image_suffix,
    is_system_entry,
    open_source,
    source_fingerprint,
    summarize_left_out,
    unreadable_reason,
)

MARKER = "conversion-not-finished"
# of names of folders and files; the last three would break the list of a record file
FORBIDDEN = re.compile(r"[/\\\0\t\r\n]")
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "PPM": ".ppm"}


def check_output(source: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Where a conversion of `source` can be written, links followed.

    Raises:
        ValueError: `output` is not empty, lies within the source, or cannot be replaced.
    """
    # a link to a folder is replaced where it leads to
    source, output = local_path(source), local_path(output).resolve()
    if output == Path.cwd() or os.path.ismount(output):
        raise ValueError(
            f"{output} is the current folder or a mount point, which cannot be replaced: choose a new folder in it."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: choose another folder.")
    if source.is_dir() and output.is_relative_to(source.resolve()):
        raise ValueError(f"{output} lies within {source}: choose a folder beside it.")
    return output


def convert_dataset(
    source: str | os.PathLike,
    output: str | os.PathLike,
    output_format: str,
    nested: bool = False,
    without: Mapping[str, str] | None = None,
    step: Mapping[str, Any] | None = None,
) -> dict:
    """Writes a data set in another form. Pictures are copied byte for byte, identities keep their names. The card,
    README.md, takes over what the source's says of its origin, and says from which set this one was made, and how.

    - `imagefolder`: `IDENTITY/FILE`, for torchvision's `ImageFolder` and `datasets`.
    - `recordio`: `train.rec` and `train.idx` of InsightFace's form, for its loaders, and `train.lst` (key, label and
      `IDENTITY/FILE`), by which `open_source` finds the names again. Labels are the names, where these are whole
      numbers, or count the identities in their order.
    - `webdataset`: shards of 1,000 pictures `IDENTITY/KEY.jpg` with `KEY.cls`, the label.
    - `parquet`: `data/train-NNNNN-of-NNNNN.parquet` of 1,000 rows `image`, `identity`, `label`, for `datasets` and the
      Hub's viewer.
    - `lmdb`: `train.lmdb` of the form of Vec2Face's authors, for their loaders. Needs the package `lmdb`.
    - `zip`: `images.zip` of `IDENTITY/FILE`.

    Args:
        source: of any form that `open_source` opens.
        output: a folder that is not there yet, or empty. It appears when it is complete: of a conversion that was
            killed only `OUTPUT.part` is left, which the next one replaces.
        output_format: one of `FORMATS`.
        nested: whether `SOURCE/PERSON/VIDEO/*.jpg` is meant where all pictures are in folders within those of SOURCE.
        without (*optional*): files of the source that are not converted -> why.
        step (*optional*): what the card says of how the set was made; the conversion if not given.

    Returns:
        `photographs`, `identities`, and `left_out`: reason -> `count`, and the `first` ten names.

    Raises:
        ValueError: `output` is not empty, lies within the source, cannot be replaced or is written by another
            conversion; a name cannot be a folder's; the source's card has no proper header; or the set that was
            written does not hold what was read.
    """
    if output_format not in FORMATS:
        raise ValueError(f"`output_format` has to be one of {FORMATS} but is {output_format!r}.")
    if output_format == "lmdb":
        import_lmdb()
    output = check_output(source, output)
    part = output.with_name(f"{output.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part.with_name(f"{part.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another conversion writes to {output}: wait for it, or choose another folder.") from error
    try:
        opened = open_source(source, nested=nested)
        made = {
            "name": local_path(source).resolve().name,
            "fingerprint": source_fingerprint(opened)[:12],
            "images": len(opened.photographs),
            "identities": len({photograph.identity for photograph in opened.photographs}),
            **(step or {"by": f"uiface convert --format {output_format}{' --nested' if nested else ''}"}),
        }
        header = derived_header(source, made, same_images=not without)
        if without:
            opened.left_out |= without
            opened.photographs = [each for each in opened.photographs if each.file not in without]
        return _convert(opened, output, part, output_format, header)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _convert(
    opened: PhotographSource, output: Path, part: Path, output_format: str, header: Mapping[str, Any]
) -> dict:
    folders = _folder_names([photograph.identity for photograph in opened.photographs])
    if (part / MARKER).exists():
        shutil.rmtree(part)
    elif part.exists():
        raise ValueError(f"{part} is in the way: the conversion is written there until it is complete. Remove it.")
    part.mkdir()
    (part / MARKER).touch()
    try:
        written = WRITERS[output_format](opened, folders, part)
        _check_written(part, written)
        (part / CARD).write_text(_card(output.name, written, header), encoding="utf-8")
        (part / MARKER).unlink()
    except BaseException:
        shutil.rmtree(part)
        raise
    part.replace(output)
    return {
        "photographs": written.total(),
        "identities": len(written),
        "left_out": summarize_left_out(opened.left_out),
    }


def _card(name: str, written: Counter[str], header: Mapping[str, Any]) -> str:
    made = header["lineage"]["derived_from"][-1]
    text = f"""
# {name}

{written.total()} pictures of {len(written)} identities, made from `{made["name"]}` by `{made["by"]}`
(uiface-diffusers).

`lineage` in this file's header has what is known of their origin; `uiface card` prints what is missing.
"""
    return card_text(header, text)


def _check_written(folder: Path, written: Counter[str]) -> None:
    if not written:
        raise ValueError("none of the pictures can be read.")
    found = Counter(photograph.identity for photograph in open_source(folder).photographs)
    if found != written:
        name = min((found - written) + (written - found))
        raise ValueError(
            f"the conversion holds {found.total()} pictures of {len(found)} identities, {written.total()} of"
            f" {len(written)} were written, and {name!r} differs: this is a fault of the program."
        )


def _folder_names(identities: list[str]) -> dict[str, str]:
    """Identity -> the folder of its pictures.

    Raises:
        ValueError: it cannot be a folder's name.
    """
    folders = {name: FORBIDDEN.sub("_", name) for name in dict.fromkeys(identities)}
    for name, folder in folders.items():
        if not folder or is_system_entry(folder) or len(os.fsencode(folder)) > MAX_NAME:
            reason = f"longer than {MAX_NAME} bytes" if len(os.fsencode(folder)) > MAX_NAME else "hidden or reserved"
            raise ValueError(f"the identity's name {name!r} cannot be a folder's: {reason}. Rename it.")
    twice = [name for name, number in Counter(folders.values()).items() if number > 1]
    if twice:
        raise ValueError(f"two identities would share the folder {twice[0]!r}: rename one.")
    return folders


def _suffix(content: bytes) -> str:
    """By the format of a picture; `.jpg` of what Pillow does not know."""
    try:
        with PIL.Image.open(io.BytesIO(content)) as picture:
            form = picture.format or "JPEG"
            return SUFFIXES.get(form, f".{form.lower()}")
    except Exception:  # damaged files raise nearly anything in Pillow's plug-ins
        return ".jpg"


def _file_name(source: PhotographSource, photograph: Photograph, content: bytes) -> str:
    """A picture's file within its identity's folder."""
    if isinstance(source, RecordIOSource):
        return f"{int(photograph.file):08d}{_suffix(content)}"
    if isinstance(source, FolderSource):
        return "_".join(PurePosixPath(photograph.file).parts[1:])
    if isinstance(source, WebDatasetSource):
        shard = source.members[photograph.file][0]
        return PurePosixPath(photograph.file.removeprefix(f"{shard.name}:")).name
    # a cache keeps the photograph's name and has its own picture
    path = PurePosixPath(photograph.file.rpartition(":")[2])
    stem = path.name.removesuffix(path.suffix) if has_image_suffix(path.name) else path.name
    return f"{stem}{_suffix(content)}"


def _pictures(
    source: PhotographSource,
    folders: dict[str, str],
    by_identity: bool = False,
    key: Callable[[str], str] = lambda name: name,
) -> Iterator[tuple[str, str, bytes]]:
    """Folder, file and content of every picture; the keys of files in one folder differ."""
    photographs = source.photographs
    if by_identity:
        order = {identity: place for place, identity in enumerate(folders)}
        photographs = sorted(photographs, key=lambda photograph: order[photograph.identity])
    taken: set[tuple[str, str]] = set()
    for photograph in tqdm(photographs, desc="convert", unit="picture"):
        try:
            content = source.content(photograph)
        except OSError as error:
            source.left_out[photograph.file] = unreadable_reason(source, photograph, error)
            continue
        folder = folders[photograph.identity]
        name = FORBIDDEN.sub("_", _file_name(source, photograph, content))
        path = PurePosixPath(name)
        stem, number = path.name.removesuffix(path.suffix), 1
        while (folder, key(name)) in taken or len(os.fsencode(name)) > MAX_NAME or is_system_entry(name):
            # as much of the name as leaves room for a number
            short = os.fsencode(stem.lstrip("."))[: MAX_NAME - 40].decode("utf-8", "ignore")
            name, number = f"{short}-{number}{path.suffix}", number + 1
        taken.add((folder, key(name)))
        yield folder, name, content


def _key(name: str) -> str:
    """The key of a webdataset sample, which ends at the first dot for most readers: dots within are replaced."""
    path = PurePosixPath(name)
    return path.name.removesuffix(path.suffix).replace(".", "_")


def _labels(folders: dict[str, str]) -> dict[str, int]:
    """Folder -> label: the name itself where all are different numbers, otherwise a count."""
    names = list(folders.values())
    if all(name.isdecimal() and int(name) <= INEXACT for name in names) and len(set(map(int, names))) == len(names):
        return {name: int(name) for name in names}
    return {name: number for number, name in enumerate(names)}


def _write_folders(source: PhotographSource, folders: dict[str, str], output: Path) -> Counter[str]:
    written: Counter[str] = Counter()
    for folder, name, content in _pictures(source, folders):
        (output / folder).mkdir(exist_ok=True)
        (output / folder / name).write_bytes(content)
        written[folder] += 1
    return written


def _write_records(source: PhotographSource, folders: dict[str, str], output: Path) -> Counter[str]:
    written: Counter[str] = Counter()
    labels = _labels(folders)
    records = RecordWriter(output / "train.rec")
    with records, open(output / "train.lst", "w", encoding="utf-8", newline="\n") as listing:
        for folder, name, content in _pictures(source, folders, by_identity=True):
            key = records.write(labels[folder], content)
            listing.write(f"{key}\t{labels[folder]}\t{folder}/{name}\n")
            written[folder] += 1
    return written


def _write_shards(source: PhotographSource, folders: dict[str, str], output: Path) -> Counter[str]:
    written: Counter[str] = Counter()
    labels, pictures = _labels(folders), enumerate(_pictures(source, folders, key=_key))
    for number, part in groupby(pictures, lambda picture: picture[0] // IMAGES_A_SHARD):
        with tarfile.open(output / shard_name(number), "w") as shard:
            for _, (folder, name, content) in part:
                key = f"{folder}/{_key(name)}"
                add_member(shard, f"{key}{PurePosixPath(name).suffix}", content)
                add_member(shard, f"{key}.cls", str(labels[folder]).encode())
                written[folder] += 1
    return written


def _write_parquet(source: PhotographSource, folders: dict[str, str], output: Path) -> Counter[str]:
    written: Counter[str] = Counter()
    labels, pictures = _labels(folders), enumerate(_pictures(source, folders))
    schema = hub_schema({"identity": pa.string(), "label": pa.int64()})
    files = []

    def row(folder: str, name: str, content: bytes) -> dict:
        written[folder] += 1
        return {"image": {"bytes": content, "path": name}, "identity": folder, "label": labels[folder]}

    for number, part in groupby(pictures, lambda picture: picture[0] // IMAGES_A_SHARD):
        files.append(output / "data" / f"train-{number:05d}.parquet")
        write_parquet(files[-1], schema, (row(*picture) for _, picture in part))
    for number, file in enumerate(files):  # how many there are is known when all pictures are read
        file.rename(file.with_name(f"train-{number:05d}-of-{len(files):05d}.parquet"))
    return written


def _write_database(source: PhotographSource, folders: dict[str, str], output: Path) -> Counter[str]:
    written: Counter[str] = Counter()
    labels = _labels(folders)
    with DatabaseWriter(output / "train.lmdb") as database:
        for folder, _, content in _pictures(source, folders, by_identity=True):
            database.write(labels[folder], content)
            written[folder] += 1
        database.finish(labels)
    return written


def _write_archive(source: PhotographSource, folders: dict[str, str], output: Path) -> Counter[str]:
    written: Counter[str] = Counter()
    # pictures are compressed already
    with zipfile.ZipFile(output / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for folder, name, content in _pictures(source, folders):
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), content)
            written[folder] += 1
    return written


WRITERS: dict[str, Callable[[PhotographSource, dict[str, str], Path], Counter[str]]] = {
    "imagefolder": _write_folders,
    "recordio": _write_records,
    "webdataset": _write_shards,
    "parquet": _write_parquet,
    "lmdb": _write_database,
    "zip": _write_archive,
}
FORMATS = tuple(WRITERS)
