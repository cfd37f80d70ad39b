#!/usr/bin/env python
"""What a layout keeps, and what of its person leaks, against the boundary that it is noised to.

    python benchmarks/layout.py --faces FOLDER --encoder-root insightface

FOLDER is of aligned faces, `PERSON/*.jpg`, that the model was not trained on. The first half of the people give
layouts, the others identities, one photograph each. Prints, for every boundary, with guidance from the latest boundary
on (the default) and from the boundary on:

- yaw: correlation of the layout's with the result's, by the encoder's detector;
- identity, layout, others: mean judge cosine of the result to the photograph of its identity, to its layout, and to
  those of the other identities, by a recognizer that the model was not trained with;
- steps that are sampled, and UNet rows per face.

The first row is without a layout.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from machine import Table

from uiface_diffusers import UIFacePipeline, default_checkpoint
from uiface_diffusers.data.sources import open_source
from uiface_diffusers.faces import FaceEncoder, head_pose


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--model", default=default_checkpoint())
    parser.add_argument("--encoder", default="edgeface", help="model pack that the model was trained with")
    parser.add_argument("--judge", default="judge", help="model pack that it was not trained with")
    parser.add_argument("--encoder-root", required=True, help="folder of models/PACK")
    parser.add_argument("--number", type=int, default=24, help="faces of each row")
    parser.add_argument("--num-inference-steps", type=int, default=15)
    parser.add_argument("--boundaries", type=int, nargs="+", default=[300, 500, 700])
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def yaw_of(encoder: FaceEncoder, face: np.ndarray) -> float:
    """Of an aligned face; NaN where none is found. Its picture is too tight for the detector: a border is added."""
    border = face.shape[0] // 2
    found = encoder.detect(np.pad(face, ((border, border), (border, border), (0, 0))))
    return head_pose(found[0].landmarks)[0] if found else float("nan")


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    known = ~np.isnan(first) & ~np.isnan(second)
    return float(np.corrcoef(first[known], second[known])[0, 1])


def first_photographs(folder: Path, number: int) -> list[np.ndarray]:
    """One of each person."""
    source = open_source(folder)
    first = {photograph.identity: photograph for photograph in reversed(source.photographs)}
    if len(first) < number:
        raise ValueError(f"{folder} has {len(first)} people, {number} are needed: ask for fewer faces.")
    return [source.read(first[name]) for name in sorted(first)[:number]]


def main() -> None:
    args = parse_args()
    encoder, judge = (FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge))
    faces = first_photographs(args.faces, 2 * args.number)
    layouts, people = faces[: args.number], faces[args.number :]
    yaws = np.array([yaw_of(encoder, face) for face in layouts])
    embeddings = encoder.embed_pictures(people)
    of_people, of_layouts = judge.embed_pictures(people), judge.embed_pictures(layouts)
    pipe = UIFacePipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    rows = 0

    def count(module: torch.nn.Module, inputs: tuple, kwargs: dict) -> None:
        nonlocal rows
        rows += len(inputs[0])

    pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    table = Table(args)
    settings = [(None, False), *((boundary, guided) for guided in (False, True) for boundary in args.boundaries)]
    for boundary, guided in settings:
        rows = 0
        given = {} if boundary is None else {"layout": layouts, "boundary": boundary, "guide_from_boundary": guided}
        generator = [torch.Generator().manual_seed(seed) for seed in range(args.number)]
        images = pipe(embeddings, num_inference_steps=args.num_inference_steps, generator=generator, **given).images
        found = np.array([yaw_of(encoder, np.array(image)) for image in images])
        cosines = judge.embed_pictures(images) @ of_people.T
        own = cosines.diagonal().mean().item()
        others = (cosines.sum() - cosines.trace()).item() / (args.number * (args.number - 1))
        to_layout = (judge.embed_pictures(images) * of_layouts).sum(dim=1).mean().item()
        table.add(
            boundary="none" if boundary is None else boundary,
            guided="from the boundary" if guided else "from the latest boundary",
            yaw=correlation(yaws, found),
            of=int((~np.isnan(yaws) & ~np.isnan(found)).sum()),
            identity=own,
            layout=to_layout,
            others=others,
            steps=pipe.num_timesteps,
            rows=rows / args.number,
        )


if __name__ == "__main__":
    main()
