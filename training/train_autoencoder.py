#!/usr/bin/env python
"""Trains a first stage on prepared faces: L1 + LPIPS (Zhang et al. 2018) + identity loss, and a patch discriminator
(Isola et al. 2017) toward the end.

    uiface prepare photos --output cache/photos --encoder buffalo_l
    accelerate launch training/train_autoencoder.py --config training/configs/autoencoder_lfw.yaml \\
        --train-data cache/photos --output-dir runs/autoencoder

Any of diffusers' `AutoencoderKL`, `AutoencoderTiny` and `VQModel`, by its config. The same command with
`--resume-from-checkpoint latest` goes on after an interruption. What is saved in `--output-dir` is the model with EMA
weights; its config holds the measured mean and deviation of the latents (`shift_factor`, `scaling_factor`).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel, VQModel
from torch import nn

from uiface_cli.options import json_object, real, whole
from uiface_diffusers.evaluation import reconstruction_quality
from uiface_diffusers.fingerprint import model_fingerprint, weights_fingerprint
from uiface_diffusers.latents import FirstStage
from uiface_diffusers.pictures import to_unit_range
from uiface_diffusers.training.autoencoding import (
    PatchDiscriminator,
    Reconstruction,
    TermsLog,
    halved,
    hinge_loss,
    load_differentiable,
    measure_latents,
    picture_grid,
)
from uiface_diffusers.training.averages import WeightAverage
from uiface_diffusers.training.datasets import FacePictures
from uiface_diffusers.training.losses import facial_feature_weights, full_precision
from uiface_diffusers.training.options import (
    SWITCH,
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
from uiface_diffusers.training.run import Product, Run, frozen, load_perceptual, make_accelerator, training_folder
from uiface_diffusers.training.schedules import make_lr_scheduler

logger = get_logger(__name__)

AUTOENCODERS = {model.__name__: model for model in (AutoencoderKL, AutoencoderTiny, VQModel)}


def add_loss_arguments(group: Options) -> None:
    group.add_argument("--lpips-weight", type=real(0), default=1.0)
    group.add_argument("--lpips-network", choices=("alex", "squeeze", "vgg"), default="alex")
    group.add_argument("--lpips-backbone", help="its convolutions' weights; torchvision downloads them if not given")
    group.add_argument("--identity-weight", type=real(0), default=0.0, help="of 1 - cosine to the face's embedding")
    text = "of the identity loss: an insightface model pack, or the .onnx file of any recognizer of aligned faces"
    group.add_argument("--identity-encoder", default="buffalo_l", help=text)
    group.add_argument("--encoder-root", default="~/.insightface", help="folder with models/PACK")
    text = "AutoencoderKL: KL divergence, AutoencoderTiny: half the latents' square, mean over their components;"
    text += " VQModel: commitment loss"
    group.add_argument("--regularization-weight", type=real(0), default=1e-3, help=text)
    text = "steps that reconstruct the half-size face from half-size latents, for latents that are easier to denoise"
    text += " (EQ-VAE, Kouzelis et al. 2025)"
    group.add_argument("--scale-equivariance-probability", type=real(0, 1), default=0.0, help=text)
    text = "standard deviation of noise on the latents that are decoded, so that the decoder forgives a denoiser's"
    text += " errors; in the units of the unscaled latents"
    group.add_argument("--latent-noise", type=real(0), default=0.0, help=text)
    group.add_argument("--facial-features", **SWITCH, help="more weight of L1 and LPIPS on eyes and mouth")
    text = "of the patch discriminator's hinge loss"
    group.add_argument("--adversarial-weight", type=real(0), default=0.0, help=text)
    group.add_argument("--adversarial-start", type=whole(0), default=0, help="first step with the discriminator")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    group: Options = parser.add_argument_group("data and model")
    group.add_argument("--train-data", nargs="+", help="caches of `uiface prepare`, all of one size")
    group.add_argument("--validation-data", help="cache of other people; faces of the training if not given")
    group.add_argument("--autoencoder", type=json_object, help="the model's config as JSON, with `_class_name`")
    group.add_argument("--init-from", help="start from this model: folder or Hub repository")
    group.add_argument("--freeze-encoder", **SWITCH, help="the decoder only: latents stay what they are")
    group.add_argument("--output-dir", type=Path, help="model, checkpoints, logs and validation grids")
    group = parser.add_argument_group("objective and optimizer")
    add_loss_arguments(group)
    add_length_arguments(group, batch_size=16, steps=100_000, accumulates=False)
    add_optimizer_arguments(group, learning_rate=5e-4, lr_scheduler="cosine")
    group.add_argument("--ema-decay", type=real(0, 1), default=0.999)
    add_machine_arguments(parser)
    group = add_checkpoint_arguments(parser, steps=1000)
    group.add_argument("--validation-faces", type=whole(), default=64)
    args = parse_recipe(parser, argv, required=("--train-data", "--output-dir"))

    if (args.autoencoder is None) == (args.init_from is None):
        parser.error("give one of --autoencoder and --init-from")
    if args.autoencoder is not None and args.autoencoder.get("_class_name") not in AUTOENCODERS:
        parser.error(f"`_class_name` of --autoencoder has to be one of {', '.join(AUTOENCODERS)}")
    if args.freeze_encoder and args.scale_equivariance_probability:
        parser.error("a frozen encoder's latents do not become scale equivariant")
    return args


def load_first_stage(args: argparse.Namespace) -> FirstStage:
    """The model of `--init-from`, or a new one of `--autoencoder`."""
    if args.init_from is not None:
        vae = AutoModel.from_pretrained(args.init_from)
        if type(vae).__name__ not in AUTOENCODERS:
            raise ValueError(f"{args.init_from} is a {type(vae).__name__}, not one of {', '.join(AUTOENCODERS)}.")
        return vae
    try:
        return AUTOENCODERS[args.autoencoder["_class_name"]].from_config(args.autoencoder)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--autoencoder {json.dumps(args.autoencoder)} makes no model: {error}") from error


def load_judges(args: argparse.Namespace, accelerator: Accelerator) -> tuple[nn.Module | None, nn.Module | None]:
    """LPIPS and the recognizer that the loss compares by, where they have a weight."""
    perceptual = recognizer = None
    if args.lpips_weight:
        perceptual = load_perceptual(accelerator, args.lpips_network, args.lpips_backbone, args.facial_features)
    if args.identity_weight:
        recognizer = load_differentiable(args.identity_encoder, args.encoder_root, accelerator.device)
        recognizer = frozen(accelerator, recognizer)
    return perceptual, recognizer


def reconstruction_terms(
    reconstruction: torch.Tensor,
    target: torch.Tensor,
    perceptual: nn.Module | None,
    recognizer: nn.Module | None,
    args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """The terms of the loss that compare a reconstruction with its face, each with its weight, in float32 whatever
    the model is trained in.

    Args:
        reconstruction, target (`torch.Tensor` of shape `(batch, 3, height, width)`): in [-1, 1].
        perceptual: LPIPS, with `spatial=True` where facial features get more weight.
        recognizer: embeds both; `None` for no identity term.
    """
    weights = facial_feature_weights(target.shape[-1], target.device) if args.facial_features else 1.0
    with full_precision(target.device):
        reconstruction, target = reconstruction.float(), target.float()
        terms = {"l1": ((reconstruction - target).abs() * weights).mean()}
        if perceptual is not None:
            terms["lpips"] = args.lpips_weight * (perceptual(target, reconstruction) * weights).mean()
        if recognizer is not None:
            with torch.no_grad():
                embeddings = recognizer(target)
            cosine = F.cosine_similarity(recognizer(reconstruction), embeddings)
            terms["identity"] = args.identity_weight * (1 - cosine).mean()
    return terms


class Model(Product):
    """The first stage; on the way, how well it reconstructs faces."""

    name = "model"

    def __init__(
        self,
        vae: FirstStage,
        dataset: FacePictures,
        validation_pixels: torch.Tensor,
        perceptual: nn.Module | None,
        recognizer: nn.Module | None,
    ):
        self.vae, self.dataset, self.pixels = vae, dataset, validation_pixels
        self.perceptual, self.recognizer = perceptual, recognizer

    def validate(self, run: Run) -> None:
        name = Path(run.args.identity_encoder).name
        recognizers = {} if self.recognizer is None else {name: self.recognizer}
        quality = reconstruction_quality(self.vae, self.pixels, self.perceptual, recognizers)
        run.report({f"validation/{name}": value for name, value in quality.figures.items()})
        run.save_picture(picture_grid(self.pixels, quality.reconstructions))

    def save(self, run: Run, folder: Path) -> None:
        """With the latents' measured mean and deviation in its config."""
        if not run.args.freeze_encoder:
            spread = range(0, len(self.dataset), max(1, len(self.dataset) // 1024))
            mean, deviation = measure_latents(self.vae, self.dataset.__getitems__(list(spread)))
            logger.info(f"latents: mean {mean:.4f}, deviation {deviation:.4f}")
            if not isinstance(self.vae, VQModel):  # its config has no shift
                self.vae.register_to_config(shift_factor=mean)
            self.vae.register_to_config(scaling_factor=1 / deviation)
        self.vae.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    with training_folder(accelerator, args) as checkpoint:
        train(args, accelerator, checkpoint)


def train(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None) -> None:
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # 1. data
    dataset = FacePictures(args.train_data)
    sampler = EndlessBatchSampler(len(dataset), args.train_batch_size, args.seed, rank, world_size)
    others = dataset if args.validation_data is None else FacePictures([args.validation_data])
    validation_pixels = others.__getitems__(list(range(min(args.validation_faces, len(others)))))

    # 2. model and losses
    torch.manual_seed(args.seed)
    vae = load_first_stage(args)
    trained = Reconstruction(vae, args.freeze_encoder, args.latent_noise)
    if args.channels_last:
        trained.to(memory_format=torch.channels_last)
    perceptual, recognizer = load_judges(args, accelerator)

    # 3. optimizer
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    average = WeightAverage(trained.to(device), args.ema_decay)
    model, optimizer = accelerator.prepare(trained, optimizer)
    discriminator = discriminator_optimizer = None
    if args.adversarial_weight:
        discriminator = PatchDiscriminator().to(device)
        options = {"lr": args.learning_rate / 2, "betas": (0.5, 0.9), "weight_decay": 0.0, "fused": True}
        discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), **options)
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # `prepare` would step it once per process

    # 4. train
    log = TermsLog(device)
    fixed = {
        "train_data": dataset.fingerprints,
        "init_from": None if args.init_from is None else model_fingerprint(vae),
    }
    for name, judge in (("lpips_backbone", perceptual), ("identity_encoder", recognizer)):
        fixed[name] = None if judge is None else weights_fingerprint(judge)
    run = Run(
        "train_autoencoder",
        args,
        accelerator,
        checkpoint,
        dataset,
        sampler,
        product=Model(vae, dataset, validation_pixels, perceptual, recognizer),
        log=log,
        lr_scheduler=lr_scheduler,
        fixed=fixed,
        average=average,
    )
    trained.train()
    for pixels in run:
        pixels = to_unit_range(pixels)
        mirrored = torch.rand(len(pixels), 1, 1, 1, device=device) < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        if args.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        # all processes take the same kind of step
        halve = np.random.default_rng((args.seed, run.step)).random() < args.scale_equivariance_probability
        with accelerator.autocast():
            reconstruction, regularization = model(pixels, halve)
        reconstruction, target = reconstruction.float(), halved(pixels) if halve else pixels
        # identity is not asked of half-size faces
        terms = reconstruction_terms(reconstruction, target, perceptual, None if halve else recognizer, args)
        terms["regularization"] = args.regularization_weight * regularization.float()
        judged = discriminator is not None and run.step >= args.adversarial_start and not halve
        if judged:
            discriminator.requires_grad_(False)
            terms["adversarial"] = -args.adversarial_weight * discriminator(reconstruction).mean()
        loss = sum(terms.values())
        accelerator.backward(loss)
        if args.max_grad_norm is not None:
            accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if judged:
            discriminator.requires_grad_(True)
            terms["discriminator"] = hinge_loss(discriminator, target, reconstruction.detach())
            accelerator.backward(terms["discriminator"])
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
        log.add(loss, terms)

    # 5. the model, with EMA weights and the latents' scale
    run.finish()


if __name__ == "__main__":
    run_script(main)
