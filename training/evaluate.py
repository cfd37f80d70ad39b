#!/usr/bin/env python
"""Measures a trained pipeline: its first stage, and the faces that it samples in two stages.

    python training/evaluate.py runs/uiface-lfw-128 --train_faces cache/devtrain cache/celeba \\
        --unseen_faces cache/devtest --encoder_root insightface --encoder edgeface --judge judge \\
        --lpips_backbone alexnet_features.safetensors --output runs/uiface-lfw-128/evaluation

- first stage: cosine of unseen people's faces to their reconstructions, LPIPS;
- identity: cosine of generated faces to the photograph of the person that they were conditioned on, and to the
  photographs of the others, for people of the training and unseen ones;
- verification: equal error rate of pairs of generated faces of the bank's identities (`identities.safetensors` of the
  pipeline, or else drawn from the training embeddings), at the same number of images an identity;
- faces found in all of these, and the nearest training face of generated and of unseen real faces.

Writes `result.json` with the figures that it prints, `identity.png` (the distributions), `faces.png` (64 faces of the
bank) and `people.png` (photographs of unseen people and the faces conditioned on them: not to be published).
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from tqdm import tqdm

from uiface_diffusers import IdentityBank, UIFacePipeline, sample_identities
from uiface_diffusers.data import FaceCache
from uiface_diffusers.evaluation import (
    equal_error_rate,
    identity_consistency,
    load_lpips,
    reconstruction_quality,
)
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.hub import IDENTITIES
from uiface_diffusers.identities import largest_cosines
from uiface_diffusers.seeds import image_generator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder or Hub repository")
    parser.add_argument("--train_faces", nargs="+", required=True, help="caches that it was trained on")
    parser.add_argument("--unseen_faces", required=True, help="cache of other people")
    parser.add_argument("--encoder", required=True, help="model pack of the caches; its detector looks for faces")
    parser.add_argument("--judge", required=True, help="model pack that the training did not see")
    parser.add_argument("--encoder_root", default="~/.insightface")
    parser.add_argument("--lpips_backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument("--num_identities", type=int, default=100, help="of the training, unseen, and of the bank")
    parser.add_argument("--images_per_identity", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help="default: the model's")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


class People:
    """Faces of caches: embeddings, names, and the pictures of single faces."""

    def __init__(self, folders: list[str]):
        self.caches = [FaceCache(folder) for folder in folders]
        banks = [cache.embeddings() for cache in self.caches]
        names = [
            f"{cache.folder.name}/{name}"
            for cache, bank in zip(self.caches, banks, strict=True)
            for name in bank.names
        ]
        self.bank = IdentityBank(torch.cat([bank.embeddings for bank in banks]), banks[0].identity_encoder, names)

    def first_faces(self, number: int) -> list[int]:
        """Positions of the first face of `number` identities, spread evenly over all."""
        first = {name: position for position, name in reversed(list(enumerate(self.bank.names)))}
        positions = sorted(first.values())
        if number > len(positions):
            raise ValueError(f"{number} identities are asked for, there are {len(positions)}.")
        return [positions[i * len(positions) // number] for i in range(number)]

    def pictures(self, positions: list[int]) -> list[PIL.Image.Image]:
        found, offset = {}, 0
        for cache in self.caches:
            inside = [position for position in positions if offset <= position < offset + len(cache)]
            images = cache.images([position - offset for position in inside])
            found |= dict(zip(inside, images, strict=True))
            offset += len(cache)
        return [PIL.Image.fromarray(found[position]) for position in positions]


def sample(
    pipe: UIFacePipeline, identities: IdentityBank, args, title: str
) -> tuple[list[PIL.Image.Image], list[int]]:
    """`images_per_identity` pictures of each identity, those of an identity together, and their boundaries."""
    images, boundaries = [], []
    numbers = [(i, n) for i in range(len(identities)) for n in range(args.images_per_identity)]
    for start in tqdm(range(0, len(numbers), args.batch_size), desc=title, unit="batch"):
        batch = numbers[start : start + args.batch_size]
        out = pipe(
            IdentityBank(identities.embeddings[[i for i, _ in batch]], identities.identity_encoder),
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[image_generator(args.seed, identities.names[i], n) for i, n in batch],
        )
        images += out.images
        boundaries += out.boundary_timesteps.tolist()
    return images, boundaries


def pair_similarities(embeddings: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs of one identity and of all pairs of two, of `(N, M, D)` embeddings."""
    similarity = embeddings.flatten(0, 1) @ embeddings.flatten(0, 1).T
    labels = torch.arange(len(embeddings)).repeat_interleave(embeddings.shape[1])
    same = labels[:, None] == labels[None]
    above = torch.ones_like(same).triu(1)
    return similarity[same & above].numpy(), similarity[~same & above].numpy()


def pixels_of(pictures: list[PIL.Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def nearest_cosines(embeddings: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
    nearest, _ = largest_cosines(embeddings, known)
    return {"mean": nearest.mean().item(), "p99": nearest.quantile(0.99).item(), "max": nearest.max().item()}


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    encoder, judge = (FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge))
    train, unseen = People(args.train_faces), People([args.unseen_faces])
    bank_file = Path(args.pipeline) / IDENTITIES
    if bank_file.exists():
        bank = IdentityBank.load(bank_file)
        if len(bank) < args.num_identities:
            raise ValueError(f"{bank_file} has {len(bank)} identities, {args.num_identities} are asked for.")
        bank = bank.take(range(args.num_identities))
    else:
        bank = sample_identities(train.bank, args.num_identities, seed=args.seed)
    pipe = UIFacePipeline.from_pretrained(args.pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    settings = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
    result = {"settings": pipe.default_sampling(args.num_inference_steps) | settings}

    chosen = {"training": train.first_faces(args.num_identities), "unseen": unseen.first_faces(args.num_identities)}
    photographs = {"training": train.pictures(chosen["training"]), "unseen": unseen.pictures(chosen["unseen"])}

    # 1. the first stage
    recognizers = {pack.name: pack.to_torch() for pack in (encoder, judge)}
    quality = reconstruction_quality(
        pipe.vae, pixels_of(photographs["unseen"]), load_lpips("alex", args.lpips_backbone), recognizers
    )
    result["first_stage"] = quality.figures
    print(f"first stage, {len(photographs['unseen'])} unseen faces: {describe(quality.figures)}")

    # 2. generated faces
    conditions = {"bank": bank}
    for name, people in (("training", train), ("unseen", unseen)):
        conditions[name] = IdentityBank(people.bank.embeddings[chosen[name]], people.bank.identity_encoder)
    images, boundaries, found = {}, [], []
    for name, identities in conditions.items():
        images[name], reached = sample(pipe, identities, args, name)
        boundaries += reached
        found += [bool(encoder.detect(np.asarray(image))) for image in images[name]]
    result["faces_found"] = float(np.mean(found))
    result["boundary_quartiles"] = np.percentile(boundaries, [0, 25, 50, 75, 100]).tolist()
    print(f"faces found in {100 * result['faces_found']:.1f} % of {len(found)}")
    print(f"boundaries, quartiles: {result['boundary_quartiles']}")

    # 3. identity
    shape = (args.num_identities, args.images_per_identity)
    embeddings = {
        (pack.name, name): pack.embed_pictures(images[name]).unflatten(0, shape)
        for pack in (judge, encoder)
        for name in images
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    for axis, name in zip(axes, ("training", "unseen"), strict=False):
        for pack in (judge, encoder):
            references, generated = pack.embed_pictures(photographs[name]), embeddings[pack.name, name]
            figures = identity_consistency(generated, references)
            result[f"identity/{name}/{pack.name}"] = figures
            print(f"cosine to the photograph of {name} people, {pack.name}: {describe(figures)}")
            if pack is judge:
                similarity = torch.einsum("nmd,kd->nmk", generated, references)
                own = torch.eye(len(references), dtype=torch.bool)[:, None].expand_as(similarity)
                draw_distributions(axis, similarity[own], similarity[~own], f"{name} people, {judge.name}")

    # 4. verification
    for pack in (judge, encoder):
        genuine, impostor = pair_similarities(embeddings[pack.name, "bank"])
        figures = {
            "eer": equal_error_rate(genuine, impostor),
            "genuine": float(genuine.mean()),
            "impostor": float(impostor.mean()),
        }
        result[f"verification/{pack.name}"] = figures
        print(f"pairs of generated faces, {pack.name}: {describe(figures)}")
        if pack is judge:
            draw_distributions(axes[2], genuine, impostor, f"pairs of the bank's faces, {judge.name}")

    # 5. nearness to the training faces
    figures = {
        "generated": nearest_cosines(embeddings[encoder.name, "bank"].flatten(0, 1), train.bank.embeddings),
        "real": nearest_cosines(unseen.bank.embeddings, train.bank.embeddings),
    }
    result["nearest_training_face"] = figures
    for name, values in figures.items():
        print(f"nearest training face of {name} faces, {encoder.name}: {describe(values)}")

    result["minutes"] = (time.monotonic() - started) / 60
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    figure.tight_layout()
    figure.savefig(args.output / "identity.png", dpi=80)
    # one face of each identity of the bank first
    order = [i * shape[1] + n for n in range(shape[1]) for i in range(shape[0])][:64]
    rows = len(order) // 8
    make_image_grid([images["bank"][i] for i in order[: 8 * rows]], rows=rows, cols=8).save(args.output / "faces.png")
    cells = []
    for i in range(min(8, shape[0])):
        cells += [photographs["unseen"][i], *images["unseen"][i * shape[1] : (i + 1) * shape[1]]]
    make_image_grid(cells, rows=len(cells) // (shape[1] + 1), cols=shape[1] + 1).save(args.output / "people.png")


def describe(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def draw_distributions(axis, genuine, impostor, title: str) -> None:
    bins = np.linspace(-0.4, 1, 57)
    axis.hist(np.asarray(impostor), bins, density=True, alpha=0.6, label="others")
    axis.hist(np.asarray(genuine), bins, density=True, alpha=0.6, label="own")
    axis.set_title(title)
    axis.set_xlabel("cosine")
    axis.legend()


if __name__ == "__main__":
    main()
