#!/usr/bin/env python
"""Trains a face recognizer on aligned faces: IResNet with a margin head. It is how a synthetic data set is judged.

    uiface generate org/model --identities bank.safetensors --images-per-identity 50 --output data
    accelerate launch training/train_face_recognition.py --config training/configs/fr_ir50_arcface.yaml \
        --train-data data --benchmarks path/to/bins --output-dir runs/recognizer

Data sets are folders `ROOT/IDENTITY/*.png`, folders of `uiface generate`, InsightFace's RecordIO (`train.rec`),
webdataset shards, parquet files, LMDB or zip archives (see `docs/formats.md`), of faces that are aligned already, or
caches of `uiface prepare`. All are read once before the first step; what cannot be trained on is an error that names
the files. `accuracies.json` in the output folder has those of every validation, `train_results.json` loss and accuracy
of the training itself in its last epoch. Look at the latter before you compare data sets: of a hard set a margin head
may learn nothing, which is then a matter of the recipe.

The same command with `--resume-from-checkpoint latest` goes on after an interruption and gives the same parameters as
an uninterrupted run: the order of the data depends on the seed and the epoch, a face's augmentation on the seed and
its place in that order. What is saved is a model for transformers' `AutoModel` with its `AutoImageProcessor`; the
head stays in the checkpoints.
"""

import argparse
import inspect
import json
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import create_repo, upload_folder
from torch import nn

from uiface_cli.options import json_object, real, whole
from uiface_diffusers import IResNetConfig, IResNetModel
from uiface_diffusers.data.benchmarks import read_benchmarks
from uiface_diffusers.data.labeled_faces import LabeledFaces, check_faces
from uiface_diffusers.evaluation import verify_benchmarks
from uiface_diffusers.evaluation.recognizers import ModelRecognizer
from uiface_diffusers.faces import ALIGNED_SIZE
from uiface_diffusers.files import write_json
from uiface_diffusers.hub import load_card
from uiface_diffusers.models.margin_heads import MARGIN_HEADS, MarginHead
from uiface_diffusers.pictures import to_unit_range
from uiface_diffusers.training.datasets import Augmentation
from uiface_diffusers.training.options import (
    Options,
    add_checkpoint_arguments,
    add_hub_arguments,
    add_length_arguments,
    add_machine_arguments,
    add_optimizer_arguments,
    describe_recipe,
    make_parser,
    parse_recipe,
    run_script,
)
from uiface_diffusers.training.order import NumberedBatches
from uiface_diffusers.training.recognition import (
    DecodedBenchmark,
    LastEpoch,
    RecognitionLog,
    image_processor,
    model_card,
    save_recognizer,
)
from uiface_diffusers.training.run import Product, Run, make_accelerator, training_folder
from uiface_diffusers.training.schedules import LR_SCHEDULERS, make_lr_scheduler

logger = get_logger(__name__)

# step -> benchmark -> accuracy
ACCURACIES = "accuracies.json"
# of the last epoch; the name is transformers'
RESULTS = "train_results.json"
# below this next to nothing was learned
LEAST_ACCURACY = 0.05


def add_data_arguments(group: Options) -> None:
    group.add_argument("--train-data", nargs="+", help="data sets of aligned faces, each of other people")
    group.add_argument("--min-images-per-identity", type=whole(), default=1, help="identities with fewer are left out")
    group.add_argument("--checked-faces", type=whole(), help="read before the first step; default: all")
    group.add_argument("--flip-probability", type=real(0, 1), default=0.5)
    group.add_argument("--crop-probability", type=real(0, 1), default=0.2, help="of a random resized crop")
    group.add_argument("--crop-scale", type=real(0, 1), nargs=2, default=(0.2, 1.0), help="least and largest area")
    group.add_argument("--recognizer", type=json_object, default={}, help="IResNetConfig options, as JSON")
    group.add_argument("--output-dir", type=Path, help="model, checkpoints and logs")


def add_objective_arguments(group: Options) -> None:
    group.add_argument("--head", choices=tuple(MARGIN_HEADS), default="arcface")
    group.add_argument("--margin", type=real(), help="default: the head's own")
    group.add_argument("--scale", type=real(0), default=64.0, help="of the cosines")
    group.add_argument("--epochs", type=whole(), default=40)
    add_length_arguments(group, batch_size=512, steps=None, steps_help="instead of --epochs")
    add_optimizer_arguments(group, 0.1, "multi_step", ("multi_step", *LR_SCHEDULERS))
    text = "of multi_step, in epochs"
    group.add_argument("--lr-milestones", type=whole(0), nargs="*", default=[22, 28, 32], help=text)
    group.add_argument("--lr-decay", type=real(0), default=0.1, help="the learning rate's factor at each of them")
    group.add_argument("--momentum", type=real(0, 1), default=0.9)
    group.add_argument("--weight-decay", type=real(0), default=5e-4)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_arguments(parser.add_argument_group("data and model"))
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
    if args.benchmarks is None:
        args.validation_steps = 0  # nothing to measure
    return args


class FaceClassifier(nn.Module):
    """Recognizer and head as one module, so that all gradients are reduced together."""

    def __init__(self, recognizer: IResNetModel, head: MarginHead):
        super().__init__()
        self.recognizer, self.head = recognizer, head

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.recognizer(pixel_values, return_dict=False)[0], labels)


def load_training_data(
    args: argparse.Namespace, accelerator: Accelerator, image_size: int, check: bool
) -> LabeledFaces:
    """The faces. The main process reads them all first, if they are to be checked."""
    augmentation = Augmentation(
        args.seed, image_size, args.flip_probability, args.crop_probability, tuple(args.crop_scale)
    )
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


class Recognizer(Product):
    """The recognizer without its head; on the way, its accuracy on benchmarks."""

    name = "recognizer"

    def __init__(self, recognizer: IResNetModel, benchmarks: list[DecodedBenchmark], log: RecognitionLog):
        self.recognizer, self.benchmarks, self.log = recognizer, benchmarks, log

    def save(self, run: Run, folder: Path) -> None:
        save_recognizer(self.recognizer, folder)

    def _measured(self, run: Run) -> dict[str, dict[str, float]]:
        file = run.args.output_dir / ACCURACIES
        return json.loads(file.read_text()) if file.exists() else {}

    def is_validated(self, run: Run) -> bool:
        return str(run.step) in self._measured(run)

    def validate(self, run: Run) -> None:
        recognizer = ModelRecognizer(self.recognizer, image_processor(self.recognizer.config), self.name)
        results = verify_benchmarks(recognizer, self.benchmarks)
        accuracies = {name: float(result.accuracy) for name, result in results.items()}
        accuracies["mean"] = sum(accuracies.values()) / len(accuracies)
        run.report({f"accuracy/{name}": value for name, value in accuracies.items()})
        write_json(run.args.output_dir / ACCURACIES, self._measured(run) | {str(run.step): accuracies})
        self.log.since = time.monotonic()  # this was no time of training

    def upload(self, run: Run, repo_id: str, message: str) -> None:
        """A card that the repository has stays."""
        args = run.args
        repo_id = create_repo(repo_id, private=args.hub_private or None, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            save_recognizer(self.recognizer, Path(folder))
            if load_card(repo_id) is None:
                paths = ("train_data", "output_dir", "hub_model_id", "benchmarks")
                recipe = describe_recipe("training/train_face_recognition.py", args, paths)
                card = model_card(repo_id, self.recognizer.config, args.license, recipe)
                card.save(Path(folder) / "README.md")
            upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)


def report_last_epoch(args: argparse.Namespace, accelerator: Accelerator, last_epoch: LastEpoch, people: int) -> None:
    """Writes what was learned in it, and warns if that is next to nothing."""
    means, finite = last_epoch.take(accelerator)
    if not finite:
        return
    loss, accuracy = means["loss"], means["accuracy"]
    if accelerator.is_main_process:
        write_json(args.output_dir / RESULTS, {"step": args.max_train_steps, "loss": loss, "accuracy": accuracy})
    if accuracy < LEAST_ACCURACY:
        logger.warning(
            f"the recognizer tells hardly any of its {people} identities apart: in the last epoch {accuracy:.1%} of"
            " the faces were classified right with the margin. Try --max-grad-norm 5, a smaller --margin or"
            " --learning-rate, or more --epochs."
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = IResNetConfig(**args.recognizer)
    if args.benchmarks is not None and config.image_size != ALIGNED_SIZE:
        raise ValueError(f"benchmarks have faces of {ALIGNED_SIZE} pixels, the recognizer takes {config.image_size}.")
    accelerator = make_accelerator(args)
    with training_folder(accelerator, args) as checkpoint:
        train(args, accelerator, checkpoint, config)


def train(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None, config: IResNetConfig) -> None:
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # 1. data
    benchmarks = []
    if args.benchmarks is not None and accelerator.is_main_process:
        # a damaged one is named now, not at the first validation
        benchmarks = [DecodedBenchmark(each.name, each.images, each.same) for each in read_benchmarks(args.benchmarks)]
    faces = load_training_data(args, accelerator, config.image_size, check=checkpoint is None)
    sampler = NumberedBatches(len(faces), args.train_batch_size, args.seed, rank, world_size)
    steps_per_epoch = sampler.batches_per_epoch / args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = max(1, args.epochs * sampler.batches_per_epoch // args.gradient_accumulation_steps)

    # 2. model
    torch.manual_seed(args.seed)
    margin = {} if args.margin is None else {"margin": args.margin}
    recognizer = IResNetModel(config)  # before the head, so that a seed's weights do not depend on the data
    head = MARGIN_HEADS[args.head](config.embedding_dim, faces.num_identities, scale=args.scale, **margin)
    classifier = FaceClassifier(recognizer, head)
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
    fixed = {"identities": faces.num_identities, "train_data": [faces.fingerprint], "recognizer": args.recognizer}
    names = ("gradient_accumulation_steps", "head", "momentum", "weight_decay")
    fixed |= {name: getattr(args, name) for name in names}
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
        fixed=fixed,
        per_step={"epoch": 1 / steps_per_epoch},
        skips_overflow=False,  # what was not finite is in batch norm's running averages
    )
    classifier.train()
    for pixels, labels in run:
        pixels = to_unit_range(pixels)
        if args.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(model):
            with accelerator.autocast():
                logits = model(pixels, labels)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            accelerator.backward(losses.mean())
            if args.max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
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
