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
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import AutoModel, DDIMScheduler, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline, UIFaceUNet2DModel
from uiface_diffusers.data import FaceCache, cache_latents, load_latents

logger = get_logger(__name__)

# the published code's: linear betas, T = 1000; the sampler steps t = 980, 960, .., 0
NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SAMPLER = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": False}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with any of the options below; the command line wins")

    group = parser.add_argument_group("data and models")
    group.add_argument("--train_data", nargs="+", help="caches of `uiface prepare`, all of one encoder and size")
    group.add_argument("--vae", help="first stage: folder or Hub repository of a diffusers autoencoder")
    group.add_argument("--vae_subfolder", help="subfolder of the first stage")
    group.add_argument("--unet", type=json.loads, default={}, help="UIFaceUNet2DModel options, as JSON")
    group.add_argument("--context_dropout", type=float, default=0.25, help="dropout of the context's components")
    group.add_argument("--empty_probability", type=float, default=0.2, help="how often the empty context is trained")
    group.add_argument("--output_dir", type=Path, help="pipeline, checkpoints, logs and validation grids")

    group = parser.add_argument_group("objective and optimiser")
    group.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    group.add_argument("--snr_gamma", type=float, help="min-SNR loss weights (Hang et al. 2023); 5.0 is usual")
    group.add_argument("--train_batch_size", type=int, default=64, help="samples a step and process")
    group.add_argument("--max_train_steps", type=int, default=250_000)
    group.add_argument("--max_train_hours", type=float, help="save and stop after this time in this run")
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument(
        "--lr_scheduler",
        choices=("cosine_warm_restarts", "constant", "constant_with_warmup", "cosine", "linear"),
        default="cosine_warm_restarts",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="of the schedules that have a warm-up")
    group.add_argument("--lr_restart_steps", type=int, default=10_000, help="T_0 of cosine_warm_restarts")
    group.add_argument("--lr_restart_factor", type=int, default=2, help="T_mult of cosine_warm_restarts")
    group.add_argument("--max_grad_norm", type=float, help="clip the gradient's norm")
    group.add_argument("--ema_decay", type=float, default=0.9999)

    group = parser.add_argument_group("machine")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's")
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--channels_last", action="store_true", help="memory format of the convolutions")
    group.add_argument("--dataloader_num_workers", type=int, default=0)
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("checkpoints, logs, validation")
    group.add_argument("--checkpointing_steps", type=int, default=5000)
    group.add_argument("--checkpoints_total_limit", type=int, default=2)
    group.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    group.add_argument("--report_to", default="tensorboard", help="an accelerate tracker, or `none`")
    group.add_argument("--logging_steps", type=int, default=50)
    group.add_argument("--validation_steps", type=int, default=5000, help="0: no validation grids")
    group.add_argument("--validation_seeds", type=int, default=4, help="pictures a row of the grid")
    group.add_argument("--validation_inference_steps", type=int, default=50)

    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        config = yaml.safe_load(known.config.read_text()) or {}
        unknown = sorted(config.keys() - vars(known).keys())
        if unknown:
            parser.error(f"{known.config} has unknown options: {', '.join(unknown)}")
        # as if they stood in front on the command line, so that they are checked alike
        argv = [word for name, value in config.items() for word in option_words(name, value)] + argv
    args = parser.parse_args(argv)
    for name in ("train_data", "vae", "output_dir"):
        if not getattr(args, name):
            parser.error(f"--{name} is required")
    return args


def option_words(name: str, value) -> list[str]:
    """An entry of the YAML file as words of the command line."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


class LatentFaces(Dataset):
    """Latents of both flips `(2, C, h, w)` and identity embeddings; fetched a batch at a time."""

    def __init__(self, latents: torch.Tensor, embeddings: torch.Tensor):
        self.latents, self.embeddings = latents, embeddings

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.tensor(indices)
        return self.latents[index], self.embeddings[index]


def keep_batch(batch):
    """What `LatentFaces` fetches is a batch already."""
    return batch


class EndlessBatchSampler(Sampler):
    """Batches of one process, epoch after epoch, from batch `start` on. An epoch's order depends on seed and epoch
    only, so that a resumed run sees what it has not seen yet; processes take turns in that order."""

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world_size: int, start: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self.batches_per_epoch = length // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(f"{length} faces do not fill {world_size} batch(es) of {batch_size}.")

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.batches_per_epoch)
        while True:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(mix_seed(self.seed, epoch)))
            for batch in range(position, self.batches_per_epoch):
                first = (batch * self.world_size + self.rank) * self.batch_size
                yield order[first : first + self.batch_size].tolist()
            epoch, position = epoch + 1, 0


class ConditionalDenoiser(nn.Module):
    """The three trained components as one module, so that all gradients are reduced together."""

    def __init__(self, unet: UIFaceUNet2DModel, identity_projector: IdentityProjector, empty_context: EmptyContext):
        super().__init__()
        self.unet, self.identity_projector, self.empty_context = unet, identity_projector, empty_context

    def forward(self, noisy_latents, timesteps, identity_embeds, is_empty):
        context = self.identity_projector(identity_embeds, return_dict=False)[0]
        empty = self.empty_context(len(context), return_dict=False)[0]
        context = torch.where(is_empty[:, None, None], empty, context)
        return self.unet(noisy_latents, timesteps, context, return_dict=False)[0]


def mix_seed(*numbers: int) -> int:
    """One seed from several numbers, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def denoising_loss(
    denoiser: nn.Module,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    identity_embeds: torch.Tensor,
    empty_probability: float,
    snr_gamma: float | None,
) -> torch.Tensor:
    """Loss of every sample, `(batch,)`: MSE of the predicted noise (or v) at a uniform timestep, under the identity
    or, with `empty_probability` and always in row 0, under the empty context (UIFace, sec. 3.2; the published code).

    Args:
        latents (`torch.Tensor` of shape `(batch, 2, C, h, w)`): both flips; one is chosen for each sample.
        identity_embeds (`torch.Tensor` of shape `(batch, identity_dim)`): of unit length.
    """
    batch_size, device = len(latents), latents.device
    flip = torch.randint(2, (batch_size,), device=device)
    latents = latents[torch.arange(batch_size, device=device), flip].float()
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), device=device)
    is_empty = torch.rand(batch_size, device=device) < empty_probability
    # the empty context gets a gradient in every step
    is_empty[0] = True

    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = denoiser(noisy, timesteps, identity_embeds, is_empty).float()
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    loss = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * snr.clamp(max=snr_gamma) / (snr + 1 if is_velocity else snr)
    return loss


def load_training_data(args, accelerator: Accelerator, vae) -> tuple[LatentFaces, list[str], str]:
    """Data set, identity of each face, encoder. Checks that the caches belong together before anything is encoded."""
    caches = [FaceCache(folder) for folder in args.train_data]
    for name in ("identity_encoder", "image_size"):
        values = {str(cache.folder): getattr(cache, name) for cache in caches}
        if len(set(values.values())) > 1:
            raise ValueError(f"the caches differ in `{name}`: {values}. Prepare them alike.")
    with accelerator.main_process_first():
        files = [file for cache in caches for file in cache_latents(cache, vae, accelerator.device)]
    banks = [cache.embeddings() for cache in caches]
    names = [f"{cache.folder.name}/{name}" for cache, bank in zip(caches, banks, strict=True) for name in bank.names]
    latents, embeddings = load_latents(files), torch.cat([bank.embeddings for bank in banks])
    if len(latents) != len(embeddings):
        raise ValueError(
            f"{len(latents)} cached latents for {len(embeddings)} faces in {args.train_data}: delete the latents-*"
            " files to encode them again."
        )
    dataset = LatentFaces(latents, embeddings)
    return dataset, names, caches[0].identity_encoder


def make_lr_scheduler(args, optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    if args.lr_scheduler == "cosine_warm_restarts":
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, T_0=args.lr_restart_steps, T_mult=args.lr_restart_factor
        )
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints by their step: an unfinished one has another name."""
    paths = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(paths, key=checkpoint_step)


def save_checkpoint(
    accelerator: Accelerator, ema: EMAModel, output_dir: Path, step: int, order: dict, total_limit: int
) -> None:
    """Writes beside and renames, so that a kill at any moment leaves complete checkpoints only."""
    beside = output_dir / "checkpoint.part"
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(beside)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shadow = {str(i): parameter.contiguous() for i, parameter in enumerate(ema.shadow_params)}
        save_file(shadow, beside / "ema.safetensors")
        state = {"step": step, "ema_step": ema.optimization_step, "order": order}
        (beside / "training.json").write_text(json.dumps(state, indent=1) + "\n")
        beside.rename(output_dir / f"checkpoint-{step}")
        for old in list_checkpoints(output_dir)[:-total_limit]:
            # by the same road: what has a checkpoint's name is whole
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old.rename(beside))


def load_checkpoint(accelerator: Accelerator, ema: EMAModel, checkpoint: Path, order: dict) -> int:
    """Restores the state of a checkpoint and returns its step.

    Raises:
        ValueError: the order of the data has changed since: some faces would be seen twice, others never.
    """
    state = json.loads((checkpoint / "training.json").read_text())
    changed = [f"{k}: {state['order'][k]} then, {v} now" for k, v in order.items() if state["order"][k] != v]
    if changed:
        raise ValueError(f"{checkpoint} cannot be resumed with another order of the data ({'; '.join(changed)}).")
    accelerator.load_state(checkpoint)
    shadow = load_file(checkpoint / "ema.safetensors")
    for i, parameter in enumerate(ema.shadow_params):
        parameter.copy_(shadow[str(i)])
    ema.optimization_step = state["ema_step"]
    return state["step"]


def find_checkpoint(args) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        ValueError: it does not exist, or a later one of another course of training would be in the way of new ones.
    """
    checkpoints = list_checkpoints(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if not checkpoints:
            logger.warning(f"no checkpoint in {args.output_dir}: a new training starts")
        return checkpoints[-1] if checkpoints else None
    path = None if args.resume_from_checkpoint is None else Path(args.resume_from_checkpoint)
    if path is not None and not (path / "training.json").is_file():
        raise ValueError(f"{path} is no checkpoint; in {args.output_dir} are {[p.name for p in checkpoints]}.")
    step = -1 if path is None else json.loads((path / "training.json").read_text())["step"]
    later = [p for p in checkpoints if checkpoint_step(p) > step]
    if later:
        raise ValueError(
            f"{args.output_dir} has {[p.name for p in later]}: go on with --resume_from_checkpoint latest, delete"
            " them, or choose another --output_dir."
        )
    return path


def build_pipeline(denoiser: ConditionalDenoiser, vae, prediction_type: str) -> UIFacePipeline:
    return UIFacePipeline(
        vae=vae,
        unet=denoiser.unet,
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, **SAMPLER, prediction_type=prediction_type),
        identity_projector=denoiser.identity_projector,
        empty_context=denoiser.empty_context,
    )


@torch.no_grad()
def validation_grid(pipeline: UIFacePipeline, identities: torch.Tensor, num_seeds: int, num_inference_steps: int):
    """Rows: empty context, then the identities; columns: seeds, the same in every row."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for identity in [None, *identities]:
        generator = [torch.Generator().manual_seed(seed) for seed in range(num_seeds)]
        out = pipeline(identity, num_seeds, num_inference_steps=num_inference_steps, generator=generator)
        images += out.images
    return make_image_grid(images, rows=1 + len(identities), cols=num_seeds)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    log_with = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=log_with,
        # the other processes wait while the first one encodes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")
        ),
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checkpoint = find_checkpoint(args)
    with torch.device("meta"):
        UIFaceUNet2DModel(**args.unet)  # wrong options are named before anything is encoded
    rank, world_size = accelerator.process_index, accelerator.num_processes

    # 1. data
    vae = AutoModel.from_pretrained(args.vae, subfolder=args.vae_subfolder).eval().requires_grad_(False)
    vae.to(accelerator.device)
    dataset, names, identity_encoder = load_training_data(args, accelerator, vae)
    channels, height, width = dataset.latents.shape[2:]
    identity_dim = dataset.embeddings.shape[1]

    # 2. models
    torch.manual_seed(args.seed)
    unet_config = {"sample_size": height, "in_channels": channels, "out_channels": channels, **args.unet}
    unet = UIFaceUNet2DModel(**unet_config)
    unet.zero_init_residual_branches()
    context_dim = unet.config.cross_attention_dim
    denoiser = ConditionalDenoiser(
        unet,
        IdentityProjector(identity_dim, context_dim, dropout=args.context_dropout, identity_encoder=identity_encoder),
        EmptyContext(context_dim),
    )
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE, prediction_type=args.prediction_type)

    # 3. optimiser; the published code's Adam is AdamW without weight decay
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    denoiser.to(accelerator.device)
    # the published code's decay: min(1 - (1 + s)^-0.75, 0.9999)
    ema = EMAModel(denoiser.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    # not given to `prepare`: that would step the schedule once a process
    accelerator.register_for_checkpointing(lr_scheduler)
    if log_with is not None:
        accelerator.init_trackers(
            "train", config={k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
        )

    # what the data's order depends on, besides the step
    order = {"seed": args.seed, "train_batch_size": args.train_batch_size, "num_processes": world_size}
    order["faces"] = len(dataset)
    step = 0
    if checkpoint is not None:
        step = load_checkpoint(accelerator, ema, checkpoint, order)
        logger.info(f"resumed from {checkpoint}")

    # 4. train
    sampler = EndlessBatchSampler(len(dataset), args.train_batch_size, args.seed, rank, world_size, start=step)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        collate_fn=keep_batch,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)
    first_of_identity = {name: position for position, name in reversed(list(enumerate(names)))}
    validation_identities = dataset.embeddings[sorted(first_of_identity.values())[:2]]

    def with_ema(action):
        ema.store(denoiser.parameters())
        ema.copy_to(denoiser.parameters())
        denoiser.eval()
        try:
            return action(build_pipeline(denoiser, vae, args.prediction_type))
        finally:
            ema.restore(denoiser.parameters())
            denoiser.train()

    started = time.monotonic()
    progress = tqdm(
        initial=step, total=args.max_train_steps, desc="train", unit="step", disable=not accelerator.is_main_process
    )
    # sum of the finite losses and their number since the last log
    running = torch.zeros(2, device=accelerator.device)
    logged_step = step
    denoiser.train()
    stop = False
    while step < args.max_train_steps and not stop:
        latents, identity_embeds = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(batches))
        torch.manual_seed(mix_seed(args.seed, step, rank))
        with accelerator.autocast():
            losses = denoising_loss(
                model, noise_scheduler, latents, identity_embeds, args.empty_probability, args.snr_gamma
            )
        loss = losses.mean()
        accelerator.backward(loss)
        if args.max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(denoiser.parameters())
        step += 1
        progress.update()
        finite = loss.detach().isfinite()
        running += torch.stack([loss.detach().nan_to_num(0, 0, 0) * finite, finite.to(loss.dtype)])

        if args.max_train_hours is not None:
            late = time.monotonic() - started > args.max_train_hours * 3600
            # the main process decides for all
            stop = bool(accelerator.reduce(torch.tensor(float(late and rank == 0), device=accelerator.device), "sum"))
        is_last = stop or step == args.max_train_steps
        saves = step % args.checkpointing_steps == 0 or is_last
        if step % args.logging_steps == 0 or saves:
            loss_sum, finite = accelerator.reduce(running, "sum").tolist()
            # fp16 skips a step that overflows; anything else is beyond repair, and is not to be saved
            if finite < (1 if accelerator.mixed_precision == "fp16" else (step - logged_step) * world_size):
                raise RuntimeError(f"the loss is not finite at step {step}: lower the learning rate, or use bf16.")
            running.zero_()
            logged_step = step
            samples = step * args.train_batch_size * world_size
            logs = {"loss": loss_sum / finite, "lr": lr_scheduler.get_last_lr()[0], "samples": samples}
            accelerator.log(logs, step=step)
            progress.set_postfix(loss=f"{logs['loss']:.4f}", samples=samples)
        if saves:
            save_checkpoint(accelerator, ema, args.output_dir, step, order, args.checkpoints_total_limit)
        if args.validation_steps and (step % args.validation_steps == 0 or is_last) and accelerator.is_main_process:
            grid = with_ema(
                lambda pipeline: validation_grid(
                    pipeline, validation_identities, args.validation_seeds, args.validation_inference_steps
                )
            )
            (args.output_dir / "validation").mkdir(exist_ok=True)
            grid.save(args.output_dir / "validation" / f"step-{step:07d}.png")
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")

    # 5. the pipeline, with EMA weights
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with_ema(lambda pipeline: pipeline.save_pretrained(args.output_dir))
        logger.info(f"pipeline saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
