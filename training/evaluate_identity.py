#!/usr/bin/env python
"""Samples identities of a prepared cache, single stage and two stages from the same noise, and measures with face
recognition models how near the faces come to their own and to other identities.

    python training/evaluate_identity.py runs/lfw --faces cache/lfw --encoder_root insightface \\
        --encoders edgeface judge --num_identities 50 --images_per_identity 8 --output runs/lfw/evaluation

Writes `grid.png` (6 identities x 8 seeds, the conditioning face in front; single stage above two-stage) and
`result.json` with the figures it prints.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from tqdm import tqdm

from uiface_diffusers import IdentityBank, UIFacePipeline
from uiface_diffusers.data import FaceCache
from uiface_diffusers.evaluation import identity_consistency
from uiface_diffusers.faces import ALIGNED_SIZE, FaceEncoder

GRID = (6, 8)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a pipeline that training/train.py saved")
    parser.add_argument("--faces", required=True, help="cache of `uiface prepare`: identities and their photographs")
    parser.add_argument("--encoders", nargs="+", required=True, help="insightface model packs that judge")
    parser.add_argument("--encoder_root", default="~/.insightface")
    parser.add_argument("--num_identities", type=int, default=50)
    parser.add_argument("--images_per_identity", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--boundary_threshold", type=float, default=0.006)
    parser.add_argument("--batch_size", type=int, default=16, help="identities times images a call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def pick_identities(cache: FaceCache, number: int) -> tuple[IdentityBank, list[PIL.Image.Image]]:
    """Embedding and picture of the first face of `number` identities, spread evenly over the cache."""
    bank = cache.embeddings()
    first = {name: position for position, name in reversed(list(enumerate(bank.names)))}
    positions = sorted(first.values())
    if number > len(positions):
        raise ValueError(f"{cache.folder} has {len(positions)} identities, {number} are asked for.")
    chosen = [positions[i * len(positions) // number] for i in range(number)]
    pictures, offset = {}, 0
    for shard in cache.shards:
        for i, image in enumerate(cache.shard_images(shard)):
            if offset + i in chosen:
                pictures[offset + i] = PIL.Image.fromarray(image)
        offset += cache.shard_length(shard)
    names = [bank.names[position] for position in chosen]
    embeddings = IdentityBank(bank.embeddings[chosen], bank.identity_encoder, names)
    return embeddings, [pictures[position] for position in chosen]


def sample(
    pipe: UIFacePipeline, identities: IdentityBank, args: argparse.Namespace, boundary
) -> tuple[list, list[int]]:
    """`images_per_identity` pictures of each identity, those of an identity together, and their boundaries."""
    images, boundaries = [], []
    numbers = [(i, n) for i in range(len(identities)) for n in range(args.images_per_identity)]
    starts = range(0, len(numbers), args.batch_size)
    for start in tqdm(starts, desc="single stage" if boundary is None else "two stages", unit="batch"):
        batch = numbers[start : start + args.batch_size]
        seeds = [int(np.random.SeedSequence((args.seed, i, n)).generate_state(1)[0]) for i, n in batch]
        out = pipe(
            IdentityBank(identities.embeddings[[i for i, _ in batch]], identities.identity_encoder),
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            boundary=boundary,
            boundary_threshold=args.boundary_threshold,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        images += out.images
        boundaries += out.boundary_timesteps.tolist()
    return images, boundaries


def embed_pictures(encoder: FaceEncoder, pictures: list[PIL.Image.Image]) -> torch.Tensor:
    """Generated faces are aligned as the training faces were: resized to 112, not detected again."""
    size = (ALIGNED_SIZE, ALIGNED_SIZE)
    faces = [np.asarray(picture.resize(size, PIL.Image.Resampling.BILINEAR)) for picture in pictures]
    batches = [encoder.embed_aligned(faces[start : start + 64]) for start in range(0, len(faces), 64)]
    return torch.from_numpy(np.concatenate(batches))


def main() -> None:
    args = parse_args()
    encoders = [FaceEncoder(name, args.encoder_root, det_size=160) for name in args.encoders]
    identities, photographs = pick_identities(FaceCache(args.faces), args.num_identities)
    pipe = UIFacePipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)

    settings = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
    results, pictures = {"settings": settings}, {}
    for name, boundary in (("single stage", None), ("two stages", "adaptive")):
        started = time.monotonic()
        images, boundaries = sample(pipe, identities, args, boundary)
        pictures[name] = images
        found = np.mean([bool(encoders[0].detect(np.asarray(image))) for image in images]).item()
        results[name] = {"images": len(images), "seconds": time.monotonic() - started, "faces_found": found}
        results[name]["boundary_quartiles"] = np.percentile(boundaries, [0, 25, 50, 75, 100]).tolist()
        print(
            f"{name}: {len(images)} images, faces found in {100 * found:.1f} %, {results[name]['boundary_quartiles']}"
        )
        for encoder in encoders:
            references = embed_pictures(encoder, photographs)
            generated = embed_pictures(encoder, images).unflatten(0, (args.num_identities, -1))
            consistency = identity_consistency(generated, references)
            results[name][encoder.name] = consistency
            print(
                f"  {encoder.name}: cosine to the own identity {consistency['own']:.4f}, to others"
                f" {consistency['other']:.4f}, difference {consistency['difference']:.4f} (95 %:"
                f" {consistency['difference_low']:.4f} .. {consistency['difference_high']:.4f})"
            )

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "result.json").write_text(json.dumps(results, indent=1) + "\n")
    rows, columns = min(GRID[0], args.num_identities), min(GRID[1], args.images_per_identity)
    cells = []
    for name in pictures:
        for i in range(rows):
            first = i * args.images_per_identity
            cells += [photographs[i], *pictures[name][first : first + columns]]
    make_image_grid(cells, rows=2 * rows, cols=columns + 1).save(args.output / "grid.png")


if __name__ == "__main__":
    main()
