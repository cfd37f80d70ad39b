import copy
import functools
import inspect
import json
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import AutoModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention import AttentionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo

from .attention_processor import installed_processors
from .conditions import ARGUMENTS, check_names, condition_values, with_arguments, with_conditions
from .denoisers import DenoiserModel, denoiser_kind
from .encoders import IDENTITY_ENCODER, EncoderMark, check_same_encoder, projector_mark
from .faces import CarriedEncoder, FaceEncoder, carried_encoder, is_by_carried, teacher_mark
from .files import plain_numbers
from .fingerprint import unwrapped
from .hub import download_pipeline, fill_card, load_card, own_class_names, write_remote_code
from .identities import IdentityBank
from .latents import FirstStage, decode_latents, encode_pictures
from .models import CONDITIONS, ConditionProjector
from .models.empty_context import EmptyContext
from .models.identity_projector import IdentityProjector
from .pictures import Picture, as_pictures, rgb_bytes
from .two_stage import TwoStageSampler
from .two_stage.boundary import rule_kind, rule_of_layout
from .two_stage.dial import DIAL_ARGUMENTS, REFUSED, Dial
from .two_stage.layout import begin_within, first_evaluation, noised_layout
from .two_stage.schedulers import (
    check_scheduler,
    check_timesteps,
    denoiser_timesteps,
    paper_timesteps,
    prediction_type,
    scale_model_input,
    set_timesteps,
    starts_step,
    step_after_switch,
)

INJECTIONS = (None, "self", "cross", "both")
# arguments of the call whose defaults are the model's own: entries of the pipeline's configuration
PAPER_DEFAULTS: dict[str, float] = {
    "guidance_scale": 2.0,
    "boundary_threshold": 0.006,
    "latest_boundary": 500,
    "injection_strength": 0.5,
}
MODEL_DEFAULTS = tuple(PAPER_DEFAULTS)
# from and to; the others may be any finite number
LIMITS = {"latest_boundary": (0.0,), "injection_strength": (0.0, 1.0)}
# the defaults of the pipeline in which each denoiser was first seen
_known_defaults: WeakKeyDictionary[torch.nn.Module, dict[str, float]] = WeakKeyDictionary()

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from uiface_diffusers import UIFacePipeline

        >>> pipe = UIFacePipeline.from_pretrained("path/to/pipeline")
        >>> identity = torch.randn(512)  # better: the embedding of a face, see uiface_diffusers.faces
        >>> generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        >>> out = pipe(identity, num_images_per_prompt=8, generator=generators)
        >>> out.images[0].save("face.png")
        >>> out.boundary_timesteps
        ```
"""


@dataclass
class UIFacePipelineOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): B pictures or latents; `output_type` says
            which.
        boundary_timesteps (`torch.LongTensor` of shape `(B,)`): the first timestep that each sample predicts from its
            identity; -1 for a sample that never does. As in the call, of the paper's noise schedule.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    boundary_timesteps: torch.Tensor


# what belongs to a single call: identities, noise, and the form of the result
CALL_ARGUMENTS = {
    "identity_embeds",
    "num_images_per_prompt",
    "generator",
    "latents",
    "layout",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    *ARGUMENTS,
}


def _check_interval(interval: Any) -> None:
    if interval is None:
        return
    is_pair = isinstance(interval, list | tuple) and len(interval) == 2
    is_pair = is_pair and all(isinstance(t, Real) and not isinstance(t, bool) for t in interval)
    if not is_pair or not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"`guidance_interval` has to be two timesteps, the lower one first, but is {interval!r}.")


def _check_generator(generator: Any, batch_size: int) -> None:
    if generator is not None and not isinstance(generator, list | torch.Generator):
        raise ValueError(f"`generator` has to be a torch.Generator or a list of them but is {generator!r}.")
    if not isinstance(generator, list):
        return
    if len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for a batch of {batch_size}: give one generator per"
            " sample, or a single one."
        )
    for i, each in enumerate(generator):
        if not isinstance(each, torch.Generator):
            raise ValueError(
                f"`generator` has to be a torch.Generator or a list of them, but position {i} is {each!r}."
            )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` has to be a positive integer but is {value!r}.")


def _check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        limits = "" if math.isinf(low) else f" from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
        raise ValueError(f"`{name}` has to be a finite number{limits} but is {value!r}.")


# ids of the pipelines and schedulers of the calls that are running: both hold the state of a call
_running: set[int] = set()
_running_lock = threading.Lock()


def one_call_at_a_time(call: Callable) -> Callable:
    """Refuses a call of a pipeline while another call of it, or with its scheduler, is running."""

    @functools.wraps(call)
    def exclusive_call(self: "UIFacePipeline", *args: Any, **kwargs: Any) -> Any:
        used = {id(self), id(self.scheduler)}
        with _running_lock:
            if used & _running:
                raise RuntimeError(
                    "another call of this pipeline, or of one with the same scheduler, is running: the two would"
                    " change each other's images. Give each thread its own `UIFacePipeline.from_pipe(pipe)`, which"
                    " shares the models and copies the scheduler."
                )
            _running.update(used)
        try:
            return call(self, *args, **kwargs)
        finally:
            with _running_lock:
                _running.difference_update(used)

    return exclusive_call


class UIFacePipeline(DiffusionPipeline):
    r"""Synthetic faces by two-stage, identity-conditioned latent diffusion (UIFace, arXiv 2502.19803).

    Every sample starts under the empty context, which lays out pose, light and expression. From a boundary that is
    found for each sample in its cross-attention, it follows its identity, with attention injected from the empty
    branch.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderTiny`] or [`VQModel`]): the first stage; `None` for a
            pipeline that is only saved, or gives latents.
        unet ([`ModelMixin`]): the denoiser, of `uiface_diffusers.denoisers.SUPPORTED`; it must have cross-attention.
            It may be a transformer: the component has the name that saved pipelines know it by.
        scheduler ([`SchedulerMixin`]): one of `uiface_diffusers.two_stage.schedulers.SUPPORTED`, with epsilon or v
            prediction, or of its `FLOW`, with the velocity of flow matching.
        identity_projector ([`IdentityProjector`]): identity embedding -> identity context.
        empty_context ([`EmptyContext`]): the learned context without an identity.
        pose_projector ([`PoseProjector`], *optional*): head pose -> tokens appended to both contexts. This one and
            others of `uiface_diffusers.models.CONDITIONS` are keyword arguments; without them nothing is appended.
        guidance_scale, boundary_threshold, latest_boundary, injection_strength (*optional*): this model's defaults
            for the call's arguments; the paper's if not given. They are saved with the pipeline, and `from_pipe` keeps
            them. `components` does not have them: `UIFacePipeline(**pipe.components)` warns if the model's own differ
            from the paper's.
        dial (`dict`, *optional*): the curve of `uiface calibrate` (`two_stage.dial.Dial`), for the call's `diversity`
            and `identity_cosine`. Saved and kept like the defaults.

    Raises:
        ValueError: components that do not belong together or cannot be sampled from, or defaults out of range.
    """

    vae: FirstStage
    unet: DenoiserModel
    scheduler: Any  # diffusers' schedulers have no typed class in common
    identity_projector: IdentityProjector
    empty_context: EmptyContext

    model_cpu_offload_seq = "->".join(  # type: ignore[assignment]  # `None` there
        ["identity_projector", "empty_context", *CONDITIONS, "unet", "vae"]
    )
    _optional_components = list(CONDITIONS)
    _callback_tensor_inputs = ["latents", "stage_two", "attention_maps"]

    @with_arguments({name: projector | None for name, projector in CONDITIONS.items()})
    def __init__(
        self,
        vae: FirstStage | None,
        unet: DenoiserModel,
        scheduler: KarrasDiffusionSchedulers,
        identity_projector: IdentityProjector,
        empty_context: EmptyContext,
        guidance_scale: float | None = None,
        boundary_threshold: float | None = None,
        latest_boundary: int | None = None,
        injection_strength: float | None = None,
        dial: dict[str, Any] | None = None,
        **conditions: ConditionProjector | None,
    ):
        super().__init__()
        if dial is not None:
            Dial.from_config(dial)
        check_names(conditions, CONDITIONS)
        self._check_components(vae, unet, identity_projector, empty_context, conditions)
        values = (guidance_scale, boundary_threshold, latest_boundary, injection_strength)
        self._check_defaults(*values)
        pairs = zip(MODEL_DEFAULTS, values, strict=True)
        given = {name: plain_numbers(value) for name, value in pairs if value is not None}
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            identity_projector=identity_projector,
            empty_context=empty_context,
            **dict.fromkeys(CONDITIONS) | conditions,
        )
        self.register_to_config(**self._with_defaults(unwrapped(unet), given), dial=dial)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads configurations and safetensors weights of a pipeline on the Hub and returns their folder.

        Stock diffusers refuses components of another package without code in the repository; here the package is
        installed, and no code is fetched. Takes `revision`, `variant`, `cache_dir`, `force_download`,
        `local_files_only`, `token`, and components that need not be downloaded.

        Raises:
            OSError: the download failed; the message says why and what to do.
        """
        names = ("revision", "variant", "cache_dir", "force_download", "local_files_only", "token")
        components, _ = cls._get_signature_keys(cls)
        passed = tuple(name for name in components if name in kwargs)
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return download_pipeline(pretrained_model_name, **options, passed_components=passed)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        return own_class_names(config, cls.__name__) if isinstance(config, dict) else config

    def to_json_string(self) -> str:
        """The content of `model_index.json`, without the conditions and the dial that this pipeline does not have."""
        config = json.loads(super().to_json_string())
        if config.get("dial") is None:
            config.pop("dial", None)
        kept = {name: value for name, value in config.items() if name not in CONDITIONS or value[0] is not None}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "UIFacePipeline":
        """A pipeline that shares the models of another one and has its defaults; for example one per thread.

        The scheduler is copied, because it holds the state of a call. The models keep their dtype if none is given:
        diffusers' own `from_pipe` would cast them to float32, in the other pipeline as well.

        Args:
            pipeline: the other one.
            kwargs: components and defaults that differ, for example `scheduler`; and `torch_dtype`.
        """
        if "scheduler" not in kwargs and getattr(pipeline, "scheduler", None) is not None:
            kwargs["scheduler"] = copy.deepcopy(pipeline.scheduler)
        own = {*cls._get_signature_keys(cls)[0], *MODEL_DEFAULTS, "dial"}
        if not isinstance(pipeline, UIFacePipeline) or not kwargs.keys() <= own:
            return super().from_pipe(pipeline, **kwargs)
        defaults = {name: pipeline.config[name] for name in (*MODEL_DEFAULTS, "dial")}
        new = cls(**pipeline.components | defaults | kwargs)
        if pipeline.config.get("_name_or_path") is not None:
            new.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return new

    @classmethod
    def from_unet(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        identity_dim: int = 512,
        num_tokens: int = 8,
        identity_encoder: str | None = None,
        **kwargs: Any,
    ) -> "UIFacePipeline":
        """A starting point for fine-tuning: denoiser, first stage and scheduler of a stock pipeline such as Stable
        Diffusion, with a fresh identity projector and empty context in place of the text.

        Args:
            pretrained_model_name_or_path: folder or Hub repository with `unet` (`UNet2DConditionModel`), `vae` and
                `scheduler`.
            identity_dim (`int`, defaults to 512): width of the identity embeddings.
            num_tokens (`int`, defaults to 8): context tokens per sample. With a single one, cross-attention would have
                nothing to choose from.
            identity_encoder (`str`, *optional*): the recognizer that the embeddings come from.
            kwargs: for each component's `from_pretrained`: `revision`, `variant`, `cache_dir`, `token` and the like.

        Raises:
            ValueError: the denoiser needs more than a context, such as SDXL's.
        """
        index = DiffusionPipeline.load_config(pretrained_model_name_or_path, **kwargs)
        unet = UNet2DConditionModel.from_pretrained(pretrained_model_name_or_path, subfolder="unet", **kwargs)
        needs = [
            name for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type") if unet.config[name]
        ]
        if needs:
            raise ValueError(f"`unet` needs more than a context ({', '.join(needs)}): it cannot follow an identity.")
        vae = AutoModel.from_pretrained(str(pretrained_model_name_or_path), subfolder="vae", **kwargs)
        scheduler_class = getattr(diffusers, index["scheduler"][1])
        kwargs.pop("variant", None)
        scheduler = scheduler_class.from_pretrained(pretrained_model_name_or_path, subfolder="scheduler", **kwargs)
        context_dim = unet.config.cross_attention_dim
        projector = IdentityProjector(identity_dim, context_dim, num_tokens, identity_encoder=identity_encoder).eval()
        return cls(vae, unet, scheduler, projector, EmptyContext(context_dim, num_tokens).eval())

    def push_to_hub(  # type: ignore[override]  # a pipeline is a whole repository: no `subfolder`
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        remote_code: bool = False,
        card_metadata: Mapping[str, Any] | None = None,
        recipe: str | None = None,
    ) -> str:
        """Uploads the pipeline with a model card.

        Args:
            repo_id: `"org/name"`; created if it does not exist.
            commit_message: `"Upload UIFacePipeline"` if not given.
            private: whether a new repository is private.
            token: for the Hub; the one of `hf auth login` if not given.
            create_pr (`bool`, defaults to `False`): open a pull request instead of committing to `main`.
            safe_serialization: has to be `True`: there are no pickles.
            variant: part of the weights' file names, such as `"fp16"`.
            remote_code (`bool`, defaults to `False`): add the files with which stock
                `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads it.
            card_metadata: for the model card, such as `license`, `datasets`, `base_model`. What the repository's card
                already says stays.
            recipe: how it was trained, in Markdown, for the card.

        Returns:
            The address of the commit or of the pull request.
        """
        if not safe_serialization:
            raise ValueError("weights are pushed as safetensors only.")
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        card = fill_card(load_card(repo_id, token), self, repo_id, card_metadata or {}, recipe)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if remote_code:
                write_remote_code(Path(folder))
            card.save(Path(folder) / "README.md")
            message = commit_message or f"Upload {type(self).__name__}"
            return self._upload_folder(folder, repo_id, token=token, commit_message=message, create_pr=create_pr)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own; the encoder that the pipeline carries goes with it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder, copied = self.carried_encoder(), Path(save_directory) / IDENTITY_ENCODER
        if folder is not None and folder.resolve() != copied.resolve():
            shutil.copytree(folder, copied, dirs_exist_ok=True)

    @staticmethod
    def _with_defaults(unet: torch.nn.Module | None, given: dict[str, float]) -> dict[str, float]:
        """Those given, and the paper's for the others. Warns if the model's own differ."""
        defaults = PAPER_DEFAULTS | given
        if unet is None:
            return defaults
        # only the first pipeline says what the model's own are: later ones may be given others
        known = _known_defaults.setdefault(unet, defaults)
        lost = {name: value for name, value in known.items() if name not in given and value != defaults[name]}
        if lost:
            own = ", ".join(f"{name}={value}" for name, value in lost.items())
            taken = ", ".join(f"{name}={defaults[name]}" for name in lost)
            warnings.warn(
                f"`unet` comes from a pipeline with {own}, which components do not carry: the paper's {taken} will be"
                " taken. Use `UIFacePipeline.from_pipe(pipe)`, which keeps the model's own, or give them.",
                stacklevel=3,
            )
        return defaults

    @staticmethod
    def _check_components(
        vae: FirstStage | None,
        unet: DenoiserModel | None,
        identity_projector: IdentityProjector | None,
        empty_context: EmptyContext | None,
        conditions: Mapping[str, ConditionProjector | None],
    ) -> None:
        if unet is not None:
            attended_dim = denoiser_kind(unet).context_dim(unet)
        if vae is not None and unet is not None and vae.config.latent_channels != unet.config.in_channels:
            raise ValueError(
                f"`vae` ({type(vae).__name__}) has {vae.config.latent_channels} latent channels, `unet` takes"
                f" {unet.config.in_channels}: they do not belong together."
            )
        contexts = {"identity_projector": identity_projector, "empty_context": empty_context, **conditions}
        for context_name, module in contexts.items():
            if module is None or unet is None:
                continue
            if module.config.context_dim != attended_dim:
                raise ValueError(
                    f"`{context_name}` gives contexts of width {module.config.context_dim}, `unet` attends to width"
                    f" {attended_dim}: they do not belong together."
                )
        if identity_projector is not None and empty_context is not None:
            tokens = (identity_projector.config.num_tokens, empty_context.config.num_tokens)
            if tokens[0] != tokens[1]:
                raise ValueError(f"`identity_projector` gives {tokens[0]} tokens, `empty_context` {tokens[1]}.")
        for name, projector in conditions.items():
            own = 1 if empty_context is None else empty_context.config.num_tokens
            if projector is not None and projector.config.num_tokens % own:
                raise ValueError(
                    f"`{name}` gives {projector.config.num_tokens} tokens, which are not a multiple of the"
                    f" {own} of `empty_context`."
                )

    @property
    def conditions(self) -> dict[str, ConditionProjector | None]:
        """The optional components of `models.CONDITIONS`; `None` for those that this pipeline does not have."""
        return {name: getattr(self, name) for name in CONDITIONS}

    @staticmethod
    def _check_defaults(*values: float | None) -> None:
        """Values of `MODEL_DEFAULTS` in their order; `None` for one that was not given."""
        for name, value in zip(MODEL_DEFAULTS, values, strict=True):
            if value is not None:
                _check_number(name, value, *LIMITS.get(name, ()))

    def check_inputs(
        self,
        identity_embeds: torch.Tensor | None,
        num_images_per_prompt: int,
        num_inference_steps: int,
        guidance_scale: float | None,
        boundary: str | int | None,
        boundary_threshold: float | None,
        latest_boundary: int | None,
        guide_from_boundary: bool,
        injection: str | None,
        injection_strength: float | None,
        guidance_interval: tuple[float, float] | None,
        reuse_empty_branch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
        layout: torch.Tensor | list[np.ndarray] | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        # components may have been exchanged
        self._check_components(self.vae, self.unet, self.identity_projector, self.empty_context, self.conditions)
        check_scheduler(self.scheduler)
        for name, value in {
            "num_images_per_prompt": num_images_per_prompt,
            "num_inference_steps": num_inference_steps,
            "reuse_empty_branch": reuse_empty_branch,
        }.items():
            _check_count(name, value)
        kind = rule_kind(boundary)
        if not isinstance(guide_from_boundary, bool | np.bool_):
            raise ValueError(f"`guide_from_boundary` has to be True or False but is {guide_from_boundary!r}.")
        if not (injection is None or isinstance(injection, str)) or injection not in INJECTIONS:
            raise ValueError(f"`injection` has to be one of {INJECTIONS} but is {injection!r}.")
        self._check_defaults(guidance_scale, boundary_threshold, latest_boundary, injection_strength)
        _check_interval(guidance_interval)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` has to be "pil", "np", "pt" or "latent" but is {output_type!r}.')
        if callback_on_step_end_tensor_inputs is not None:
            unknown = [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]
            if unknown:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` has {unknown}, possible are {self._callback_tensor_inputs}."
                )

        batch_size = (1 if identity_embeds is None else len(identity_embeds)) * num_images_per_prompt
        _check_generator(generator, batch_size)
        _, threshold, latest, _ = self.prepare_sampling(
            num_inference_steps, guidance_scale, boundary_threshold, latest_boundary, injection_strength
        )
        rule = kind.of(boundary, batch_size, latest, guide_from_boundary, threshold)
        condition_values(self.conditions, conditions or {}, batch_size)
        if latents is not None:
            channels = self.unet.config.in_channels
            if not isinstance(latents, torch.Tensor):
                raise ValueError(f"`latents` has to be a tensor but is {type(latents).__name__}.")
            if latents.ndim != 4 or latents.shape[0] != batch_size or latents.shape[1] != channels:
                raise ValueError(
                    f"`latents` has shape {tuple(latents.shape)}, expected is ({batch_size}, {channels},"
                    " height, width)."
                )
        elif self.unet.config.sample_size is None:
            raise ValueError("`unet.config.sample_size` is not set: give `latents`.")
        # last, so that a scheduler's own complaints are about its steps; a copy, because a call may be running
        scheduler = copy.deepcopy(self.scheduler)
        set_timesteps(scheduler, int(num_inference_steps))
        check_timesteps(scheduler)
        if layout is not None:
            self._check_layout(layout, batch_size, self._latent_size(latents))
            first_evaluation(scheduler, paper_timesteps(scheduler), rule.layout_timestep())

    def _check_layout(self, layout: torch.Tensor | list[np.ndarray], batch_size: int, size: tuple[int, int]) -> None:
        if len(layout) not in (1, batch_size):
            raise ValueError(
                f"`layout` has {len(layout)} pictures for a batch of {batch_size}: give one, or one each."
            )
        height, width = size
        if isinstance(layout, torch.Tensor):
            expected = (self.unet.config.in_channels, height, width)
            if layout.shape[1:] != expected or not layout.is_floating_point() or not layout.isfinite().all():
                raise ValueError(
                    f"`layout` has shape {tuple(layout.shape)} and type {layout.dtype}: latents have to be finite, of"
                    f" shape ({batch_size} or 1, {', '.join(map(str, expected))}). Pictures are given as PIL images,"
                    " arrays or paths."
                )
            return
        if self.vae is None:
            raise ValueError("`vae` is None, which `layout` pictures are encoded by: give their latents.")
        for i, picture in enumerate(layout):
            if picture.shape[0] * width != picture.shape[1] * height:
                raise ValueError(
                    f"`layout` {i} is {picture.shape[1]}x{picture.shape[0]}, the pipeline's pictures are"
                    f" {width}:{height}: give faces aligned as those of its training, see `uiface prepare`."
                )

    @classmethod
    def sampling_defaults(cls) -> dict[str, Any]:
        """The arguments of the call that say how to sample, with their defaults: all but those of a single call."""
        parameters = inspect.signature(cls.__call__).parameters
        others = {"self", *CALL_ARGUMENTS, *DIAL_ARGUMENTS}
        return {name: each.default for name, each in parameters.items() if name not in others}

    def with_dial(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the call in which `diversity` and `identity_cosine` are replaced by what they become.

        Args:
            sampling: some of the arguments of `sampling_defaults`, and of the dial.

        Raises:
            ValueError: the pipeline has no dial, a value is out of its range, both are given, or an argument that the
                dial decides is given, too.
        """
        others = {name: value for name, value in sampling.items() if name not in DIAL_ARGUMENTS}
        asked = {name: sampling[name] for name in DIAL_ARGUMENTS if sampling.get(name) is not None}
        if not asked:
            return others
        given = [*asked, *(name for name in REFUSED if name in others)]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` decides what `{given[1]}` would: give one of the two.")
        if self.config.dial is None:
            raise ValueError(
                f"`{given[0]}` needs a pipeline whose trade-off of diversity and identity was measured: run `uiface"
                " calibrate MODEL --encoder PACK` first, or give `boundary` and `guidance_scale`."
            )
        dial, value = Dial.from_config(self.config.dial), plain_numbers(asked[given[0]])
        return others | dial.settings(dial.identity_cosine(value) if "diversity" in asked else value)

    def prepare_dial(self, diversity: float | str | None, identity_cosine: float | None, *given: Any) -> list[Any]:
        """The values of `two_stage.dial.REFUSED` in their order: those `given`, or what the dial makes of them."""
        defaults, values = self.sampling_defaults(), dict(zip(REFUSED, given, strict=True))
        # a default is as good as nothing
        others = {
            name: value
            for name, value in values.items()
            if not (isinstance(value, type(defaults[name])) and value == defaults[name])
        }
        dial = {"diversity": diversity, "identity_cosine": identity_cosine}
        return list((values | self.with_dial(others | dial)).values())

    def check_sampling(
        self,
        identity_embeds: torch.Tensor | None = None,
        layout: torch.Tensor | list[np.ndarray] | None = None,
        **sampling: Any,
    ) -> None:
        """Checks the arguments of `sampling_defaults` before many calls.

        Args:
            identity_embeds: as `prepare_identity_embeds` gives them.
            layout: as `load_layout` gives it; one picture.
            sampling: some of the arguments.

        Raises:
            ValueError: there is no such argument, or a value does not fit.
        """
        defaults, sampling = self.sampling_defaults(), self.with_dial(sampling)
        unknown = sorted(sampling.keys() - defaults.keys())
        if unknown:
            raise ValueError(
                f"the pipeline's call has no argument {unknown[0]!r} that could be given here: {sorted(defaults)}."
            )
        single: dict[str, Any] = {"generator": None, "latents": None, "output_type": "latent"}
        single |= {"num_images_per_prompt": 1, "callback_on_step_end_tensor_inputs": None}
        self.check_inputs(identity_embeds=identity_embeds, layout=layout, **single, **defaults | sampling)

    def carried_encoder(self) -> Path | None:
        """The folder of the encoder that comes with the pipeline, `identity_encoder` in the folder that it was loaded
        from; `None` if there is none."""
        source = self.config.get("_name_or_path")
        if source is None or Path(source).is_dir():
            return carried_encoder(source)
        try:
            return carried_encoder(self.download(source, local_files_only=True))
        except OSError:  # it was loaded from a cache elsewhere
            return None

    def check_encoder(self, what: str, mark: EncoderMark) -> None:
        """Refuses embeddings of another encoder than the one that the pipeline was trained with, or that it carries.

        Args:
            what: has the embeddings of `mark`, such as "the bank".

        Raises:
            ValueError: they are of another one.
        """
        folder, trained_on = self.carried_encoder(), projector_mark(self.identity_projector)
        if folder is not None and is_by_carried(mark, folder):
            mark = teacher_mark(folder)  # the projector may have been exchanged
            if trained_on.fingerprint is None:  # what came with the pipeline is no reason for a warning
                mark = mark._replace(fingerprint=None)
        check_same_encoder(what, mark, "this pipeline", trained_on)

    def embed_photographs(
        self,
        photographs: Picture | list[Picture],
        aligned: bool = False,
        detector: FaceEncoder | None = None,
        selection: str = "largest",
    ) -> IdentityBank:
        """The identities of people in photographs, by the encoder that the pipeline carries: a small copy of the one
        that it was trained with, for which no model pack is needed. A copy's embeddings are near the real ones, not
        the same: where you have the pack, `FaceEncoder.embed` is better.

        Args:
            photographs: one or several: files, `PIL.Image.Image` of any mode, or `(height, width, 3)` bytes.
            aligned (`bool`, defaults to `False`): they are aligned faces already, such as those of a generated set.
            detector (`FaceEncoder`, *optional*): finds the faces in photographs that are not aligned; of any pack.
            selection: which face of a photograph, see `FaceEncoder.select`.

        Returns:
            An `IdentityBank` for this pipeline's call; other pipelines refuse it.

        Raises:
            NoFaceError: a photograph without a face.
            OSError: a file cannot be read.
            ValueError: the pipeline carries no encoder, or there is no detector for photographs.
        """
        folder = self.carried_encoder()
        if folder is None:
            trained_on = projector_mark(self.identity_projector)
            raise ValueError(
                f"this pipeline carries no encoder (`{IDENTITY_ENCODER}` in its folder): embed photographs by"
                f" `FaceEncoder.embed` with the pack that it was trained with, {trained_on}."
            )
        encoder = CarriedEncoder(folder, detector, self.device)
        return encoder.embed(photographs, selection, aligned)

    def prepare_identity_embeds(self, identity_embeds: Any) -> torch.Tensor | None:
        """Brings identity embeddings into one form: `(batch, identity_dim)`, float32, of unit length, on the CPU.

        Args:
            identity_embeds: see `__call__`.

        Raises:
            ValueError: another width than the projector's, NaN or infinite values, a zero vector, an empty batch, or a
                bank of another encoder than the projector's.
        """
        if identity_embeds is None:
            return None
        config = self.identity_projector.config
        if isinstance(identity_embeds, IdentityBank):
            self.check_encoder("the identity bank", identity_embeds.encoder_mark)
            identity_embeds = identity_embeds.embeddings
        if isinstance(identity_embeds, list | tuple):
            if not len(identity_embeds):
                raise ValueError("`identity_embeds` is an empty list.")
            rows = [torch.as_tensor(row, dtype=torch.float32, device="cpu") for row in identity_embeds]
            shapes = {tuple(row.shape) for row in rows}
            if len(shapes) > 1:
                raise ValueError(f"`identity_embeds` is a list of vectors of different shapes: {sorted(shapes)}.")
            identity_embeds = torch.stack(rows)
        # one vector has one length: another device would round it in another way
        embeds = torch.as_tensor(identity_embeds, dtype=torch.float32, device="cpu")
        if embeds.ndim == 1:
            embeds = embeds[None]
        if embeds.ndim != 2 or embeds.shape[1] != config.identity_dim or not len(embeds):
            raise ValueError(
                f"`identity_embeds` has shape {tuple(embeds.shape)}, the identity projector takes (batch,"
                f" {config.identity_dim})"
                + (f" from `{config.identity_encoder}`." if config.identity_encoder else ".")
            )
        bad = (~embeds.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"`identity_embeds` has NaN or infinite values in row(s) {bad}.")
        norm = embeds.norm(dim=1, keepdim=True)
        zero = (norm.flatten() == 0).nonzero().flatten().tolist()
        if zero:
            raise ValueError(f"`identity_embeds` is zero in row(s) {zero}: a zero vector has no direction.")
        return embeds / norm

    def default_sampling(self, num_inference_steps: int = 50) -> dict[str, float]:
        """The call's default values of `guidance_scale`, `boundary_threshold` (in proportion to the width of a step),
        `latest_boundary` and `injection_strength`.

        Raises:
            ValueError: `num_inference_steps` is not a positive integer.
        """
        _check_count("num_inference_steps", num_inference_steps)
        defaults = {name: self.config[name] for name in MODEL_DEFAULTS}
        defaults["boundary_threshold"] *= 50 / int(num_inference_steps)
        return defaults

    def prepare_sampling(self, num_inference_steps: int, *given: float | None) -> tuple[float, ...]:
        """The values of `MODEL_DEFAULTS` in their order: those `given`, or the model's own where one is `None`."""
        defaults = self.default_sampling(num_inference_steps)
        pairs = zip(MODEL_DEFAULTS, given, strict=True)
        return tuple(defaults[name] if value is None else float(value) for name, value in pairs)

    @staticmethod
    def load_layout(layout: Any) -> torch.Tensor | list[np.ndarray] | None:
        """Brings a layout into one of two forms: latents `(N, channels, height, width)`, which a tensor is, or a list
        of `(height, width, 3)` RGB bytes.

        Args:
            layout: see `__call__`.

        Raises:
            OSError: a file is missing or no picture.
            ValueError: an array has another form than `uiface_diffusers.pictures.rgb_bytes` takes, or a list is empty.
        """
        if layout is None:
            return None
        if isinstance(layout, torch.Tensor):
            if layout.ndim not in (3, 4):
                raise ValueError(f"`layout` has shape {tuple(layout.shape)}: latents have 4 dimensions.")
            return layout[None] if layout.ndim == 3 else layout
        pictures = [rgb_bytes(picture) for picture in as_pictures(layout)]
        if not pictures:
            raise ValueError("`layout` is an empty list.")
        return pictures

    def encode_layout(self, layout: torch.Tensor | list[np.ndarray], height: int, width: int) -> torch.Tensor:
        """What `load_layout` gives -> latents `(N, channels, height, width)`."""
        if isinstance(layout, torch.Tensor):
            return layout
        return encode_pictures(self.vae, layout, height, width, self._execution_device)

    def encode_identity(
        self,
        identity_embeds: torch.Tensor,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Identity embeddings -> identity contexts.

        Args:
            identity_embeds (`torch.Tensor` of shape `(batch, identity_dim)`): of unit length.
            num_images_per_prompt (`int`, defaults to 1): samples per identity.
            device, dtype (*optional*): of the context; by default, the pipeline's device and the projector's dtype.

        Returns:
            `torch.Tensor` of shape `(batch * num_images_per_prompt, num_tokens, context_dim)`.
        """
        identity_embeds = identity_embeds.to(device or self._execution_device, self.identity_projector.dtype)
        context = self.identity_projector(identity_embeds, return_dict=False)[0].to(dtype)
        return context.repeat_interleave(num_images_per_prompt, dim=0)

    def prepare_contexts(
        self,
        identity_embeds: torch.Tensor | None,
        num_images_per_prompt: int,
        device: torch.device,
        conditions: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The empty context, then every sample's own: `(1 + B, tokens, context_dim)`; the empty one alone, without
        identities. Where a condition is another one for each sample, there are B empty ones.

        Args:
            conditions: those of the call. Their tokens come after the contexts' own.
        """
        batch_size = (1 if identity_embeds is None else len(identity_embeds)) * num_images_per_prompt
        values = condition_values(self.conditions, conditions or {}, batch_size)
        contexts = self.empty_context(1, return_dict=False)[0].to(device=device, dtype=self.unet.dtype)
        contexts = contexts.repeat(max(map(len, values.values()), default=1), 1, 1)
        if identity_embeds is not None:
            own = self.encode_identity(identity_embeds, num_images_per_prompt, device, self.unet.dtype)
            contexts = torch.cat([contexts, own])
        return with_conditions(contexts, self.conditions, values)

    def prepare_timesteps(self, num_inference_steps: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheduler's timesteps on the CPU, where it looks them up, and the denoiser's on its device."""
        set_timesteps(self.scheduler, num_inference_steps)
        return self.scheduler.timesteps, denoiser_timesteps(self.scheduler).to(device)

    def prepare_extra_step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """The generator, for a scheduler whose step takes one."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    def prepare_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
        layout: torch.Tensor | list[np.ndarray] | None = None,
        first: int = 0,
    ) -> torch.Tensor:
        """The latents `(B, channels, height, width)` that sampling begins with: noise as wide as the scheduler wants
        it, `latents` or drawn from `generator`; with a `layout`, its latents with this noise, as of evaluation
        `first`."""
        height, width = self._latent_size(latents)
        if latents is None:
            shape = (batch_size, self.unet.config.in_channels, height, width)
            # in float32 always: one seed gives the same noise under every dtype
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device=device, dtype=dtype)
        if layout is not None:
            return noised_layout(self.scheduler, first, self.encode_layout(layout, height, width), latents)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _latent_size(self, latents: torch.Tensor | None) -> tuple[int, int]:
        """Height and width of the latents: of those given, or the model's own."""
        size = self.unet.config.sample_size if latents is None else latents.shape[-2:]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @one_call_at_a_time
    @with_arguments(dict.fromkeys(ARGUMENTS, Any))
    def __call__(
        self,
        identity_embeds: torch.Tensor | np.ndarray | list | IdentityBank | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        boundary: str | int | None = "adaptive",
        boundary_threshold: float | None = None,
        latest_boundary: int | None = None,
        guide_from_boundary: bool = False,
        injection: str | None = "both",
        injection_strength: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        reuse_empty_branch: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature
        layout: torch.Tensor | Picture | list[Picture] | None = None,
        diversity: float | str | None = None,
        identity_cosine: float | None = None,
        **conditions: Any,
    ) -> UIFacePipelineOutput | tuple:
        r"""Samples faces. B below is the number of identities times `num_images_per_prompt`. The timesteps of
        `boundary`, `latest_boundary` and `guidance_interval` are noise levels of the paper's schedule: with another
        one, they mean the same signal-to-noise ratio (`two_stage.schedulers.paper_timesteps`).

        Args:
            identity_embeds (`torch.Tensor`, `np.ndarray`, `list` or `IdentityBank`, *optional*): `(batch, 512)` face
                recognition embeddings, one `(512,)` vector, or a list of such vectors; they are normalized. `None`
                follows the empty context to the end: faces of nobody in particular.
            num_images_per_prompt (`int`, defaults to 1): samples per identity; those of one identity are neighbors.
            num_inference_steps (`int`, defaults to 50): steps of the scheduler.
            guidance_scale (`float`, *optional*, the paper's is 2.0): diffusers' scale, the paper's w plus 1:
                e_empty + guidance_scale * (e_identity - e_empty). 1 is no guidance. By default, this,
                `boundary_threshold`, `latest_boundary` and `injection_strength` are those of `pipe.config`.
            boundary (`str`, `int` or `None`, defaults to `"adaptive"`): one of `two_stage.boundary.RULES`.
                `"adaptive"` finds each sample's boundary in its cross-attention (paper, sec. 3.3); a timestep is the
                same boundary for all, the first timestep predicted from the identity; `None` is the single stage that
                the paper compares with: the identity with guidance from the first step on, nothing injected.
            boundary_threshold (`float`, *optional*, the paper's is 0.006): the adaptive boundary is reached when the
                attention maps of two steps differ by less: the mean absolute difference of maps in [0, 1]. The one of
                `pipe.config` is for 50 steps; it is scaled with the width of a step.
            latest_boundary (`int`, *optional*, the paper's is 500): below this timestep every sample follows its
                identity, whether it reached the adaptive boundary or not. With a fixed boundary, it only says below
                which timestep guidance and cross-attention injection act.
            guide_from_boundary (`bool`, defaults to `False`): `False` is the reference code: guidance and
                cross-attention injection act below `latest_boundary` only; between a sample's boundary and that
                timestep, its identity is followed with self-attention injection alone. `True` is the paper's reading:
                both act from the sample's boundary on.
            injection (`str`, *optional*, defaults to `"both"`): attention injected from the empty branch: `"self"`,
                `"cross"`, `"both"` or `None` (paper, sec. 3.4).
            injection_strength (`float`, *optional*, the paper's is 0.5): of the cross-attention injection, in [0, 1].
            guidance_interval (`tuple[float, float]`, *optional*): an approximation that saves rows: stage two has
                guidance and injection only at timesteps from the first, the lower one, to the second. Elsewhere, it is
                the identity's prediction alone (after Kynkaanniemi et al. 2024, arXiv 2404.07724).
            reuse_empty_branch (`int`, defaults to 1): an approximation that saves rows: where every sample of any
                batch is in stage two and guided (below `latest_boundary`; from a fixed boundary with
                `guide_from_boundary`; always in the single stage), the empty branch runs once in this many steps. The
                steps between reuse what it gave to guidance (e_identity - e_empty) and injection. 1 is exact.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one, or one per sample. With one per
                sample, no sample depends on the others in its batch.
            latents (`torch.Tensor` of shape `(B, channels, height, width)`, *optional*): the start noise; by default,
                drawn from `generator` in float32.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (`(B, height, width, 3)` in [0, 1]), `"pt"`
                (`(B, 3, height, width)` in [0, 1]) or `"latent"` (float32, whatever the UNet's dtype).
            return_dict (`bool`, defaults to `True`): a tuple `(images, boundary_timesteps)` when `False`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, callback_kwargs)`
                after every step, with the scheduler's timestep, a tensor on the CPU; the `"latents"` that it returns
                replace the call's. Diffusers' `PipelineCallback` objects say themselves which tensors they take.
            callback_on_step_end_tensor_inputs (`list[str]`): of `latents`; `stage_two`, the `(B,)` booleans of the
                samples that followed their identity in this step; and `attention_maps`, the newest ones by which the
                adaptive boundary is found, `(B, 32, 32)` in [0, 1], NaN for a sample in stage two, or `None`.
            layout (`PIL.Image.Image`, `np.ndarray`, path, list of these, or `torch.Tensor`, *optional*): whose pose,
                light, expression and background the samples take: one picture for all, or one per sample, aligned as
                the training's faces are; a tensor is clean latents `(B or 1, channels, height, width)`. It is noised
                to `boundary`, and the steps above are skipped: the higher, the more identity and the less layout.
                `"adaptive"` is then `latest_boundary`, and `None` is refused.
            pose (`tuple[float, float]`, `list` or `torch.Tensor` of shape `(B, 2)`, *optional*): yaw and pitch of the
                head in degrees, of [`PoseProjector`]; one for all samples, or one per sample, `None` for one without.
                It and other conditions of `uiface_diffusers.models.CONDITIONS` need their component.
            diversity (`float` or `"recommended"`, *optional*): chooses `boundary`, `latest_boundary` and
                `guidance_scale` on the curve that `uiface calibrate` measured: 0 is most identity, 1 most diversity,
                `"recommended"` as real faces. `with_dial` says what it becomes. Not beside one of these arguments.
            identity_cosine (`float`, *optional*): the same by the mean cosine of an image to its identity.

        Examples:

        Returns:
            [`UIFacePipelineOutput`] or `tuple`: the pictures and each sample's boundary timestep.

        Raises:
            ValueError: an argument does not fit; raised before the first step, with its name.
            RuntimeError: another call of this pipeline, or of one with the same scheduler, is running.
        """
        # 1. inputs
        guidance_scale, boundary, latest_boundary, boundary_threshold = self.prepare_dial(
            diversity, identity_cosine, guidance_scale, boundary, latest_boundary, boundary_threshold
        )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        identity_embeds, layouts = self.prepare_identity_embeds(identity_embeds), self.load_layout(layout)
        self.check_inputs(
            identity_embeds,
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            boundary,
            boundary_threshold,
            latest_boundary,
            guide_from_boundary,
            injection,
            injection_strength,
            guidance_interval,
            reuse_empty_branch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            layouts,
            conditions,
        )
        num_images_per_prompt, num_inference_steps = int(num_images_per_prompt), int(num_inference_steps)
        scale, threshold, latest, strength = self.prepare_sampling(
            num_inference_steps, guidance_scale, boundary_threshold, latest_boundary, injection_strength
        )
        self._guidance_scale, self._interrupt = scale, False
        device, has_identities = self._execution_device, identity_embeds is not None
        batch_size = (1 if identity_embeds is None else len(identity_embeds)) * num_images_per_prompt

        # 2. contexts, timesteps, start noise
        contexts = self.prepare_contexts(identity_embeds, num_images_per_prompt, device, conditions)
        own_empty, own_tokens = len(contexts) > 1 + has_identities * batch_size, self.empty_context.config.num_tokens
        timesteps, model_timesteps = self.prepare_timesteps(num_inference_steps, device)
        schedule, first = paper_timesteps(self.scheduler), 0
        rule = rule_kind(boundary).of(boundary, batch_size, latest, guide_from_boundary, threshold)
        if layouts is not None:
            rule = fixed = rule_of_layout(rule)
            first = begin_within(self.scheduler, schedule, fixed.timestep)
        # the denoiser alone works in its own dtype: rounded between the steps, latents would lead to another image
        latents_dtype = torch.promote_types(torch.float32, self.unet.dtype)
        latents = self.prepare_latents(batch_size, latents_dtype, device, generator, latents, layouts, first)
        timesteps, model_timesteps, schedule = timesteps[first:], model_timesteps[first:], schedule[first:]
        self._num_timesteps = len(timesteps)
        step_kwargs = self.prepare_extra_step_kwargs(generator)

        # 3. denoise
        sampler = TwoStageSampler(
            rule, has_identities, scale, injection, guidance_interval, int(reuse_empty_branch), device, own_empty
        )
        denoiser = denoiser_kind(self.unet)(self.unet, contexts, device, sampler.injects_cross, strength, own_tokens)
        with installed_processors(cast(AttentionMixin, self.unet)), self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                sampler.guidance_scale = self.guidance_scale  # callbacks may have changed it
                plan = sampler.begin_step(schedule[i], schedule[i + 1 :], starts_step(self.scheduler))
                model_input = scale_model_input(self.scheduler, latents, t)
                rows, block_maps = denoiser(model_input, model_timesteps[i], plan)
                noise_pred = sampler.combine(rows.to(latents_dtype))
                sampler.observe(model_input, noise_pred, prediction_type(self.scheduler), block_maps)
                latents = step_after_switch(self.scheduler, sampler.switched, noise_pred, t, latents, **step_kwargs)

                if callback_on_step_end is not None:
                    maps = rule.attention_maps
                    tensors = {"latents": latents, "stage_two": sampler.stage_two, "attention_maps": maps}
                    callback_kwargs = {k: tensors[k] for k in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                bar.update()

        # 4. pictures
        images = latents
        if output_type != "latent":
            images = decode_latents(self.vae, latents.to(self.vae.dtype))
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        output = UIFacePipelineOutput(images=images, boundary_timesteps=sampler.boundary_timesteps)
        return output if return_dict else output.to_tuple()
