#!/usr/bin/env python
"""Trains a flow of directions in which the embeddings of one person differ: `--identity-flow` of `uiface generate`.

    uiface prepare photos --output cache/photos --encoder buffalo_l
    python training/train_identity_flow.py --train-data cache/photos --output-dir runs/identity_flow

The idea is FaceFlow's (04sunyc/FaceFlow): an embedding is turned by an angle that is drawn, in a direction of the
anchor's tangent space that a flow has learned from pairs of real embeddings of one person. This is written from the
mathematics, with none of its code. Ours are the path (quarter circles, on which an untrained flow is IDperturb), the
condition on the cosine, people drawn alike whatever their number of faces, the noise that the images of an identity
share, and the network, of 3M parameters.

Minutes on one CPU core. The same command with `--resume-from-checkpoint latest` goes on after an interruption. What is
saved in `--output-dir` is an `IdentityFlow` with EMA weights.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from uiface_cli.options import json_object, real, whole
from uiface_diffusers import IdentityFlow
from uiface_diffusers.files import write_json
from uiface_diffusers.training.averages import WeightAverage
from uiface_diffusers.training.identity_pairs import (
    FlowLog,
    PersonEmbeddings,
    compare_directions,
    fit_shared_noise,
    flow_losses,
)
from uiface_diffusers.training.options import (
    Options,
    add_checkpoint_arguments,
    add_length_arguments,
    add_machine_arguments,
    add_optimizer_arguments,
    make_parser,
    parse_recipe,
    run_script,
)
from uiface_diffusers.training.order import EndlessBatchSampler
from uiface_diffusers.training.run import Product, Run, make_accelerator, training_folder
from uiface_diffusers.training.schedules import make_lr_scheduler

logger = get_logger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    group: Options = parser.add_argument_group("data and model")
    group.add_argument("--train-data", nargs="+", help="caches of `uiface prepare`, all of one encoder")
    text = "of the people, by their names, who are held out for validation"
    group.add_argument("--validation-share", type=real(0, 0.5), default=0.1, help=text)
    group.add_argument("--flow", type=json_object, default={}, help="options of `IdentityFlow`, as JSON")
    group.add_argument("--output-dir", type=Path, help="model, checkpoints, logs and validation")
    group = parser.add_argument_group("objective and optimizer")
    add_length_arguments(group, batch_size=256, steps=4000, accumulates=False)
    add_optimizer_arguments(group, learning_rate=1e-3, lr_scheduler="cosine")
    group.add_argument("--weight-decay", type=real(0), default=0.01)
    group.add_argument("--ema-decay", type=real(0, 1), default=0.999)
    add_machine_arguments(parser)
    group = add_checkpoint_arguments(parser, steps=500)
    group.add_argument("--validation-faces", type=whole(), default=256)
    args = parse_recipe(parser, argv, required=("--train-data", "--output-dir"))
    if not args.validation_share:
        args.validation_steps = 0
    return args


def make_flow(args: argparse.Namespace, faces: PersonEmbeddings) -> IdentityFlow:
    """A new model for the embeddings, which draws the cosines of their pairs by default."""
    mark = faces.encoder_mark
    options = {
        "identity_dim": faces.embeddings.shape[1],
        "cosine_quantiles": faces.cosine_quantiles(),
        "identity_encoder": mark.name,
        "identity_encoder_fingerprint": mark.fingerprint,
    }
    try:
        return IdentityFlow(**options | (args.flow or {}))
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--flow {json.dumps(args.flow)} makes no model: {error}") from error


class Flow(Product):
    """The flow; on the way, how it does on people who are held out."""

    name = "identity flow"

    def __init__(self, flow: IdentityFlow, faces: PersonEmbeddings, others: PersonEmbeddings | None):
        self.flow, self.faces, self.others = flow, faces, others

    def _report(self, run: Run) -> Path:
        return run.picture.with_suffix(".json")

    def validate(self, run: Run) -> None:
        assert self.others is not None  # otherwise `--validation-steps` is 0
        figures = compare_directions(self.flow, self.others, run.args.validation_faces)
        run.report({f"validation/{name}": value for name, value in figures.items()})
        write_json(self._report(run), figures)

    def is_validated(self, run: Run) -> bool:
        return self._report(run).exists()

    def save(self, run: Run, folder: Path) -> None:
        """With the share of the noise that the images of an identity have in common."""
        share = fit_shared_noise(self.flow, self.others or self.faces, run.args.validation_faces)
        logger.info(f"shared noise: {share:.3f} of the variance")
        self.flow.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    with training_folder(accelerator, args) as checkpoint:
        train(args, accelerator, checkpoint)


def train(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None) -> None:
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # 1. data
    faces = PersonEmbeddings(args.train_data, (args.validation_share, 1.0))
    logger.info(f"{len(faces)} faces of {faces.people} people; left out: {faces.left_out}")
    # people alike, whatever their number of faces
    weights = 1 / faces.count.double()
    sampler = EndlessBatchSampler(len(faces), args.train_batch_size, args.seed, rank, world_size, weights=weights)
    others = None
    if args.validation_share:
        others = PersonEmbeddings(args.train_data, (0.0, args.validation_share)).to(device)
    faces.to(device)
    if not ((others or faces).count > 2).any():
        raise ValueError("nobody, or nobody who is held out, has three faces: how these are alike cannot be measured.")

    # 2. model
    torch.manual_seed(args.seed)
    flow = make_flow(args, faces).train()
    logger.info(f"{flow.num_parameters() / 1e6:.1f}M parameters")

    # 3. optimizer
    optimizer = torch.optim.AdamW(flow.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    average = WeightAverage(flow.to(device), args.ema_decay)
    model, optimizer = accelerator.prepare(flow, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # `prepare` would step it once per process

    # 4. train
    log = FlowLog(device)
    run = Run(
        "train_identity_flow",
        args,
        accelerator,
        checkpoint,
        faces,
        sampler,
        product=Flow(flow, faces, others),
        log=log,
        lr_scheduler=lr_scheduler,
        fixed={"train_data": faces.fingerprints},
        average=average,
    )
    for positions in run:
        anchors, partners = faces.pairs(positions)
        time, noise = torch.rand(len(anchors), device=device), torch.randn_like(anchors)
        with accelerator.autocast():
            losses = flow_losses(model, anchors, partners, time, noise)
        accelerator.backward(losses.mean())
        if args.max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.add(losses)

    # 5. the flow, with EMA weights
    run.finish()


if __name__ == "__main__":
    run_script(main)
