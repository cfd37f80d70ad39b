"""Pictures of a report."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid

from ..faces import ALIGNED_SIZE
from .face_set import FaceSet

if TYPE_CHECKING:
    import matplotlib.figure

Picture: TypeAlias = "PIL.Image.Image | matplotlib.figure.Figure"

GRID_ROWS, GRID_COLUMNS = 8, 8
MOST_BINS = 60


def plot_histograms(
    values: Mapping[str, np.ndarray | torch.Tensor], label: str, marks: Mapping[str, float] | None = None
) -> "matplotlib.figure.Figure":
    """Histograms of unit area over one axis, as a figure of matplotlib.

    Args:
        values: legend -> values, at least one each.
        label: of the axis.
        marks (*optional*): legend -> a value to mark.
    """
    from matplotlib.figure import Figure  # of the extra `train`; without pyplot it needs no display

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    values = {name: np.asarray(each, np.float64) for name, each in values.items()}
    low, high = min(each.min() for each in values.values()), max(each.max() for each in values.values())
    bins = int(np.clip(2 * np.sqrt(min(map(len, values.values()))), 10, MOST_BINS))
    edges = np.linspace(low, max(high, low + 1e-3), bins + 1)
    for name, each in values.items():
        axis.hist(each, edges.tolist(), density=True, histtype="stepfilled", alpha=0.5, label=name)
    for style, (name, value) in zip(("--", ":"), (marks or {}).items(), strict=False):
        axis.axvline(value, color="black", linestyle=style, label=f"{name}: {value:.3f}")
    axis.set_xlabel(label)
    axis.set_ylabel("density")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def identity_grid(faces: FaceSet, seed: int = 0) -> tuple[list[str], PIL.Image.Image]:
    """Names of some identities, drawn at random, and their first images, an identity a row."""
    names = list(faces.identities)
    drawn = np.random.default_rng(seed).choice(len(names), min(GRID_ROWS, len(names)), replace=False)
    chosen = [names[position] for position in sorted(drawn)]
    columns = min(GRID_COLUMNS, max(len(faces.identities[name]) for name in chosen))
    empty, cells = PIL.Image.new("RGB", (ALIGNED_SIZE, ALIGNED_SIZE), "white"), []
    for name in chosen:
        row = [faces.read(position) for position in faces.identities[name][:columns]]
        cells += row + [empty] * (columns - len(row))
    return chosen, make_image_grid(cells, rows=len(chosen), cols=columns)
