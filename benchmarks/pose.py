#!/usr/bin/env python
"""The head pose that is asked for against the one that is measured, and what it costs in identity.

    python benchmarks/pose.py --model runs/pose --encoder-root insightface

Samples faces of a bank's identities, of the same noise without a pose and with one drawn for each, uniformly.
Prints for both, by the encoder's detector and by a recognizer that the model was not trained with:

- yaw, pitch: correlation of what was asked for with what is measured, in degrees; error: the median absolute
  difference; slope: of the line that predicts measured from asked yaw (1: as far as asked);
- spread: the standard deviation of the measured yaw;
- of: the number of faces that the detector found;
- EER between images of one identity and of two; genuine: mean cosine within an identity; identity: mean cosine of the
  model's own encoder to the embedding that was asked for.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from layout import correlation
from machine import Table
from tqdm import tqdm

from uiface_diffusers import IdentityBank, PoseProjector, UIFacePipeline, default_checkpoint
from uiface_diffusers.evaluation import equal_error_rate
from uiface_diffusers.evaluation.separability import genuine_pairs, impostor_pairs
from uiface_diffusers.faces import FaceEncoder, head_pose
from uiface_diffusers.identities import IDENTITIES
from uiface_diffusers.seeds import image_generator


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline with a pose projector")
    parser.add_argument("--bank", type=Path, default=default_checkpoint() / IDENTITIES, help="of the identities")
    parser.add_argument("--encoder", default="edgeface", help="model pack that the model was trained with")
    parser.add_argument("--judge", default="judge", help="model pack that it was not trained with")
    parser.add_argument("--encoder-root", required=True, help="folder of models/PACK")
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--faces", type=int, default=400, help="of each row, of all identities")
    parser.add_argument("--yaw", type=float, default=45, help="asked for from minus this to this, in degrees")
    parser.add_argument("--pitch", type=float, default=15, help="asked for from minus this to this, in degrees")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=Path, help="folder for a grid of each row")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


def measured_pose(encoder: FaceEncoder, face: np.ndarray) -> tuple[float, float]:
    """Of an aligned face; NaN where none is found. Its picture is too tight for the detector: a border is added."""
    border = face.shape[0] // 2
    found = encoder.detect(np.pad(face, ((border, border), (border, border), (0, 0))))
    return head_pose(found[0].landmarks) if found else (float("nan"), float("nan"))


def sample(pipe: UIFacePipeline, embeds: torch.Tensor, poses: np.ndarray | None, args: argparse.Namespace) -> list:
    images = []
    for start in tqdm(range(0, len(embeds), args.batch_size), desc="sample", unit="batch"):
        rows = range(start, min(start + args.batch_size, len(embeds)))
        pose = None if poses is None else poses[rows.start : rows.stop]
        generator = [image_generator(args.seed, "benchmark", row) for row in rows]
        steps = args.num_inference_steps
        images += pipe(embeds[rows], pose=pose, generator=generator, num_inference_steps=steps).images
    return images


def of_poses(asked: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    known = np.isfinite(measured).all(axis=1)
    if known.sum() < 3:  # a correlation says nothing about fewer
        return {}
    slope = np.polyfit(asked[known, 0], measured[known, 0], 1)[0]
    figures = {"yaw": correlation(asked[:, 0], measured[:, 0]), "pitch": correlation(asked[:, 1], measured[:, 1])}
    figures |= {"error": float(np.median(np.abs(asked - measured)[known, 0])), "slope": float(slope)}
    return figures | {"spread": float(measured[known, 0].std())}


def of_identity(embeddings: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    cosines = [
        (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]]).sum(dim=1).numpy()
        for pairs in (genuine_pairs(labels), impostor_pairs(labels))
    ]
    return {"EER": equal_error_rate(*cosines), "genuine": float(cosines[0].mean())}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    encoder, judge = (FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge))
    pipe = UIFacePipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    bank = IdentityBank.load(args.bank)
    labels = np.arange(args.faces) % min(args.identities, len(bank))
    embeds = F.normalize(bank.embeddings)[labels]
    drawn = np.random.default_rng(args.seed).uniform(-1, 1, (args.faces, 2)) * [args.yaw, args.pitch]
    table = Table(args)
    for name, poses in (("without", None), ("with", drawn)):
        images = sample(pipe, embeds, poses, args)
        if args.pictures is not None:
            args.pictures.mkdir(parents=True, exist_ok=True)
            save_grid(images, drawn, args.pictures / f"{name}.png")
        measured = PoseProjector.from_columns(np.array([measured_pose(encoder, np.array(image)) for image in images]))
        own = (encoder.embed_pictures(images) * embeds).sum(dim=1).mean().item()
        figures = of_poses(drawn, measured) | {"of": int(np.isfinite(measured).all(axis=1).sum())}
        table.add(pose=name, **figures, **of_identity(judge.embed_pictures(images), labels), identity=own)


def save_grid(images: list, poses: np.ndarray, file: Path, columns: int = 8) -> None:
    """Of the first faces, by the yaw that was asked for."""
    from diffusers.utils import make_image_grid

    first = sorted(range(min(len(images), columns * columns)), key=lambda i: poses[i, 0])
    first = first[: len(first) // columns * columns]
    if first:
        make_image_grid([images[i] for i in first], rows=len(first) // columns, cols=columns).save(file)


if __name__ == "__main__":
    main()
