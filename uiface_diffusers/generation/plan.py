"""Which images a data set has, and which part of a run makes which."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..data.image_folder import ImageKey
from ..files import MAX_NAME


@dataclass(frozen=True)
class Attempt:
    """One image to be made, and how often it has been tried before."""

    key: ImageKey
    number: int = 0

    @property
    def seed_key(self) -> tuple[str, int, int]:
        """What the image's random numbers depend on, beside the data set's seed."""
        return self.key.identity, self.key.index, self.number


class Part(NamedTuple):
    """Part `position` of `total` of a run, from 0: of the jobs that do not know each other, and of their processes."""

    position: int
    total: int

    @classmethod
    def of(cls, shard: Sequence[int], process: int, processes: int) -> "Part":
        """
        Raises:
            ValueError: `shard` is no (i, n) with 0 <= i < n.
        """
        position, total = shard
        if not 0 <= position < total:
            raise ValueError(f"`shard` is (i, n) with 0 <= i < n, not ({position}, {total}).")
        return cls(int(position) * processes + process, int(total) * processes)


@dataclass(frozen=True)
class Plan:
    """All images of a data set in their order: identity by identity."""

    names: Sequence[str]
    images_per_identity: int

    @cached_property
    def keys(self) -> list[ImageKey]:
        return [ImageKey(name, index) for name in self.names for index in range(self.images_per_identity)]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Name -> position in the bank."""
        return {name: row for row, name in enumerate(self.names)}

    def position(self, key: ImageKey) -> int:
        """Of an image among `keys`."""
        return self.rows[key.identity] * self.images_per_identity + key.index


def check_names(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: there are none, or one cannot be the name of a folder of its own.
    """
    if not names:
        raise ValueError("the bank of identities is empty.")
    bad = next((name for name in names if not name or Path(name).name != name or ":" in name or name[0] == "."), None)
    if bad is not None:
        raise ValueError(f"the identity's name {bad!r} cannot be a folder's.")
    long = next((name for name in names if len(os.fsencode(name)) > MAX_NAME), None)
    if long is not None:
        raise ValueError(f"the identity's name {long[:40]!r}... is longer than {MAX_NAME} bytes, a folder's limit.")
    if len(set(names)) < len(names):
        raise ValueError("two identities of the bank have one name: their images would fall together.")
