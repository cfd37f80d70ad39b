"""What the values of a condition, such as the head pose, are drawn from in a data set: each image draws one."""

import hashlib
import os
from collections.abc import Callable

import numpy as np

from ..data import FaceCache
from ..models import ConditionProjector
from ..seeds import CONDITION, image_seed
from .plan import Attempt

UNIFORM = "uniform:"


class Distribution:
    """
    Args:
        projector: the condition's class.
        given: a cache of `prepare_faces`, whose faces' values are drawn, each as often; or `"uniform:LOW:HIGH"`, with
            a range for each number of a value, separated by commas, in their order. Those without one are 0.

    Raises:
        ValueError: a range is none or out of the condition's limits, or the cache has no such values.

    Attributes:
        fingerprint (`str`): of all that is drawn from.
    """

    def __init__(self, projector: type[ConditionProjector], given: str | os.PathLike):
        self.projector = projector
        # another one for each condition: what is drawn for one says nothing about another
        self._stream = CONDITION + int.from_bytes(projector.condition.encode(), "big")
        self._draw: Callable[[int], np.ndarray]
        if isinstance(given, str) and given.startswith(UNIFORM):
            low, high = self._ranges(given)
            self.fingerprint = UNIFORM + ",".join(f"{a:g}:{b:g}" for a, b in zip(low, high, strict=True))
            self._draw = lambda seed: np.random.default_rng(seed).uniform(low, high)
        else:
            values = self._values(given)
            self.fingerprint = hashlib.sha256(values.tobytes()).hexdigest()[:12]
            self._draw = lambda seed: values[seed % len(values)]

    def _ranges(self, given: str) -> tuple[np.ndarray, np.ndarray]:
        fields, (least, most) = self.projector.fields, self.projector.limits
        try:
            words = given.removeprefix(UNIFORM).split(",")
            ranges = [(float(low), float(high)) for low, high in (word.split(":") for word in words)]
        except ValueError:
            ranges = []
        is_fine = 0 < len(ranges) <= len(fields) and all(least <= low <= high <= most for low, high in ranges)
        if not is_fine:
            example = ",".join(["-30:30"] * len(fields))
            raise ValueError(
                f"{given!r} is no distribution of the {self.projector.condition}: give {UNIFORM}LOW:HIGH, numbers from"
                f" {least:g} to {most:g}; or for all of {', '.join(fields)}, such as {UNIFORM}{example}; or a cache."
            )
        ranges += [(0.0, 0.0)] * (len(fields) - len(ranges))
        low, high = np.array(ranges).T
        return low, high

    def _values(self, cache: str | os.PathLike) -> np.ndarray:
        values = self.projector.from_columns(FaceCache(cache).columns(self.projector.columns))
        known = values[np.isfinite(values).all(axis=1)]
        if not len(known):
            name = self.projector.condition
            raise ValueError(f"{cache} has no {name} of any face to draw from: {self.projector.remedy}.")
        return known.astype(np.float32)

    def drawn(self, seed: int, attempt: Attempt) -> dict[str, float]:
        """The value of an attempt at an image, in a data set of this seed: field -> number, as the metadata have it
        (of 32 bits)."""
        value = self._draw(image_seed(seed, *attempt.seed_key, stream=self._stream))
        return {name: float(np.float32(number)) for name, number in zip(self.projector.fields, value, strict=True)}
