"""What a call computes and what it does not, and the approximations that save rows."""

import json
from contextlib import nullcontext

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import BETAS, TINY_UNET, max_difference, stock_pipeline
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from diffusers.models.attention_processor import Attention
from slow_references import MaterializingProcessor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from uiface_diffusers import IdentityBank, UIFacePipeline, UIFaceUNet2DModel, generate_dataset
from uiface_diffusers.attention_processor import cross_attention_names
from uiface_diffusers.pipeline_uiface import MODEL_DEFAULTS

EMBEDS = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def sample(pipe, latents=LATENTS, **options):
    call = {
        "num_inference_steps": 10,
        "boundary_threshold": 0.06,
        "latest_boundary": 300,
        "output_type": "latent",
        **options,
    }
    return pipe(EMBEDS[: len(latents)], latents=latents, **call)


def count_calls(module, calls: list) -> None:
    module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))


# --- exact -----------------------------------------------------------------------------------------------------------


def test_contexts_are_encoded_once_a_call(tiny_pipeline):
    tokens, keys = [], []
    for name in cross_attention_names(tiny_pipeline.unet):
        attn = tiny_pipeline.unet.get_submodule(name)
        count_calls(attn.to_k, keys)
        count_calls(tiny_pipeline.unet.get_submodule(name.rpartition(".")[0]).context_proj, tokens)
    sample(tiny_pipeline)
    # the empty context and three identities, in every block once
    assert tokens == keys == [4] * len(cross_attention_names(tiny_pipeline.unet))


@pytest.mark.parametrize("stock", [False, True])
def test_contexts_encoded_once_equal_those_of_every_step(tiny_pipeline, stock):
    """A group-offloaded UNet has no weights at hand before its call, and encodes them in every step."""
    pipe = stock_pipeline(tiny_pipeline) if stock else tiny_pipeline
    once = sample(pipe)
    assert len(once.boundary_timesteps.unique()) > 1
    keys = []
    count_calls(pipe.unet.get_submodule(cross_attention_names(pipe.unet)[0]).to_k, keys)
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    every_step = sample(pipe)
    assert len(keys) == 10
    assert torch.equal(once.boundary_timesteps, every_step.boundary_timesteps)
    assert max_difference(once.images, every_step.images) <= 1e-5 * once.images.abs().max()


def test_injected_rows_compute_no_queries_and_keys_of_their_own(tiny_pipeline):
    queries, values = [], []
    attn = next(m for m in tiny_pipeline.unet.modules() if isinstance(m, Attention) and not m.is_cross_attention)
    count_calls(attn.to_q, queries)
    count_calls(attn.to_v, values)
    sample(tiny_pipeline, boundary=500)
    assert queries == [3] * 10
    assert values == [3] * 4 + [6] * 6


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_no_step_reads_from_the_device(tiny_pipeline, scheduler_class, monkeypatch):
    """The meta device holds no values: whatever reads one back, as `.item()` or `if tensor` do, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # torch has none for this device
    pipe = UIFacePipeline(**tiny_pipeline.components | {"scheduler": scheduler_class(**BETAS)})
    pipe.unet.to("meta")
    pipe.identity_projector.to("meta")
    pipe.empty_context.to("meta")
    pipe.vae.to("meta")
    # torch knows no default generator of this device
    out = sample(pipe, boundary=500, reuse_empty_branch=2, generator=torch.Generator())
    assert out.images.device.type == "meta" and out.images.shape == LATENTS.shape


def test_an_adaptive_boundary_reads_once_a_step(tiny_pipeline, monkeypatch):
    reads, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tuple(tensor.shape)) or cpu(tensor))
    sample(tiny_pipeline)
    # seven steps from 900 to 300, the first of which has no map before it; below, nothing seeks
    assert reads == [(3,)] * len(reads) and 0 < len(reads) <= 6


def test_a_call_of_the_unet_from_a_callback_gets_its_own_context(tiny_pipeline):
    context = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(2))
    expected = tiny_pipeline.unet(LATENTS, 500, context).sample
    seen = []

    def call(pipe, step, t, tensors):
        seen.append(pipe.unet(LATENTS, 500, context).sample)
        return {}

    sample(tiny_pipeline, callback_on_step_end=call)
    assert all(torch.allclose(prediction, expected, atol=1e-5) for prediction in seen)


def test_a_unet_that_transforms_its_contexts_gets_those_of_every_row(tiny_pipeline):
    """What happens to contexts before cross-attention is not known beforehand."""
    pipe = stock_pipeline(tiny_pipeline)
    expected = sample(pipe).images

    class Transforming(type(pipe.unet)):
        def forward(self, sample, timestep, encoder_hidden_states, **options):
            assert len(encoder_hidden_states) == len(sample)
            return super().forward(sample, timestep, encoder_hidden_states, **options)

    pipe.unet.__class__ = Transforming
    keys = []
    count_calls(pipe.unet.get_submodule(cross_attention_names(pipe.unet)[0]).to_k, keys)
    pipe.unet.register_to_config(encoder_hid_dim_type="text_proj")
    assert max_difference(sample(pipe).images, expected) <= 1e-5 * expected.abs().max()
    assert len(keys) == 10


def test_compiled_graphs_are_few(tiny_pipeline):
    """Batches whose samples find their boundaries at different steps, so that the rows vary from 6 to 12."""
    rows, counter = [], CompileCounter()
    # a single level: compiling takes nearly all of the time
    torch.manual_seed(1)
    tiny_pipeline.unet = UIFaceUNet2DModel(**TINY_UNET | {"block_out_channels": (32,), "attention_levels": (True,)})
    hook = tiny_pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    noises = [torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(batch)) for batch in range(6)]
    expected = [sample(tiny_pipeline, noise).images for noise in noises]
    hook.remove()
    torch._dynamo.reset()
    counters.clear()
    tiny_pipeline.unet = torch.compile(tiny_pipeline.unet, backend=counter, dynamic=True)
    for noise, images in zip(noises, expected, strict=True):
        assert max_difference(sample(tiny_pipeline, noise).images, images) <= 1e-5 * images.abs().max()
    assert len(set(rows)) > 4
    # a graph for each regime of a step, whatever the number of its rows
    assert counter.frame_count <= len(set(rows))
    assert not counters["graph_break"]


def test_a_compiled_denoiser_makes_the_same_data_set(tiny_pipeline, tmp_path):
    """By one graph in the single stage, whose rows are always twice the batch; the batch may be another one."""
    options = {"num_inference_steps": 3, "boundary": None, "size": 16}
    bank = IdentityBank(EMBEDS, "toy")
    generate_dataset(tiny_pipeline, bank, tmp_path / "eager", 2, batch_size=3, **options)
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    tiny_pipeline.unet = torch.compile(tiny_pipeline.unet, backend=counter, dynamic=True)
    for name, batch_size in (("compiled", 6), ("other", 4)):
        report = generate_dataset(tiny_pipeline, bank, tmp_path / name, 2, batch_size=batch_size, **options)
        assert report.unet_rows_per_image == 6
        for file in (tmp_path / "eager" / "images").glob("*/*.png"):
            same = tmp_path / name / file.relative_to(tmp_path / "eager")
            levels = [np.asarray(PIL.Image.open(each)).astype(int) for each in (file, same)]
            assert abs(levels[0] - levels[1]).max() <= 1
    assert counter.frame_count == 1 and not counters["graph_break"]


# --- approximate -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_reuse(pipe, steps, processors):
    """`steps`: (timestep, course) with the course "empty", "bare" (identity alone), "both" or "reuse"."""
    identity, empty = pipe.encode_identity(pipe.prepare_identity_embeds(EMBEDS[:3])), pipe.empty_context(3).context
    pipe.scheduler.set_timesteps(10)
    latents = LATENTS
    for t, course in steps:

        def predict(mode, context, course=course, latents=latents, t=t):
            for processor in processors.values():
                processor.mode, processor.injection = mode, None if course == "bare" else "both"
            return pipe.unet(latents, t, context).sample

        if course in ("empty", "both"):
            of_empty = predict("empty", empty)
        if course != "empty":
            of_identity = predict("identity", identity)
        if course == "both":
            difference = of_identity - of_empty
        guided = course in ("both", "reuse")
        prediction = of_empty if course == "empty" else of_identity + (difference if guided else 0)
        latents = pipe.scheduler.step(prediction, t, latents).prev_sample
    return latents


STAGE_ONE = [(t, "empty") for t in (900, 800, 700, 600)]


@pytest.mark.parametrize(
    ("options", "stage_two", "rows"),
    [
        ({}, ["both"] * 6, 12 + 36),
        ({"reuse_empty_branch": 2}, ["both", "reuse"] * 3, 12 + 9 * 3),
        ({"reuse_empty_branch": 4}, ["both", "reuse", "reuse", "reuse", "both", "reuse"], 12 + 2 * 6 + 4 * 3),
        ({"guidance_interval": (100, 400)}, ["bare", "both", "both", "both", "both", "bare"], 12 + 4 * 6 + 2 * 3),
        (
            {"guidance_interval": (200, 1000), "reuse_empty_branch": 3},
            ["both", "reuse", "reuse", "both", "bare", "bare"],
            12 + 2 * 6 + 4 * 3,
        ),
    ],
)
def test_reuse_and_interval_equal_materialized_maps(tiny_pipeline, options, stage_two, rows):
    pipe = stock_pipeline(tiny_pipeline)
    counted = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    ours = sample(pipe, boundary=500, latest_boundary=600, **options).images
    hook.remove()
    assert sum(counted) == rows
    processors = {name: MaterializingProcessor() for name in pipe.unet.attn_processors}
    pipe.unet.set_attn_processor(dict(processors))
    steps = STAGE_ONE + list(zip((500, 400, 300, 200, 100, 0), stage_two, strict=True))
    expected = reference_reuse(pipe, steps, processors)
    assert max_difference(ours, expected) <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [{"latest_boundary": 300}, {"guidance_interval": (100, 800)}])
def test_a_sample_does_not_depend_on_its_batch_under_reuse(tiny_pipeline, options):
    """Samples that find their boundaries at different steps: reuse begins where all of any batch are in stage two."""
    call = {"guide_from_boundary": True, "reuse_empty_branch": 2, **options}
    together = sample(tiny_pipeline, **call)
    assert len(together.boundary_timesteps.unique()) > 1
    for row in range(3):
        alone = tiny_pipeline(
            EMBEDS[row],
            latents=LATENTS[row : row + 1],
            **{"num_inference_steps": 10, "boundary_threshold": 0.06, "latest_boundary": 300, "output_type": "latent"},
            **{name: value for name, value in call.items() if name != "latest_boundary"},
        )
        assert max_difference(alone.images[0], together.images[row]) <= 1e-5 * together.images[row].abs().max()


@pytest.mark.parametrize("options", [{"guidance_interval": (0, 450)}, {"reuse_empty_branch": 2}])
def test_inner_evaluations_keep_the_rows_of_their_step(tiny_pipeline, options):
    rows = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    tiny_pipeline.scheduler = HeunDiscreteScheduler(**BETAS)
    sample(tiny_pipeline, boundary=900, latest_boundary=1000, **options)
    assert len(set(rows)) == 2
    # a step's start and its inner evaluation, but for the last step, which is of first order
    assert all(start == inner for start, inner in zip(rows[0:-1:2], rows[1::2], strict=True))


def test_guidance_that_begins_among_reused_steps(tiny_pipeline):
    """A callback may change the scale: steps without guidance and injection have kept nothing to reuse."""
    rows = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def guide(pipe, step, t, tensors):
        pipe._guidance_scale = 2.0 if step >= 5 else 1.0
        return {}

    call = {"boundary": None, "guidance_scale": 1.0, "reuse_empty_branch": 2, "callback_on_step_end": guide}
    assert sample(tiny_pipeline, **call).images.isfinite().all()
    assert rows == [3] * 6 + [6, 3, 6, 3]


# --- the model's own defaults ----------------------------------------------------------------------------------------


def test_sampling_defaults_are_saved_with_the_pipeline(tiny_pipeline, tmp_path):
    own = {"guidance_scale": 1.5, "boundary_threshold": 0.012, "latest_boundary": 300, "injection_strength": 0.25}
    UIFacePipeline(**tiny_pipeline.components, **own).save_pretrained(tmp_path)
    pipe = UIFacePipeline.from_pretrained(tmp_path)
    # 10 steps are five times as wide as the 50 that the threshold is meant for
    assert pipe.default_sampling(10) == own | {"boundary_threshold": 0.06}
    assert pipe.default_sampling() == own
    call = {"num_inference_steps": 10, "output_type": "latent", "latents": LATENTS}
    told = tiny_pipeline(EMBEDS[:3], **call, **own | {"boundary_threshold": 0.06})
    assert torch.equal(pipe(EMBEDS[:3], **call).images, told.images)
    assert pipe.guidance_scale == 1.5


def test_a_pipeline_saved_without_defaults_has_the_papers(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    kept = {name: value for name, value in index.items() if name not in MODEL_DEFAULTS}
    assert len(index) - len(kept) == 4
    (tmp_path / "model_index.json").write_text(json.dumps(kept))
    paper = {"guidance_scale": 2.0, "boundary_threshold": 0.006, "latest_boundary": 500, "injection_strength": 0.5}
    assert UIFacePipeline.from_pretrained(tmp_path).default_sampling() == paper


def test_defaults_that_cannot_be_are_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="injection_strength"):
        UIFacePipeline(**tiny_pipeline.components, injection_strength=7)
    with pytest.raises(ValueError, match="`num_inference_steps` has to be a positive integer but is 0"):
        tiny_pipeline.default_sampling(0)
