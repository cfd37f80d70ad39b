#!/usr/bin/env python
"""Trains UIFace's denoiser with identity projector and empty context (Lin et al., ICLR 2025, sec. 3.2).

    uiface prepare photos --output cache/photos --encoder buffalo_l
    accelerate launch training/train.py --config training/configs/uiface_casia.yaml \
        --train_data cache/photos --vae path/to/vq-f4 --output_dir runs/casia

The same command with `--resume_from_checkpoint latest` goes on after an interruption and gives the same parameters as
an uninterrupted run: all randomness of a step is drawn from the seed, the step and the process, and the order of the
data from the seed and the epoch. What is saved is a pipeline for `UIFacePipeline.from_pretrained`, with the EMA
weights.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoModel, DDPMScheduler, SchedulerMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from huggingface_hub.errors import HTTPError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline, UIFaceUNet2DModel
from uiface_diffusers.data import FaceCache, LatentSet, cache_latents
from uiface_diffusers.denoisers import TRAINABLE, denoiser_kind
from uiface_diffusers.encoders import EncoderMark, check_same_encoder, common_encoder, projector_mark
from uiface_diffusers.evaluation import load_lpips
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import write_json
from uiface_diffusers.fingerprint import model_fingerprint
from uiface_diffusers.latents import decode_latents
from uiface_diffusers.objectives import (
    OBJECTIVES,
    PREDICTS_LATENTS,
    new_sampler,
    objective_of,
    training_scheduler,
)
from uiface_diffusers.options import json_object, real, whole
from uiface_diffusers.pipeline_uiface import MODEL_DEFAULTS
from uiface_diffusers.seeds import mix_seed
from uiface_diffusers.training_utils import (
    SWITCH,
    EndlessBatchSampler,
    add_checkpoint_arguments,
    add_hub_arguments,
    add_machine_arguments,
    add_optimizer_arguments,
    compiled,
    describe_recipe,
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
    sampling_weights,
    save_checkpoint,
    schedule_settings,
    training_folder,
    validates,
)
from uiface_diffusers.two_stage.schedulers import prediction_type

logger = get_logger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with any of the options below; the command line wins")

    group = parser.add_argument_group("data and models")
    group.add_argument("--train_data", nargs="+", help="caches of `uiface prepare`, all of one encoder and size")
    group.add_argument("--init_from", help="pipeline to start from: folder or Hub repository")
    group.add_argument("--vae", help="first stage: folder or Hub repository of a diffusers autoencoder")
    group.add_argument("--vae_subfolder", help="subfolder of the first stage")
    group.add_argument("--denoiser", choices=tuple(TRAINABLE), default="uiface", help="UIFace's UNet or a transformer")
    group.add_argument("--unet", type=json_object, default={}, help="UIFaceUNet2DModel options, as JSON")
    group.add_argument("--transformer", type=json_object, default={}, help="PixArtTransformer2DModel options, as JSON")
    group.add_argument("--context_dropout", type=real(0, 1), default=0.25, help="dropout of the context's components")
    group.add_argument(
        "--empty_probability",
        type=real(0, 1),
        default=0.2,
        help="how often the empty context is trained; beside it, the first sample of every batch and process has it",
    )
    group.add_argument(
        "--balanced_sampling",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="every identity as often, however many faces it has",
    )
    group.add_argument(
        "--train_data_shares",
        nargs="+",
        type=real(0),
        help="how much of the training each cache gets, one number per cache; by default, in proportion to its faces",
    )
    group.add_argument(
        "--side_view_share",
        type=real(0, 1),
        help="how much of the training looks sideways (|yaw| > 0.25), also where --train_data_shares and"
        " --balanced_sampling are given; by default, in proportion to the faces",
    )
    group.add_argument("--output_dir", type=Path, help="pipeline, checkpoints, logs and validation grids")

    group = parser.add_argument_group("objective and optimizer")
    group.add_argument("--prediction_type", choices=tuple(OBJECTIVES), default="epsilon")
    group.add_argument("--snr_gamma", type=real(0), help="min-SNR loss weights (Hang et al. 2023); 5.0 is usual")
    group.add_argument(
        "--identity_weight",
        type=real(0),
        default=0.0,
        help="of 1 - cosine between the denoised face and the identity it was told (DCFace, Kim et al. 2023); needs"
        " --encoder_root and v_prediction or flow_prediction",
    )
    group.add_argument(
        "--lpips_weight",
        type=real(0),
        default=0.0,
        help="of LPIPS between the denoised and the clean face, both decoded, with weight on eyes and mouth; needs"
        " v_prediction or flow_prediction",
    )
    group.add_argument(
        "--lpips_backbone", help="AlexNet's convolutions for it; torchvision downloads them if not given"
    )
    group.add_argument(
        "--decoded_samples", type=whole(), default=8, help="faces per batch that are decoded for these two losses"
    )
    group.add_argument(
        "--decoded_noise",
        choices=("any", "low"),
        default="any",
        help="which faces are decoded: all noise levels alike, or drawn in proportion to alpha_bar",
    )
    group.add_argument(
        "--timestep_sampling",
        choices=tuple(TIMESTEP_SAMPLING),
        default="uniform",
        help="logit_normal: sigmoid of a normal with mean -0.5 and deviation 1.2 (Esser et al. 2024), which spends"
        " fewer samples on nearly pure noise",
    )
    group.add_argument("--train_batch_size", type=whole(), default=64, help="samples per step and process")
    group.add_argument("--max_train_steps", type=whole(), default=250_000)
    group.add_argument("--max_train_hours", type=real(0), help="save and stop after this time in this run")
    group.add_argument("--gradient_accumulation_steps", type=whole(), default=1, help="batches of one optimizer step")
    add_optimizer_arguments(group, learning_rate=1e-4, lr_scheduler="cosine_warm_restarts")
    group.add_argument("--ema_decay", type=real(0, 1), default=0.9999)

    add_machine_arguments(parser).add_argument("--gradient_checkpointing", **SWITCH)

    group = add_checkpoint_arguments(parser, steps=5000)
    group.add_argument(
        "--snapshot_steps", type=whole(0), default=0, help="keep the pipeline of every so many steps, too"
    )
    group.add_argument("--validation_seeds", type=whole(), default=4, help="pictures per row of the grid")
    group.add_argument("--validation_inference_steps", type=whole(), default=50)
    group.add_argument(
        "--encoder_root",
        help="folder with models/PACK of the caches' encoder: the grid's mean cosine to its identities is logged",
    )

    add_hub_arguments(group, "pipeline")

    args = parse_recipe(parser, argv, required=("train_data", "output_dir"))
    if args.init_from is None and args.vae is None:
        parser.error("--vae or --init_from is required")
    # of predicted noise the clean latents are no stable function: the noisier, the less
    if args.identity_weight and (args.encoder_root is None or args.prediction_type not in PREDICTS_LATENTS):
        parser.error("--identity_weight needs --encoder_root and --prediction_type v_prediction or flow_prediction")
    if args.lpips_weight and args.prediction_type not in PREDICTS_LATENTS:
        parser.error("--lpips_weight needs --prediction_type v_prediction or flow_prediction")
    if args.train_data_shares is not None and len(args.train_data_shares) != len(args.train_data):
        parser.error(
            f"--train_data_shares has {len(args.train_data_shares)} numbers for {len(args.train_data)} caches"
        )
    if args.train_data_shares is not None and not sum(args.train_data_shares):
        parser.error("--train_data_shares are all 0: nothing would be drawn")
    if args.transformer if args.denoiser == "uiface" else args.unet:
        other = "transformer" if args.denoiser == "uiface" else "unet"
        parser.error(f"--{other} has options of another network than --denoiser {args.denoiser}")
    if args.init_from is not None and (args.unet or args.transformer):
        parser.error("--unet and --transformer cannot change the network of --init_from")
    return args


def _uniform_timesteps(number: int, num_train_timesteps: int, device: torch.device) -> torch.Tensor:
    return torch.randint(num_train_timesteps, (number,), device=device)


def _logit_normal_timesteps(number: int, num_train_timesteps: int, device: torch.device) -> torch.Tensor:
    share = torch.sigmoid(1.2 * torch.randn(number, device=device) - 0.5)
    return (share * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


TIMESTEP_SAMPLING = {"uniform": _uniform_timesteps, "logit_normal": _logit_normal_timesteps}


class LatentFaces(Dataset):
    """Latents of both flips `(2, C, h, w)` and identity embeddings; fetched a batch at a time."""

    def __init__(self, latents: LatentSet, embeddings: torch.Tensor):
        self.latents, self.embeddings = latents, embeddings

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latents.__getitems__(indices), self.embeddings[indices]


def keep_batch(batch):
    """What `LatentFaces` fetches is a batch already."""
    return batch


class ConditionalDenoiser(nn.Module):
    """The three trained components as one module, so that all gradients are reduced together."""

    def __init__(self, unet: UIFaceUNet2DModel, identity_projector: IdentityProjector, empty_context: EmptyContext):
        super().__init__()
        self.unet, self.identity_projector, self.empty_context = unet, identity_projector, empty_context

    def forward(self, noisy_latents, timesteps, identity_embeds, is_empty):
        context = self.identity_projector(identity_embeds, return_dict=False)[0]
        empty = self.empty_context(len(context), return_dict=False)[0]
        context = torch.where(is_empty[:, None, None], empty, context)
        return self.unet(noisy_latents, timestep=timesteps, encoder_hidden_states=context, return_dict=False)[0]


class DenoisingLoss(NamedTuple):
    """Of every sample: loss `(batch,)`, timestep `(batch,)`, whether the context was empty `(batch,)`, and the clean
    latents as predicted and as they are `(batch, C, h, w)`."""

    losses: torch.Tensor
    timesteps: torch.Tensor
    is_empty: torch.Tensor
    denoised: torch.Tensor
    latents: torch.Tensor


def denoising_loss(
    denoiser: nn.Module,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    identity_embeds: torch.Tensor,
    empty_probability: float,
    snr_gamma: float | None,
    timestep_sampling: str = "uniform",
) -> DenoisingLoss:
    """Loss of every sample: MSE of the predicted noise (or v, or velocity) at a random timestep, under the identity
    or, with `empty_probability` and always in row 0, under the empty context (UIFace, sec. 3.2; the published code).

    Args:
        latents (`torch.Tensor` of shape `(batch, 2, C, h, w)`): both flips; one is chosen for each sample.
        identity_embeds (`torch.Tensor` of shape `(batch, identity_dim)`): of unit length.
    """
    batch_size, device = len(latents), latents.device
    flip = torch.randint(2, (batch_size,), device=device)
    latents = latents[torch.arange(batch_size, device=device), flip].float()
    noise = torch.randn_like(latents)
    timesteps = TIMESTEP_SAMPLING[timestep_sampling](batch_size, scheduler.config.num_train_timesteps, device)
    is_empty = torch.rand(batch_size, device=device) < empty_probability
    # the empty context gets a gradient in every step
    is_empty[:1].fill_(True)  # assigning to `is_empty[0]` would wait for the device

    objective = objective_of(scheduler)
    noisy = objective.noisy(latents, noise, timesteps)
    prediction = denoiser(noisy, objective.denoiser_timesteps(timesteps), identity_embeds, is_empty).float()
    target = objective.target(latents, noise, timesteps)
    loss = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        loss = objective.weighted(loss, timesteps, snr_gamma)
    return DenoisingLoss(loss, timesteps, is_empty, objective.denoised(noisy, prediction, timesteps), latents)


class FaceLosses(NamedTuple):
    """Of the decoded faces: cosine to the identity they were given, whether it counts (not under the empty context),
    and LPIPS to the clean face (zeros where it is not asked for), `(decoded_samples,)` each."""

    cosines: torch.Tensor
    has_identity: torch.Tensor
    lpips: torch.Tensor


def draw_rows(weights: torch.Tensor, number: int) -> torch.Tensor:
    """`number` different rows, drawn in proportion to `weights` `(rows,)` (Gumbel top-k). A fixed number, and so the
    device need not be waited for; rows of weight 0 come last."""
    return (weights.log() - torch.empty_like(weights).exponential_().log()).topk(min(number, len(weights))).indices


def jitter(faces: torch.Tensor) -> torch.Tensor:
    """Faces `(N, 3, height, width)`, each mirrored or not, scaled by up to 5 % and moved by up to 3 % of its side: a
    recognizer is harder to satisfy by patterns of pixels."""
    number, device = len(faces), faces.device
    scale = 1 + 0.05 * (2 * torch.rand(number, device=device) - 1)
    theta = torch.zeros(number, 2, 3, device=device)
    theta[:, 0, 0] = scale * (1 - 2 * torch.randint(2, (number,), device=device))
    theta[:, 1, 1] = scale
    theta[:, :, 2] = 0.06 * (2 * torch.rand(number, 2, device=device) - 1)
    grid = F.affine_grid(theta, list(faces.shape), align_corners=False)
    return F.grid_sample(faces, grid, padding_mode="border", align_corners=False)


def face_losses(
    vae: nn.Module,
    recognizer: nn.Module | None,
    perceptual: nn.Module | None,
    loss: DenoisingLoss,
    identity_embeds: torch.Tensor,
    num_samples: int,
    weights: torch.Tensor | None = None,
) -> FaceLosses:
    """Decodes some of the faces as denoised in one step, and compares them with what they should be. Differentiable
    in the prediction.

    Args:
        recognizer: embeds `(N, 3, height, width)` in [-1, 1].
        perceptual: LPIPS with `spatial=True`.
        weights (`torch.Tensor` of shape `(batch,)`, *optional*): the faces are drawn in proportion to it.
    """
    weights = torch.ones_like(loss.losses) if weights is None else weights
    rows = draw_rows(weights if perceptual is not None else weights * ~loss.is_empty, num_samples)
    faces = decode_latents(vae, loss.denoised[rows].to(vae.dtype)).float()
    cosines = lpips = torch.zeros(len(rows), device=faces.device)
    if recognizer is not None:
        cosines = F.cosine_similarity(recognizer(jitter(faces)), identity_embeds[rows])
    if perceptual is not None:
        with torch.no_grad():
            clean = decode_latents(vae, loss.latents[rows].to(vae.dtype)).float()
        lpips = (perceptual(clean, faces) * facial_feature_weights(faces.shape[-1], faces.device)).mean(dim=(1, 2, 3))
    return FaceLosses(cosines, ~loss.is_empty[rows], lpips)


class LossLog:
    """Running means of the loss: over all, by quarter of the timesteps, by context; and of the decoded faces' identity
    cosine and LPIPS, where they are measured. Sums stay on the device."""

    QUARTERS = 4

    def __init__(self, num_train_timesteps: int, device: torch.device):
        self.num_train_timesteps = num_train_timesteps
        # quarter x context (identity, empty) x (sum of the finite losses, their number, the number of all)
        self.sums = torch.zeros(self.QUARTERS, 2, 3, device=device)
        self.faces = torch.zeros(3, device=device)  # sums of cosines and of their number, of LPIPS
        self.decoded = 0

    def add(self, loss: DenoisingLoss, faces: FaceLosses | None = None) -> None:
        losses = loss.losses.detach().float()
        finite = losses.isfinite()
        quarter = loss.timesteps * self.QUARTERS // self.num_train_timesteps
        values = torch.stack([losses.nan_to_num(0, 0, 0) * finite, finite.float(), torch.ones_like(losses)], dim=1)
        self.sums.index_put_((quarter, loss.is_empty.long()), values, accumulate=True)
        if faces is not None:
            counted = faces.has_identity.float()
            self.faces += torch.stack([(faces.cosines * counted).sum(), counted.sum(), faces.lpips.sum()]).detach()
            self.decoded += len(counted)

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        """The means of all processes since the last call, what had no sample left out, and the share of samples whose
        loss was finite."""
        sums = accelerator.reduce(self.sums, "sum").cpu()
        self.sums = torch.zeros_like(self.sums)
        parts = {"loss": sums.sum(dim=(0, 1))}
        parts |= {f"loss/quarter_{quarter + 1}": sums[quarter].sum(dim=0) for quarter in range(self.QUARTERS)}
        parts |= {f"loss/{context}": sums[:, i].sum(dim=0) for i, context in enumerate(("identity", "empty"))}
        means = {name: (total / number).item() for name, (total, number, _) in parts.items() if number}
        if self.decoded:
            cosines, number, lpips = accelerator.reduce(self.faces, "sum").tolist()
            if cosines:
                means["identity_cosine"] = cosines / number
            if lpips:
                means["lpips"] = lpips / (self.decoded * accelerator.num_processes)
            self.faces, self.decoded = torch.zeros_like(self.faces), 0
        return means, (parts["loss"][1] / parts["loss"][2]).item()


def load_training_data(
    args, caches: Sequence[FaceCache], accelerator: Accelerator, vae
) -> tuple[LatentFaces, list[str], torch.Tensor | None, EncoderMark]:
    """Data set, identity of each face, how often each face is drawn (None: all alike), and encoder. Checks that the
    caches are of one encoder before anything is encoded."""
    encoder = common_encoder({str(cache.folder): cache.encoder_mark for cache in caches})
    # too few faces are named before they are encoded
    EndlessBatchSampler(sum(map(len, caches)), args.train_batch_size, args.seed, 0, accelerator.num_processes)
    banks = [cache.embeddings() for cache in caches]
    names = [f"{cache.folder}/{name}" for cache, bank in zip(caches, banks, strict=True) for name in bank.names]
    poses = None
    if args.side_view_share is not None:
        poses = np.concatenate([cache.poses() for cache in caches])
        unknown = np.isnan(poses[:, 0]).sum()
        if unknown:
            logger.warning(f"{unknown} of {len(poses)} faces have no head pose: they count as no side views")
    lengths = [len(cache) for cache in caches]
    weights = sampling_weights(
        names, lengths, poses, args.balanced_sampling, args.train_data_shares, args.side_view_share
    )
    with accelerator.main_process_first():
        files = [file for cache in caches for file in cache_latents(cache, vae, accelerator.device)]
    latents, embeddings = LatentSet(files), torch.cat([bank.embeddings for bank in banks])
    if len(latents) != len(embeddings):
        raise ValueError(
            f"{len(latents)} cached latents for {len(embeddings)} faces in {args.train_data}: delete the latents-*"
            " files to encode them again."
        )
    return LatentFaces(latents, embeddings), names, weights, encoder


def build_denoiser(
    args, latent_shape: torch.Size, identity_dim: int, encoder: EncoderMark
) -> tuple[ConditionalDenoiser, SchedulerMixin, dict[str, float]]:
    """The three trained components, the sampler, and the defaults of its call that are not the paper's: new ones, or
    those of `--init_from`.

    Raises:
        ValueError: the pipeline to start from is of another encoder, objective or number of latent channels.
    """
    channels, height, width = latent_shape
    if args.init_from is None:
        kind = TRAINABLE[args.denoiser]
        unet = kind.build(channels, height, width, args.unet | args.transformer)
        context_dim, num_tokens = kind.context_dim(unet), kind.num_tokens
        projector = IdentityProjector(
            identity_dim,
            context_dim,
            num_tokens,
            dropout=args.context_dropout,
            identity_encoder=encoder.name,
            identity_encoder_fingerprint=encoder.fingerprint,
        )
        scheduler = new_sampler(args.prediction_type)
        return ConditionalDenoiser(unet, projector, EmptyContext(context_dim, num_tokens)), scheduler, {}
    pipeline = UIFacePipeline.from_pretrained(args.init_from)
    projector = pipeline.identity_projector
    check_same_encoder(args.init_from, projector_mark(projector), "the training data", encoder)
    wanted = {"identity_dim": identity_dim, "latent channels": channels, "prediction_type": args.prediction_type}
    given = {"identity_dim": projector.config.identity_dim, "latent channels": pipeline.unet.config.in_channels}
    given["prediction_type"] = prediction_type(pipeline.scheduler)
    projector.register_to_config(identity_encoder=encoder.name)  # a fresh projector has none
    if encoder.fingerprint is not None:
        projector.register_to_config(identity_encoder_fingerprint=encoder.fingerprint)
    if given != wanted:
        raise ValueError(f"{args.init_from} has {given}, this training {wanted}: they do not fit together.")
    projector.context_dropout.p = args.context_dropout
    projector.register_to_config(dropout=args.context_dropout)
    pipeline.unet.register_to_config(sample_size=height if height == width else (height, width))
    sampling_defaults = {name: pipeline.config[name] for name in MODEL_DEFAULTS}
    denoiser = ConditionalDenoiser(pipeline.unet, projector, pipeline.empty_context)
    return denoiser, pipeline.scheduler, sampling_defaults


def push_to_hub(pipeline: UIFacePipeline, args: argparse.Namespace, message: str) -> None:
    """Uploads the pipeline. What goes wrong is logged: a training does not end for it."""
    repo_id = args.hub_model_id or args.output_dir.resolve().name
    paths = ("train_data", "vae", "output_dir", "init_from", "hub_model_id", "encoder_root")
    try:
        pipeline.push_to_hub(
            repo_id,
            commit_message=message,
            private=args.hub_private or None,
            card_metadata={"license": args.license},
            recipe=describe_recipe("training/train.py", args, paths),
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        logger.warning(f"{repo_id} was not pushed to the Hub; the training goes on. {type(error).__name__}: {error}")


def validation_images(
    pipeline: UIFacePipeline, identities: torch.Tensor, num_seeds: int, num_inference_steps: int
) -> list[PIL.Image.Image]:
    """`num_seeds` faces of the empty context, then of each identity; the same seeds every time."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for identity in [None, *identities]:
        generator = [torch.Generator().manual_seed(seed) for seed in range(num_seeds)]
        out = pipeline(identity, num_seeds, num_inference_steps=num_inference_steps, generator=generator)
        images += out.images
    return images


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = make_accelerator(args, gradient_accumulation_steps=args.gradient_accumulation_steps)
    with training_folder(accelerator, args.output_dir):
        train(args, accelerator)


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    try:
        with torch.device("meta"):
            # wrong options are named before anything is encoded
            model = TRAINABLE[args.denoiser].build(4, 32, 32, args.unet | args.transformer)
        denoiser_kind(model)
    except (TypeError, ValueError, ZeroDivisionError, NotImplementedError) as error:
        option = "unet" if args.denoiser == "uiface" else "transformer"
        raise ValueError(f"--{option} {json.dumps(getattr(args, option))} makes no network: {error}") from error
    rank, world_size = accelerator.process_index, accelerator.num_processes

    # 1. data
    vae_path, vae_subfolder = (args.vae, args.vae_subfolder) if args.vae else (args.init_from, "vae")
    vae = AutoModel.from_pretrained(vae_path, subfolder=vae_subfolder).eval().requires_grad_(False)
    vae.to(accelerator.device)
    caches = open_caches(args.train_data)
    dataset, names, sample_weights, encoder = load_training_data(args, caches, accelerator, vae)
    face_encoder = recognizer = None
    if args.encoder_root is not None:
        face_encoder = FaceEncoder(encoder.name, args.encoder_root, det_size=160)
        check_same_encoder("the training data", encoder, "the pack of --encoder_root", face_encoder.encoder_mark)
        if args.identity_weight:
            recognizer = compiled(accelerator, face_encoder.to_torch().to(accelerator.device))
    perceptual = None
    if args.lpips_weight:
        perceptual = load_lpips("alex", args.lpips_backbone).to(accelerator.device)
        perceptual.spatial = True
        perceptual = compiled(accelerator, perceptual)
    decodes = recognizer is not None or perceptual is not None
    if decodes:
        vae.to(memory_format=torch.channels_last)  # decodes and differentiates a quarter faster

    # 2. models
    torch.manual_seed(args.seed)
    denoiser, sampler_scheduler, sampling_defaults = build_denoiser(
        args, dataset.latents.shape[1:], dataset.embeddings.shape[1], encoder
    )
    if args.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    if args.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    noise_scheduler = training_scheduler(sampler_scheduler)

    # 3. optimizer; the published code's Adam is AdamW without weight decay
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    denoiser.to(accelerator.device)
    # the published code's decay: min(1 - (1 + s)^-0.75, 0.9999)
    ema = EMAModel(denoiser.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    # not given to `prepare`: that would step the schedule once per process
    accelerator.register_for_checkpointing(lr_scheduler)
    if args.report_to != "none":
        accelerator.init_trackers(
            "train", config={k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
        )

    # what the data's order depends on, besides the step, and what a checkpoint's optimizer would overrule
    fixed = {"seed": args.seed, "train_batch_size": args.train_batch_size, "num_processes": world_size}
    fixed |= {"faces": len(dataset), "balanced_sampling": args.balanced_sampling}
    fixed |= {"gradient_accumulation_steps": args.gradient_accumulation_steps, **schedule_settings(args)}
    fixed |= {"train_data": [cache.fingerprint for cache in caches], "vae": model_fingerprint(vae)}
    fixed |= {"prediction_type": args.prediction_type, "unet": args.unet}
    fixed |= {} if args.denoiser == "uiface" else {"denoiser": args.denoiser, "transformer": args.transformer}
    fixed |= {"train_data_shares": args.train_data_shares, "side_view_share": args.side_view_share}
    step, hours_before = 0, 0.0
    if checkpoint is not None:
        step, hours_before = load_checkpoint(accelerator, ema, checkpoint, fixed)
        logger.info(f"resumed from {checkpoint}")

    # 4. train
    first_of_identity = {name: position for position, name in reversed(list(enumerate(names)))}
    sampler = EndlessBatchSampler(
        len(dataset),
        args.train_batch_size,
        args.seed,
        rank,
        world_size,
        start=step * args.gradient_accumulation_steps,
        weights=sample_weights,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        collate_fn=keep_batch,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)
    validation_identities = dataset.embeddings[sorted(first_of_identity.values())[:2]]

    samples_a_step = args.train_batch_size * args.gradient_accumulation_steps * world_size
    grids = args.output_dir / "validation"

    def ema_pipeline() -> UIFacePipeline:
        contexts = (denoiser.identity_projector, denoiser.empty_context)
        return UIFacePipeline(vae, denoiser.unet, sampler_scheduler, *contexts, **sampling_defaults)

    def validate() -> None:
        with ema_weights(ema, denoiser):
            images = validation_images(
                ema_pipeline(), validation_identities, args.validation_seeds, args.validation_inference_steps
            )
        if face_encoder is not None:
            embeddings = face_encoder.embed_pictures(images[args.validation_seeds :])
            wanted = validation_identities.repeat_interleave(args.validation_seeds, dim=0)
            accelerator.log({"validation/cosine": F.cosine_similarity(embeddings, wanted).mean().item()}, step)
        # rows: empty context, then the identities; columns: seeds, the same in every row
        grid = make_image_grid(images, rows=1 + len(validation_identities), cols=args.validation_seeds)
        for tracker in accelerator.trackers:
            if not hasattr(tracker, "log_images"):  # as of MLflow, Comet, DVCLive
                continue
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation/grid": np.asarray(grid)[None]}, step, **layout)
        grids.mkdir(exist_ok=True)
        grid.save(grids / f"step-{step:07d}.png")

    def save_pipeline(folder: Path, hours: float) -> None:
        with ema_weights(ema, denoiser):
            ema_pipeline().save_pretrained(folder)
        facts = {"step": step, "samples": step * samples_a_step, "hours": round(hours, 4)}
        write_json(folder / "progress.json", facts)

    def save_snapshot(hours: float) -> None:
        beside, folder = args.output_dir / "snapshot.part", args.output_dir / f"step-{step:07d}"
        for earlier in (beside, folder):
            shutil.rmtree(earlier, ignore_errors=True)
        save_pipeline(beside, hours)
        beside.rename(folder)

    if step and accelerator.is_main_process:
        # what belonged to this step and was interrupted
        if validates(step, args) and not (grids / f"step-{step:07d}.png").exists():
            validate()
        if is_due(step, args.snapshot_steps) and not (args.output_dir / f"step-{step:07d}").exists():
            save_snapshot(hours_before)
    started = time.monotonic()
    progress = tqdm(
        initial=step, total=args.max_train_steps, desc="train", unit="step", disable=not accelerator.is_main_process
    )
    log = LossLog(noise_scheduler.config.num_train_timesteps, accelerator.device)
    signal = objective_of(noise_scheduler).signal
    denoiser.train()
    stop = False
    while step < args.max_train_steps and not stop:
        for part in range(args.gradient_accumulation_steps):
            latents, identity_embeds = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(batches))
            torch.manual_seed(mix_seed(args.seed, step, rank, part))
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = denoising_loss(
                        model,
                        noise_scheduler,
                        latents,
                        identity_embeds,
                        args.empty_probability,
                        args.snr_gamma,
                        args.timestep_sampling,
                    )
                objective, faces = loss.losses.mean(), None
                if decodes:
                    weights = signal(loss.timesteps) if args.decoded_noise == "low" else None
                    faces = face_losses(
                        vae, recognizer, perceptual, loss, identity_embeds, args.decoded_samples, weights
                    )
                    objective = objective + args.lpips_weight * faces.lpips.mean()
                    distances = ((1 - faces.cosines) * faces.has_identity).sum()
                    objective = objective + args.identity_weight * distances / faces.has_identity.sum().clamp(min=1)
                accelerator.backward(objective)
                if args.max_grad_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            log.add(loss, faces)
        lr_scheduler.step()
        ema.step(denoiser.parameters())
        step += 1
        progress.update()

        hours = (time.monotonic() - started) / 3600
        stop = is_out_of_time(accelerator, hours, args.max_train_hours)
        is_last = stop or step == args.max_train_steps
        saves = is_due(step, args.checkpointing_steps) or is_last
        if is_due(step, args.logging_steps) or saves:
            logs, finite = log.take(accelerator)
            # fp16 skips a step that overflows; anything else is beyond repair, and is not to be saved
            if finite == 0 or (finite < 1 and accelerator.mixed_precision != "fp16"):
                raise RuntimeError(f"the loss is not finite at step {step}: lower the learning rate, or use bf16.")
            samples = step * samples_a_step
            logs |= {"lr": lr_scheduler.get_last_lr()[0], "samples": samples}
            accelerator.log(logs, step=step)
            progress.set_postfix(loss=f"{logs['loss']:.4f}", samples=samples)
        if saves:
            total = hours_before + hours
            save_checkpoint(accelerator, ema, args.output_dir, step, fixed, args.checkpoints_total_limit, total)
            if args.push_to_hub and accelerator.is_main_process:
                with ema_weights(ema, denoiser):
                    push_to_hub(ema_pipeline(), args, f"Step {step}")
        if accelerator.is_main_process:
            if validates(step, args, stop):
                validate()
            if is_due(step, args.snapshot_steps):
                save_snapshot(hours_before + hours)

    # 5. the pipeline, with EMA weights
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_pipeline(args.output_dir, hours_before + (time.monotonic() - started) / 3600)
        logger.info(f"pipeline saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
