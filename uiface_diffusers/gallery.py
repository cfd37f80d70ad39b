"""A page with all images of a data set, identities in rows, to be filtered and sorted. It needs no other file."""

import base64
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
from tqdm import tqdm

from .data.face_cache import FaceCache, FaceCacheSource
from .data.image_folder import GENERATION, METADATA
from .data.sources import (
    Photograph,
    PhotographSource,
    describe_left_out,
    open_source,
    summarize_left_out,
    unreadable_reason,
)
from .files import check_no_folder, complete_file, local_path

# columns of the metadata -> what they are called; an image can be filtered and sorted by them
GENERATED_COLUMNS = {"similarity": "similarity", "boundary_timestep": "boundary", "perturbation": "perturbation"}
QUALITY = 80  # of WebP: about 1.5 kB for a face of 80x80


def write_gallery(
    dataset: str | os.PathLike,
    output: str | os.PathLike,
    thumbnail: int = 80,
    max_images: int = 20_000,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Writes a page with the images of a data set. It has thumbnails of its own, of about 2 kB each, and shows only
    those that are in sight.

    Similarity, boundary and perturbation of a set of `generate_dataset`, and yaw and pitch of a cache of
    `prepare_faces`, are what images can be filtered and sorted by.

    Args:
        dataset: in any form that `open_source` opens.
        output: the page's file.
        thumbnail (`int`, defaults to 80): side of the thumbnails, in pixels.
        max_images (`int`, defaults to 20,000): of a larger set, whole identities are drawn; the page says so.
        seed (`int`, defaults to 0): of that draw.
        log: is called with each line of a summary.

    Returns:
        `images` and `identities`, how many the page has.

    Raises:
        ValueError: there are no pictures, none can be read, or a number is not positive.
        OSError: the disk cannot be read or written.
    """
    for name, value in (("thumbnail", thumbnail), ("max_images", max_images)):
        if value < 1:
            raise ValueError(f"`{name}` has to be positive but is {value}.")
    dataset, output = local_path(dataset), local_path(output)
    check_no_folder(output)
    source = open_source(dataset)
    values, seeds = _metadata(dataset, source)
    members: dict[str, list[Photograph]] = {}
    for photograph in source.photographs:
        members.setdefault(photograph.identity, []).append(photograph)
    drawn = _draw(members, max_images, seed)

    thumbnails, unreadable = _thumbnails(source, [each for name in drawn for each in members[name]], thumbnail)
    if not thumbnails:
        raise ValueError(f"none of the pictures in {dataset} can be read: {next(iter(unreadable.values()))}.")
    shown = {name: [each for each in members[name] if each.file in thumbnails] for name in drawn}
    shown = {name: photographs for name, photographs in shown.items() if photographs}
    photographs = [photograph for each in shown.values() for photograph in each]
    summary = f"{len(photographs):,} images of {len(shown):,} identities"
    if len(drawn) < len(members):
        summary += f", drawn from {len(source.photographs):,} of {len(members):,}"
    left_out = describe_left_out(summarize_left_out(source.left_out | unreadable))
    columns = [
        {"name": name, "values": [of_file.get(photograph.file) for photograph in photographs]}
        for name, of_file in values.items()
    ]
    content = {
        "name": dataset.resolve().name,
        "summary": f"{summary}.",
        "left_out": left_out,
        "thumbnail": thumbnail,
        "identities": [[name, len(each)] for name, each in shown.items()],
        "files": [photograph.file for photograph in photographs],
        # as text: numbers of JavaScript have 53 bits
        "seeds": [str(seeds.get(photograph.file, "")) for photograph in photographs] if seeds else None,
        "columns": [column for column in columns if any(value is not None for value in column["values"])],
        "thumbnails": [thumbnails[photograph.file] for photograph in photographs],
    }
    with complete_file(output) as beside:
        beside.write_text(_page(content), encoding="utf-8")
    for line in (summary, *(f"left out: {each}" for each in left_out)):
        log(line)
    return {"images": len(photographs), "identities": len(shown)}


def _page(content: Mapping[str, Any]) -> str:
    # within a script, only `<` can end it or begin a comment; all else is text of JSON
    data = json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    before, after = files(__package__).joinpath("gallery.html").read_text(encoding="utf-8").split("DATA", 1)
    return before + data + after


def _metadata(dataset: Path, source: PhotographSource) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Column -> file -> value, and file -> seed, of data sets that have them."""
    if (dataset / GENERATION).is_file():
        rows = pq.read_table(dataset / METADATA).to_pylist()
        by_name = {row["file_name"].partition("/")[2]: row for row in rows}
        found = {each.file: by_name.get(_generated_name(each)) for each in source.photographs}
        known = {file: row for file, row in found.items() if row is not None}
        columns = {
            shown: {file: row[name] for file, row in known.items() if row[name] is not None}
            for name, shown in GENERATED_COLUMNS.items()
        }
        return columns, {file: row["seed"] for file, row in known.items()}
    if isinstance(source, FaceCacheSource):
        # in the order of the photographs; NaN where it is not known
        poses = FaceCache(dataset).poses().astype(float).round(3).tolist()
        by_file = {each.file: pose for each, pose in zip(source.photographs, poses, strict=True)}
        return {
            name: {file: pose[i] for file, pose in by_file.items() if math.isfinite(pose[i])}
            for i, name in enumerate(("yaw", "pitch"))
        }, {}
    return {}, {}


def _generated_name(photograph: Photograph) -> str:
    """What metadata call a photograph of a generated set, without the first folder: `anna/0001.png` of a folder,
    `000000.tar/anna/0001.png` of the source's `000000.tar:anna/0001.png`, and `train.parquet/anna/0001.png` of its
    `train.parquet:ROW:0001.png`."""
    if ".parquet:" in photograph.file:
        shard, _, name = photograph.file.split(":", 2)
        return f"{shard}/{photograph.identity}/{name}"
    return photograph.file.replace(".tar:", ".tar/", 1)


def _draw(members: Mapping[str, Sequence[Photograph]], max_images: int, seed: int) -> list[str]:
    """Names of the identities to show, in their order: all, or as many whole ones as `max_images` has room for, and
    one at least."""
    names, total = list(members), 0
    drawn: set[str] = set()
    if sum(map(len, members.values())) <= max_images:
        return names
    for position in np.random.default_rng(seed).permutation(len(names)):
        total += len(members[names[position]])
        if drawn and total > max_images:
            break
        drawn.add(names[position])
    return [name for name in names if name in drawn]


def _thumbnails(
    source: PhotographSource, photographs: Sequence[Photograph], side: int
) -> tuple[dict[str, str], dict[str, str]]:
    """File -> thumbnail as base64 of WebP, and file -> why it cannot be read."""
    made: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for photograph in tqdm(photographs, desc="thumbnails", unit="image"):
        try:
            picture = PIL.Image.fromarray(source.read(photograph))
        except OSError as error:
            unreadable[photograph.file] = unreadable_reason(source, photograph, error)
            continue
        picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "webp", quality=QUALITY)
        made[photograph.file] = base64.b64encode(buffer.getvalue()).decode()
    return made, unreadable
