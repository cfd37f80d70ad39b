"""Faces of a pipeline, sampled and judged in memory: what training/evaluate.py and the studies have in common."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from tqdm import tqdm

from ..encoders import check_same_encoder
from ..faces import FaceEncoder, resize_aligned
from ..identities import IdentityBank, largest_cosines
from ..pipeline_uiface import UIFacePipeline
from ..seeds import image_generator
from .consistency import identity_consistency
from .face_set import FaceSet, face_pixels, open_faces
from .features import LpipsGridFeatures
from .people import People
from .realism import Realism, kernel_features, measure_realism, real_halves
from .reconstruction import reconstruct_pictures, reconstruction_quality
from .separability import grouped_cosines
from .verification import equal_error_rate

if TYPE_CHECKING:
    import lpips

# PIL images, or RGB bytes of shape (height, width, 3)
Pictures = Sequence[PIL.Image.Image] | Sequence[np.ndarray]


def sample_faces(
    pipe: UIFacePipeline,
    identities: IdentityBank,
    images_per_identity: int,
    batch_size: int = 16,
    seed: int = 0,
    empty: bool = False,
    title: str | None = None,
    **options: Any,
) -> tuple[list[PIL.Image.Image], list[int]]:
    """Faces of some identities, each from the noise of its identity's name, its number and the seed.

    Args:
        pipe: makes them.
        identities: N identities.
        images_per_identity (`int`): M.
        batch_size (`int`, defaults to 16): faces per call.
        seed (`int`, defaults to 0): of the noise.
        empty (`bool`, defaults to `False`): of the empty context, from the same noise.
        title (*optional*): of the progress bar.
        options: of the pipeline's call.

    Returns:
        N * M pictures, those of an identity together, and the timesteps from which they follow their identity.
    """
    images, boundaries = [], []
    numbers = [(i, n) for i in range(len(identities)) for n in range(images_per_identity)]
    for start in tqdm(range(0, len(numbers), batch_size), desc=title, unit="batch"):
        batch = numbers[start : start + batch_size]
        out = pipe(
            None if empty else identities.take([i for i, _ in batch]),
            num_images_per_prompt=len(batch) if empty else 1,
            generator=[image_generator(seed, identities.names[i], n) for i, n in batch],
            **options,
        )
        images += out.images
        boundaries += out.boundary_timesteps.tolist()
    return images, boundaries


class RealFaces:
    """Real faces to compare generated ones with, and as many others.

    Args:
        folders: their sets.
        number: of faces to compare; with several sets fewer by less than their number.
        cache: a folder that remembers which sets were read through.
        perceptual: what `load_lpips` returns; its backbone and the judge are the networks.
        judge: a recognizer.
        log: takes what the sets leave out.

    Raises:
        ValueError: a picture cannot be used, or there are too few.
    """

    def __init__(
        self,
        folders: Sequence[str],
        number: int,
        cache: Path,
        perceptual: "lpips.LPIPS",
        judge: FaceEncoder,
        log: Callable[[str], None] = lambda line: None,
    ):
        sets = []
        for folder in folders:
            faces = FaceSet(open_faces(folder))
            if faces.source.left_out:
                log(f"left out of {folder}: {faces.left_out_of_source}")
            sets.append(faces.usable(folder, cache))
        self.half, self.others = real_halves(sets, number)
        if len(self.half) < number // len(sets) * len(sets):
            raise ValueError(
                f"{number} generated faces are compared with as many real ones, and these with as many others: of"
                f" {', '.join(folders)} there are {len(self.half)} and {len(self.others)}. Ask for fewer by"
                " --num_identities or --images_per_identity, or give more real faces."
            )
        self.grid, self.judge = LpipsGridFeatures(perceptual), judge
        self._features: dict[int, dict[str, torch.Tensor]] = {}

    @staticmethod
    def pictures(faces: FaceSet, size: int) -> list[np.ndarray]:
        """RGB bytes at the size of a pipeline's pictures: both sides are resized to 112 from there. KID would see the
        difference: real faces of 112 pixels have 430 / 1000 to others that went through 128 and back."""
        return [resize_aligned(faces.source.read(photograph), size) for photograph in faces.photographs]

    def features_of(self, pictures: Pictures) -> dict[str, torch.Tensor]:
        """Network -> features `(N, D)` of square faces."""
        faces = [resize_aligned(np.asarray(picture)) for picture in pictures]
        grid = torch.cat([self.grid(pixels) for pixels in face_pixels(faces).split(64)])
        judged = self.judge.embed_pictures([PIL.Image.fromarray(face) for face in faces])
        return {self.grid.network: grid, self.judge.name: kernel_features(judged)}

    def measure(self, pictures: Pictures, people: Sequence) -> dict[str, Realism]:
        """Network -> how far square faces of `people` are from the real ones at their size."""
        size = np.asarray(pictures[0]).shape[0]
        if size not in self._features:
            self._features[size] = self.features_of(self.pictures(self.half, size))
        return {
            name: measure_realism(self._features[size][name], features, self.half.names, people)
            for name, features in self.features_of(pictures).items()
        }


@dataclass(frozen=True)
class PipelineSettings:
    """How many faces are sampled, and how.

    Args:
        num_identities (`int`): of the training, unseen, and of the bank.
        same_person (`float`): cosine from which two faces are one person's.
        guidance_scale (*optional*): the pipeline's if not given.
    """

    num_identities: int = 100
    images_per_identity: int = 4
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    batch_size: int = 16
    seed: int = 0
    same_person: float = 0.5


class PipelineEvaluation:
    """Measures pipelines: their first stage, and the faces that they sample.

    Args:
        train: people that the pipelines were trained on.
        unseen: other people; those who look like one of the training are left out.
        encoder: of both; its detector looks for faces.
        judge: a recognizer that the training did not see.
        perceptual: what `load_lpips` returns.
        settings: how many faces, and how.
        real: folders of real faces, to measure how real generated ones look; none by default.
        cache: see `RealFaces`.
        log: takes every figure.

    Raises:
        ValueError: the encoder is not that of the people, encoder and judge are one, or as of `RealFaces`.
    """

    def __init__(
        self,
        train: People,
        unseen: People,
        encoder: FaceEncoder,
        judge: FaceEncoder,
        perceptual: "lpips.LPIPS",
        settings: PipelineSettings,
        real: Sequence[str] = (),
        cache: Path = Path("cache"),
        log: Callable[[str], None] = print,
    ):
        self.train, self.encoder, self.judge, self.perceptual = train, encoder, judge, perceptual
        self.settings, self.log = settings, log
        for people in (train, unseen):
            folder, mark = str(people.caches[0].folder), people.bank.encoder_mark
            check_same_encoder(folder, mark, "the pack of --encoder", encoder.encoder_mark)
        if encoder.name == judge.name:
            raise ValueError(f"the judge has to be another recognizer than the encoder, but both are `{judge.name}`.")
        self.seen = unseen.near(train.bank, settings.same_person)
        log(
            f"{len(self.seen)} unseen people have a face like one of the training (cosine >="
            f" {settings.same_person}) and are left out: {', '.join(self.seen)}"
        )
        self.conditions = {
            "training": train.one_photograph_each(settings.num_identities),
            "unseen": unseen.one_photograph_each(settings.num_identities, without=self.seen),
        }
        seen = set(self.seen)
        strangers = [i for i, name in enumerate(unseen.bank.names) if name not in seen]
        self.unseen_embeddings = unseen.bank.embeddings[strangers]
        self.recognizers = {pack.name: pack.to_torch() for pack in (encoder, judge)}
        number = settings.num_identities * settings.images_per_identity
        self.real = RealFaces(real, number, cache, perceptual, judge, log) if real else None

    def measure(self, pipe: UIFacePipeline, bank: IdentityBank, output: Path) -> dict[str, Any]:
        """All figures of a pipeline; pictures go to the folder `output`.

        Args:
            bank: identities to sample, besides the people.
        """
        started, shape = time.monotonic(), (self.settings.num_identities, self.settings.images_per_identity)
        figures: dict[str, Any] = {"left_out": self.seen, "first_stage": self._first_stage(pipe)}
        images, sampled = self._sample(pipe, bank)
        embeddings = {
            (pack.name, name): pack.embed_pictures(images[name]).unflatten(0, shape)
            for pack in (self.judge, self.encoder)
            for name in images
        }
        identity, of_people = self._identity(embeddings)
        verification, of_pairs = self._verification(embeddings)
        figures |= sampled | identity | verification
        figures["nearest_training_face"] = self._nearness(embeddings[self.encoder.name, "bank"].flatten(0, 1))
        if self.real is not None:
            figures["realism"] = self._looks(self.real, pipe, bank, images["bank"])
        output.mkdir(parents=True, exist_ok=True)
        _draw_distributions([*of_people, *of_pairs], output / "identity.png")
        self._draw_faces(images, output)
        return figures | {"minutes": (time.monotonic() - started) / 60}

    def _first_stage(self, pipe: UIFacePipeline) -> dict[str, float]:
        _, photographs = self.conditions["unseen"]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in photographs])).permute(0, 3, 1, 2)
        figures = reconstruction_quality(pipe.vae, pixels, self.perceptual, self.recognizers).figures
        self.log(f"first stage, {len(photographs)} unseen faces: {_in_words(figures)}")
        return figures

    def _options(self) -> dict[str, Any]:
        """Of every sampling."""
        names = ("images_per_identity", "batch_size", "seed", "num_inference_steps", "guidance_scale")
        return {name: getattr(self.settings, name) for name in names}

    def _sample(
        self, pipe: UIFacePipeline, bank: IdentityBank
    ) -> tuple[dict[str, list[PIL.Image.Image]], dict[str, Any]]:
        """Faces of the bank, of people of the training and of unseen ones."""
        images, boundaries, found = {}, [], []
        banks = {"bank": bank} | {name: people for name, (people, _) in self.conditions.items()}
        for name, identities in banks.items():
            images[name], reached = sample_faces(pipe, identities, title=name, **self._options())
            boundaries += reached
            found += [bool(self.encoder.detect(np.asarray(image))) for image in images[name]]
        figures = {"faces_found": float(np.mean(found))}
        quartiles = np.percentile(boundaries, [0, 25, 50, 75, 100]).tolist()
        self.log(f"faces found in {100 * figures['faces_found']:.1f} % of {len(found)}")
        self.log(f"boundaries, quartiles: {quartiles}")
        return images, figures | {"boundary_quartiles": quartiles}

    def _identity(
        self, embeddings: dict[tuple[str, str], torch.Tensor]
    ) -> tuple[dict[str, dict[str, float]], list[tuple]]:
        """Cosines to the photographs that faces were conditioned on; and their distributions."""
        figures, distributions = {}, []
        for name, (_, photographs) in self.conditions.items():
            for pack in (self.judge, self.encoder):
                references, generated = pack.embed_pictures(photographs), embeddings[pack.name, name]
                found = figures[f"identity/{name}/{pack.name}"] = identity_consistency(generated, references)
                self.log(f"cosine to the photograph of {name} people, {pack.name}: {_in_words(found)}")
                if pack is self.judge:
                    similarity = torch.einsum("nmd,kd->nmk", generated, references)
                    own = torch.eye(len(references), dtype=torch.bool)[:, None].expand_as(similarity)
                    distributions.append((f"{name} people, {pack.name}", similarity[own], similarity[~own]))
        return figures, distributions

    def _verification(
        self, embeddings: dict[tuple[str, str], torch.Tensor]
    ) -> tuple[dict[str, dict[str, float]], list[tuple]]:
        """Pairs of faces of the bank; and the distributions of their cosines."""
        figures, distributions = {}, []
        for pack in (self.judge, self.encoder):
            genuine, impostor = grouped_cosines(embeddings[pack.name, "bank"])
            found = figures[f"verification/{pack.name}"] = {
                "eer": equal_error_rate(genuine, impostor),
                "genuine": float(genuine.mean()),
                "impostor": float(impostor.mean()),
            }
            self.log(f"pairs of generated faces, {pack.name}: {_in_words(found)}")
            if pack is self.judge:
                distributions.append((f"pairs of the bank's faces, {pack.name}", genuine, impostor))
        return figures, distributions

    def _nearness(self, generated: torch.Tensor) -> dict[str, dict[str, float]]:
        """Cosines to the nearest face of the training."""
        figures = {}
        for name, embeddings in {"generated": generated, "real": self.unseen_embeddings}.items():
            nearest, _ = largest_cosines(embeddings, self.train.bank.embeddings)
            figures[name] = {"mean": nearest.mean().item(), "p99": nearest.quantile(0.99).item()}
            figures[name]["max"] = nearest.max().item()
            self.log(f"nearest training face of {name} faces, {self.encoder.name}: {_in_words(figures[name])}")
        return figures

    def _looks(
        self, real: RealFaces, pipe: UIFacePipeline, bank: IdentityBank, two_stages: list[PIL.Image.Image]
    ) -> dict[str, Any]:
        """How real faces of each way to sample look; those of two stages are there already."""
        people = np.arange(len(bank)).repeat(self.settings.images_per_identity).tolist()
        found: dict[str, Any] = {
            "faces": len(people),
            "identities": len(bank),
            "real_faces": len(real.half),
            "real_identities": len(real.half.identities),
        }
        self.log(
            f"looks, {len(people)} faces of {len(bank)} identities against {len(real.half)} real ones of"
            f" {len(real.half.identities)} people:"
        )

        def measure(title: str, pictures: Pictures, names: Sequence) -> None:
            found[title] = {}
            for network, looks in real.measure(pictures, names).items():
                found[title] |= {f"{name}/{network}": value for name, value in asdict(looks).items()}
                kid, spread = 1000 * looks.kid, 1000 * looks.kid_std
                self.log(f"{title:25s} {network:10s} KID x 1000 {kid:8.1f} +- {spread:6.1f}   AUC {looks.c2st:.3f}")

        others = real.pictures(real.others, two_stages[0].width)
        measure("real", others, real.others.names)
        measure("first stage", reconstruct_pictures(pipe.vae, others), real.others.names)
        # every face is of nobody in particular
        empty, _ = sample_faces(pipe, bank, title="empty context", empty=True, **self._options())
        measure("empty context", empty, range(len(people)))
        for scale in (1.0, 2.0):
            title = f"single stage, guidance {scale:g}"
            options = self._options() | {"boundary": None, "guidance_scale": scale}
            measure(title, sample_faces(pipe, bank, title=title, **options)[0], people)
        measure("two stages", two_stages, people)
        return found

    def _draw_faces(self, images: dict[str, list[PIL.Image.Image]], output: Path) -> None:
        """`faces.png`: one face of each identity of the bank first; `people.png`: photographs of unseen people, each
        with the faces conditioned on it."""
        number, each = self.settings.num_identities, self.settings.images_per_identity
        order = [i * each + n for n in range(each) for i in range(number)][:64]
        columns = min(8, len(order))
        rows = len(order) // columns
        make_image_grid([images["bank"][i] for i in order[: columns * rows]], rows, columns).save(output / "faces.png")
        cells = []
        for i in range(min(8, number)):
            cells += [self.conditions["unseen"][1][i], *images["unseen"][i * each : (i + 1) * each]]
        make_image_grid(cells, rows=len(cells) // (each + 1), cols=each + 1).save(output / "people.png")


def _in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _draw_distributions(distributions: Sequence[tuple], file: Path) -> None:
    """Histograms side by side: title, cosines to the own identity, and to others."""
    from matplotlib.figure import Figure  # of the extra `train`

    figure, bins = Figure(figsize=(15, 4), layout="tight"), np.linspace(-0.4, 1, 57).tolist()
    for axis, (title, own, others) in zip(figure.subplots(1, len(distributions)), distributions, strict=True):
        axis.hist(np.asarray(others), bins, density=True, alpha=0.6, label="others")
        axis.hist(np.asarray(own), bins, density=True, alpha=0.6, label="own")
        axis.set_title(title)
        axis.set_xlabel("cosine")
        axis.legend()
    figure.savefig(file, dpi=80)
