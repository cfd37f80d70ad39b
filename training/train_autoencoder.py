#!/usr/bin/env python
"""Trains a first stage on prepared faces: L1 + LPIPS (Zhang et al. 2018) + identity loss, and a patch discriminator
(Isola et al. 2017) toward the end.

    uiface prepare photos --output cache/photos --encoder buffalo_l
    accelerate launch training/train_autoencoder.py --config training/configs/autoencoder_lfw.yaml \
        --train_data cache/photos --output_dir runs/autoencoder

Any of diffusers' `AutoencoderKL`, `AutoencoderTiny` and `VQModel`, by its config. The same command with
`--resume_from_checkpoint latest` goes on after an interruption. What is saved in `--output_dir` is the model with EMA
weights; its config holds the measured mean and deviation of the latents (`shift_factor`, `scaling_factor`).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel, VQModel
from diffusers.training_utils import EMAModel
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from uiface_diffusers.data.face_cache import load_pictures
from uiface_diffusers.evaluation import load_lpips, reconstruction_quality
from uiface_diffusers.faces import FaceEncoder, TorchRecognizer
from uiface_diffusers.latents import FirstStage
from uiface_diffusers.options import json_object, real, whole
from uiface_diffusers.pictures import rgb_bytes, to_bytes, to_unit_range
from uiface_diffusers.seeds import mix_seed
from uiface_diffusers.training_utils import (
    SWITCH,
    EndlessBatchSampler,
    add_checkpoint_arguments,
    add_machine_arguments,
    add_optimizer_arguments,
    compiled,
    ema_weights,
    facial_feature_weights,
    find_checkpoint,
    is_due,
    is_out_of_time,
    load_checkpoint,
    make_accelerator,
    make_lr_scheduler,
    open_caches,
    parse_recipe,
    run_script,
    save_checkpoint,
    schedule_settings,
    training_folder,
    validates,
)

logger = get_logger(__name__)

AUTOENCODERS = {model.__name__: model for model in (AutoencoderKL, AutoencoderTiny, VQModel)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with any of the options below; the command line wins")

    group = parser.add_argument_group("data and model")
    group.add_argument("--train_data", nargs="+", help="caches of `uiface prepare`, all of one size")
    group.add_argument("--validation_data", help="cache of other people; faces of the training if not given")
    group.add_argument("--autoencoder", type=json_object, help="the model's config as JSON, with `_class_name`")
    group.add_argument("--init_from", help="start from this model: folder or Hub repository")
    group.add_argument(
        "--freeze_encoder",
        **SWITCH,
        help="the decoder only: latents stay what they are",
    )
    group.add_argument("--output_dir", type=Path, help="model, checkpoints, logs and validation grids")

    group = parser.add_argument_group("objective and optimizer")
    group.add_argument("--lpips_weight", type=real(0), default=1.0)
    group.add_argument("--lpips_network", choices=("alex", "squeeze", "vgg"), default="alex")
    group.add_argument("--lpips_backbone", help="its convolutions' weights; torchvision downloads them if not given")
    group.add_argument("--identity_weight", type=real(0), default=0.0, help="of 1 - cosine to the face's embedding")
    group.add_argument(
        "--identity_encoder",
        default="buffalo_l",
        help="of the identity loss: an insightface model pack, or the .onnx file of any recognizer of aligned faces",
    )
    group.add_argument("--encoder_root", default="~/.insightface", help="folder with models/PACK")
    group.add_argument(
        "--regularization_weight",
        type=real(0),
        default=1e-3,
        help="AutoencoderKL: KL divergence, AutoencoderTiny: half the latents' square, mean over their components;"
        " VQModel: commitment loss",
    )
    group.add_argument(
        "--scale_equivariance_probability",
        type=real(0, 1),
        default=0.0,
        help="steps that reconstruct the half-size face from half-size latents, for latents that are easier to"
        " denoise (EQ-VAE, Kouzelis et al. 2025)",
    )
    group.add_argument(
        "--latent_noise",
        type=real(0),
        default=0.0,
        help="standard deviation of noise on the latents that are decoded, so that the decoder forgives a denoiser's"
        " errors; in the units of the unscaled latents",
    )
    group.add_argument("--facial_features", **SWITCH, help="more weight of L1 and LPIPS on eyes and mouth")
    group.add_argument(
        "--adversarial_weight", type=real(0), default=0.0, help="of the patch discriminator's hinge loss"
    )
    group.add_argument("--adversarial_start", type=whole(0), default=0, help="first step with the discriminator")
    group.add_argument("--train_batch_size", type=whole(), default=16, help="faces per step and process")
    group.add_argument("--max_train_steps", type=whole(), default=100_000)
    group.add_argument("--max_train_hours", type=real(0), help="save and stop after this time in this run")
    add_optimizer_arguments(group, learning_rate=5e-4, lr_scheduler="cosine")
    group.add_argument("--ema_decay", type=real(0, 1), default=0.999)

    add_machine_arguments(parser)

    group = add_checkpoint_arguments(parser, steps=1000)
    group.add_argument("--validation_faces", type=whole(), default=64)

    args = parse_recipe(parser, argv, required=("train_data", "output_dir"))
    if (args.autoencoder is None) == (args.init_from is None):
        parser.error("give one of --autoencoder and --init_from")
    if args.autoencoder is not None and args.autoencoder.get("_class_name") not in AUTOENCODERS:
        parser.error(f"`_class_name` of --autoencoder has to be one of {', '.join(AUTOENCODERS)}")
    if args.freeze_encoder and args.scale_equivariance_probability:
        parser.error("a frozen encoder's latents do not become scale equivariant")
    return args


class FacePictures(Dataset):
    """Faces of prepared caches, `(N, 3, size, size)` bytes; fetched a batch at a time.

    Raises:
        ValueError: the caches differ in size.
    """

    def __init__(self, folders: list[str]):
        caches = open_caches(folders)
        self.image_size = caches[0].image_size
        self.fingerprints = [cache.fingerprint for cache in caches]
        self.table = load_pictures([shard for cache in caches for shard in cache.shards])

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        pictures = [rgb_bytes(picture) for picture in self.table[indices]["image"]]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def keep_batch(batch):
    """What `FacePictures` fetches is a batch already."""
    return batch


def load_differentiable(name: str, root: str) -> TorchRecognizer:
    """The recognizer of a model pack, or of an ONNX file, for a loss."""
    if not name.endswith(".onnx"):
        return FaceEncoder(name, root, det_size=160).to_torch()
    model = ArcFaceONNX(name)
    return TorchRecognizer(name, model.input_mean, model.input_std)


class Reconstruction(nn.Module):
    """A first stage as one module, pixels to pixels, so that all gradients are reduced together."""

    def __init__(self, vae: FirstStage, freeze_encoder: bool = False, latent_noise: float = 0.0):
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise
        if freeze_encoder:
            vae.encoder.requires_grad_(False)
            if getattr(vae, "quant_conv", None) is not None:
                vae.quant_conv.requires_grad_(False)

    def forward(self, pixels: torch.Tensor, halve: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction, of half the size if `halve`, and the regularization of the latents."""
        encoded = self.vae.encode(pixels)
        if isinstance(self.vae, AutoencoderKL):
            posterior = encoded.latent_dist
            latents = posterior.sample()
            regularization = posterior.kl().mean() / latents[0].numel()
        else:
            latents = encoded.latents
            regularization = latents.square().mean() / 2
        latents = halved(latents) if halve else latents
        if self.latent_noise:
            latents = latents + self.latent_noise * torch.randn_like(latents)
        decoded = self.vae.decode(latents)
        if isinstance(self.vae, VQModel):
            regularization = decoded.commit_loss.mean()
        return decoded.sample, regularization


class PatchDiscriminator(nn.Sequential):
    """Tells photographs from reconstructions, patch by patch: `(N, 3, height, width)` in [-1, 1] -> logits
    `(N, 1, height / 8, width / 8)`. Spectral norm bounds its slope."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)):
        layers, channels = [], 3
        for width in widths:
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            channels = width
        super().__init__(*layers, spectral_norm(nn.Conv2d(channels, 1, 3, padding=1)))


def hinge_loss(discriminator: nn.Module, real: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss on both kinds of faces (Lim & Ye 2017)."""
    of_real, of_reconstructed = discriminator(torch.cat([real, reconstructed])).chunk(2)
    return (F.relu(1 - of_real).mean() + F.relu(1 + of_reconstructed).mean()) / 2


def halved(tensor: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(tensor, 2)


def reconstruction_terms(
    reconstruction: torch.Tensor,
    target: torch.Tensor,
    perceptual: nn.Module | None,
    recognizer: nn.Module | None,
    args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """The terms of the loss that compare a reconstruction with its face, each with its weight, in float32.

    Args:
        reconstruction, target (`torch.Tensor` of shape `(batch, 3, height, width)`): in [-1, 1].
        perceptual: LPIPS, with `spatial=True` where facial features get more weight.
        recognizer: embeds both; `None` for no identity term.
    """
    weights = facial_feature_weights(target.shape[-1], target.device) if args.facial_features else 1.0
    terms = {"l1": ((reconstruction - target).abs() * weights).mean()}
    if perceptual is not None:
        terms["lpips"] = args.lpips_weight * (perceptual(target, reconstruction) * weights).mean()
    if recognizer is not None:
        with torch.no_grad():
            embeddings = recognizer(target)
        cosine = F.cosine_similarity(recognizer(reconstruction), embeddings)
        terms["identity"] = args.identity_weight * (1 - cosine).mean()
    return terms


@torch.no_grad()
def measure_latents(vae: FirstStage, pixels: torch.Tensor, batch_size: int = 32) -> tuple[float, float]:
    """Mean and standard deviation of the latents of `(N, 3, height, width)` bytes, over all components; an
    `AutoencoderKL`'s are sampled, as for the denoiser."""
    latents = []
    generator = torch.Generator(vae.device).manual_seed(0)
    for batch in pixels.split(batch_size):
        encoded = vae.encode(to_unit_range(batch).to(vae.device, vae.dtype))
        latents.append(encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents)
    latents = torch.cat(latents).double()
    return latents.mean().item(), latents.std().item()


class LossLog:
    """Means of the loss's terms over the steps in which it was finite. Sums stay on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}  # of each term: sum and number
        self.steps = torch.zeros(2, device=device)  # finite, all

    def add(self, loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        finite = loss.detach().isfinite().float()
        self.steps += torch.stack([finite, torch.ones_like(finite)])
        for name, term in terms.items():
            pair = torch.stack([term.detach().float().nan_to_num(0, 0, 0) * finite, finite])
            self.sums[name] = self.sums.get(name, 0) + pair

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        """The means of all processes since the last call, and the share of finite steps."""
        sums = {name: accelerator.reduce(self.sums[name], "sum").tolist() for name in sorted(self.sums)}
        finite, steps = accelerator.reduce(self.steps, "sum").tolist()
        self.__init__(self.device)
        return {name: total / number for name, (total, number) in sums.items() if number}, finite / steps


def picture_grid(pixels: torch.Tensor, reconstructions: torch.Tensor, columns: int = 8) -> PIL.Image.Image:
    """Rows of photographs, each above its row of reconstructions."""
    rows, columns = [], min(columns, len(pixels))
    for start in range(0, len(pixels) - columns + 1, columns):
        for row in (to_unit_range(pixels), reconstructions):
            rows.append(torch.cat(list(row[start : start + columns]), dim=2))
    return PIL.Image.fromarray(to_bytes(torch.cat(rows, dim=1)).permute(1, 2, 0).numpy())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    with training_folder(accelerator, args.output_dir):
        train(args, accelerator)


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # 1. data
    dataset = FacePictures(args.train_data)
    others = dataset if args.validation_data is None else FacePictures([args.validation_data])
    validation_pixels = others.__getitems__(list(range(min(args.validation_faces, len(others)))))

    # 2. model and losses
    torch.manual_seed(args.seed)
    if args.init_from is not None:
        vae = AutoModel.from_pretrained(args.init_from)
        if type(vae).__name__ not in AUTOENCODERS:
            raise ValueError(f"{args.init_from} is a {type(vae).__name__}, not one of {', '.join(AUTOENCODERS)}.")
    else:
        try:
            vae = AUTOENCODERS[args.autoencoder["_class_name"]].from_config(args.autoencoder)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"--autoencoder {json.dumps(args.autoencoder)} makes no model: {error}") from error
    trained = Reconstruction(vae, args.freeze_encoder, args.latent_noise)
    if args.channels_last:
        trained.to(memory_format=torch.channels_last)
    perceptual = None
    if args.lpips_weight:
        perceptual = load_lpips(args.lpips_network, args.lpips_backbone).to(device)
        perceptual.spatial = args.facial_features
        perceptual = compiled(accelerator, perceptual)
    recognizer = None
    if args.identity_weight:
        recognizer = load_differentiable(args.identity_encoder, args.encoder_root).to(device)
        recognizer = compiled(accelerator, recognizer)

    # 3. optimizer
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    trained.to(device)
    ema = EMAModel(trained.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    model, optimizer = accelerator.prepare(trained, optimizer)
    discriminator = discriminator_optimizer = None
    if args.adversarial_weight:
        judge = PatchDiscriminator().to(device)
        discriminator_optimizer = torch.optim.AdamW(
            judge.parameters(), lr=args.learning_rate / 2, betas=(0.5, 0.9), weight_decay=0.0, fused=True
        )
        discriminator, discriminator_optimizer = accelerator.prepare(judge, discriminator_optimizer)
    # not given to `prepare`: that would step the schedule once per process
    accelerator.register_for_checkpointing(lr_scheduler)
    if args.report_to != "none":
        settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
        accelerator.init_trackers("train_autoencoder", config=settings)
    # what the data's order depends on, besides the step, and what a checkpoint's optimizer would overrule
    fixed = {"seed": args.seed, "train_batch_size": args.train_batch_size, "num_processes": world_size}
    fixed |= {"faces": len(dataset), "train_data": dataset.fingerprints, **schedule_settings(args)}
    fixed |= {"autoencoder": args.autoencoder, "freeze_encoder": args.freeze_encoder}
    step, hours_before = 0, 0.0
    if checkpoint is not None:
        step, hours_before = load_checkpoint(accelerator, ema, checkpoint, fixed)
        logger.info(f"resumed from {checkpoint}")

    # 4. train
    sampler = EndlessBatchSampler(len(dataset), args.train_batch_size, args.seed, rank, world_size, start=step)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        collate_fn=keep_batch,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    grids = args.output_dir / "validation"

    def validate() -> None:
        recognizers = {} if recognizer is None else {Path(args.identity_encoder).name: recognizer}
        with ema_weights(ema, trained):
            quality = reconstruction_quality(vae, validation_pixels, perceptual, recognizers)
        accelerator.log({f"validation/{name}": value for name, value in quality.figures.items()}, step=step)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in quality.figures.items())
        tqdm.write(f"validation at step {step}: {figures}")
        grids.mkdir(exist_ok=True)
        picture_grid(validation_pixels, quality.reconstructions).save(grids / f"step-{step:07d}.png")

    # what belonged to this step and was interrupted
    interrupted = validates(step, args) and not (grids / f"step-{step:07d}.png").exists()
    if step and accelerator.is_main_process and interrupted:
        validate()
    started = time.monotonic()
    progress = tqdm(
        initial=step, total=args.max_train_steps, desc="train", unit="step", disable=not accelerator.is_main_process
    )
    trained.train()
    log = LossLog(device)
    stop = False
    while step < args.max_train_steps and not stop:
        pixels = to_unit_range(next(batches).to(device, non_blocking=True))
        # all processes take the same kind of step
        halve = np.random.default_rng((args.seed, step)).random() < args.scale_equivariance_probability
        torch.manual_seed(mix_seed(args.seed, step, rank))
        mirrored = torch.rand(len(pixels), 1, 1, 1, device=device) < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        if args.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            reconstruction, regularization = model(pixels, halve)
        # the losses in float32: differences of neighboring values drown in bf16
        reconstruction, target = reconstruction.float(), halved(pixels) if halve else pixels
        # identity is not asked of half-size faces
        terms = reconstruction_terms(reconstruction, target, perceptual, None if halve else recognizer, args)
        terms["regularization"] = args.regularization_weight * regularization.float()
        judged = discriminator is not None and step >= args.adversarial_start and not halve
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
        lr_scheduler.step()
        ema.step(trained.parameters())
        step += 1
        progress.update()
        log.add(loss, terms)

        hours = (time.monotonic() - started) / 3600
        stop = is_out_of_time(accelerator, hours, args.max_train_hours)
        is_last = stop or step == args.max_train_steps
        saves = is_due(step, args.checkpointing_steps) or is_last
        if is_due(step, args.logging_steps) or saves:
            logs, finite = log.take(accelerator)
            # fp16 skips a step that overflows; anything else is beyond repair, and is not to be saved
            if finite == 0 or (finite < 1 and accelerator.mixed_precision != "fp16"):
                raise RuntimeError(f"the loss is not finite at step {step}: lower the learning rate, or use bf16.")
            accelerator.log({**logs, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
            progress.set_postfix({name: f"{value:.4f}" for name, value in logs.items()})
        if saves:
            total = hours_before + hours
            save_checkpoint(accelerator, ema, args.output_dir, step, fixed, args.checkpoints_total_limit, total)
        if accelerator.is_main_process and validates(step, args, stop):
            validate()

    # 5. the model, with EMA weights and the latents' scale
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with ema_weights(ema, trained):
            if not args.freeze_encoder:
                spread = range(0, len(dataset), max(1, len(dataset) // 1024))
                mean, deviation = measure_latents(vae, dataset.__getitems__(list(spread)))
                logger.info(f"latents: mean {mean:.4f}, deviation {deviation:.4f}")
                if not isinstance(vae, VQModel):  # its config has no shift
                    vae.register_to_config(shift_factor=mean)
                vae.register_to_config(scaling_factor=1 / deviation)
            vae.save_pretrained(args.output_dir)
        logger.info(f"model saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
