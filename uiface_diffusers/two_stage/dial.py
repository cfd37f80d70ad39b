"""One number between diversity and identity: a curve of settings that `uiface calibrate` measured on a grid.

A pipeline has it in its configuration (`dial` in `model_index.json`). It is ordered by the mean cosine of an image to
its identity, and diversity falls along it. Between two neighbors the settings are interpolated in proportion to that
cosine, if both are of one kind of boundary; from two stages to the single stage there is nothing between, and the
nearer one is taken.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

RECOMMENDED = "recommended"
# arguments of the pipeline's call that turn the dial, and those that it decides, which cannot be given beside it
DIAL_ARGUMENTS = ("diversity", "identity_cosine")
DECIDED = ("guidance_scale", "boundary", "latest_boundary")
REFUSED = (*DECIDED, "boundary_threshold")


@dataclass(frozen=True)
class DialPoint:
    """Settings, and what was measured with them.

    Args:
        boundary (`str`, *optional*): `"adaptive"`, or `None` for the single stage.
        guidance_scale (`float`): of the call.
        latest_boundary (`float`, *optional*): of the call; `None` for the single stage, which has no boundary.
        identity_cosine (`float`): mean cosine of an image to its identity.
        genuine_cosine (`float`): mean cosine of two images of one identity.
        eer (`float`): equal error rate of pairs of images.
        diversity (`float`): how much the images of one identity differ, see `Dial.diversity_measure`.
        rows_per_image (`float`): denoiser rows that an image took.
    """

    boundary: str | None
    guidance_scale: float
    latest_boundary: float | None
    identity_cosine: float
    genuine_cosine: float
    eer: float
    diversity: float
    rows_per_image: float

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        return {name: getattr(self, name) for name in DECIDED}


@dataclass(frozen=True)
class Dial:
    """
    Args:
        points: see `monotone_curve`.
        encoder (`str`), encoder_fingerprint (`str`): the recognizer that measured.
        num_inference_steps (`int`): of the measured images.
        diversity_measure (`str`): what `DialPoint.diversity` is: `"intra_class_lpips"`, or `"genuine_distance"`, which
            is 1 - `genuine_cosine`.
        real_genuine_cosine (`float`, *optional*): mean cosine of two photographs of one real person.
        recommended_diversity (`float`, *optional*): the diversity at which two images of one identity are as alike.

    Raises:
        ValueError: there are fewer than two points, or they are not in order.
    """

    points: tuple[DialPoint, ...]
    encoder: str
    encoder_fingerprint: str | None
    num_inference_steps: int
    diversity_measure: str
    real_genuine_cosine: float | None = None
    recommended_diversity: float | None = None

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError(f"a dial needs two points of its curve but has {len(self.points)}.")
        for lower, upper in pairwise(self.points):
            if not (lower.identity_cosine < upper.identity_cosine and lower.diversity > upper.diversity):
                raise ValueError("the points of a dial have to rise in `identity_cosine` and fall in `diversity`.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Dial":
        """Of a pipeline's configuration.

        Raises:
            ValueError: it is damaged.
        """
        try:
            points = tuple(DialPoint(**point) for point in config["points"])
            return cls(**{**config, "points": points})
        except (KeyError, TypeError) as error:
            raise ValueError(f"`dial` of the pipeline is damaged ({error}): run `uiface calibrate` again.") from error

    def to_config(self) -> dict[str, Any]:
        """For a pipeline's configuration; of JSON's types."""
        return {**asdict(self), "points": [asdict(point) for point in self.points]}

    def identity_cosine(self, diversity: float | str) -> float:
        """The mean identity cosine at a diversity: 0 is the end of the curve with most identity, 1 the other one.

        Raises:
            ValueError: out of range, or `"recommended"` was not measured.
        """
        if diversity == RECOMMENDED:
            if self.recommended_diversity is None:
                raise ValueError(
                    "the dial has no recommended diversity: run `uiface calibrate` again with real faces (--real)."
                )
            diversity = self.recommended_diversity
        _check_between("diversity", diversity, 0.0, 1.0, f', or "{RECOMMENDED}"')
        low, high = self.points[0].identity_cosine, self.points[-1].identity_cosine
        return high + float(diversity) * (low - high)

    def settings(self, identity_cosine: float) -> dict[str, Any]:
        """The arguments of the pipeline's call at a mean identity cosine.

        Raises:
            ValueError: the curve does not reach it.
        """
        low, high = self.points[0].identity_cosine, self.points[-1].identity_cosine
        _check_between("identity_cosine", identity_cosine, low, high, ", which is what the model's curve reaches")
        # rounding may leave the ends
        asked = min(max(float(identity_cosine), low), high)
        for lower, upper in pairwise(self.points):
            if asked <= upper.identity_cosine:
                share = (asked - lower.identity_cosine) / (upper.identity_cosine - lower.identity_cosine)
                return _between(lower, upper, share)
        return self.points[-1].settings


def _check_between(name: str, value: Any, low: float, high: float, more: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low - 1e-9 <= value <= high + 1e-9:
        raise ValueError(f"`{name}` has to be a number from {low:.4g} to {high:.4g}{more}, but is {value!r}.")


def _between(lower: DialPoint, upper: DialPoint, share: float) -> dict[str, Any]:
    """The settings at a share of the way, which are exact at both ends."""
    if share in (0, 1) or lower.boundary != upper.boundary:
        return (lower if share < 0.5 else upper).settings
    found = lower.settings
    for name in ("guidance_scale", "latest_boundary"):
        first, last = getattr(lower, name), getattr(upper, name)
        if first is not None and last is not None:
            found[name] = first + share * (last - first)
    return found


def monotone_curve(points: Iterable[DialPoint]) -> tuple[DialPoint, ...]:
    """The points in the order of their identity cosine, without those that are dominated: another one has at least as
    much of both identity and diversity. The single stage stays only where it has more identity than any two stages: it
    ends the curve.

    Raises:
        ValueError: fewer than two are left.
    """
    # of equal cosines the most diverse one first, which dominates the others
    ordered = sorted(points, key=lambda point: (-point.identity_cosine, -point.diversity))
    two_stages = [point.identity_cosine for point in ordered if point.boundary is not None]
    highest = max(two_stages, default=-math.inf)
    found: list[DialPoint] = []
    for point in ordered:
        is_inside = point.boundary is None and point.identity_cosine <= highest
        if not is_inside and (not found or point.diversity > found[-1].diversity):
            found.append(point)
    if len(found) < 2:
        raise ValueError(
            f"of {len(ordered)} points of the grid one has most identity and most diversity: there is nothing to"
            " choose between. Measure a wider grid, or more images."
        )
    return tuple(reversed(found))


def diversity_of_real_faces(points: tuple[DialPoint, ...], genuine_cosine: float) -> float:
    """The diversity, in [0, 1], at which two images of one identity are as alike as those of real people; the nearer
    end where the curve does not reach it. If it is met more than once, the first from the side of identity.

    Args:
        points: of `monotone_curve`.
        genuine_cosine (`float`): of real people.
    """
    low, high = points[0].identity_cosine, points[-1].identity_cosine
    for upper, lower in pairwise(reversed(points)):
        first, last = upper.genuine_cosine - genuine_cosine, lower.genuine_cosine - genuine_cosine
        if first * last <= 0 and first != last:
            share = first / (first - last)
            met = upper.identity_cosine + share * (lower.identity_cosine - upper.identity_cosine)
            return (high - met) / (high - low)
    nearest = min((points[-1], points[0]), key=lambda point: abs(point.genuine_cosine - genuine_cosine))
    return 0.0 if nearest is points[-1] else 1.0
