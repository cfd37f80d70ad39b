#!/usr/bin/env python
"""Trains UIFace's denoiser with identity projector and empty context (Lin et al., ICLR 2025, sec. 3.2), and with
projectors of further conditions, such as the head pose.

    uiface prepare photos --output cache/photos --encoder buffalo_l
    accelerate launch training/train.py --config training/configs/uiface_casia.yaml \\
        --train-data cache/photos --vae path/to/vq-f4 --output-dir runs/casia

The same command with `--resume-from-checkpoint latest` goes on after an interruption and gives the same parameters as
an uninterrupted run: all randomness of a step is drawn from the seed, the step and the process, and the order of the
data from the seed and the epoch. What is saved is a pipeline for `UIFacePipeline.from_pretrained`, with the EMA
weights.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoModel

from uiface_cli.options import json_object, real, whole
from uiface_diffusers import UIFacePipeline
from uiface_diffusers.denoisers import TRAINABLE
from uiface_diffusers.fingerprint import model_fingerprint, weights_fingerprint
from uiface_diffusers.models import CONDITIONS
from uiface_diffusers.training.alignment import OwnRecognizer, Teacher, align_features
from uiface_diffusers.training.averages import WeightAverage
from uiface_diffusers.training.datasets import load_training_data, open_caches
from uiface_diffusers.training.denoising import (
    TIMESTEP_SAMPLING,
    DenoisingLog,
    build_denoiser,
    check_network,
    condition_options,
    denoising_loss,
    face_losses,
    load_judges,
)
from uiface_diffusers.training.objectives import OBJECTIVES, PREDICTS_LATENTS, objective_of, training_scheduler
from uiface_diffusers.training.options import (
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
from uiface_diffusers.training.run import Run, frozen, make_accelerator, training_folder
from uiface_diffusers.training.schedules import make_lr_scheduler
from uiface_diffusers.training.trained_pipeline import TrainedPipeline


def add_data_arguments(group: Options) -> None:
    group.add_argument("--train-data", nargs="+", help="caches of `uiface prepare`, all of one encoder and size")
    group.add_argument("--init-from", help="pipeline to start from: folder or Hub repository")
    group.add_argument("--vae", help="first stage: folder or Hub repository of a diffusers autoencoder")
    group.add_argument("--vae-subfolder", help="subfolder of the first stage")
    group.add_argument("--denoiser", choices=tuple(TRAINABLE), default="uiface", help="UIFace's UNet or a transformer")
    group.add_argument("--unet", type=json_object, default={}, help="UIFaceUNet2DModel options, as JSON")
    group.add_argument("--transformer", type=json_object, default={}, help="PixArtTransformer2DModel options, as JSON")
    group.add_argument("--context-dropout", type=real(0, 1), default=0.25, help="dropout of the context's components")
    text = "how often the empty context is trained; beside it, the first sample of every batch and process has it"
    group.add_argument("--empty-probability", type=real(0, 1), default=0.2, help=text)
    for component, projector in CONDITIONS.items():
        name, option = projector.condition, component.replace("_", "-")
        text = f"condition on the {name}, too, which the caches need to have: {projector.__name__} options, as JSON,"
        text += " '{}' for its own. One that --init-from has is trained in any case"
        group.add_argument(f"--{option}", type=json_object, help=text)
        text = f"how often a sample goes without its {name}, so that it need not be given"
        group.add_argument(f"--{name}-dropout", type=real(0, 1), default=0.1, help=text)
    group.add_argument("--balanced-sampling", **SWITCH, help="every identity as often, however many faces it has")
    text = "how much of the training each cache gets, one number per cache; by default, in proportion to its faces"
    group.add_argument("--train-data-shares", nargs="+", type=real(0), help=text)
    text = "how much of the training looks sideways (|yaw| > 0.25), also where --train-data-shares and"
    text += " --balanced-sampling are given; by default, in proportion to the faces"
    group.add_argument("--side-view-share", type=real(0, 1), help=text)
    group.add_argument("--output-dir", type=Path, help="pipeline, checkpoints, logs and validation grids")


def add_loss_arguments(group: Options) -> None:
    group.add_argument("--prediction-type", choices=tuple(OBJECTIVES), default="epsilon")
    group.add_argument("--snr-gamma", type=real(0), help="min-SNR loss weights (Hang et al. 2023); 5.0 is usual")
    text = "of 1 - cosine between the denoised face and the identity it was given (DCFace, Kim et al. 2023); needs"
    text += " --encoder-root and v_prediction or flow_prediction"
    group.add_argument("--identity-weight", type=real(0), default=0.0, help=text)
    text = "folders of IResNets (training/train_face_recognition.py), of any embedding, beside the encoder: they"
    text += " compare the denoised with the clean face, both decoded, and the recognizers' mean is taken"
    group.add_argument("--identity-recognizers", nargs="+", default=[], help=text)
    text = "of 1 - cosine between features in the middle of the denoiser and a recognizer's map of the clean face"
    text += " (REPA, Yu et al. 2025); needs --alignment-recognizer or --encoder-root"
    group.add_argument("--alignment-weight", type=real(0), default=0.0, help=text)
    text = "that recognizer: folder of an IResNet; by default, the encoder"
    group.add_argument("--alignment-recognizer", help=text)
    text = "of LPIPS between the denoised and the clean face, both decoded, with weight on eyes and mouth; needs"
    text += " v_prediction or flow_prediction"
    group.add_argument("--lpips-weight", type=real(0), default=0.0, help=text)
    group.add_argument("--lpips-backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    group.add_argument("--decoded-samples", type=whole(), default=8, help="faces per batch decoded for these losses")
    text = "which faces are decoded: all noise levels alike, or drawn in proportion to alpha_bar"
    group.add_argument("--decoded-noise", choices=("any", "low"), default="any", help=text)
    text = "logit_normal: sigmoid of a normal with mean -0.5 and deviation 1.2 (Esser et al. 2024), which spends"
    text += " fewer samples on nearly pure noise"
    group.add_argument("--timestep-sampling", choices=tuple(TIMESTEP_SAMPLING), default="uniform", help=text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_arguments(parser.add_argument_group("data and models"))
    group: Options = parser.add_argument_group("objective and optimizer")
    add_loss_arguments(group)
    add_length_arguments(group, batch_size=64, steps=250_000)
    add_optimizer_arguments(group, learning_rate=1e-4, lr_scheduler="cosine_warm_restarts")
    group.add_argument("--ema-decay", type=real(0, 1), default=0.9999)
    add_machine_arguments(parser).add_argument("--gradient-checkpointing", **SWITCH)
    group = add_checkpoint_arguments(parser, steps=5000)
    group.add_argument("--snapshot-steps", type=whole(0), default=0, help="keep the pipeline of every so many steps")
    group.add_argument("--validation-seeds", type=whole(), default=4, help="pictures per row of the grid")
    group.add_argument("--validation-inference-steps", type=whole(), default=50)
    text = "folder with models/PACK of the caches' encoder: the grid's mean cosine to its identities is logged"
    group.add_argument("--encoder-root", help=text)
    add_hub_arguments(group, "pipeline")
    args = parse_recipe(parser, argv, required=("--train-data", "--output-dir"))

    if args.init_from is None and args.vae is None:
        parser.error("--vae or --init-from is required")
    # of predicted noise the clean latents are no stable function: the noisier, the less
    if args.identity_weight and (args.encoder_root is None or args.prediction_type not in PREDICTS_LATENTS):
        parser.error("--identity-weight needs --encoder-root and --prediction-type v_prediction or flow_prediction")
    if args.identity_recognizers and not args.identity_weight:
        parser.error("--identity-recognizers are beside the encoder: give --encoder-root and --identity-weight, too")
    if args.alignment_weight and args.alignment_recognizer is None and args.encoder_root is None:
        parser.error("--alignment-weight needs a teacher: --alignment-recognizer or --encoder-root")
    own = [args.alignment_recognizer] if args.alignment_recognizer else []
    for folder in [*args.identity_recognizers, *own]:
        if not (Path(folder) / "config.json").is_file():
            parser.error(f"{folder} is no folder of a recognizer of training/train_face_recognition.py")
    if args.lpips_weight and args.prediction_type not in PREDICTS_LATENTS:
        parser.error("--lpips-weight needs --prediction-type v_prediction or flow_prediction")
    shares = args.train_data_shares
    if shares is not None and len(shares) != len(args.train_data):
        parser.error(f"--train-data-shares has {len(shares)} numbers for {len(args.train_data)} caches")
    if shares is not None and not sum(shares):
        parser.error("--train-data-shares are all 0: nothing would be drawn")
    other = "transformer" if args.denoiser == "uiface" else "unet"
    if getattr(args, other):
        parser.error(f"--{other} has options of another network than --denoiser {args.denoiser}")
    if args.init_from is not None and (args.unet or args.transformer):
        parser.error("--unet and --transformer cannot change the network of --init-from")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    with training_folder(accelerator, args) as checkpoint:
        train(args, accelerator, checkpoint)


def train(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None) -> None:
    device = accelerator.device
    check_network(args)  # before anything is encoded

    # 1. data
    vae_path, vae_subfolder = (args.vae, args.vae_subfolder) if args.vae else (args.init_from, "vae")
    vae = AutoModel.from_pretrained(vae_path, subfolder=vae_subfolder).eval().requires_grad_(False).to(device)
    caches, conditions = open_caches(args.train_data), condition_options(args)
    dataset, sampler, names, encoder_mark = load_training_data(args, caches, accelerator, vae, list(conditions))

    # 2. models
    torch.manual_seed(args.seed)
    denoiser, sampling_scheduler, defaults = build_denoiser(
        args, dataset.latents.shape[1:], dataset.embeddings.shape[1], encoder_mark
    )
    if args.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    if args.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    noise_scheduler = training_scheduler(sampling_scheduler)
    signal = objective_of(noise_scheduler).signal
    face_encoder, recognizer, perceptual = load_judges(args, accelerator, encoder_mark)
    recognizers = args.identity_recognizers if args.identity_weight else []
    further = [frozen(accelerator, OwnRecognizer(folder)) for folder in recognizers]
    decodes = recognizer is not None or perceptual is not None
    if decodes:
        vae.to(memory_format=torch.channels_last)  # decodes and differentiates a quarter faster

    teacher = Teacher(args.alignment_recognizer or face_encoder) if args.alignment_weight else None
    trained: torch.nn.Module = denoiser
    if teacher is not None:
        trained, dataset.features = align_features(accelerator, denoiser, teacher, caches, dataset.latents.shape[-2:])

    # 3. optimizer; the published code's Adam is AdamW without weight decay
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    average = WeightAverage(denoiser.to(device), args.ema_decay)
    model, optimizer = accelerator.prepare(trained, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # `prepare` would step it once per process

    # 4. train
    contexts = (denoiser.identity_projector, denoiser.empty_context)
    pipeline = UIFacePipeline(vae, denoiser.unet, sampling_scheduler, *contexts, **defaults, **denoiser.conditions)
    first_faces = sorted({name: position for position, name in reversed(list(enumerate(names)))}.values())
    fixed = {"train_data": [cache.fingerprint for cache in caches], "vae": model_fingerprint(vae), "init_from": None}
    if args.init_from is not None:
        parts = (denoiser.unet, *contexts, *denoiser.conditions.values(), sampling_scheduler)
        fixed["init_from"] = [model_fingerprint(each) for each in parts]
    fixed["lpips_backbone"] = None if perceptual is None else weights_fingerprint(perceptual)
    fixed["alignment_recognizer"] = None if teacher is None else teacher.fingerprint
    fixed["identity_recognizers"] = [weights_fingerprint(each) for each in further]
    dropouts = {name: getattr(args, f"{CONDITIONS[name].condition}_dropout") for name in conditions}
    log = DenoisingLog(noise_scheduler.config.num_train_timesteps, device)
    samples = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    run = Run(
        "train",
        args,
        accelerator,
        checkpoint,
        dataset,
        sampler,
        product=TrainedPipeline(pipeline, dataset.embeddings[first_faces[:2]], face_encoder),
        log=log,
        lr_scheduler=lr_scheduler,
        fixed=fixed,
        average=average,
        per_step={"samples": samples},
    )
    denoiser.train()
    for latents, identity_embeds, *given in run:
        targets = None if teacher is None else given.pop()
        with accelerator.accumulate(model):
            with accelerator.autocast():
                options = (args.empty_probability, args.snr_gamma, args.timestep_sampling)
                options += (dict(zip(conditions, given, strict=True)), dropouts, targets)
                loss = denoising_loss(model, noise_scheduler, latents, identity_embeds, *options)
            terms, faces = {"denoising": loss.losses.mean()}, None
            if loss.alignment is not None:
                terms["alignment"] = args.alignment_weight * loss.alignment.mean()
            if decodes:
                weights = signal(loss.timesteps) if args.decoded_noise == "low" else None
                judges = (vae, recognizer, perceptual)
                faces = face_losses(*judges, loss, identity_embeds, args.decoded_samples, weights, further)
                terms["lpips"] = args.lpips_weight * faces.lpips.mean()
                distances = (faces.identity_distances() * faces.has_identity).sum()
                terms["identity"] = args.identity_weight * distances / faces.has_identity.sum().clamp(min=1)
            accelerator.backward(sum(terms.values()))
            if args.max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        log.add(loss, faces)

    # 5. the pipeline, with EMA weights
    run.finish()


if __name__ == "__main__":
    run_script(main)
