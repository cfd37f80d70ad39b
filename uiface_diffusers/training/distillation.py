"""What the distillation of an encoder is made of: faces with their teacher's embeddings, and what is saved."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..data import FaceCache
from ..encoders import EncoderMark, common_encoder
from ..faces import CarriedEncoder, resize_aligned
from ..files import read_json, write_json
from ..models.face_recognition import IResNetConfig, IResNetImageProcessor, IResNetModel
from .means import RunningMeans

# of a face's augmentation: pixels of a shift, and the ranges of contrast and brightness of values in [-1, 1]
SHIFT, CONTRAST, BRIGHTNESS = 2, (0.8, 1.2), (-0.1, 0.1)


class EmbeddedFaces(Dataset):
    """The faces of caches in memory, as a copy sees them, with the teacher's embeddings; fetched a batch at a time.

    Args:
        folders: caches of `prepare_faces`, of one encoder: the teacher.
        size (`int`): height and width of the faces.

    Raises:
        ValueError: a cache is not whole, or they are of different encoders.
    """

    def __init__(self, folders: Sequence[str], size: int):
        caches = [FaceCache(folder) for folder in folders]
        self.teacher = common_encoder({str(cache.folder): cache.encoder_mark for cache in caches})
        self.fingerprints = [cache.fingerprint for cache in caches]
        self.embeddings = F.normalize(torch.cat([cache.embeddings().embeddings for cache in caches]))
        self.pixels = np.empty((len(self.embeddings), size, size, 3), np.uint8)
        images = (image for cache in caches for shard in cache.shards for image in cache.shard_images(shard))
        for position, image in enumerate(images):
            self.pixels[position] = resize_aligned(image, size)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.pixels[indices]).permute(0, 3, 1, 2), self.embeddings[indices]


def vary(faces: torch.Tensor) -> torch.Tensor:
    """Faces `(N, 3, size, size)` in [-1, 1], each mirrored or not, shifted, and of another contrast and brightness; by
    torch's global generator."""
    number, device = len(faces), faces.device
    mirrored = torch.rand(number, 1, 1, 1, device=device) < 0.5
    faces = torch.where(mirrored, faces.flip(-1), faces)
    shifts = torch.randint(-SHIFT, SHIFT + 1, (number, 2)).tolist()
    faces = torch.stack([face.roll(shift, (1, 2)) for face, shift in zip(faces, shifts, strict=True)])
    contrast, brightness = (
        torch.empty(number, 1, 1, 1, device=device).uniform_(*limits) for limits in (CONTRAST, BRIGHTNESS)
    )
    return (faces * contrast + brightness).clamp(-1, 1)


def compare_copy(copies: torch.Tensor, embeddings: torch.Tensor) -> dict[str, float]:
    """How near a copy's embeddings are to the teacher's of the same faces.

    Args:
        copies, embeddings (`torch.Tensor` of shape `(N, identity_dim)`): the copy's and the teacher's, unit length.

    Returns:
        `faces`; mean and 5th percentile of the cosine, `cosine` and `cosine_p5`; and `rank1`, the share of faces of
        whose copy's embedding the nearest of all N teacher's is the face's own.
    """
    cosines = (copies * embeddings).sum(dim=1)
    nearest = torch.cat([(part @ embeddings.T).argmax(dim=1) for part in copies.split(1024)])
    own = (nearest == torch.arange(len(copies), device=copies.device)).float().mean()
    return {
        "faces": len(copies),
        "cosine": round(cosines.mean().item(), 4),
        "cosine_p5": round(cosines.quantile(0.05).item(), 4),
        "rank1": round(own.item(), 4),
    }


class DistillationLog(RunningMeans):
    """The mean cosine to the teacher's embeddings."""

    def add(self, losses: torch.Tensor) -> None:
        self.add_mean("cosine", 1 - losses, self.count(losses))


def check_unseen(teacher: EncoderMark, trained: Collection[str | None], caches: Sequence[FaceCache]) -> EncoderMark:
    """The teacher, as far as all of them name it.

    Args:
        trained: fingerprints of the caches of the training.
        caches: those that the copy is compared on.

    Raises:
        ValueError: one of `caches` is of another encoder, or was trained on.
    """
    # a cache of earlier versions does not name the weights, a newer one does
    marks = {"the training data": teacher, **{str(each.folder): each.encoder_mark for each in caches}}
    teacher = common_encoder(marks)
    seen = [str(each.folder) for each in caches if each.fingerprint in trained]
    if seen:
        raise ValueError(f"{seen[0]} is of the training data: name caches of other people.")
    return teacher


def save_carried(
    model: IResNetModel,
    folder: Path,
    teacher: EncoderMark,
    training_data: Sequence[Mapping[str, Any]],
    unseen: Sequence[str] = (),
    license: str | None = None,
) -> dict[str, dict[str, float]]:
    """Saves a copy of an encoder as a pipeline's folder carries it, with a card that says what it is. Matrices are
    kept in half precision. What is saved is measured.

    Args:
        model: the copy.
        folder: for its files.
        teacher: the encoder that it reproduces, as far as the training data tell.
        training_data: as `describe_caches` gives it.
        unseen: caches of people that it was not trained on, by the same teacher.
        license: of the copy, for its card.

    Returns:
        What `compare_copy` measures, by the unseen caches' names.

    Raises:
        ValueError: an unseen cache is of another encoder, or of the training data.
    """
    caches = [FaceCache(each) for each in unseen]
    teacher = check_unseen(teacher, [each.get("fingerprint") for each in training_data], caches)
    sizes = {
        name: getattr(model.config, name) for name in ("layers", "width", "embedding_dim", "image_size", "use_se")
    }
    about: dict[str, Any] = {"approximates": teacher._asdict(), "license": license}
    about["training_data"] = list(training_data)
    weights = {
        name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in model.cpu().float().state_dict().items()
    }
    copy = IResNetModel(IResNetConfig(**sizes, **about))
    copy.save_pretrained(folder, state_dict=weights)
    IResNetImageProcessor(dict.fromkeys(("height", "width"), sizes["image_size"])).save_pretrained(folder)
    measured = measure_carried(folder, caches)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"measured": measured})
    (folder / "README.md").write_text(_card(copy, teacher, training_data, measured, license), encoding="utf-8")
    return measured


def measure_carried(folder: Path, caches: Sequence[FaceCache]) -> dict[str, dict[str, float]]:
    """What `compare_copy` measures of a saved copy, by the caches' names."""
    encoder, measured = CarriedEncoder(folder), {}
    for cache in caches:
        faces = [resize_aligned(image) for shard in cache.shards for image in cache.shard_images(shard)]
        copies = torch.from_numpy(encoder.embed_aligned(faces))
        measured[cache.folder.resolve().name] = compare_copy(copies, F.normalize(cache.embeddings().embeddings))
    return measured


def _card(
    model: IResNetModel,
    teacher: EncoderMark,
    training_data: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Mapping[str, float]],
    license: str | None,
) -> str:
    data = "\n".join(
        f"- {each['name']}: {each['faces']} faces, license: {each.get('license') or 'not stated'}"
        for each in training_data
    )
    rows = "\n".join(
        f"| {name} | {each['faces']} | {each['cosine']:.3f} | {each['cosine_p5']:.3f} | {each['rank1']:.1%} |"
        for name, each in measured.items()
    )
    size = model.config.image_size
    return f"""# A copy of {teacher}

An IResNet-{model.config.layers} of width {model.config.width} ({model.num_parameters() / 1e6:.1f}M parameters) for
aligned faces, seen at {size}x{size}. It was trained to give the embeddings of {teacher},
so that the pipeline beside it takes the identity of a face where that encoder's model pack is not at hand. It is not
that encoder: its embeddings are near the real ones, not the same. They are marked as `{teacher.name}-distilled`, and
other pipelines refuse them. Do not measure or verify faces with it.

License: {license or "not stated"}. Whoever uses it is bound by the licenses of the encoder that it copies and of the
faces that it was trained on, too.

Trained on the encoder's embeddings of:

{data or "- not stated"}

Measured on faces of other people, the saved weights against the encoder itself: the cosine of the two embeddings of a
face, and how often the encoder's embedding that is nearest to a copy's is that of the same face.

| faces of | number | mean cosine | 5th percentile | nearest is its own |
|---|---|---|---|---|
{rows or "| not measured | | | | |"}
"""
