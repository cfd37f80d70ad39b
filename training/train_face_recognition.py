#!/usr/bin/env python
"""Trains a face recognizer on aligned faces: IResNet with a margin head. It is how a synthetic data set is judged.

    uiface generate org/model --identities bank.safetensors --images-per-identity 50 --output data
    accelerate launch training/train_face_recognition.py --config training/configs/fr_ir50_arcface.yaml \
        --train_data data --benchmarks path/to/bins --output_dir runs/recognizer

Data sets are folders `ROOT/IDENTITY/*.png`, folders of `uiface generate`, InsightFace's RecordIO (`train.rec`) or
webdataset shards, of faces that are aligned already, or caches of `uiface prepare`. All are read once before the first
step; what cannot be trained on is an error that names the files. `accuracies.json` in the output folder has those of
every validation, `train_results.json` loss and accuracy of the training itself in its last epoch. Look at the latter
before you compare data sets: of a hard set a margin head may learn nothing, which is then a matter of the recipe.

The same command with `--resume_from_checkpoint latest` goes on after an interruption and gives the same parameters as
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import HTTPError
from torch import nn
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2
from tqdm import tqdm

from uiface_diffusers import IResNetConfig, IResNetImageProcessor, IResNetModel
from uiface_diffusers.data.benchmarks import read_benchmarks
from uiface_diffusers.data.labeled_faces import LabeledFaces, check_faces
from uiface_diffusers.evaluation import verify_benchmarks
from uiface_diffusers.evaluation.recognizers import ModelRecognizer
from uiface_diffusers.faces import ALIGNED_SIZE
from uiface_diffusers.files import write_json
from uiface_diffusers.hub import load_card
from uiface_diffusers.models.margin_heads import MARGIN_HEADS, MarginHead
from uiface_diffusers.options import json_object, real, whole
from uiface_diffusers.pictures import to_unit_range
from uiface_diffusers.seeds import mix_seed
from uiface_diffusers.training_utils import (
    LR_SCHEDULERS,
    EndlessBatchSampler,
    add_checkpoint_arguments,
    add_hub_arguments,
    add_machine_arguments,
    add_optimizer_arguments,
    describe_recipe,
    find_checkpoint,
    is_due,
    is_out_of_time,
    load_checkpoint,
    make_accelerator,
    make_lr_scheduler,
    parse_recipe,
    run_script,
    save_checkpoint,
    schedule_settings,
    training_folder,
    validates,
)

logger = get_logger(__name__)

# step -> benchmark -> accuracy
ACCURACIES = "accuracies.json"
# of the last epoch; the name is transformers'
RESULTS = "train_results.json"
# below this next to nothing was learned
LEAST_ACCURACY = 0.05
# the stream of random numbers of a face's augmentation
AUGMENTATION = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with any of the options below; the command line wins")

    group = parser.add_argument_group("data and model")
    group.add_argument("--train_data", nargs="+", help="data sets of aligned faces, each of other people")
    group.add_argument("--min_images_per_identity", type=whole(), default=1, help="identities with fewer are left out")
    group.add_argument("--checked_faces", type=whole(), help="read before the first step; default: all")
    group.add_argument("--flip_probability", type=real(0, 1), default=0.5)
    group.add_argument("--crop_probability", type=real(0, 1), default=0.2, help="of a random resized crop")
    group.add_argument("--crop_scale", type=real(0, 1), nargs=2, default=(0.2, 1.0), help="least and largest area")
    group.add_argument("--recognizer", type=json_object, default={}, help="IResNetConfig options, as JSON")
    group.add_argument("--output_dir", type=Path, help="model, checkpoints and logs")

    group = parser.add_argument_group("objective and optimizer")
    group.add_argument("--head", choices=tuple(MARGIN_HEADS), default="arcface")
    group.add_argument("--margin", type=real(), help="default: the head's own")
    group.add_argument("--scale", type=real(0), default=64.0, help="of the cosines")
    group.add_argument("--train_batch_size", type=whole(), default=512, help="faces per step and process")
    group.add_argument("--epochs", type=whole(), default=40)
    group.add_argument("--max_train_steps", type=whole(), help="instead of --epochs")
    group.add_argument("--max_train_hours", type=real(0), help="save and stop after this time in this run")
    group.add_argument("--gradient_accumulation_steps", type=whole(), default=1, help="batches of one optimizer step")
    add_optimizer_arguments(group, 0.1, "multi_step", ("multi_step", *LR_SCHEDULERS))
    group.add_argument(
        "--lr_milestones", type=whole(0), nargs="*", default=[22, 28, 32], help="of multi_step, in epochs"
    )
    group.add_argument("--lr_decay", type=real(0), default=0.1, help="the learning rate's factor at each of them")
    group.add_argument("--momentum", type=real(0, 1), default=0.9)
    group.add_argument("--weight_decay", type=real(0), default=5e-4)

    add_machine_arguments(parser)

    group = add_checkpoint_arguments(parser, steps=2000)
    group.add_argument("--benchmarks", type=Path, help="folder of InsightFace .bin files, for validation")
    add_hub_arguments(group, "recognizer")

    args = parse_recipe(parser, argv, required=("train_data", "output_dir"))
    unknown = sorted(args.recognizer.keys() - inspect.signature(IResNetConfig.__init__).parameters.keys())
    if unknown:
        parser.error(f"--recognizer has unknown options: {', '.join(unknown)}")
    if args.train_batch_size < 2:
        parser.error("--train_batch_size has to be 2 at least: batch norm compares the faces of a batch")
    return args


class Augmentation:
    """Flips and crops a face by random numbers of its own, so that neither the number of workers nor an interruption
    changes them.

    Args:
        seed (`int`): of the training.
        image_size (`int`): of the faces, before and after.
        flip_probability (`float`): of mirroring.
        crop_probability (`float`): of a random resized crop.
        crop_scale (`tuple[float, float]`): least and largest share of the area that a crop keeps.
    """

    def __init__(
        self,
        seed: int,
        image_size: int,
        flip_probability: float,
        crop_probability: float,
        crop_scale: tuple[float, float],
    ):
        self.seed = seed
        crop = v2.RandomResizedCrop(image_size, scale=tuple(crop_scale), antialias=True)
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(flip_probability), v2.RandomApply([crop], crop_probability)]
        )

    def __call__(self, face: torch.Tensor, number: int) -> torch.Tensor:
        """A face of `(3, image_size, image_size)` bytes; `number` is its place in the training."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, number, AUGMENTATION))
            return self.transform(face)


class NumberedBatches(Sampler):
    """The batches of a sampler; beside every face its number in the whole training, which does not depend on how the
    faces are shared among processes."""

    def __init__(self, batches: EndlessBatchSampler):
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        sampler = self.batches
        for batch, indices in enumerate(sampler, start=sampler.start):
            first = (batch * sampler.world_size + sampler.rank) * sampler.batch_size
            yield list(zip(indices, range(first, first + sampler.batch_size), strict=True))


def keep_batch(batch):
    """What `LabeledFaces` fetches is a batch already."""
    return batch


class FaceClassifier(nn.Module):
    """Recognizer and head as one module, so that all gradients are reduced together."""

    def __init__(self, recognizer: IResNetModel, head: MarginHead):
        super().__init__()
        self.recognizer, self.head = recognizer, head

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.recognizer(pixel_values, return_dict=False)[0], labels)


def multi_step(step: int, milestones: list[int], decay: float, warmup_steps: int) -> float:
    """The factor of the learning rate in a step: `decay` to the power of the milestones behind it, and rising from
    near zero within the warm-up."""
    warmup = min((step + 1) / max(warmup_steps, 1), 1.0)
    return warmup * decay ** sum(step >= milestone for milestone in milestones)


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, batches_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """multi_step, whose milestones are epochs, or a schedule of `make_lr_scheduler`."""
    if args.lr_scheduler != "multi_step":
        return make_lr_scheduler(args, optimizer)
    milestones = [epoch * batches_per_epoch // args.gradient_accumulation_steps for epoch in args.lr_milestones]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: multi_step(step, milestones, args.lr_decay, args.lr_warmup_steps)
    )


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


class TrainingLog:
    """Means since the last time: loss, and the share of faces whose own logit is the largest in spite of its margin.
    Sums stay on the device."""

    def __init__(self, device: torch.device):
        # of the finite losses: sum, right answers, number; number of all
        self.sums = torch.zeros(4, device=device)
        self.since = time.monotonic()

    def add(self, losses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        losses = losses.detach()
        finite = losses.isfinite()
        right = finite & (logits.argmax(dim=1) == labels)
        parts = (losses.nan_to_num(0, 0, 0), right, finite, torch.ones_like(losses))
        self.sums += torch.stack([part.float() for part in parts]).sum(dim=1)

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        """The means over all processes with the images per second, and the share of finite losses (0 of none)."""
        total, right, finite, number = accelerator.reduce(self.sums, "sum").tolist()
        now = time.monotonic()
        logs = {"loss": total / max(finite, 1), "accuracy": right / max(finite, 1)}
        logs["images/s"] = number / (now - self.since)
        self.sums, self.since = torch.zeros_like(self.sums), now
        return logs, finite / max(number, 1)


class LastEpochLog(TrainingLog):
    """The log of the steps from `first` on, which a checkpoint keeps."""

    def __init__(self, device: torch.device, first: int):
        super().__init__(device)
        self.first = first

    def gather(self, accelerator: Accelerator) -> None:
        """Brings the sums of all processes to the main one, whose state is what a checkpoint has."""
        self.sums = accelerator.reduce(self.sums, "sum")
        self.keep_on_main(accelerator)

    def keep_on_main(self, accelerator: Accelerator) -> None:
        """To be called after loading, too: every process loads the main one's."""
        if not accelerator.is_main_process:
            self.sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["first"] == self.first:  # otherwise the training was to end at another step
            self.sums.copy_(state["sums"])


def verification_accuracies(recognizer: IResNetModel, benchmarks: Path) -> dict[str, float]:
    """Accuracy on each of a folder's InsightFace `.bin` files, and their mean."""
    results = verify_benchmarks(ModelRecognizer(recognizer, image_processor(recognizer), "recognizer"), benchmarks)
    accuracies = {name: float(result.accuracy) for name, result in results.items()}
    return {**accuracies, "mean": sum(accuracies.values()) / len(accuracies)}


def image_processor(recognizer: IResNetModel) -> IResNetImageProcessor:
    size = recognizer.config.image_size
    return IResNetImageProcessor({"height": size, "width": size})


def save_recognizer(recognizer: IResNetModel, folder: Path) -> None:
    """The model and its image processor, for transformers' Auto classes."""
    recognizer.save_pretrained(folder)
    image_processor(recognizer).save_pretrained(folder)


def model_card(repo_id: str, config: IResNetConfig, license_name: str | None, recipe: str) -> ModelCard:
    """What the recognizer is, how to use it, how it was trained."""
    data = ModelCardData(
        license=license_name,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["face-recognition", "iresnet", "uiface"],
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

A face recognizer: IResNet-{config.layers} of width {config.width}, {config.embedding_dim}-d embeddings of aligned
{config.image_size}x{config.image_size} faces, of [uiface-diffusers](https://pypi.org/project/uiface-diffusers).

```python
import uiface_diffusers  # registers the model; pip install uiface-diffusers
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{repo_id}")
processor = AutoImageProcessor.from_pretrained("{repo_id}")
embeddings = model(**processor(faces, return_tensors="pt")).embeddings  # faces: RGB bytes, not normalized
```

## Training

{recipe}
""")


def push_to_hub(recognizer: IResNetModel, args: argparse.Namespace, message: str) -> None:
    """Uploads the recognizer; a card that the repository has stays. What goes wrong is logged: a training does not end
    for it."""
    repo_id = args.hub_model_id or args.output_dir.resolve().name
    paths = ("train_data", "output_dir", "hub_model_id", "benchmarks")
    recipe = describe_recipe("training/train_face_recognition.py", args, paths)
    try:
        repo_id = create_repo(repo_id, private=args.hub_private or None, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            save_recognizer(recognizer, Path(folder))
            if load_card(repo_id) is None:
                model_card(repo_id, recognizer.config, args.license, recipe).save(Path(folder) / "README.md")
            upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        logger.warning(f"{repo_id} was not pushed to the Hub; the training goes on. {type(error).__name__}: {error}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = IResNetConfig(**args.recognizer)
    if args.benchmarks is not None and config.image_size != ALIGNED_SIZE:
        raise ValueError(f"benchmarks have faces of {ALIGNED_SIZE} pixels, the recognizer takes {config.image_size}.")
    accelerator = make_accelerator(args, gradient_accumulation_steps=args.gradient_accumulation_steps)
    with training_folder(accelerator, args.output_dir):
        train(args, accelerator, config)


def train(args: argparse.Namespace, accelerator: Accelerator, config: IResNetConfig) -> None:
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # 1. data
    if args.benchmarks is not None and accelerator.is_main_process:
        read_benchmarks(args.benchmarks)  # a damaged one is named now, not at the first validation
    faces = load_training_data(args, accelerator, config.image_size, check=checkpoint is None)
    sampler = EndlessBatchSampler(len(faces), args.train_batch_size, args.seed, rank, world_size)
    batches_per_epoch = sampler.batches_per_epoch
    if args.max_train_steps is None:
        args.max_train_steps = max(1, args.epochs * batches_per_epoch // args.gradient_accumulation_steps)

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
    lr_scheduler = make_schedule(args, optimizer, batches_per_epoch)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    # not given to `prepare`: that would step the schedule once per process
    accelerator.register_for_checkpointing(lr_scheduler)
    if args.report_to != "none":
        settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
        accelerator.init_trackers("train_face_recognition", config=settings)

    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    last_epoch = LastEpochLog(device, max(0, args.max_train_steps - steps_per_epoch))
    accelerator.register_for_checkpointing(last_epoch)
    # what the data's order and labels depend on, besides the step, and what a checkpoint's optimizer would overrule
    fixed = {"seed": args.seed, "train_batch_size": args.train_batch_size, "num_processes": world_size}
    fixed |= {"faces": len(faces), "identities": faces.num_identities}
    fixed |= {"gradient_accumulation_steps": args.gradient_accumulation_steps, "head": args.head}
    fixed |= {name: getattr(args, name) for name in ("learning_rate", "momentum", "weight_decay")}
    fixed |= {
        "train_data": [faces.fingerprint],
        "recognizer": args.recognizer,
        **schedule_settings(args),
    }
    step, hours_before = 0, 0.0
    if checkpoint is not None:
        step, hours_before = load_checkpoint(accelerator, None, checkpoint, fixed)
        last_epoch.keep_on_main(accelerator)
        logger.info(f"resumed from {checkpoint}")

    # 4. train
    sampler.start = step * args.gradient_accumulation_steps
    loader = DataLoader(
        faces,
        batch_sampler=NumberedBatches(sampler),
        num_workers=args.dataloader_num_workers,
        collate_fn=keep_batch,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    measures, measured = args.benchmarks is not None and accelerator.is_main_process, args.output_dir / ACCURACIES

    def validate() -> None:
        accuracies = verification_accuracies(classifier.recognizer, args.benchmarks)
        accelerator.log({f"accuracy/{name}": value for name, value in accuracies.items()}, step=step)
        before = json.loads(measured.read_text()) if measured.exists() else {}
        write_json(measured, before | {str(step): accuracies})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in accuracies.items())
        tqdm.write(f"benchmarks at step {step}: {figures}")

    if step and measures and validates(step, args):  # interrupted behind its checkpoint
        if not measured.exists() or str(step) not in json.loads(measured.read_text()):
            validate()
    started = time.monotonic()
    progress = tqdm(
        initial=step, total=args.max_train_steps, desc="train", unit="step", disable=not accelerator.is_main_process
    )
    log = TrainingLog(device)
    classifier.train()
    stop = False
    while step < args.max_train_steps and not stop:
        for part in range(args.gradient_accumulation_steps):
            pixels, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            pixels = to_unit_range(pixels)
            if args.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            torch.manual_seed(mix_seed(args.seed, step, rank, part))
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
            if step >= last_epoch.first:
                last_epoch.add(losses, logits, labels)
        lr_scheduler.step()
        step += 1
        progress.update()

        hours = (time.monotonic() - started) / 3600
        stop = is_out_of_time(accelerator, hours, args.max_train_hours)
        is_last = stop or step == args.max_train_steps
        saves = is_due(step, args.checkpointing_steps) or is_last
        if is_due(step, args.logging_steps) or saves:
            logs, finite = log.take(accelerator)
            # beyond repair, and not to be saved: what was not finite is in batch norm's running averages (fp16 skips
            # steps whose gradient overflows, but then the loss is finite)
            if finite < 1:
                raise RuntimeError(f"the loss is not finite at step {step}: lower the learning rate, or use bf16.")
            epoch = step * args.gradient_accumulation_steps / batches_per_epoch
            accelerator.log({**logs, "lr": lr_scheduler.get_last_lr()[0], "epoch": epoch}, step=step)
            figures = {name: f"{value:.4g}" for name, value in logs.items()}
            progress.set_postfix(epoch=f"{epoch:.2f}", **figures)
        if saves:
            total = hours_before + hours
            last_epoch.gather(accelerator)
            save_checkpoint(accelerator, None, args.output_dir, step, fixed, args.checkpoints_total_limit, total)
            if args.push_to_hub and accelerator.is_main_process:
                push_to_hub(classifier.recognizer, args, f"Step {step}")
        if measures and validates(step, args, stop):
            validate()
            log.since = time.monotonic()  # not a time of training

    # 5. the recognizer; the head has done its work
    accelerator.wait_for_everyone()
    if step == args.max_train_steps:
        logs, finite = last_epoch.take(accelerator)
        if accelerator.is_main_process and finite:
            write_json(args.output_dir / RESULTS, {"step": step, "loss": logs["loss"], "accuracy": logs["accuracy"]})
        if finite and logs["accuracy"] < LEAST_ACCURACY:
            logger.warning(
                f"the recognizer tells hardly any of its {faces.num_identities} identities apart: in the last epoch"
                f" {logs['accuracy']:.1%} of the faces were classified right with the margin. Try --max_grad_norm 5, a"
                " smaller --margin or --learning_rate, or more --epochs."
            )
    if accelerator.is_main_process:
        save_recognizer(classifier.recognizer, args.output_dir)
        logger.info(f"recognizer saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
