"""Faces of a bank of identities, into folders."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from tqdm import tqdm

from .files import complete_file
from .identities import IdentityBank
from .pipeline_uiface import UIFacePipeline

# of the preview
GRID_ROWS, GRID_COLUMNS = 8, 8


def image_generator(seed: int, identity: int, index: int) -> torch.Generator:
    """The random generator of image `index` of identity number `identity`: it depends on nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, identity, index)).generate_state(1)[0]))


def generate_dataset(
    pipeline: UIFacePipeline,
    identities: IdentityBank,
    output: str | os.PathLike,
    images_per_identity: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    **sampling,
) -> int:
    """Generates faces of every identity of a bank: `OUTPUT/IDENTITY/NNNN.png`, and `OUTPUT/grid.png` of the first.

    A batch is filled across identities; an image depends on its identity, its number and the seed only. Pictures that
    are there already are not made again.

    Args:
        pipeline: samples; its own progress bar is switched off.
        identities: whom.
        output: a folder.
        images_per_identity (`int`, defaults to 8).
        seed (`int`, defaults to 0).
        batch_size (`int`, defaults to 16): pictures a pipeline call.
        sampling: further arguments of the pipeline's call, as `guidance_scale`.

    Returns:
        How many pictures were made.

    Raises:
        ValueError: an empty bank, or names that cannot be folders.
    """
    if not len(identities):
        raise ValueError("the bank of identities is empty.")
    bad = [name for name in identities.names if Path(name).name != name or name in (".", "..")]
    if bad:
        raise ValueError(f"the identity's name {bad[0]!r} cannot be a folder's.")
    if len(set(identities.names)) < len(identities):
        raise ValueError("two identities of the bank have one name: their pictures would fall together.")
    output = Path(output)
    plan = [(identity, index) for identity in range(len(identities)) for index in range(images_per_identity)]

    def path(identity: int, index: int) -> Path:
        return output / identities.names[identity] / f"{index:04d}.png"

    missing = [number for number in plan if not path(*number).exists()]
    output.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(plan), initial=len(plan) - len(missing), desc="generate", unit="image") as progress:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            embeddings = identities.embeddings[[identity for identity, _ in batch]]
            images = pipeline(
                IdentityBank(embeddings, identities.identity_encoder),
                generator=[image_generator(seed, *number) for number in batch],
                **sampling,
            ).images
            for number, image in zip(batch, images, strict=True):
                path(*number).parent.mkdir(exist_ok=True)
                with complete_file(path(*number)) as beside:
                    image.save(beside, "png")
            progress.update(len(batch))

    rows, columns = min(GRID_ROWS, len(identities)), min(GRID_COLUMNS, images_per_identity)
    cells = [PIL.Image.open(path(identity, index)) for identity in range(rows) for index in range(columns)]
    with complete_file(output / "grid.png") as beside:
        make_image_grid(cells, rows=rows, cols=columns).save(beside, "png")
    return len(missing)
