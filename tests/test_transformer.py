"""PixArt's transformer as a denoiser, against attention maps in memory; other transformers are refused by name."""

import pytest
import torch
from conftest import BETAS, DDIM, max_difference, tiny_components
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from slow_references import MaterializingProcessor
from torch import nn

from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline
from uiface_diffusers.attention_processor import cross_attention_names, installed_processors
from uiface_diffusers.denoisers import PixArtDenoiser, denoiser_kind
from uiface_diffusers.two_stage import combine_rows, plan_rows

EMBEDS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
CONTEXTS = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(2))


def pixart(**options) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    given = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    given |= {"cross_attention_dim": 24, "sample_size": 8}
    model = PixArtTransformer2DModel(**given | options).eval()
    # its time modulation and output layer start near zero, which would hide what attention does
    for module in (*model.adaln_single.modules(), model.proj_out):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return model


def pixart_pipeline(scheduler=None, **options) -> UIFacePipeline:
    components = tiny_components() | {"unet": pixart(**options)}
    components["scheduler"] = scheduler or DDIMScheduler(**BETAS, **DDIM)
    components["identity_projector"] = IdentityProjector(16, 24, num_tokens=5).eval()
    components["empty_context"] = EmptyContext(24, num_tokens=5).eval()
    pipe = UIFacePipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def two_passes(
    model, latents: torch.Tensor, t: float, contexts: torch.Tensor, injection: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The empty pass, which keeps its attention maps, then the identities' pass, which takes them."""
    before, processors = model.attn_processors, {name: MaterializingProcessor() for name in model.attn_processors}
    model.set_attn_processor(dict(processors))
    predictions = []
    for mode, rows in (("empty", contexts[:1].expand(3, -1, -1)), ("identity", contexts[1:])):
        for processor in processors.values():
            processor.mode, processor.injection = mode, injection
        timesteps = torch.full((3,), t)
        predictions.append(model(latents, encoder_hidden_states=rows, timestep=timesteps).sample)
    model.set_attn_processor(before)
    return predictions[0], predictions[1]


@torch.no_grad()
def difference_to_materialized_maps(model, injection: str | None, t: float = 400.0) -> float:
    """Of the guided predictions of three samples, one of which is still in stage one."""
    stage_two = torch.tensor([False, True, True])
    plan = plan_rows(
        stage_two,
        guided=True,
        self_injection=injection in ("self", "both"),
        cross_injection=injection in ("cross", "both"),
        record=True,
    )
    kind = denoiser_kind(model)
    denoiser = kind(model, CONTEXTS, torch.device("cpu"), cross_injection=True, injection_strength=0.5)
    with installed_processors(model):
        rows, block_maps = denoiser(LATENTS, torch.tensor(t), plan)
    assert len(block_maps) == len(cross_attention_names(model))
    assert all(each.shape == (1, 32, 32) for each in block_maps)
    empty, identity = two_passes(model, LATENTS, t, CONTEXTS, injection)
    expected = torch.where(stage_two[:, None, None, None], empty + 2 * (identity - empty), empty)
    return max_difference(combine_rows(rows, plan, 2.0), expected)


@pytest.mark.parametrize("caption_channels", [None, 24])
@pytest.mark.parametrize("injection", [None, "self", "cross", "both"])
def test_predictions_equal_materialized_maps(injection, caption_channels):
    dims = {"cross_attention_dim": 32, "caption_channels": 24} if caption_channels else {}
    model = pixart(**dims)
    assert denoiser_kind(model) is PixArtDenoiser
    assert difference_to_materialized_maps(model, injection) <= 1e-5
    # the injections are no trifle: without them, the prediction is another one
    if injection is not None:
        injected, plain = (two_passes(model, LATENTS, 400.0, CONTEXTS, each)[1] for each in (injection, None))
        assert max_difference(injected, plain) > 1e-3


def test_contexts_are_encoded_once_a_call():
    pipe, encoded = pixart_pipeline(), []
    for name in cross_attention_names(pipe.unet):
        pipe.unet.get_submodule(name).to_k.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    pipe(EMBEDS, num_inference_steps=5, output_type="latent")
    assert encoded == [4, 4]


@torch.no_grad()
def by_hand(pipe: UIFacePipeline, injection: str | None, steps: int) -> torch.Tensor:
    """Fixed boundary 500: the empty context above it, guidance of scale 2 and the injection from there."""
    scheduler, latents = DDIMScheduler(**BETAS, **DDIM), LATENTS
    scheduler.set_timesteps(steps)
    contexts = torch.cat(
        [pipe.empty_context(1).context, pipe.identity_projector(nn.functional.normalize(EMBEDS)).context]
    )
    for t in scheduler.timesteps:
        empty, identity = two_passes(pipe.unet, latents, t, contexts, injection)
        prediction = empty + 2 * (identity - empty) if t <= 500 else empty
        latents = scheduler.step(prediction, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("injection", [None, "self", "cross", "both"])
def test_sampling_equals_materialized_maps(injection):
    pipe = pixart_pipeline()
    call = {"num_inference_steps": 5, "boundary": 500, "latest_boundary": 501, "injection": injection}
    out = pipe(EMBEDS, latents=LATENTS, output_type="latent", guidance_scale=2.0, **call)
    expected = by_hand(pipe, injection, 5)
    assert max_difference(out.images, expected) <= 1e-5 * max(1, expected.abs().max())


def test_a_saved_pipeline_samples_the_same(tmp_path, caplog):
    pipe = pixart_pipeline()
    call = {"num_inference_steps": 6, "latents": LATENTS, "output_type": "latent", "boundary_threshold": 0.2}
    out = pipe(EMBEDS, **call)
    assert (out.boundary_timesteps > 0).all()
    pipe.save_pretrained(tmp_path)
    loaded = UIFacePipeline.from_pretrained(tmp_path)
    assert "Expected types" not in caplog.text
    assert isinstance(loaded.unet, PixArtTransformer2DModel)
    assert torch.equal(loaded(EMBEDS, **call).images, out.images)
    # start noise of the size that the model names, decoded
    assert loaded(None, 2, num_inference_steps=1, output_type="np").images.shape == (2, 16, 16, 3)


def test_a_caption_projection_is_applied_to_the_contexts():
    pipe = pixart_pipeline(cross_attention_dim=32, caption_channels=24)
    out = pipe(EMBEDS, num_inference_steps=3, output_type="latent", latents=LATENTS)
    assert out.images.isfinite().all()


def test_patches_of_any_size_have_attention_maps():
    """Eight patches a side of a 24x24 latent: no halving of it."""
    pipe = pixart_pipeline(sample_size=24, patch_size=3)
    latents = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(3))
    assert pipe(EMBEDS, num_inference_steps=3, latents=latents, output_type="latent").images.isfinite().all()
    with pytest.raises(ValueError, match="latents of 25x24 cannot be cut into patches: .* multiples of 3"):
        pipe(EMBEDS, num_inference_steps=3, latents=torch.randn(3, 4, 25, 24), output_type="latent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 8}, "predicts 8 channels for 4 latent channels; learned variances are not supported"),
        ({"use_additional_conditions": True}, "conditioned on the size of the picture: .*=False"),
        ({"cross_attention_dim": 20}, "contexts of width 24, `unet` attends to width 20"),
        ({"cross_attention_dim": None}, "has no cross-attention"),
    ],
)
def test_configurations_that_cannot_be_sampled_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pixart_pipeline(**options)


def test_channels_that_are_not_given_are_the_latents():
    assert (
        pixart_pipeline(out_channels=None)(EMBEDS, num_inference_steps=1, output_type="latent").images.isfinite().all()
    )
