"""What `training/train.py` makes: a pipeline with its progress, card and validation grid."""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import make_image_grid

from ..faces import FaceEncoder
from ..files import write_json
from ..hub import save_card
from ..pipeline_uiface import UIFacePipeline
from .datasets import describe_caches
from .options import describe_recipe
from .run import Product, Run


class TrainedPipeline(Product):
    """The pipeline of a training; on the way, a grid of faces: a row of the empty context and one of each identity,
    with the same seeds in every row."""

    name = "pipeline"

    def __init__(self, pipeline: UIFacePipeline, identities: torch.Tensor, encoder: FaceEncoder | None):
        self.pipeline, self.identities, self.encoder = pipeline, identities, encoder

    def save(self, run: Run, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)
        samples = run.step * run.per_step["samples"]
        write_json(folder / "progress.json", {"step": run.step, "samples": samples, "hours": round(run.hours, 4)})
        save_card(folder, self.pipeline, **self.card(run.args))

    def card(self, args: argparse.Namespace) -> dict[str, Any]:
        paths = ["train_data", "vae", "output_dir", "init_from", "hub_model_id", "encoder_root"]
        paths += ["identity_recognizers", "alignment_recognizer"]
        lineage = {"training_data": describe_caches(args.train_data)}
        return {
            "recipe": describe_recipe("training/train.py", args, paths),
            "card_metadata": {"license": args.license, "lineage": lineage},
        }

    def validate(self, run: Run) -> None:
        seeds, steps, images = run.args.validation_seeds, run.args.validation_inference_steps, []
        self.pipeline.set_progress_bar_config(disable=True)
        for identity in [None, *self.identities]:
            generator = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
            images += self.pipeline(identity, seeds, num_inference_steps=steps, generator=generator).images
        if self.encoder is not None:
            embeddings = self.encoder.embed_pictures(images[seeds:])
            wanted = self.identities.repeat_interleave(seeds, dim=0)
            run.report({"validation/cosine": F.cosine_similarity(embeddings, wanted).mean().item()})
        grid = make_image_grid(images, rows=1 + len(self.identities), cols=seeds)
        run.log_picture("validation/grid", grid)
        run.save_picture(grid)

    def upload(self, run: Run, repo_id: str, message: str) -> None:
        private = run.args.hub_private or None
        self.pipeline.push_to_hub(repo_id, commit_message=message, private=private, **self.card(run.args))
