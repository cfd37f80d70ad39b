"""Banks of identities made of other things: caches, photographs, other banks."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from .data import FaceCache, FaceCacheSource, prepare_faces
from .faces import PhotographEncoder
from .files import local_path
from .identities import IdentityBank, keep_distinct, perturb_embeddings
from .seeds import PERTURBATION, image_generator


def is_cache(folder: str | os.PathLike) -> bool:
    """Whether a folder is a cache of `prepare_faces`, and not photographs."""
    return (local_path(folder) / "prepare.json").is_file()


def load_bank(path: str | os.PathLike) -> IdentityBank:
    """A bank's file, or the embeddings of a cache of `prepare_faces`.

    Raises:
        ValueError: the file is damaged, or the folder is no finished cache.
    """
    path = local_path(path)
    return FaceCache(path).embeddings() if path.is_dir() else IdentityBank.load(path)


def identities_from_images(
    images: str | os.PathLike,
    output: str | os.PathLike,
    number: int,
    encoder: PhotographEncoder | None = None,
    exclude: Sequence[IdentityBank] = (),
    max_similarity: float = 0.3,
    aligned: bool = False,
) -> tuple[IdentityBank, dict[str, int]]:
    """Saves the embeddings of photographs as a bank: those that are unlike each other and unlike the excluded ones.

    Args:
        images: photographs in any form that `open_source` opens, or a cache of `prepare_faces`.
        output: the bank's file. `OUTPUT.faces` beside it is a cache until the bank is saved.
        number (`int`): identities wanted; there may be fewer in the end.
        encoder: detects and embeds; not needed for a cache.
        exclude: banks of identities to keep away from.
        max_similarity (`float`, defaults to 0.3): cosine from which two identities are too near.
        aligned (`bool`, defaults to `False`): the pictures are aligned faces already: no detection.

    Returns:
        The bank, and the report of `keep_distinct`.

    Raises:
        ValueError: photographs without an encoder, or embeddings of two encoders.
    """
    cache = local_path(images) if is_cache(images) else Path(f"{local_path(output)}.faces")
    if not is_cache(images):
        if encoder is None:
            raise ValueError(f"{images} holds photographs: an encoder is needed.")
        prepare_faces(images, cache, encoder, aligned=aligned)
    candidates = FaceCache(cache).embeddings()
    # names that can be folders
    candidates.names = [re.sub(r"[/:\\]", "_", photograph.file) for photograph in FaceCacheSource(cache).photographs]
    bank, report = keep_distinct(candidates, exclude, max_similarity, number)
    bank.save(output)
    if not is_cache(images):
        shutil.rmtree(cache)
    return bank, report


def perturb_identities(
    bank: IdentityBank, cosine_range: tuple[float, float], seed: int = 0
) -> tuple[IdentityBank, torch.Tensor]:
    """Turns every identity by a random angle (`perturb_embeddings`), the same one for the same name and seed.

    Args:
        bank: the identities.
        cosine_range: a, b of the cosine between an identity and the turned one, within [-1, 1].
        seed (`int`, defaults to 0): of the draws.

    Returns:
        The bank of the turned ones, and their cosines to the given ones, `(N,)`.
    """
    bank.check_one_each("the perturbation")
    generators = [image_generator(seed, name, 0, stream=PERTURBATION) for name in bank.names]
    embeddings, cosines = perturb_embeddings(F.normalize(bank.embeddings), cosine_range, generators)
    return replace(bank, embeddings=embeddings), cosines
