"""Lists of pairs of photographs, in the forms in which verification benchmarks are published."""

import csv
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import local_path, read_lines

# into which verification divides a list
NUM_FOLDS = 10
SAME = {"1", "1.0", "true", "yes", "same", "match", "matched", "genuine", "positive"}
DIFFERENT = {"0", "0.0", "-1", "false", "no", "different", "mismatch", "mismatched", "impostor", "negative"}
PICTURE = "p|path|img|image|imagepath|imgpath|file|filename|filepath|photo|picture|face"
PERSON = "name|id|identity|person|subject"
NUMBER = "num|number|imagenum|imgnum|imagenumber|imageid|index|idx"
LABEL = re.compile("label|same|issame|match|ismatch|samepersonq?|sameperson|issameperson|target|genuine|y|gt")
HINT = "separate the words by tabs if names have blanks or commas"


class Pair(NamedTuple):
    """Two photographs and whether they are of one person. A photograph is a path within the folder of all: of LFW's
    form `NAME/NAME_0001` without suffix, otherwise as in the list."""

    first: str
    second: str
    same: bool


def read_pairs(path: str | os.PathLike) -> list[Pair]:
    """Reads a list of pairs. Its form is recognized by its first lines:

    - LFW (Huang et al. 2007): `NAME I J` of a genuine pair or `NAME I NAME J` of an impostor pair. The first line
      counts them: `FOLDS N` of View 2 (`pairs.txt`), folds of N genuine and N impostor pairs, or `N` of View 1
      (`pairsDevTest.txt`). RFW's lists have no such line.
    - `PATH PATH 0/1` or `0/1 PATH PATH`; 1 is a genuine pair.
    - CALFW and CPLFW: `FILE FLAG`, two lines for each pair; a flag of 0 is an impostor pair.
    - CSV with a header: two columns of paths (`path1`, `path2`; `img1`, `img2`; `p1`, `p2`; ...) and one of labels
      (`label`, `same`, `is_same`, ...), with or without a column `fold`; or Kaggle's of LFW (`name`, `imagenum1`,
      `imagenum2` and a fourth one).

    Words are separated by tabs or, without any in the line, by commas or blanks.

    Returns:
        The pairs in the order of the list, of which verification takes ten consecutive parts as folds. Pairs with a
        column `fold` are ordered by it. View 1 has no folds, and all genuine pairs first: its pairs alternate here, so
        that consecutive parts of a benchmark have both kinds.

    Raises:
        ValueError: a line is of another form, or there are more or fewer pairs than counted.
    """
    path = local_path(path)
    lines = [(number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    pairs = _read(path, lines) if lines else []
    if not pairs:
        raise ValueError(f"{path} has no pairs.")
    return pairs


def _read(path: Path, lines: list[tuple[int, str]]) -> list[Pair]:
    counts = lines[0][1].split()
    if len(counts) in (1, 2) and all(count.isdecimal() for count in counts):
        return _counted(path, [int(count) for count in counts], lines[1:])
    try:
        header = _header(lines[0][1])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if header is not None:
        return _table(path, header, lines)
    words = _words(lines[0][1])
    if len(words) == 2:
        return _two_lines_each(path, lines)
    for form in _numbered_names([_words(line) for _, line in lines]) or (_lfw_pair, _label_last, _label_first):
        try:
            form(words)
        except ValueError:
            continue
        return _parse(path, form, lines)
    raise ValueError(
        f"{path} does not start with FOLDS and PAIRS, nor with PAIRS, as LFW's lists do, and its first line"
        f" {lines[0][1]!r} is of no other known form: NAME I J, PATH PATH 0/1, or a header with columns such as path1,"
        f" path2, label. Or {HINT}."
    )


def _numbered_names(rows: list[list[str]]) -> tuple[Callable[[list[str]], Pair], ...]:
    """The forms with labels, of three words of which one is always 0 or 1: those of LFW's form number the photographs
    from 1 on, and have four words for an impostor pair."""
    if any(len(row) != 3 for row in rows):
        return ()
    return tuple(
        form
        for place, form in ((2, _label_last), (0, _label_first))
        if {row[place] for row in rows} <= {"0", "1"} and any(row[place] == "0" for row in rows)
    )


def check_pairs(name: str | os.PathLike, same: Sequence[bool]) -> None:
    """
    Raises:
        ValueError: there are too few pairs to measure a verification rate, or none of a kind.
    """
    genuine = sum(map(bool, same))
    if len(same) < NUM_FOLDS or genuine in (0, len(same)):
        raise ValueError(
            f"{name} has {genuine} genuine and {len(same) - genuine} impostor pairs: {NUM_FOLDS} pairs are needed, of"
            " both kinds."
        )


def _words(line: str) -> list[str]:
    if "\t" in line:
        words = line.split("\t")
    else:
        words = next(csv.reader([line])) if "," in line else line.split()
    words = [word.strip() for word in words]
    while words and not words[-1]:  # of separators at the end of a line
        words.pop()
    return words


def _parse(path: Path, form: Callable[[list[str]], Pair], lines: list[tuple[int, str]]) -> list[Pair]:
    pairs = []
    for number, line in lines:
        try:
            pairs.append(form(_words(line)))
        except ValueError as error:
            raise ValueError(f"{path} has the line {line!r}: {error} (line {number}).") from error
    return pairs


def _lfw_pair(words: list[str]) -> Pair:
    if len(words) not in (3, 4):
        raise ValueError(f"neither NAME I J nor NAME I NAME J: {HINT}")
    same = len(words) == 3
    first, second = words[:2], [words[0], words[2]] if same else words[2:]
    return Pair(_photograph(*first), _photograph(*second), same)


def _photograph(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number.removesuffix('.0')):04d}"  # tables may have made floats of the numbers


def _same(label: str) -> bool:
    if label.lower() in SAME | DIFFERENT:
        return label.lower() in SAME
    raise ValueError(f"{label!r} says neither same (1) nor different (0)")


def _path(text: str) -> str:
    if not text:
        raise ValueError("a path is missing")
    return text if "/" in text else text.replace("\\", "/")


def _label_last(words: list[str]) -> Pair:
    if len(words) != 3:
        raise ValueError(f"not PATH PATH 0/1: {HINT}")
    return Pair(_path(words[0]), _path(words[1]), _same(words[2]))


def _label_first(words: list[str]) -> Pair:
    if len(words) != 3:
        raise ValueError(f"not 0/1 PATH PATH: {HINT}")
    return Pair(_path(words[1]), _path(words[2]), _same(words[0]))


def _counted(path: Path, counts: list[int], lines: list[tuple[int, str]]) -> list[Pair]:
    """LFW's lists."""
    pairs = _parse(path, _lfw_pair, lines)
    kinds = [pair for pair in pairs if pair.same], [pair for pair in pairs if not pair.same]
    expected = counts[0] * (counts[1] if len(counts) == 2 else 1)
    if [len(kind) for kind in kinds] != [expected, expected]:
        raise ValueError(
            f"{path} has {len(kinds[0])} genuine and {len(kinds[1])} impostor pairs, {expected} of each are counted in"
            " its first line."
        )
    if len(counts) == 2:
        _warn_of_folds(path, [counts[1] * 2] * counts[0])
        return pairs
    return [pair for two in zip(*kinds, strict=True) for pair in two]


def _two_lines_each(path: Path, lines: list[tuple[int, str]]) -> list[Pair]:
    """CALFW's and CPLFW's lists."""
    rows = []
    for number, line in lines:
        words = _words(line)
        if len(words) != 2 or not words[1].isdecimal():
            raise ValueError(f"{path} has the line {line!r}: not FILE FLAG; {HINT} (line {number}).")
        rows.append((_path(words[0]), words[1], number))
    pairs = []
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        if first[1] != second[1]:
            raise ValueError(f"{path}, lines {first[2]} and {second[2]}: the flags of a pair are equal, these differ.")
        pairs.append(Pair(first[0], second[0], int(first[1]) > 0))
    if len(rows) % 2:
        raise ValueError(f"{path} has {len(rows)} lines: two are needed for each pair.")
    return pairs


class _Header(NamedTuple):
    """Places of the columns of a table; of pairs of LFW's form, only that it is one."""

    delimiter: str
    pictures: tuple[int, int] | None = None
    people: tuple[int, int, int, int] | None = None
    label: int | None = None
    fold: int | None = None


def _header(line: str) -> _Header | None:
    delimiter = next((each for each in "\t;," if each in line), None)
    if delimiter is None:
        return None
    names = [re.sub("[^a-z0-9]", "", word.lower()) for word in next(csv.reader([line], delimiter=delimiter))]

    def two(kinds: str) -> tuple[int, int] | None:
        places = [
            [place for place, name in enumerate(names) if re.fullmatch(f"({kinds})({end})", name)]
            for end in ("1|a|left|first", "2|b|right|second")
        ]
        return (places[0][0], places[1][0]) if all(places) else None

    label = next((place for place, name in enumerate(names) if LABEL.fullmatch(name)), None)
    fold = next((place for place, name in enumerate(names) if name in ("fold", "folds")), None)
    pictures, people, numbers = two(PICTURE), two(PERSON), two(NUMBER)
    if pictures is not None and label is not None:
        return _Header(delimiter, pictures, label=label, fold=fold)
    if people is not None and numbers is not None:
        return _Header(delimiter, people=(people[0], numbers[0], people[1], numbers[1]), label=label, fold=fold)
    if names[:2] in (["name", "imagenum1"], ["name1", "imagenum1"]):
        return _Header(delimiter)
    # a first line with a number or a file is no header: a person may be named Match
    in_list = any(re.fullmatch(r"\d+|.*[/\\].*|.*\.[a-z0-9]{2,5}", word.lower()) for word in _words(line))
    if (pictures is not None or label is not None) and not in_list:
        raise ValueError(
            f"the header {line!r} has not all columns: two of paths (such as path1 and path2) and one of labels (such"
            " as label or same) are needed."
        )
    return None


def _table(path: Path, header: _Header, lines: list[tuple[int, str]]) -> list[Pair]:
    pairs, folds = [], []
    for number, line in lines[1:]:
        row = [word.strip() for word in next(csv.reader([line], delimiter=header.delimiter))]
        try:
            if header.pictures is not None and header.label is not None:
                first, second = (_path(row[place]) for place in header.pictures)
                pair = Pair(first, second, _same(row[header.label]))
            elif header.people is not None:
                name, one, other, two = (row[place] for place in header.people)
                same = name == other if header.label is None else _same(row[header.label])
                pair = Pair(_photograph(name, one), _photograph(other, two), same)
            else:
                pair = _lfw_pair(row if all(row) else row[: row.index("")])
            pairs.append(pair)
            folds.append("" if header.fold is None else row[header.fold])
        except (IndexError, ValueError) as error:
            reason = "columns are missing" if isinstance(error, IndexError) else error
            if len(row) > len(next(csv.reader([lines[0][1]], delimiter=header.delimiter))):
                reason = (
                    f"{reason}; it has more columns than the header: put names with {header.delimiter!r} in quotes"
                )
            raise ValueError(f"{path} has the line {line!r}: {reason} (line {number}).") from error
    if header.fold is None:
        return pairs
    numbers = [int(fold) if fold.isdecimal() else None for fold in folds]
    order = dict.fromkeys(folds) if None in numbers else sorted(set(folds), key=int)
    counts = Counter(folds)
    _warn_of_folds(path, [counts[fold] for fold in order])
    places = {fold: place for place, fold in enumerate(order)}
    return [pair for _, pair in sorted(zip(folds, pairs, strict=True), key=lambda two: places[two[0]])]


def _warn_of_folds(path: Path, sizes: list[int]) -> None:
    if len(sizes) != NUM_FOLDS or len(set(sizes)) > 1:
        warnings.warn(
            f"{path} has {len(sizes)} folds of {min(sizes)} to {max(sizes)} pairs. Verification takes {NUM_FOLDS}"
            " consecutive equal parts of the list instead.",
            stacklevel=3,
        )
