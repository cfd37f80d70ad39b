"""A data set from a pipeline and a bank of identities. The same call begins it, goes on, and completes it."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import PartialState

from ..conditions import ARGUMENTS, condition_values
from ..encoders import check_same_encoder
from ..faces import FaceEncoder
from ..files import local_path, plain_numbers
from ..hub.lineage import CARD, read_header
from ..identities import IdentityBank, safe_cosines
from ..identities.selection import check_same_dimension
from ..models import CONDITIONS, IdentityFlow
from ..pipeline_uiface import UIFacePipeline
from ..two_stage.dial import DIAL_ARGUMENTS
from .distributions import Distribution
from .finish import finish_dataset
from .layouts import Layouts
from .making import ImageMaker, default_batch_size
from .plan import Part, Plan, check_names
from .resume import locked, with_noise_of
from .settings import GenerationSettings, check_positive
from .upload import upload_dataset
from .writers import OUTPUT_FORMATS


@dataclass(frozen=True)
class GenerationReport:
    """
    Args:
        made (`int`): images of this run and process, repeated attempts not counted.
        planned (`int`): images of the whole data set.
        complete (`bool`): all of them are there, metadata and preview are written.
        images_per_second (`float`): of this run and process.
        unet_rows_per_image (`float`): UNet samples that an image took, on average.
    """

    made: int
    planned: int
    complete: bool
    images_per_second: float
    unet_rows_per_image: float


def generate_dataset(
    pipeline: UIFacePipeline,
    identities: IdentityBank,
    output: str | os.PathLike,
    images_per_identity: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    size: int = 112,
    image_format: str = "png",
    output_format: str = "imagefolder",
    shard: tuple[int, int] = (0, 1),
    identity_perturbation: tuple[float, float] | Literal["auto"] | None = None,
    min_similarity: float | None = None,
    encoder: FaceEncoder | None = None,
    max_attempts: int = 3,
    push_to_hub: str | None = None,
    identity_flow: IdentityFlow | None = None,
    layouts: str | os.PathLike | None = None,
    distributions: Mapping[str, str | os.PathLike] | None = None,
    **sampling: Any,
) -> GenerationReport:
    """Generates `images_per_identity` faces of every identity of a bank. The same call goes on where an earlier one
    was stopped. Under `accelerate launch`, the processes share the work.

    Args:
        pipeline: samples; its own progress bar is switched off.
        identities: of the faces; their names become folders. Of a bank with an embedding per image, image n follows
            embedding n, and its similarity is measured to that one.
        output: the data set's folder.
        images_per_identity (`int`, defaults to 50): how many of each.
        seed (`int`, defaults to 0): of all noise.
        batch_size (`int`, *optional*): images per call of the pipeline, filled across identities; by default
            `default_batch_size(pipeline)`.
        size (`int`, defaults to 112): height and width of the images (bilinear, with antialiasing).
        image_format (`str`, defaults to `"png"`): `"png"`, `"jpeg"` or `"webp"`, the last two with quality 95.
        output_format (`str`, defaults to `"imagefolder"`): `images/IDENTITY/NNNN.png`, `"webdataset"` tar shards, or
            `"parquet"` files as the Hub's viewer shows them.
        shard (`tuple[int, int]`, defaults to `(0, 1)`): part i of n, for jobs that do not know each other.
        identity_perturbation (`tuple[float, float]`, *optional*): every image follows its own embedding, with a cosine
            drawn from this range to the identity's; see `perturb_embeddings`. `"auto"`: from 1 to each identity's
            `safe_cosines`.
        min_similarity (`float`, *optional*): an image whose embedding has a smaller cosine to the identity's is made
            anew from the next sub-seed; the best of all attempts is kept.
        encoder: measures the similarity, also without `min_similarity`; the encoder of the bank.
        max_attempts (`int`, defaults to 3): attempts at an image, if `min_similarity` is given.
        push_to_hub (`str`, *optional*): `"org/name"` of a data set on the Hub to upload to when complete.
        identity_flow (`IdentityFlow`, *optional*): gives the directions in which the embeddings are turned, and the
            cosines, too, where there is no `identity_perturbation`.
        layouts (*optional*): aligned faces in a folder, or in another form that `open_faces` reads. Each image draws
            one, whose layout it takes: see `layout` of the pipeline's call. All are read before anything is generated.
        distributions (`Mapping[str, str]`, *optional*): of conditions, such as `{"pose": "uniform:-60:60"}` or
            `{"pose": CACHE}`. Each image draws a value, which its row of metadata has; see `Distribution`.
        sampling: further arguments of the pipeline's call, as `guidance_scale`. In place of `diversity` or
            `identity_cosine`, the settings hold what the pipeline's dial makes of them.

    Raises:
        ValueError: an argument is out of range, or `output` was begun with other settings.
        RuntimeError: another process is at work on the same part of `output`.
    """
    given = {name: plain_numbers(value) for name, value in sampling.items()}
    sampling = pipeline.with_dial(given)
    dial = {name: given[name] for name in DIAL_ARGUMENTS if given.get(name) is not None}
    drawn_from = None if layouts is None else Layouts(layouts)
    conditions = _open_distributions(pipeline, distributions or {})
    _check_inputs(pipeline, identities, encoder, drawn_from, sampling)
    _check_perturbation(identities, plain_numbers(images_per_identity), identity_perturbation, identity_flow)
    batch_size = default_batch_size(pipeline) if batch_size is None else plain_numbers(batch_size)
    check_positive("batch_size", batch_size)
    state = PartialState()
    part = Part.of(shard, state.process_index, state.num_processes)
    settings = GenerationSettings.of(
        pipeline,
        identities,
        encoder,
        sampling,
        identity_perturbation,
        identity_flow,
        min_similarity,
        max_attempts,
        drawn_from,
        conditions,
        images_per_identity=images_per_identity,
        seed=seed,
        size=size,
        image_format=image_format,
        output_format=output_format,
    )
    folder = local_path(output)
    if (folder / "prepare.json").exists():
        raise ValueError(f"{folder} is a cache of faces, not a data set of generated ones: choose another folder.")
    read_header(folder / CARD)  # of an earlier run: what is wrong with it is named before the work
    plan = Plan(identities.names, settings.images_per_identity)
    writer = OUTPUT_FORMATS[output_format](folder, plan, settings.size, image_format)
    maker = ImageMaker(
        pipeline, identities, encoder, settings, batch_size, writer, identity_flow, drawn_from, conditions
    )
    with locked(folder, part):
        with_noise_of(settings, writer, part).begin(folder, versions=_versions(), **({"dial": dial} if dial else {}))
        made, seconds = maker.make(part)
    # the last one to come here completes the data set
    complete, wrote = finish_dataset(settings, identities, writer, pipeline.config.get("_name_or_path"))
    if push_to_hub is not None and (wrote or (complete and part.position == 0)):
        upload_dataset(folder, push_to_hub)
    return GenerationReport(
        made=made,
        planned=len(plan.keys),
        complete=complete,
        images_per_second=made / seconds if made else 0.0,
        unet_rows_per_image=maker.unet_rows / made if made else 0.0,
    )


def _open_distributions(pipeline: UIFacePipeline, given: Mapping[str, str | os.PathLike]) -> dict[str, Distribution]:
    """
    Raises:
        ValueError: the pipeline has no such condition, or a distribution is wrong.
    """
    for name in given:
        if name not in ARGUMENTS:
            raise ValueError(f"there is no condition {name!r} to draw values of: {sorted(ARGUMENTS)}.")
    # names the component that the pipeline lacks
    condition_values(pipeline.conditions, {name: [None] for name in given}, 1)
    return {name: Distribution(CONDITIONS[ARGUMENTS[name]], each) for name, each in given.items()}


def _check_inputs(
    pipeline: UIFacePipeline,
    bank: IdentityBank,
    encoder: FaceEncoder | None,
    layouts: Layouts | None,
    sampling: Mapping[str, Any],
) -> None:
    """Names wrong embeddings and arguments of the pipeline's call before anything is hashed or written."""
    check_names(bank.names)
    if encoder is not None:
        check_same_encoder("the bank", bank.encoder_mark, "the pack that measures", encoder.encoder_mark)
    if any(hasattr(module, "_hf_hook") for module in pipeline.components.values()):
        raise ValueError("the pipeline is offloaded; images are decoded beside sampling: put it on one device.")
    embeds = pipeline.prepare_identity_embeds(bank.one_per_row())
    pipeline.check_sampling(embeds, **sampling)
    for shape in () if layouts is None else layouts.shapes:
        pipeline.check_sampling(embeds, [np.zeros(shape, np.uint8)], **sampling)


def _check_perturbation(
    bank: IdentityBank, images: int, perturbation: Sequence[float] | str | None, flow: IdentityFlow | None
) -> None:
    """Names a bank that has not what the images are to follow."""
    if bank.images is not None and (perturbation is not None or flow is not None):
        bank.check_one_each("a perturbation")
    if bank.images is not None and isinstance(images, int) and images > bank.images:
        raise ValueError(
            f"the bank has embeddings for {bank.images} images of each identity, {images} are asked for: ask for"
            f" {bank.images} or fewer (--images-per-identity)."
        )
    if flow is not None:
        check_same_encoder("the bank", bank.encoder_mark, "the identity flow", flow.encoder_mark)
        check_same_dimension(bank.embeddings.shape[1], flow.config.identity_dim)
    if perturbation == "auto":
        safe_cosines(bank)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "uiface_diffusers": version("uiface-diffusers"),
    }
