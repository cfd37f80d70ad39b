"""Verification by group of people, in the form of RFW (Wang et al. 2019): pairs within each group, all at one common
threshold. Groups come from a file that the user gives; none is guessed from a picture."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from ..data.face_cache import FaceCache, FaceCacheSource
from ..data.file_list import split_line
from ..data.photographs import has_image_suffix
from ..faces import SIDE_VIEW
from ..files import iterate_lines, local_path, same_name
from .intervals import wilson_interval

MEASURES = ("accuracy", "fmr", "fnmr")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Rate(NamedTuple):
    """A share and its 95 % interval."""

    rate: float
    low: float
    high: float


@dataclass
class GroupRates:
    """At the common threshold.

    Args:
        genuine (`int`): pairs of one person.
        impostor (`int`): of two.
        accuracy (`Rate`, *optional*): share of the pairs that are told right.
        fmr (`Rate`, *optional*): false match rate, the share of impostor pairs at or above the threshold; None without
            such pairs.
        fnmr (`Rate`, *optional*): false non-match rate, the share of genuine pairs below it; None without such pairs.
    """

    genuine: int
    impostor: int
    accuracy: Rate | None
    fmr: Rate | None
    fnmr: Rate | None


@dataclass
class GroupResult:
    """
    Args:
        threshold (`float`): the common cosine.
        groups (`dict[str, GroupRates]`): by the group's name, in order.
        spread (`dict[str, dict[str, float]]`): measure -> `range` (largest minus smallest) and `std` (of the
            population) over the groups that have it.
        across (`int`): pairs of two groups, left out.
        unknown (`int`): pairs with a photograph of no group, left out.
    """

    threshold: float
    groups: dict[str, GroupRates]
    spread: dict[str, dict[str, float]]
    across: int = 0
    unknown: int = 0

    def to_dict(self) -> dict:
        """What JSON can hold."""
        return asdict(self) | {
            "groups": {
                name: asdict(rates)
                | {m: None if (rate := getattr(rates, m)) is None else rate._asdict() for m in MEASURES}
                for name, rates in self.groups.items()
            }
        }

    def lines(self) -> list[str]:
        """A text of a line per group, in percent."""
        text = [f"groups at the common cosine {self.threshold:.4f}; accuracy, FMR, FNMR:"]
        for name, rates in self.groups.items():
            shown = (
                "-" if rate is None else f"{100 * rate.rate:.2f} [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
                for rate in (rates.accuracy, rates.fmr, rates.fnmr)
            )
            text.append(f"  {name} ({rates.genuine} genuine, {rates.impostor} impostor): {', '.join(shown)}")
        for key, title in (("range", "largest minus smallest"), ("std", "standard deviation")):
            values = (f"{100 * self.spread[m][key]:.2f}" if m in self.spread else "-" for m in MEASURES)
            text.append(f"  {title}: {', '.join(values)}")
        if self.across:
            text.append(f"  left out: {self.across} pairs of two groups")
        if self.unknown:
            text.append(f"  left out: {self.unknown} pairs with a photograph of no group")
        return text


class Groups(dict[str, str]):
    """Name or file -> group. A file is known with its suffix and without."""

    def of(self, photograph: str) -> str | None:
        """The group of a photograph `FOLDER/.../NAME/FILE`: by its file, else by the innermost of its folders that is
        listed, as a path or by its name; None for none."""
        path = PurePosixPath(same_name(photograph))
        for part in (path, *path.parents):
            for key in (str(part), part.name):
                key = _without_suffix(key)
                if key in self:
                    return self[key]
        return None


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if has_image_suffix(name) else name


def read_groups(path: str | os.PathLike) -> Groups:
    """Reads a file of one `NAME,GROUP` or `FILE,GROUP` per line, with a comma or a tab. A first line whose last word
    is `group` is a header.

    Raises:
        ValueError: a line is of another form, a name has two groups, or there are none.
    """
    path, groups = local_path(path), Groups()
    for number, line in enumerate(iterate_lines(path), start=1):
        if not line.strip():
            continue
        words = split_line(line)
        if number == 1 and words[-1].lower() == "group":
            continue
        if len(words) != 2 or not all(words):
            raise ValueError(f"{path}, line {number}, is {line!r}, neither NAME,GROUP nor FILE,GROUP.")
        key = _without_suffix(same_name(words[0].replace("\\", "/")))
        if groups.setdefault(key, words[1]) != words[1]:
            raise ValueError(f"{path}, line {number}: {words[0]} is in `{words[1]}`, and in `{groups[key]}` before.")
    if not groups:
        raise ValueError(f"{path} names no groups.")
    return groups


def pair_groups(groups: Groups, pairs: Sequence[tuple[str, str]]) -> tuple[list[str | None], int, int]:
    """The group of each pair of photographs: None for pairs of two groups or of none, and how many there are of
    either.

    Raises:
        ValueError: no pair has a group.
    """
    found: list[str | None] = []
    across = unknown = 0
    for first, second in pairs:
        one, other = groups.of(first), groups.of(second)
        unknown += None in (one, other)
        across += None not in (one, other) and one != other
        found.append(one if one == other else None)
    if not any(found):
        raise ValueError(f"none of {len(pairs)} pairs is of one group, such as {pairs[0][0]} and {pairs[0][1]}.")
    return found, across, unknown


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The score at which most pairs are told right, if those at or above it are accepted; the lowest of several,
    infinite if all are best rejected."""
    thresholds = np.append(np.unique(scores), np.inf)
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    right = len(genuine) - np.searchsorted(genuine, thresholds) + np.searchsorted(impostor, thresholds)
    return float(thresholds[right.argmax()])


def measure_groups(
    scores: np.ndarray, same: np.ndarray, groups: Sequence[str | None], fmr: float | None = None
) -> GroupResult:
    """Rates of each group at one threshold for all.

    Args:
        scores (`np.ndarray` of shape `(N,)`): cosines of the pairs.
        same (`np.ndarray` of shape `(N,)`): booleans, whether a pair is of one person.
        groups: N names; pairs of None are left out.
        fmr (`float`, *optional*): the threshold is the lowest at which the false match rate of all groups' pairs
            together is at most this. By default, it is the one with the highest accuracy on them.

    Raises:
        ValueError: numbers disagree, no pair has a group, or there are too few impostor pairs for `fmr`.
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, bool)
    if not len(scores) == len(same) == len(groups):
        raise ValueError(f"{len(scores)} scores, {len(same)} labels and {len(groups)} groups: one of each per pair.")
    numbers: dict[str, int] = {}
    labels = np.array([-1 if name is None else numbers.setdefault(name, len(numbers)) for name in groups])
    grouped = labels >= 0
    if not numbers:
        raise ValueError("no pair has a group.")
    if fmr is None:
        threshold = best_threshold(scores[grouped], same[grouped])
    else:
        impostor = np.sort(scores[grouped & ~same])[::-1]
        if not 0 < fmr < 1 or fmr * len(impostor) < 1:
            raise ValueError(
                f"a false match rate of {fmr:g} would be less than one of {len(impostor)} impostor pairs."
            )
        threshold = float(np.nextafter(impostor[int(fmr * len(impostor) + 1e-9)], np.inf))
    accepted = scores >= threshold
    rates = {
        name: _rates(accepted[labels == numbers[name]], same[labels == numbers[name]]) for name in sorted(numbers)
    }
    spread = {}
    for measure in MEASURES:
        values = [rate.rate for each in rates.values() if (rate := getattr(each, measure)) is not None]
        if values:
            spread[measure] = {"range": max(values) - min(values), "std": float(np.std(values))}
    return GroupResult(threshold, rates, spread)


def _share(wrong: np.ndarray) -> Rate | None:
    share = float(wrong.mean()) if len(wrong) else 0.0
    return Rate(share, *wilson_interval(share, len(wrong))) if len(wrong) else None


def _rates(accepted: np.ndarray, same: np.ndarray) -> GroupRates:
    counts = int(same.sum()), int((~same).sum())
    return GroupRates(*counts, *map(_share, (accepted == same, accepted[~same], ~accepted[same])))


def pose_statistics(cache: FaceCache, groups: Groups | None = None) -> dict[str, dict]:
    """Head poses of a cache's faces by group, from the landmarks that it holds (see `head_pose`). Faces without a
    group are under an empty name; so are all if no groups are given.

    Returns:
        Group -> `faces`, `poses_known`, `side_views` (how many of these have |yaw| > 0.25), and of `yaw` and `pitch`
        `mean`, `std` and `quantiles` (0.05, 0.25, 0.5, 0.75, 0.95); None where no pose is known.
    """
    poses = cache.poses()
    by_group: dict[str, list[int]] = {}
    for position, photograph in enumerate(FaceCacheSource(cache.folder).photographs):
        group = None if groups is None else groups.of(photograph.file) or groups.of(photograph.identity)
        by_group.setdefault(group or "", []).append(position)
    return {name: _describe(poses[positions]) for name, positions in sorted(by_group.items())}


def _describe(poses: np.ndarray) -> dict:
    known = poses[np.isfinite(poses).all(axis=1)].astype(np.float64)
    result: dict = {"faces": len(poses), "poses_known": len(known)}
    result["side_views"] = int((np.abs(known[:, 0]) > SIDE_VIEW).sum())
    for name, values in zip(("yaw", "pitch"), known.T, strict=True):
        result[name] = None
        if len(known):
            quantiles = dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True))
            result[name] = {"mean": float(values.mean()), "std": float(values.std()), "quantiles": quantiles}
    return result


def pose_lines(statistics: dict[str, dict]) -> list[str]:
    """What `pose_statistics` gives, as text of a few lines per group."""
    text = []
    for group, each in statistics.items():
        known = f"{each['faces']} faces, {each['poses_known']} with a pose, {each['side_views']} look sideways"
        text.append(f"{group or 'no group'}: {known} (|yaw| > {SIDE_VIEW})")
        for name in ("yaw", "pitch"):
            if each[name] is not None:
                quantiles = ", ".join(f"{value:+.3f}" for value in each[name]["quantiles"].values())
                spread = f"mean {each[name]['mean']:+.3f}, std {each[name]['std']:.3f}"
                text.append(f"  {name}: {spread}, quantiles 5, 25, 50, 75, 95 %: {quantiles}")
    return text
