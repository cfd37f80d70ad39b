#!/usr/bin/env python
"""Asked against measured identity cosine along a model's dial.

    uiface calibrate --encoder edgeface --encoder-root insightface --num-inference-steps 15 --output runs/calibrated
    python benchmarks/dial.py --model runs/calibrated --encoder-root insightface

Five values of `diversity`, spread evenly, on identities from the end of the model's bank: `uiface calibrate` takes
those from its start. Bars: each measured cosine within 0.03 of the asked one, and falling with diversity.
"""

import argparse
from itertools import pairwise
from pathlib import Path

from machine import Table

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.evaluation import identity_consistency
from uiface_diffusers.evaluation.pipelines import sample_faces
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.loading import model_identities
from uiface_diffusers.two_stage.dial import Dial

BAR = 0.03


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that `uiface calibrate` wrote to")
    parser.add_argument("--encoder", default="edgeface", help="model pack that the curve was measured by")
    parser.add_argument("--encoder-root", required=True, help="folder of models/PACK")
    parser.add_argument("--identities", type=int, default=40)
    parser.add_argument("--images-per-identity", type=int, default=2)
    parser.add_argument("--num-inference-steps", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    pipe, encoder = UIFacePipeline.from_pretrained(args.model), FaceEncoder(args.encoder, args.encoder_root)
    pipe.set_progress_bar_config(disable=True)
    dial, bank = Dial.from_config(pipe.config.dial), model_identities(args.model)
    bank = bank.take(range(len(bank) - args.identities, len(bank)))
    embeds, table, found = pipe.prepare_identity_embeds(bank), Table(args), []
    for diversity in (0.0, 0.25, 0.5, 0.75, 1.0):
        images, _ = sample_faces(
            pipe,
            bank,
            args.images_per_identity,
            num_inference_steps=args.num_inference_steps,
            diversity=diversity,
        )
        embeddings = encoder.embed_pictures(images).unflatten(0, (args.identities, args.images_per_identity))
        asked, measured = dial.identity_cosine(diversity), identity_consistency(embeddings, embeds)["own"]
        found.append((asked, measured))
        settings = {name: str(value) for name, value in pipe.with_dial({"diversity": diversity}).items()}
        table.add(diversity=diversity, asked=asked, measured=measured, difference=measured - asked, **settings)
    worst = max(abs(asked - measured) for asked, measured in found)
    is_monotone = all(first[1] > second[1] for first, second in pairwise(found))
    print(f"largest difference {worst:.3f} (bar {BAR}), {'monotone' if is_monotone else 'not monotone'}")


if __name__ == "__main__":
    main()
