"""Small data sets of `generate_dataset`: the identities, and what was written."""

from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import torch

from uiface_diffusers import IdentityBank


def bank(number: int = 3) -> IdentityBank:
    return IdentityBank(torch.eye(16)[:number], "toy")


def rows_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "metadata.parquet").to_pylist()


def images_of(folder: Path) -> list[np.ndarray]:
    return [np.array(PIL.Image.open(folder / row["file_name"])).astype(int) for row in rows_of(folder)]
