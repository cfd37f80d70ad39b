"""Pictures that the images of a data set take their layouts from: each image draws one."""

import os
from functools import cached_property

import numpy as np

from ..data.photographs import (
    Photograph,
    describe_left_out,
    source_fingerprint,
    summarize_left_out,
    unreadable_reason,
)
from ..data.sources import open_faces
from ..files import warn_once
from ..seeds import LAYOUT, image_seed
from .plan import Attempt


class Layouts:
    """
    Args:
        path: what `open_faces` reads; the pictures are aligned faces, as those of the pipeline's training.

    Raises:
        ValueError: there are no pictures, or some cannot be read: all are, before anything is generated.
    """

    def __init__(self, path: str | os.PathLike):
        self.source = open_faces(path)
        self.photographs = self.source.photographs
        if self.source.left_out:
            lines = "; ".join(describe_left_out(summarize_left_out(self.source.left_out)))
            warn_once(f"of {path} these are no layouts: {lines}")
        unreadable, self.shapes = {}, set()
        for photograph in self.photographs:
            try:
                self.shapes.add(self.source.read(photograph).shape)
            except OSError as error:
                unreadable[photograph.file] = unreadable_reason(self.source, photograph, error)
        if unreadable:
            lines = "; ".join(describe_left_out(summarize_left_out(unreadable)))
            raise ValueError(
                f"{len(unreadable)} of {len(self.photographs)} layouts in {path} cannot be read: remove them. {lines}"
            )

    @cached_property
    def fingerprint(self) -> str:
        return source_fingerprint(self.source)

    def drawn(self, seed: int, attempt: Attempt) -> Photograph:
        """The one of an attempt at an image, in a data set of this seed."""
        return self.photographs[image_seed(seed, *attempt.seed_key, stream=LAYOUT) % len(self.photographs)]

    def read(self, photograph: Photograph) -> np.ndarray:
        """`(height, width, 3)` RGB bytes."""
        return self.source.read(photograph)
