"""Whose pictures are in a record file: by the labels in it, or by the list that was left beside it."""

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..files import iterate_lines
from .recordio import INEXACT

NUMBER = re.compile(r"-?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE)


class ListedImage(NamedTuple):
    """A line of a list: a record's key, a label, a picture's path; what the line does not have is None."""

    key: int | None
    label: float | None
    path: PurePosixPath


def find_list(records: Path) -> Path | None:
    """The list of a record file: `NAME.lst`, or the `list.txt` of DCFace's tool."""
    candidates = (records.with_suffix(".lst"), records.with_name("list.txt"))
    return next((file for file in candidates if file.is_file()), None)


def _parse(line: str) -> ListedImage:
    words = line.split("\t") if "\t" in line else line.split()
    words = [word.strip() for word in words if word.strip()]
    places = [place for place, word in enumerate(words) if not NUMBER.fullmatch(word)]
    if len(places) != 1:
        raise ValueError("not a picture's path with its index or its label")
    place = places[0]
    if place and not float(words[0]).is_integer():
        raise ValueError(f"{words[0]} is no key of a record")
    # `KEY PATH` (DCFace), `KEY LABEL... PATH` (im2rec), `1 PATH LABEL ...` (InsightFace), `PATH LABEL`, `PATH`
    labels = [float(word) for word in words[1:place] + words[place + 1 :]]
    path = PurePosixPath(words[place].replace("\\", "/"))
    return ListedImage(int(float(words[0])) if place else None, labels[0] if labels else None, path)


def read_image_list(file: Path, keys: list[int]) -> dict[int, ListedImage]:
    """A list's line for every record: by the keys in it, or in the order of the records where it has none.

    Args:
        file: the list.
        keys: of the records with pictures, ascending.

    Raises:
        ValueError: a line is of no known form, a key is there twice, or the list is of other records.
    """
    images: list[ListedImage] = []
    by_key: dict[int | None, int] = {}
    twice = None
    for number, line in enumerate(iterate_lines(file), start=1):
        if not line.strip():
            continue
        try:
            image = _parse(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, is {line!r}: {error}.") from error
        if image.key in by_key and twice is None:
            twice = f"{file} has the key {image.key} twice, in line {by_key[image.key]} and in line {number}"
        by_key.setdefault(image.key, number)
        images.append(image)
    if twice is None and by_key.keys() >= set(keys):
        return {image.key: image for image in images if image.key is not None}
    # InsightFace's lists have a 1 in every line
    if len(by_key) == 1 and len(images) == len(keys):
        return dict(zip(keys, images, strict=True))
    if len(by_key) > 1 and twice is not None:
        raise ValueError(f"{twice}: one line would hide the other.")
    missing = len(set(keys) - by_key.keys())
    raise ValueError(f"{file} has {len(images)} lines for {len(keys)} pictures, {missing} of which are not in it.")


def _folders(images: Mapping[int, ListedImage]) -> dict[int, str] | None:
    """The names of the pictures' folders, as much of their paths as tells them apart; None if one has no folder."""
    parents = {key: image.path.parent for key, image in images.items()}
    if any(not parent.name for parent in parents.values()):
        return None
    if len({parent.name for parent in parents.values()}) == len(set(parents.values())):
        return {key: parent.name for key, parent in parents.items()}
    return {key: str(parent) for key, parent in parents.items()}


def _is_renaming(first: Mapping[int, object], second: Mapping[int, object]) -> bool:
    """Whether two namings of the same records have the same groups."""
    pairs = {(first[key], second[key]) for key in first}
    return len(pairs) == len(set(first.values())) == len({second[key] for key in first})


def record_identities(
    records: Path, labels: Mapping[int, float], one: bool = False
) -> tuple[dict[int, str], dict[str, str]]:
    """The identity of every picture in a record file.

    Labels that differ say who is who, first those of the records, then those of the list, then its folders. Where the
    folders group the pictures in the same way, their names are the identities'; otherwise it is the label as a number
    of seven digits.

    Args:
        records: the `.rec` file.
        labels: key -> label of each picture's record.
        one: whether pictures of equal labels are known to be of one identity.

    Returns:
        Key -> identity; and the list with the reason why it was not used, if it was not.

    Raises:
        ValueError: all labels are equal though there are several pictures, and no list tells their identities; or
            labels are no whole numbers that float32 can tell apart.
    """
    wrong = next((key for key, label in labels.items() if not 0 <= label <= INEXACT or label != int(label)), None)
    if wrong is not None:
        raise ValueError(
            f"{records} has the label {labels[wrong]} in the record of key {wrong}: identities are whole numbers from"
            f" 0 to {INEXACT}, up to which float32 is exact."
        )
    one = one or len(labels) == 1
    told = one or len(set(labels.values())) > 1  # without a list, too
    file = find_list(records)
    if file is None:
        if told:
            return _numbered(labels), {}
        raise ValueError(
            f"all {len(labels)} pictures in {records} have the label {next(iter(labels.values())):g}: their identities"
            " are not in it. Put the list that came with it beside it, named"
            f" {records.with_suffix('.lst').name} or list.txt."
        )
    try:
        images = read_image_list(file, list(labels))
    except ValueError as error:
        if told:
            return _numbered(labels), {file.name: f"a list that does not fit ({error})"}
        raise ValueError(f"all labels in {records} are {next(iter(labels.values())):g}, and {error}") from error
    return _listed_identities(records, file, {key: images[key] for key in labels}, labels, one), {}


def _numbered(labels: Mapping[int, float]) -> dict[int, str]:
    return {key: f"{int(label):07d}" for key, label in labels.items()}


def _listed_identities(
    records: Path, file: Path, images: Mapping[int, ListedImage], labels: Mapping[int, float], one: bool
) -> dict[int, str]:
    """Key -> identity, as `record_identities` gives them, where the lines of a list are known."""
    folders = _folders(images)
    listed = {key: image.label for key, image in images.items() if image.label is not None}
    known = [labels, listed] if len(listed) == len(images) else [labels]
    groups = next((naming for naming in known if len(set(naming.values())) > 1), None)
    if groups is None:
        if folders is not None and (one or len(set(folders.values())) > 1):
            return folders
        if not one:
            raise ValueError(
                f"all labels in {records} are equal, and the paths in {file} "
                + ("have no folders of identities." if folders is None else f"are all in {min(folders.values())}.")
                + " Nothing tells the identities."
            )
        groups = known[-1]
    elif folders is not None and _is_renaming(groups, folders):
        return folders
    wrong = next((key for key, label in groups.items() if not 0 <= label < math.inf or label != int(label)), None)
    if wrong is not None:
        raise ValueError(
            f"{file} has the label {groups[wrong]} of key {wrong}: identities are whole numbers from 0 on."
        )
    return _numbered(groups)
