"""The trade-off of a pipeline between diversity and identity, measured on a grid of settings: its dial."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..encoders import check_same_encoder
from ..faces import FaceEncoder
from ..files import check_settings, complete_file, local_path, read_json, write_json
from ..fingerprint import pipeline_fingerprint, weights_fingerprint
from ..generation import generate_dataset
from ..identities import IdentityBank, bank_hash
from ..pipeline_uiface import UIFacePipeline
from ..two_stage.dial import Dial, DialPoint, diversity_of_real_faces, monotone_curve
from . import registry
from .face_set import FaceSet, open_faces
from .measure import Inputs, Settings

if TYPE_CHECKING:
    import lpips

# of `two_stage.dial.DialPoint`, by the names of the registered measures
FIGURES = {"context_cosine": "identity_cosine", "genuine_mean": "genuine_cosine", "eer": "eer"}
MAX_REAL_FACES = 2000


def settings_grid(guidance_scales: Sequence[float], latest_boundaries: Sequence[float]) -> list[dict[str, Any]]:
    """The arguments of the pipeline's call at every point of the grid: two stages at each guidance and latest
    boundary, and the single stage at each guidance."""
    caps: list[float | None] = [*latest_boundaries, None]
    return [
        {"guidance_scale": scale, "boundary": "adaptive" if cap is not None else None, "latest_boundary": cap}
        for cap in caps
        for scale in guidance_scales
    ]


def calibrate(
    pipeline: UIFacePipeline,
    identities: IdentityBank,
    encoder: FaceEncoder,
    work: str | os.PathLike,
    guidance_scales: Sequence[float] = (1.5, 3.0),
    latest_boundaries: Sequence[float] = (100, 300, 500, 700),
    images_per_identity: int = 2,
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    perceptual: "lpips.LPIPS | None" = None,
    real: str | os.PathLike | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Dial:
    """Samples every point of `settings_grid` from the same noise and measures it.

    Diversity is the mean LPIPS between images of one identity, or without `perceptual` their mean cosine distance by
    the encoder (1 - the mean cosine of genuine pairs).

    Args:
        pipeline: the model.
        identities: two or more, of the encoder.
        encoder: embeds the images.
        work: folder of images and figures. A finished point is not measured again.
        guidance_scales, latest_boundaries: the grid.
        images_per_identity (`int`, defaults to 2): two or more.
        num_inference_steps (`int`, defaults to 50): of the images.
        seed (`int`, defaults to 0): of the noise.
        batch_size (*optional*): see `generate_dataset`.
        perceptual (*optional*): what `load_lpips` returns.
        real (*optional*): aligned real faces, several of a person, for the recommended diversity; at most 2,000 of
            them are drawn.
        log: takes a line about each point.

    Returns:
        The dial, for the pipeline's configuration.

    Raises:
        ValueError: an argument does not fit, `work` was begun with other settings, or no trade-off was found.
    """
    work = local_path(work)
    grid = settings_grid(guidance_scales, latest_boundaries)
    check_same_encoder("the bank", identities.encoder_mark, "the pack that measures", encoder.encoder_mark)
    identities.check_one_each("the calibration")
    for name, value in {"identities": len(identities), "images_per_identity": images_per_identity}.items():
        if value < 2:
            raise ValueError(f"`{name}`: a calibration needs two or more, for pairs of images, but has {value}.")
    embeds = pipeline.prepare_identity_embeds(identities)
    for settings in grid:
        pipeline.check_sampling(embeds, num_inference_steps=num_inference_steps, **settings)
    settings = {
        "model": pipeline_fingerprint(pipeline),
        "identities": bank_hash(identities),
        "images_per_identity": images_per_identity,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "encoder": encoder.fingerprint,
        "perceptual": None if perceptual is None else weights_fingerprint(perceptual),
    }
    check_settings(work / "calibration.json", settings)
    real_cosine = None if real is None else _real_cosine(real, work / "real", encoder)
    if real_cosine is not None:
        log(f"two photographs of a real person: mean cosine {real_cosine:.3f}")
    sampling = {"images_per_identity": images_per_identity, "num_inference_steps": num_inference_steps, "seed": seed}
    points = []
    for number, each in enumerate(grid, start=1):
        folder = work / f"{'single' if each['boundary'] is None else each['latest_boundary']}-{each['guidance_scale']}"
        point = _measured_before(folder)
        if point is None:
            rows = _sample(pipeline, identities, folder, batch_size=batch_size, **sampling, **each)
            figures: dict[str, Any] = _figures(folder, identities, encoder, perceptual)
            point = DialPoint(**each, **figures, rows_per_image=rows)
            write_json(folder / "point.json", asdict(point))
        points.append(point)
        log(f"{number}/{len(grid)} {describe(point)}")
    curve = monotone_curve(points)
    return Dial(
        points=curve,
        encoder=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
        num_inference_steps=num_inference_steps,
        diversity_measure="genuine_distance" if perceptual is None else "intra_class_lpips",
        real_genuine_cosine=real_cosine,
        recommended_diversity=None if real_cosine is None else diversity_of_real_faces(curve, real_cosine),
    )


def describe(point: DialPoint) -> str:
    """A point in a line."""
    stages = "single stage" if point.boundary is None else f"latest boundary {point.latest_boundary:g}"
    return (
        f"{stages}, guidance {point.guidance_scale:g}: identity cosine {point.identity_cosine:.3f}, diversity"
        f" {point.diversity:.3f}, EER {100 * point.eer:.1f} %, {point.rows_per_image:.1f} rows per image"
    )


def save_dial(folder: Path, dial: Dial) -> None:
    """Writes the dial into the configuration of a saved pipeline; everything else stays as it is."""
    index = folder / "model_index.json"
    config = read_json(index) | {"dial": dial.to_config()}
    with complete_file(index) as beside:
        beside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _measured_before(folder: Path) -> DialPoint | None:
    file = folder / "point.json"
    try:
        return DialPoint(**read_json(file)) if file.is_file() else None
    except TypeError as error:
        raise ValueError(f"{file} is no point of a calibration ({error}): delete it.") from error


def _sample(pipeline: UIFacePipeline, identities: IdentityBank, folder: Path, **options: Any) -> float:
    """Images of one point in `folder`; returns the rows that each took, which are counted of whole runs only."""
    if folder.exists():
        shutil.rmtree(folder)
    return generate_dataset(pipeline, identities, folder / "images", **options).unet_rows_per_image


def _figures(
    folder: Path, identities: IdentityBank, encoder: FaceEncoder, perceptual: "lpips.LPIPS | None"
) -> dict[str, float]:
    found = _measure(folder / "images", folder / "cache", encoder, perceptual, identities)
    figures = {ours: found[name] for name, ours in FIGURES.items()}
    distance = found.get("intra_class_lpips", 1 - found["genuine_mean"])
    return figures | {"diversity": distance}


def _measure(
    path: Path,
    cache: Path,
    encoder: FaceEncoder,
    perceptual: "lpips.LPIPS | None" = None,
    identities: IdentityBank | None = None,
    max_faces: int | None = None,
) -> dict[str, float]:
    """Name -> value of the figures of the registered measures that have what they need."""
    faces = FaceSet(open_faces(path)).usable(str(path), cache)
    if max_faces is not None:
        faces = faces.sample_identities(max_faces)
    counts = [len(positions) for positions in faces.identities.values()]
    if len(counts) < 2 or max(counts) < 2:
        raise ValueError(f"{path} needs faces of two or more people, and several of a person: it has {len(counts)}.")
    inputs = Inputs(
        path=path,
        faces=faces,
        recognizers=(encoder,),
        perceptual=cast("lpips.LPIPS", perceptual),  # without it, no measure that needs it is taken
        features=encoder,
        settings=Settings(lpips_pairs=None),
        cache=cache,
        identities=identities,
    )
    measures = [measure(inputs) for measure in registry.MEASURES if all(map(inputs.has, measure.needs))]
    for measure in measures:
        measure.check()
        measure.measure()
    found = (figure for measure in measures for figure in measure.found)
    return {figure.name: figure.value for figure in found if figure.value is not None}


def _real_cosine(path: str | os.PathLike, cache: Path, encoder: FaceEncoder) -> float:
    return _measure(local_path(path), cache, encoder, max_faces=MAX_REAL_FACES)["genuine_mean"]
