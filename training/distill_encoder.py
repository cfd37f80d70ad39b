#!/usr/bin/env python
"""Trains a small copy of an encoder on its embeddings of prepared faces: what a checkpoint can carry, so that it takes
the identity of an aligned face without a model pack.

    uiface prepare photos --output cache/photos --encoder edgeface
    uiface prepare others --output cache/others --encoder edgeface
    accelerate launch training/distill_encoder.py --train-data cache/photos --validation-data cache/others \\
        --output-dir runs/encoder

The network is an IResNet (`uiface_diffusers.IResNetModel`), the loss one minus the cosine to the embedding in the
cache. The same command with `--resume-from-checkpoint latest` goes on after an interruption. What is saved in
`--output-dir` is the network in half precision, with a card of what was measured on the faces of `--validation-data`,
for `training/export_checkpoint.py --identity-encoder`. A network that was trained elsewhere on the same faces is
measured and saved by `--finished FOLDER`, without training.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger

from uiface_cli.options import json_object, real, whole
from uiface_diffusers import IResNetConfig, IResNetModel
from uiface_diffusers.data import FaceCache
from uiface_diffusers.encoders import EncoderMark, common_encoder
from uiface_diffusers.faces import teacher_mark
from uiface_diffusers.files import write_json
from uiface_diffusers.pictures import to_unit_range
from uiface_diffusers.training.datasets import describe_caches
from uiface_diffusers.training.distillation import (
    DistillationLog,
    EmbeddedFaces,
    check_unseen,
    compare_copy,
    save_carried,
    vary,
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
    group.add_argument("--train-data", nargs="+", help="caches of `uiface prepare`, all of the encoder to be copied")
    group.add_argument("--validation-data", nargs="+", default=[], help="caches of other people, of the same encoder")
    text = "options of `IResNetConfig`, as JSON, besides the width of the embedding"
    group.add_argument(
        "--recognizer", type=json_object, default={"layers": 18, "width": 32, "image_size": 64}, help=text
    )
    group.add_argument("--finished", type=Path, metavar="FOLDER", help="measure and save this network: no training")
    group.add_argument("--license", help="of the copy, for its card")
    group.add_argument("--output-dir", type=Path, help="network, card, checkpoints and logs")
    group = parser.add_argument_group("objective and optimizer")
    add_length_arguments(group, batch_size=128, steps=2700, accumulates=False)
    add_optimizer_arguments(group, learning_rate=3e-3, lr_scheduler="cosine")
    group.add_argument("--weight-decay", type=real(0), default=0.05, help="of matrices; vectors have none")
    add_machine_arguments(parser)
    group = add_checkpoint_arguments(parser, steps=250)
    group.add_argument("--validation-faces", type=whole(), default=1000, help="looked at on the way, evenly drawn")
    args = parse_recipe(parser, argv, required=("--train-data", "--output-dir"))
    if not args.validation_data:
        args.validation_steps = 0
    return args


def make_copy(args: argparse.Namespace, embedding_dim: int) -> IResNetModel:
    try:
        return IResNetModel(IResNetConfig(**{"embedding_dim": embedding_dim, **(args.recognizer or {})}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--recognizer {json.dumps(args.recognizer)} makes no network: {error}") from error


def check_width(copy: IResNetModel, folder: str, embedding_dim: int) -> None:
    """
    Raises:
        ValueError: the copy's embeddings are not as wide as its teacher's.
    """
    width = copy.config.embedding_dim
    if width != embedding_dim:
        raise ValueError(f"the copy's embedding_dim is {width}, that of the embeddings of {folder} {embedding_dim}.")


class Copy(Product):
    """The copy; on the way, how near it is to its teacher on faces of other people."""

    name = "copy"

    def __init__(self, copy: IResNetModel, teacher: EncoderMark, others: EmbeddedFaces | None):
        self.copy, self.teacher, self.others = copy, teacher, others

    def _report(self, run: Run) -> Path:
        return run.picture.with_suffix(".json")

    @torch.no_grad()
    def validate(self, run: Run) -> None:
        assert self.others is not None  # otherwise `--validation-steps` is 0
        step = math.ceil(len(self.others) / run.args.validation_faces)
        pixels, embeddings = self.others.__getitems__(list(range(0, len(self.others), step)))
        self.copy.eval()
        parts = [self.copy(to_unit_range(part).to(self.copy.device)).embeddings for part in pixels.split(128)]
        self.copy.train()
        figures = compare_copy(F.normalize(torch.cat(parts).float().cpu()), embeddings)
        run.report({f"validation/{name}": value for name, value in figures.items()})
        self._report(run).parent.mkdir(exist_ok=True)
        write_json(self._report(run), figures)

    def is_validated(self, run: Run) -> bool:
        return self._report(run).exists()

    def save(self, run: Run, folder: Path) -> None:
        save_and_report(run.args, self.copy, self.teacher, folder)


def save_and_report(args: argparse.Namespace, copy: IResNetModel, teacher: EncoderMark, folder: Path) -> None:
    data = describe_caches(args.train_data)
    for name, each in save_carried(copy, folder, teacher, data, args.validation_data, args.license).items():
        print(f"{name}: " + ", ".join(f"{figure} {value}" for figure, value in each.items()))
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {size / 1e6:.2f} MB, reproduces {teacher_mark(folder)}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.finished is not None:
        caches = [FaceCache(each) for each in args.train_data]
        teacher = common_encoder({str(cache.folder): cache.encoder_mark for cache in caches})
        copy = IResNetModel.from_pretrained(args.finished, dtype=torch.float32, use_safetensors=True)
        check_width(copy, args.train_data[0], caches[0].embeddings().embeddings.shape[1])
        save_and_report(args, copy.eval(), teacher, args.output_dir)
        return
    accelerator = make_accelerator(args)
    with training_folder(accelerator, args) as checkpoint:
        train(args, accelerator, checkpoint)


def train(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None) -> None:
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # 1. model
    torch.manual_seed(args.seed)
    embedding_dim = FaceCache(args.train_data[0]).embeddings().embeddings.shape[1]
    copy = make_copy(args, embedding_dim).train()
    check_width(copy, args.train_data[0], embedding_dim)
    if args.channels_last:
        copy.to(memory_format=torch.channels_last)

    # 2. data
    faces = EmbeddedFaces(args.train_data, copy.config.image_size)
    check_unseen(faces.teacher, faces.fingerprints, [FaceCache(each) for each in args.validation_data or ()])
    others = EmbeddedFaces(args.validation_data, copy.config.image_size) if args.validation_data else None
    sampler = EndlessBatchSampler(len(faces), args.train_batch_size, args.seed, rank, world_size)
    logger.info(f"{len(faces)} faces of {faces.teacher}; {copy.num_parameters() / 1e6:.1f}M parameters")

    # 3. optimizer
    matrices = [parameter for parameter in copy.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in copy.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    model, optimizer = accelerator.prepare(copy, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # `prepare` would step it once per process

    # 4. train
    log = DistillationLog(device)
    run = Run(
        "distill_encoder",
        args,
        accelerator,
        checkpoint,
        faces,
        sampler,
        product=Copy(copy, faces.teacher, others),
        log=log,
        lr_scheduler=lr_scheduler,
        fixed={"train_data": faces.fingerprints},
    )
    for pixels, embeddings in run:
        pixels = vary(to_unit_range(pixels))
        if args.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            copies = model(pixels).embeddings
        losses = 1 - F.cosine_similarity(copies.float(), embeddings)
        accelerator.backward(losses.mean())
        if args.max_grad_norm is not None:
            accelerator.clip_grad_norm_(copy.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.add(losses)

    # 5. the copy in half precision, with its card
    run.finish()


if __name__ == "__main__":
    run_script(main)
