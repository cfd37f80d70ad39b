"""New identities from the model itself."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ..encoders import check_same_encoder, projector_mark
from ..faces import FaceEncoder
from ..files import check_no_folder, check_settings, complete_file, local_path, plain_numbers, read_safetensors
from ..fingerprint import pipeline_fingerprint
from ..identities import DistinctIdentities, IdentityBank, join_embeddings
from ..pipeline_uiface import UIFacePipeline
from ..seeds import CANDIDATE, NOISE_VERSION, image_generator


def make_identities(
    pipeline: UIFacePipeline,
    encoder: FaceEncoder,
    number: int,
    output: str | os.PathLike,
    exclude: Sequence[IdentityBank] = (),
    max_similarity: float = 0.3,
    max_candidates: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    **sampling: Any,
) -> dict[str, int]:
    """New identities from the model itself: faces of nobody in particular (the empty context), embedded, and kept when
    they are unlike every one kept before and every excluded one (UIFace's authors; DCFace, Kim et al. 2023).

    The candidates' embeddings are saved beside `output` as they come; the same call goes on after an interruption.

    Args:
        pipeline: makes the candidates; its progress bar is switched off.
        encoder: embeds them: the encoder that the pipeline was trained on.
        number: identities wanted.
        output: the bank's file, safetensors.
        exclude: banks of identities to keep away from, as those of the training.
        max_similarity (`float`, defaults to 0.3): cosine from which two identities are too near.
        max_candidates (`int`, *optional*): give up after so many; 20 times `number` if not given.
        seed (`int`, defaults to 0): candidate k depends on the pipeline, `sampling`, k and the seed only.
        batch_size (`int`, defaults to 16): faces per call.
        sampling: further arguments of the pipeline's call.

    Returns:
        The report: `candidates`, `kept`, `near an excluded identity`, `near a kept identity`, `no face`.

    Raises:
        ValueError: an encoder or a setting does not fit, before anything is written; or too few identities were found:
            the message has the report, and `output` holds what was found.
    """
    for name, value in {"number": number, "batch_size": batch_size, "max_candidates": max_candidates}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` has to be positive but is {value}.")
    seed, batch_size = plain_numbers(seed), plain_numbers(batch_size)
    # the settings have what the dial makes of them: the model's fingerprint says nothing of its dial
    sampling = pipeline.with_dial({name: plain_numbers(value) for name, value in sampling.items()})
    pipeline.check_sampling(**sampling)
    output = local_path(output)
    check_no_folder(output)
    check_same_encoder("the pipeline", projector_mark(pipeline.identity_projector), "the pack", encoder.encoder_mark)
    for bank in exclude:
        check_same_encoder("an excluded bank", bank.encoder_mark, "the pack", encoder.encoder_mark)
    excluded = join_embeddings(exclude, pipeline.identity_projector.config.identity_dim)
    distinct = DistinctIdentities(excluded, max_similarity, number)
    max_candidates = 20 * number if max_candidates is None else max_candidates
    folder = Path(f"{output}.candidates")
    settings = {"seed": seed, "batch_size": batch_size, "sampling": sampling}
    settings |= {"model": pipeline_fingerprint(pipeline), "noise": NOISE_VERSION}
    settings |= {"identity_encoder": encoder.name, "identity_encoder_fingerprint": encoder.fingerprint}
    check_settings(folder / "settings.json", settings, if_known=["identity_encoder_fingerprint"])
    pipeline.set_progress_bar_config(disable=True)
    faceless = 0
    with tqdm(total=number, desc="identities", unit="identity") as progress:
        for start in range(0, max_candidates, batch_size):
            file = folder / f"{start // batch_size:06d}.safetensors"
            if not file.exists():
                _make_candidates(file, pipeline, encoder, range(start, start + batch_size), seed, sampling)
            candidates = read_safetensors(file, ("embeddings", "found"))
            faceless += int((~candidates["found"]).sum())
            distinct.add(candidates["embeddings"][candidates["found"]])
            progress.update(len(distinct.kept) - progress.n)
            progress.set_postfix({name: value for name, value in distinct.report.items() if name != "kept"})
            if distinct.complete:
                break
    report = {**distinct.report, "no face": faceless}
    IdentityBank(distinct.kept, encoder.name, identity_encoder_fingerprint=encoder.fingerprint).save(output)
    if not distinct.complete:
        raise ValueError(
            f"only {len(distinct.kept)} of {number} identities were found ({report}); they are in {output}. Allow more"
            " candidates or a larger similarity and run it again: candidates are not made twice."
        )
    return report


def _make_candidates(
    file: Path, pipeline: UIFacePipeline, encoder: FaceEncoder, numbers: range, seed: int, sampling: dict[str, Any]
) -> None:
    """Writes embeddings `(N, identity_dim)` of faces of nobody in particular, and in which of them a face is found."""
    generators = [image_generator(seed, "", number, stream=CANDIDATE) for number in numbers]
    pictures = pipeline(None, len(numbers), generator=generators, **sampling).images
    found = [bool(encoder.detect(np.asarray(picture))) for picture in pictures]
    with complete_file(file) as beside:
        save_file({"embeddings": encoder.embed_pictures(pictures), "found": torch.tensor(found)}, beside)
