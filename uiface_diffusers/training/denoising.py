"""The denoiser of UIFace with its contexts, and how it is trained (Lin et al., ICLR 2025, sec. 3.2)."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from torch import nn

from .. import EmptyContext, IdentityProjector, UIFacePipeline
from ..conditions import with_conditions
from ..denoisers import TRAINABLE, denoiser_kind
from ..encoders import EncoderMark, check_same_encoder, projector_mark
from ..faces import FaceEncoder
from ..latents import FirstStage, decode_latents
from ..models import CONDITIONS, ConditionProjector
from ..pipeline_uiface import MODEL_DEFAULTS
from ..two_stage.schedulers import prediction_type
from .losses import draw_rows, facial_feature_weights, full_precision, jitter
from .means import RunningMeans
from .objectives import new_sampler, objective_of
from .run import frozen, load_perceptual


def _uniform_timesteps(number: int, num_train_timesteps: int, device: torch.device) -> torch.Tensor:
    return torch.randint(num_train_timesteps, (number,), device=device)


def _logit_normal_timesteps(number: int, num_train_timesteps: int, device: torch.device) -> torch.Tensor:
    share = torch.sigmoid(1.2 * torch.randn(number, device=device) - 0.5)
    return (share * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


TIMESTEP_SAMPLING = {"uniform": _uniform_timesteps, "logit_normal": _logit_normal_timesteps}


class ConditionalDenoiser(nn.Module):
    """The trained components as one module, so that all gradients are reduced together.

    Args:
        unet, identity_projector, empty_context: those of the pipeline.
        conditions: component -> projector, of `models.CONDITIONS`.
    """

    def __init__(
        self,
        unet: ModelMixin,
        identity_projector: IdentityProjector,
        empty_context: EmptyContext,
        conditions: Mapping[str, ConditionProjector] | None = None,
    ):
        super().__init__()
        self.unet, self.identity_projector, self.empty_context = unet, identity_projector, empty_context
        # last: the parameters of a denoiser without conditions keep their places in checkpoints
        self.conditions = nn.ModuleDict(dict(conditions or {}))

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        identity_embeds: torch.Tensor,
        is_empty: torch.Tensor,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = self.identity_projector(identity_embeds, return_dict=False)[0]
        empty = self.empty_context(len(context), return_dict=False)[0]
        context = torch.where(is_empty[:, None, None], empty, context)
        context = with_conditions(context, cast(Any, self.conditions), values or {})
        return self.unet(noisy_latents, timestep=timesteps, encoder_hidden_states=context, return_dict=False)[0]


def check_network(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: the options of `--denoiser` make no network that can be sampled.
    """
    try:
        with torch.device("meta"):
            model = TRAINABLE[args.denoiser].build(4, 32, 32, args.unet | args.transformer)
        denoiser_kind(model)
    except (TypeError, ValueError, ZeroDivisionError, NotImplementedError) as error:
        option, given = ("--transformer", args.transformer) if args.transformer else ("--unet", args.unet)
        raise ValueError(f"{option} {json.dumps(given)} makes no network: {error}") from error


def condition_options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Component -> options, of the conditions that a training has: those asked for, and those of `--init-from`.

    Raises:
        ValueError: options make no projector, or would change that of `--init-from`.
    """
    options = {name: getattr(args, name) for name in CONDITIONS if getattr(args, name) is not None}
    index = {} if args.init_from is None else UIFacePipeline.load_config(args.init_from)
    there = [name for name in CONDITIONS if (index.get(name) or [None])[0] is not None]
    for name in there:
        if options.setdefault(name, {}):
            raise ValueError(f"--{name.replace('_', '-')} cannot change that of {args.init_from}: give no options.")
    for name, given in options.items():
        try:
            with torch.device("meta"):
                CONDITIONS[name](**given)
        except (TypeError, ValueError, RuntimeError) as error:
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} {json.dumps(given)} makes no {CONDITIONS[name].__name__}: {error}"
            ) from error
    return options


def build_denoiser(
    args: argparse.Namespace, latent_shape: torch.Size, identity_dim: int, encoder: EncoderMark
) -> tuple[ConditionalDenoiser, SchedulerMixin, dict[str, float]]:
    """The trained components, the sampler, and the defaults of its call that are not the paper's: new ones, or those
    of `--init-from`. Conditions that are asked for and not there are new.

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
        scheduler, empty = new_sampler(args.prediction_type), EmptyContext(context_dim, num_tokens)
        return ConditionalDenoiser(unet, projector, empty, build_conditions(args, projector)), scheduler, {}
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
    conditions = build_conditions(args, projector, pipeline.conditions)
    denoiser = ConditionalDenoiser(pipeline.unet, projector, pipeline.empty_context, conditions)
    return denoiser, pipeline.scheduler, sampling_defaults


def build_conditions(
    args: argparse.Namespace,
    identity_projector: IdentityProjector,
    there: Mapping[str, ConditionProjector | None] | None = None,
) -> dict[str, ConditionProjector]:
    """Component -> projector, of the conditions of a training; new ones that are not `there` yet, with as many tokens
    as the identity's context has."""
    config = identity_projector.config
    shape = {"context_dim": config.context_dim, "num_tokens": config.num_tokens}
    found = {}
    for name, options in condition_options(args).items():
        present = (there or {}).get(name)
        found[name] = CONDITIONS[name](**shape | options) if present is None else present
    return found


def load_judges(
    args: argparse.Namespace, accelerator: Accelerator, encoder: EncoderMark
) -> tuple[FaceEncoder | None, nn.Module | None, nn.Module | None]:
    """The encoder of `--encoder-root`, on this process's device; and what `face_losses` compares by, recognizer and
    LPIPS, where they have a weight.

    Raises:
        ValueError: the encoder is not that of the training data.
    """
    face_encoder = recognizer = perceptual = None
    if args.encoder_root is not None:
        if encoder.name is None:
            raise ValueError("the training data do not name their encoder, which --encoder-root is to have.")
        face_encoder = FaceEncoder(encoder.name, args.encoder_root, det_size=160, device=accelerator.device)
        own = face_encoder.encoder_mark
        check_same_encoder("the training data", encoder, "the pack of --encoder-root", own)
        if args.identity_weight:
            recognizer = frozen(accelerator, face_encoder.to_torch())
    if args.lpips_weight:
        perceptual = load_perceptual(accelerator, "alex", args.lpips_backbone, spatial=True)
    return face_encoder, recognizer, perceptual


class DenoisingLoss(NamedTuple):
    """Of every sample: loss `(batch,)`, timestep `(batch,)`, whether the context was empty `(batch,)`, the clean
    latents as predicted and as they are `(batch, C, h, w)`, and how far its features are from the teacher's
    `(batch,)`, where they are aligned: the mean of 1 - cosine over the locations."""

    losses: torch.Tensor
    timesteps: torch.Tensor
    is_empty: torch.Tensor
    denoised: torch.Tensor
    latents: torch.Tensor
    alignment: torch.Tensor | None = None


def denoising_loss(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    identity_embeds: torch.Tensor,
    empty_probability: float,
    snr_gamma: float | None,
    timestep_sampling: str = "uniform",
    values: Mapping[str, torch.Tensor] | None = None,
    dropouts: Mapping[str, float] | None = None,
    teacher: torch.Tensor | None = None,
) -> DenoisingLoss:
    """Loss of every sample: MSE of the predicted noise (or v, or velocity) at a random timestep, under the identity
    or, with `empty_probability` and always in row 0, under the empty context (UIFace, sec. 3.2; the published code).

    Args:
        latents (`torch.Tensor` of shape `(batch, 2, C, h, w)`): both flips; one is chosen for each sample.
        identity_embeds (`torch.Tensor` of shape `(batch, identity_dim)`): of unit length.
        values (*optional*): component -> values of its condition `(batch, fields)`, of the first flip. The empty
            context is trained with them, too.
        dropouts (*optional*): component -> how often a sample goes without its value.
        teacher (`torch.Tensor` of shape `(batch, 2, locations, channels)`, *optional*): features of both flips; the
            denoiser is an `AlignedDenoiser` then.
    """
    batch_size, device = len(latents), latents.device
    flip = torch.randint(2, (batch_size,), device=device)
    chosen = (torch.arange(batch_size, device=device), flip)
    latents = latents[chosen].float()
    noise = torch.randn_like(latents)
    num_train_timesteps = cast(ConfigMixin, scheduler).config.num_train_timesteps
    timesteps = TIMESTEP_SAMPLING[timestep_sampling](batch_size, num_train_timesteps, device)
    is_empty = torch.rand(batch_size, device=device) < empty_probability
    # the empty context gets a gradient in every step
    is_empty[:1].fill_(True)  # assigning to `is_empty[0]` would wait for the device
    arguments: tuple[Any, ...] = (identity_embeds, is_empty)
    if values:
        arguments += (condition_inputs(values, flip.bool(), dropouts or {}),)

    objective = objective_of(scheduler)
    noisy = objective.noisy(latents, noise, timesteps)
    prediction = denoiser(noisy, objective.denoiser_timesteps(timesteps), *arguments)
    alignment = None
    if teacher is not None:
        prediction, features = prediction
        alignment = 1 - F.cosine_similarity(features.float(), teacher[chosen].float(), dim=-1).mean(dim=1)
    prediction = prediction.float()
    target = objective.target(latents, noise, timesteps)
    loss = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        loss = objective.weighted(loss, timesteps, snr_gamma)
    denoised = objective.denoised(noisy, prediction, timesteps)
    return DenoisingLoss(loss, timesteps, is_empty, denoised, latents, alignment)


def condition_inputs(
    values: Mapping[str, torch.Tensor], is_mirrored: torch.Tensor, dropouts: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """What the projectors are given: component -> values `(batch, fields)`, of mirrored faces where they are, and NaN
    where they are dropped."""
    inputs = {}
    for name, given in values.items():
        given = torch.where(is_mirrored[:, None], CONDITIONS[name].mirrored(given), given)
        dropped = torch.rand(len(given), device=given.device) < dropouts.get(name, 0.0)
        inputs[name] = given.masked_fill(dropped[:, None], torch.nan)
    return inputs


class FaceLosses(NamedTuple):
    """Of the decoded faces: cosine to the identity they were given, whether it counts (not under the empty context),
    LPIPS to the clean face (zeros where it is not asked for), `(decoded_samples,)` each; and by further recognizers,
    the cosine to the clean face, `(recognizers, decoded_samples)`."""

    cosines: torch.Tensor
    has_identity: torch.Tensor
    lpips: torch.Tensor
    further_cosines: torch.Tensor | None = None

    def identity_distances(self) -> torch.Tensor:
        """The mean of 1 - cosine over the recognizers, `(decoded_samples,)`: none alone can be fooled."""
        if self.further_cosines is None:
            return 1 - self.cosines
        return 1 - torch.cat([self.cosines[None], self.further_cosines]).mean(dim=0)


def face_losses(
    vae: FirstStage,
    recognizer: nn.Module | None,
    perceptual: nn.Module | None,
    loss: DenoisingLoss,
    identity_embeds: torch.Tensor,
    num_samples: int,
    weights: torch.Tensor | None = None,
    further: Sequence[nn.Module] = (),
) -> FaceLosses:
    """Decodes some of the faces as denoised in one step, and compares them with what they should be, in float32
    whatever the model is trained in. Differentiable in the prediction.

    Args:
        recognizer: embeds `(N, 3, height, width)` in [-1, 1].
        perceptual: LPIPS with `spatial=True`.
        weights (`torch.Tensor` of shape `(batch,)`, *optional*): the faces are drawn in proportion to it.
        further: recognizers of any embedding, beside `recognizer`: they compare with the clean face, decoded.
    """
    weights = torch.ones_like(loss.losses) if weights is None else weights
    rows = draw_rows(weights if perceptual is not None else weights * ~loss.is_empty, num_samples)
    with full_precision(loss.denoised.device):
        faces = decode_latents(vae, loss.denoised[rows].to(vae.dtype)).float()
        cosines = lpips = torch.zeros(len(rows), device=faces.device)
        further_cosines = None
        if perceptual is not None or further:
            with torch.no_grad():
                clean = decode_latents(vae, loss.latents[rows].to(vae.dtype)).float()
                wanted = [each(clean) for each in further]
        if recognizer is not None:
            jittered = jitter(faces)
            cosines = F.cosine_similarity(recognizer(jittered), identity_embeds[rows])
            if further:
                pairs = zip(further, wanted, strict=True)
                further_cosines = torch.stack([F.cosine_similarity(each(jittered), own) for each, own in pairs])
        if perceptual is not None:
            weights = facial_feature_weights(faces.shape[-1], faces.device)
            lpips = (perceptual(clean, faces) * weights).mean(dim=(1, 2, 3))
    return FaceLosses(cosines, ~loss.is_empty[rows], lpips, further_cosines)


class DenoisingLog(RunningMeans):
    """Means of the loss: over all, by quarter of the timesteps, by context; and of the alignment and of the decoded
    faces' identity cosine (one per recognizer) and LPIPS, where they are measured."""

    QUARTERS = 4

    def __init__(self, num_train_timesteps: int, device: torch.device):
        super().__init__(device)
        self.num_train_timesteps = num_train_timesteps

    def add(self, loss: DenoisingLoss, faces: FaceLosses | None = None) -> None:
        finite = self.count(loss.losses)
        quarter = loss.timesteps * self.QUARTERS // self.num_train_timesteps
        parts = {"loss": finite, "loss/identity": finite & ~loss.is_empty, "loss/empty": finite & loss.is_empty}
        parts |= {f"loss/quarter_{i + 1}": finite & (quarter == i) for i in range(self.QUARTERS)}
        for name, part in parts.items():
            self.add_mean(name, loss.losses, part)
        if loss.alignment is not None:
            self.add_mean("alignment", loss.alignment, loss.alignment.isfinite())
        if faces is not None:
            for number, cosines in enumerate(() if faces.further_cosines is None else faces.further_cosines):
                self.add_mean(f"identity_cosine_{number + 2}", cosines, faces.has_identity)
            self.add_mean("identity_cosine", faces.cosines, faces.has_identity)
            self.add_mean("lpips", faces.lpips, torch.ones_like(faces.lpips, dtype=torch.bool))

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        means, finite = super().take(accelerator)
        # a distance that is not asked for is 0
        return {name: mean for name, mean in means.items() if mean or name not in ("identity_cosine", "lpips")}, finite
