"""Trains a face recognizer on aligned faces: IResNet with a margin head. It is how a synthetic data set is judged.

    uiface generate org/model --identities bank.safetensors --images-per-identity 50 --output data
    accelerate launch training/train_face_recognition.py --config training/configs/fr_ir50_arcface.yaml \\
        --train-data data --benchmarks path/to/bins --output-dir runs/recognizer

Data sets are folders `ROOT/IDENTITY/*.png`, folders of `uiface generate`, InsightFace's RecordIO (`train.rec`),
webdataset shards, parquet files, LMDB or zip (see `docs/how-to/formats.md`), of faces that are aligned already, or
caches of `uiface prepare`. All are read once before the first step; what cannot be trained on is an error that names
the files.

In the output folder, `accuracies.json` has the accuracies of every validation, and `train_results.json` loss and
accuracy on the training's own faces in its last epoch. Look at the latter before you compare data sets: a margin head
may learn nothing of a hard set, and then the recipe is to blame, not the set.

The same command with `--resume-from-checkpoint latest` goes on after an interruption and gives the same parameters as
an uninterrupted run: the order of the data depends on the seed and the epoch, a face's augmentation on the seed and
its place in that order. What is saved is a model for transformers' `AutoModel` with its `AutoImageProcessor`; the
head stays in the checkpoints.

For a hundred thousand identities and more, `--class-sample-rate 0.1` compares the faces of a step with their own
identities and as many others, drawn by the seed and the step, as make it a tenth of all. The accuracy in the log is
then among these. Several processes draw the same identities, those of all their faces among them; the head is whole in
each, as is its gradient, so momentum and weight decay also act on identities that were not drawn.
"""

import argparse
import inspect
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger

from uiface_cli.options import json_object, real, whole

from .. import IResNetConfig, IResNetModel
from ..data.benchmarks import read_benchmarks
from ..data.labeled_faces import LabeledFaces, check_faces
from ..faces import ALIGNED_SIZE
from ..models.margin_heads import MARGIN_HEADS
from ..pictures import to_unit_range
from .datasets import Augmentation
from .options import (
    SWITCH,
    Options,
    add_checkpoint_arguments,
    add_hub_arguments,
    add_length_arguments,
    add_machine_arguments,
    add_optimizer_arguments,
    make_parser,
    parse_recipe,
    run_script,
)
from .order import NumberedBatches, set_weights
from .recognition import (
    ClassSampling,
    DecodedBenchmark,
    FaceClassifier,
    LastEpoch,
    RecognitionLog,
    Recognizer,
    report_last_epoch,
)
from .run import Run, make_accelerator, training_folder
from .schedules import LR_SCHEDULERS, make_lr_scheduler

logger = get_logger(__name__)

# what `Augmentation` takes, by the options' names
AUGMENTATION = (
    "flip_probability",
    "crop_probability",
    "crop_scale",
    "crop_in_place",
    "low_resolution_probability",
    "photometric_probability",
    "erasing_probability",
)


def add_data_arguments(group: Options) -> None:
    group.add_argument("--train-data", nargs="+", help="data sets of aligned faces, each of other people")
    text = "one per set: how often a face of it is drawn, relative to the others' (default: all alike, once per epoch)"
    group.add_argument("--train-data-weights", nargs="+", type=real(0), metavar="WEIGHT", help=text)
    group.add_argument("--min-images-per-identity", type=whole(), default=1, help="identities with fewer are left out")
    group.add_argument("--checked-faces", type=whole(), help="read before the first step; default: all")
    group.add_argument("--recognizer", type=json_object, default={}, help="IResNetConfig options, as JSON")
    group.add_argument("--output-dir", type=Path, help="model, checkpoints and logs")


def add_augmentation_arguments(group: Options) -> None:
    group.add_argument("--flip-probability", type=real(0, 1), default=0.5)
    group.add_argument("--crop-probability", type=real(0, 1), default=0.2, help="of a random resized crop")
    group.add_argument("--crop-scale", type=real(0, 1), nargs=2, default=(0.2, 1.0), help="least and largest area")
    text = "a crop stays where it is and the rest is black, instead of being resized (AdaFace, Kim et al. 2022)"
    group.add_argument("--crop-in-place", **SWITCH, help=text)
    text = "of a fifth of the size or more (AdaFace: 0.2)"
    group.add_argument("--low-resolution-probability", type=real(0, 1), default=0.0, help=text)
    text = "of another brightness, contrast and saturation (AdaFace: 0.2)"
    group.add_argument("--photometric-probability", type=real(0, 1), default=0.0, help=text)
    text = "of random erasing (Zhong et al. 2020: 0.5)"
    group.add_argument("--erasing-probability", type=real(0, 1), default=0.0, help=text)


def add_objective_arguments(group: Options) -> None:
    group.add_argument("--head", choices=tuple(MARGIN_HEADS), default="arcface")
    group.add_argument("--margin", type=real(), help="default: the head's own")
    group.add_argument("--scale", type=real(0), default=64.0, help="of the cosines")
    text = "of the identities that a step compares its faces with, chosen as Partial FC does (An et al. 2022)"
    group.add_argument("--class-sample-rate", type=real(0, 1), default=1.0, help=text)
    group.add_argument("--epochs", type=whole(), default=40)
    add_length_arguments(group, batch_size=512, steps=None, steps_help="instead of --epochs")
    add_optimizer_arguments(group, 0.1, "multi_step", ("multi_step", *LR_SCHEDULERS))
    text = "clip the gradient's norm of the network without the head (arcface_torch: 5)"
    group.add_argument("--max-backbone-grad-norm", type=real(0), help=text)
    text = "of multi_step, in epochs"
    group.add_argument("--lr-milestones", type=whole(0), nargs="*", default=[22, 28, 32], help=text)
    group.add_argument("--lr-decay", type=real(0), default=0.1, help="the learning rate's factor at each of them")
    group.add_argument("--momentum", type=real(0, 1), default=0.9)
    group.add_argument("--weight-decay", type=real(0), default=5e-4)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_arguments(parser.add_argument_group("data and model"))
    add_augmentation_arguments(parser.add_argument_group("augmentation"))
    add_objective_arguments(parser.add_argument_group("objective and optimizer"))
    add_machine_arguments(parser)
    group = add_checkpoint_arguments(parser, steps=2000)
    group.add_argument("--benchmarks", type=Path, help="folder of InsightFace .bin files, for validation")
    add_hub_arguments(group, "recognizer")
    args = parse_recipe(parser, argv, required=("--train-data", "--output-dir"))

    unknown = sorted(args.recognizer.keys() - inspect.signature(IResNetConfig.__init__).parameters.keys())
    if unknown:
        parser.error(f"--recognizer has unknown options: {', '.join(unknown)}")
    if args.train_batch_size < 2:
        parser.error("--train-batch-size has to be 2 at least: batch norm compares the faces of a batch")
    weights = args.train_data_weights
    if weights is not None and len(weights) != len(args.train_data):
        parser.error(f"--train-data-weights has {len(weights)} numbers for {len(args.train_data)} data sets")
    if weights is not None and not all(weights):
        parser.error("--train-data-weights has a 0: leave that data set out")
    if args.class_sample_rate == 0:
        parser.error("--class-sample-rate is 0: nothing would be learned from other identities")
    if args.max_grad_norm is not None and args.max_backbone_grad_norm is not None:
        parser.error("--max-grad-norm clips network and head together, --max-backbone-grad-norm the network: give one")
    if args.benchmarks is None:
        args.validation_steps = 0  # nothing to measure
    return args


def load_training_data(
    args: argparse.Namespace, accelerator: Accelerator, image_size: int, check: bool
) -> LabeledFaces:
    """The faces. The main process reads them all first, if they are to be checked."""
    augmentation = Augmentation(args.seed, image_size, **{name: getattr(args, name) for name in AUGMENTATION})
    faces = LabeledFaces(args.train_data, image_size, args.min_images_per_identity, augmentation)
    if check and accelerator.is_main_process:
        report = check_faces(faces, args.checked_faces, args.dataloader_num_workers)
        logger.info("{faces} faces of {identities} identities; {checked} checked".format_map(report))
        if report["single"]:
            logger.warning("{single} of {identities} identities have a single face".format_map(report))
        if report["uniform"]:
            logger.warning("{uniform} of {checked} faces are of one color".format_map(report))
    accelerator.wait_for_everyone()
    return faces


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = IResNetConfig(**args.recognizer)
    if args.benchmarks is not None and config.image_size != ALIGNED_SIZE:
        raise ValueError(f"benchmarks have faces of {ALIGNED_SIZE} pixels, the recognizer takes {config.image_size}.")
    accelerator = make_accelerator(args)
    with training_folder(accelerator, args) as checkpoint:
        train(args, accelerator, checkpoint, config)


def train(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None, config: IResNetConfig) -> None:
    """Trains from the beginning or a checkpoint to the end, and saves the recognizer."""
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # 1. data
    benchmarks = []
    if args.benchmarks is not None and accelerator.is_main_process:
        # a damaged one is named now, not at the first validation
        benchmarks = [DecodedBenchmark(each.name, each.images, each.same) for each in read_benchmarks(args.benchmarks)]
    faces = load_training_data(args, accelerator, config.image_size, check=checkpoint is None)
    weights = set_weights(np.diff(faces.starts).tolist(), args.train_data_weights)
    sampler = NumberedBatches(len(faces), args.train_batch_size, args.seed, rank, world_size, weights=weights)
    steps_per_epoch = sampler.batches_per_epoch / args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = max(1, args.epochs * sampler.batches_per_epoch // args.gradient_accumulation_steps)

    # 2. model
    torch.manual_seed(args.seed)
    margin = {} if args.margin is None else {"margin": args.margin}
    recognizer = IResNetModel(config)  # before the head, so that a seed's weights do not depend on the data
    head = MARGIN_HEADS[args.head](config.embedding_dim, faces.num_identities, scale=args.scale, **margin)
    classifier = FaceClassifier(recognizer, head)
    rate, batch_size = args.class_sample_rate, args.train_batch_size
    sampled = ClassSampling(accelerator, faces.num_identities, rate, batch_size, args.seed)
    if args.channels_last:
        classifier.to(memory_format=torch.channels_last)

    # 3. optimizer; as arcface_torch's, it decays the weights of batch norm and head, too
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    lr_scheduler = make_lr_scheduler(args, optimizer, sampler.batches_per_epoch)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    last_epoch = LastEpoch(accelerator, max(0, args.max_train_steps - math.ceil(steps_per_epoch)))
    # not given to `prepare`: that would step the schedule once per process
    accelerator.register_for_checkpointing(lr_scheduler, last_epoch)

    # 4. train
    log = RecognitionLog(device)
    run = Run(
        "train_face_recognition",
        args,
        accelerator,
        checkpoint,
        faces,
        sampler,
        product=Recognizer(recognizer, benchmarks, log),
        log=log,
        lr_scheduler=lr_scheduler,
        fixed={"identities": faces.num_identities, "train_data": [faces.fingerprint]},
        per_step={"epoch": 1 / steps_per_epoch},
        skips_overflow=False,  # what was not finite is in batch norm's running averages
    )
    classifier.train()
    for pixels, labels in run:
        pixels = to_unit_range(pixels)
        if args.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        labels, classes = sampled(labels, run.step)
        with accelerator.accumulate(model):
            with accelerator.autocast():
                logits = model(pixels, labels, classes)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            accelerator.backward(losses.mean())
            if args.max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            if args.max_backbone_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(recognizer.parameters(), args.max_backbone_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        log.add(losses, logits, labels)
        if run.step >= last_epoch.first:
            last_epoch.add(losses, logits, labels)

    # 5. the recognizer; the head has done its work
    if run.step == args.max_train_steps:
        report_last_epoch(args, accelerator, last_epoch, faces.num_identities)
    run.finish()


if __name__ == "__main__":
    run_script(main)
