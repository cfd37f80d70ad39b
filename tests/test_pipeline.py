import copy
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import BETAS, DDIM, Trace, max_difference, reference_call, stock_unet, tiny_components
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from slow_references import MaterializingProcessor

from uiface_diffusers import EmptyContext, IdentityBank, IdentityProjector, UIFacePipeline
from uiface_diffusers.attention_processor import AttentionMapRecorder, cross_attention_names, two_stage_processors
from uiface_diffusers.two_stage import combine_rows, plan_rows


def test_parity_of_two_stage_sampling(reference):
    trace = Trace()
    out = reference_call(reference, reference.pipeline(), **trace.options())
    assert torch.equal(torch.stack(trace.stage_two[:10]), reference["stage1_flags"])
    assert all(flags.all() for flags in trace.stage_two[10:])
    assert max_difference(torch.stack(trace.latents), reference["trajectory"]) <= 1e-3
    assert max_difference(out.images, reference["x_0"]) <= 1e-3
    first = [next(t for t, f in zip(trace.timesteps, trace.stage_two, strict=True) if f[i]) for i in range(4)]
    assert out.boundary_timesteps.tolist() == first


def test_converted_pipeline_is_bit_identical_after_saving(reference, tmp_path):
    pipe = reference.pipeline()
    before = reference_call(reference, pipe).images
    pipe.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    loaded = UIFacePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(reference_call(reference, loaded).images, before)


def test_a_fresh_process_loads_and_gives_the_same(reference, tmp_path):
    pipe = reference.pipeline()
    before = reference_call(reference, pipe, num_inference_steps=3).images
    pipe.save_pretrained(tmp_path / "pipe")
    np.savez(tmp_path / "in.npz", x=reference["x_T"].numpy(), c=reference["context"].numpy())
    code = """
import sys, numpy, torch
from uiface_diffusers import UIFacePipeline
given = numpy.load(sys.argv[1] + "/in.npz")
pipe = UIFacePipeline.from_pretrained(sys.argv[1] + "/pipe")
x = pipe(given["c"], num_inference_steps=3, boundary_threshold=0.012, latents=torch.from_numpy(given["x"]),
         output_type="latent").images
numpy.save(sys.argv[1] + "/out.npy", x.numpy())
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert max_difference(torch.from_numpy(np.load(tmp_path / "out.npy")), before) <= 1e-5


def test_a_sample_does_not_depend_on_its_batch(reference):
    """Injections act while other samples still seek their boundary, and the numbers of rows differ."""
    pipe = reference.pipeline()
    together = reference_call(reference, pipe)
    for i in range(4):
        alone = reference_call(reference, pipe, slice(i, i + 1))
        # the latents of this untrained model reach 200, where float32 has steps of 1.5e-5
        assert max_difference(alone.images, together.images[i : i + 1]) <= 1e-6 * together.images[i].abs().max()
        assert alone.boundary_timesteps[0] == together.boundary_timesteps[i]


def count_rows(unet) -> list[int]:
    rows = []
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize(
    ("options", "before_cap", "below_cap"),
    [
        # 1 row before the flag, 2 after: both branches of stage two in one call
        ({}, lambda flagged: 4 + flagged, 8),
        ({"injection": "self"}, lambda flagged: 4 + flagged, 8),
        # nothing is taken from the empty branch between boundary and cap, or anywhere
        ({"injection": "cross"}, lambda flagged: 4, 8),
        ({"injection": None, "guidance_scale": 1.0}, lambda flagged: 4, 4),
        ({"guidance_scale": 1.0}, lambda flagged: 4 + flagged, 8),
        ({"injection": None, "guide_from_boundary": True}, lambda flagged: 4 + flagged, 8),
    ],
)
def test_unet_rows_are_exactly_the_plan(reference, options, before_cap, below_cap):
    pipe = reference.pipeline()
    pipe.unet = copy.deepcopy(pipe.unet)
    rows, trace = count_rows(pipe.unet), Trace()
    reference_call(reference, pipe, **options, **trace.options())
    expected = [
        before_cap(int(flags.sum())) if t >= 500 else below_cap
        for t, flags in zip(trace.timesteps, trace.stage_two, strict=True)
    ]
    assert rows == expected
    # the samples found boundaries of their own before the cap
    assert len({int(flags.sum()) for t, flags in zip(trace.timesteps, trace.stage_two, strict=True) if t >= 500}) > 2


def test_rows_of_the_ablations(reference):
    pipe = reference.pipeline()
    pipe.unet = copy.deepcopy(pipe.unet)
    rows = count_rows(pipe.unet)
    single = {"num_inference_steps": 4, "latents": reference["x_T"], "output_type": "latent"}
    pipe(reference["context"], boundary=None, **single)
    assert rows == [8] * 4  # guidance takes both branches from the first step on
    rows.clear()
    pipe(None, num_images_per_prompt=4, **single)
    assert rows == [4] * 4


def test_nothing_is_recorded_when_nothing_needs_it(reference, monkeypatch):
    recorded = []
    record = AttentionMapRecorder.record
    monkeypatch.setattr(
        AttentionMapRecorder,
        "record",
        lambda self, query, *args: (recorded.append(len(query)), record(self, query, *args)),
    )
    trace = Trace()
    reference_call(reference, reference.pipeline(), **trace.options())
    # 11 cross-attentions a step, the samples still in stage one, and no map in the last step that could use none
    seeking = [4 - int(flags.sum()) for flags in trace.stage_two[:9]]
    assert recorded == [n for n in seeking for _ in range(11)]
    recorded.clear()
    reference_call(reference, reference.pipeline(), boundary=600)
    reference_call(reference, reference.pipeline(), boundary=None)
    pipe = reference.pipeline()
    pipe(None, num_inference_steps=5, output_type="latent")
    assert recorded == []


def test_fixed_boundary_of_a_sample_reproduces_the_adaptive_one(reference):
    pipe = reference.pipeline()
    adaptive = reference_call(reference, pipe)
    for i in (0, 1):
        boundary = int(adaptive.boundary_timesteps[i])
        fixed = reference_call(reference, pipe, slice(i, i + 1), boundary=boundary)
        assert fixed.boundary_timesteps.tolist() == [boundary]
        assert max_difference(fixed.images, adaptive.images[i : i + 1]) <= 1e-6 * adaptive.images[i].abs().max()


def test_fixed_boundary_below_the_cap_is_kept(reference):
    out = reference_call(reference, reference.pipeline(), boundary=310)
    assert out.boundary_timesteps.tolist() == [300] * 4


def plain_guidance(pipe, embeds, latents, steps, scale):
    """Classifier-free guidance in a dozen lines."""
    with torch.no_grad():
        scheduler = DDIMScheduler(**BETAS, **DDIM)
        scheduler.set_timesteps(steps)
        empty, identity = pipe.empty_context(len(embeds)).context, pipe.identity_projector(embeds).context
        for t in scheduler.timesteps:
            e_empty, e_identity = pipe.unet(latents, t, empty).sample, pipe.unet(latents, t, identity).sample
            latents = scheduler.step(e_empty + scale * (e_identity - e_empty), t, latents).prev_sample
    return latents


def test_single_stage_is_plain_guidance(reference):
    pipe = reference.pipeline()
    out = reference_call(reference, pipe, boundary=None, guidance_scale=3.0)
    expected = plain_guidance(pipe, reference["context"], reference["x_T"], 20, 3.0)
    assert max_difference(out.images, expected) <= 1e-3
    assert out.boundary_timesteps.tolist() == [950] * 4


def test_without_identity_the_empty_context_leads_to_the_end(reference):
    pipe = reference.pipeline()
    out = pipe(None, 4, num_inference_steps=20, latents=reference["x_T"], output_type="latent")
    expected = plain_guidance(pipe, reference["context"], reference["x_T"], 20, 0.0)
    assert max_difference(out.images, expected) <= 1e-3
    assert out.boundary_timesteps.tolist() == [-1] * 4


def test_guidance_from_the_boundary_is_the_papers_reading(reference):
    """With the boundary at the start, it is guidance with both injections throughout."""
    pipe = reference.pipeline()
    options = {"boundary": 999, "num_inference_steps": 5}
    late = reference_call(reference, pipe, **options)
    early = reference_call(reference, pipe, **options, guide_from_boundary=True)
    all_below = reference_call(reference, pipe, **options, latest_boundary=1000)
    assert torch.equal(early.images, all_below.images)
    assert max_difference(early.images, late.images) > 1e-2


# --- the processors on a stock UNet, against materialized maps -------------------------------------------------------


@pytest.mark.parametrize("injection", [None, "self", "cross", "both"])
def test_processors_on_a_stock_unet_equal_materialized_maps(injection):
    unet = stock_unet()
    torch.manual_seed(1)
    latents, t = torch.randn(3, 4, 16, 16), torch.tensor([900, 400, 20])
    empty, identity = torch.randn(1, 5, 16).expand(3, -1, -1), torch.randn(3, 5, 16)
    stage_two = torch.tensor([False, True, True])
    plan = plan_rows(
        stage_two,
        guided=True,
        self_injection=injection in ("self", "both"),
        cross_injection=injection in ("cross", "both"),
        record=True,
    )
    recorder = AttentionMapRecorder(16, 16)
    with torch.no_grad():
        unet.set_attn_processor(two_stage_processors(unet))
        kwargs = {"row_plan": plan, "injection_strength": 0.5, "recorder": recorder}
        context = torch.cat([empty[plan.empty], identity[plan.identity]])
        rows = unet(latents[plan.samples], t[plan.samples], context, cross_attention_kwargs=kwargs).sample
        ours = combine_rows(rows, plan, 2.0)

        processors = {name: MaterializingProcessor() for name in unet.attn_processors}
        unet.set_attn_processor(dict(processors))
        predictions = {}
        for mode, context in (("empty", empty), ("identity", identity)):
            for processor in processors.values():
                processor.mode, processor.injection = mode, injection
            predictions[mode] = unet(latents, t, context).sample
        guided = predictions["empty"] + 2 * (predictions["identity"] - predictions["empty"])
    expected = torch.where(stage_two[:, None, None, None], guided, predictions["empty"])
    assert max_difference(ours, expected) <= 1e-5

    # the maps of the one sample in stage one, by their definition
    # in the order of the call: the way down, the middle, the way up
    names = sorted(f"{name}.processor" for name in cross_attention_names(unet))
    maps = []
    for name in names:
        logits = processors[name].logits[:1]
        saliency = logits.softmax(dim=2).mean(dim=3).mean(dim=1)
        saliency = (saliency / saliency.max()).reshape(1, 1, 8, 8)
        maps.append(F.interpolate(saliency, size=(32, 32), mode="bilinear").clamp(0, 1)[:, 0])
    assert len(recorder.block_maps) == len(maps) == 4
    assert all(max_difference(a, b) <= 1e-5 for a, b in zip(recorder.block_maps, maps, strict=True))


def test_pipeline_on_a_stock_unet(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    components = {
        "vae": vae,
        "unet": stock_unet(),
        "scheduler": DDIMScheduler(**BETAS, **DDIM),
        "identity_projector": IdentityProjector(24, 16, num_tokens=4).eval(),
        "empty_context": EmptyContext(16, num_tokens=4),
    }
    pipe = UIFacePipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "boundary_threshold": 1.0, "latest_boundary": 100}
    call |= {"output_type": "np"}
    seed = torch.Generator().manual_seed(0)
    out = pipe(torch.randn(2, 24, generator=seed), generator=torch.Generator().manual_seed(1), **call)
    assert out.images.shape == (2, 32, 32, 3) and np.isfinite(out.images).all()
    # t = 750, 500, 250, 0: flagged at the end of the second step, in force from the third on
    assert out.boundary_timesteps.tolist() == [250, 250]
    pipe.save_pretrained(tmp_path)
    loaded = UIFacePipeline.from_pretrained(tmp_path)
    seed.manual_seed(0)
    again = loaded(torch.randn(2, 24, generator=seed), generator=torch.Generator().manual_seed(1), **call)
    assert np.array_equal(out.images, again.images)


@pytest.mark.parametrize("first_stage", ["kl", "vq"])
def test_latents_go_through_scale_and_shift(first_stage):
    from uiface_diffusers.latents import decode_latents, encode_images

    torch.manual_seed(0)
    if first_stage == "kl":
        vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,), scaling_factor=0.5,
                            shift_factor=0.25).eval()  # fmt: skip
    else:
        vae = VQModel(latent_channels=4, norm_num_groups=4, block_out_channels=(8,), scaling_factor=0.5).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = encode_images(vae, images, torch.Generator().manual_seed(0))
        if first_stage == "kl":
            raw = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
            assert torch.allclose(latents, (raw - 0.25) * 0.5)
        else:
            raw = vae.encode(images).latents
            assert torch.allclose(latents, raw * 0.5)
        decoded = vae.decode(raw).sample
        assert torch.allclose(decode_latents(vae, latents), decoded, atol=1e-5)


# --- schedulers ------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_any_scheduler_and_one_image_one_seed(tiny_pipeline, scheduler_class, prediction_type):
    tiny_pipeline.scheduler = scheduler_class(**BETAS, prediction_type=prediction_type)
    embeds = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 8, "boundary_threshold": 0.02, "latest_boundary": 300, "output_type": "latent"}

    def sample(rows):
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        return tiny_pipeline(embeds[rows], generator=generators, **call)

    together = sample([0, 1, 2])
    assert together.images.isfinite().all()
    for row in range(3):
        alone = sample([row])
        assert alone.boundary_timesteps[0] == together.boundary_timesteps[row]
        assert max_difference(alone.images[0], together.images[row]) <= 1e-3 * together.images[row].abs().max().item()


@pytest.mark.parametrize(
    ("scheduler_class", "options", "boundary"),
    [
        (DPMSolverMultistepScheduler, {}, 500),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, 500),
        (DPMSolverSinglestepScheduler, {}, 500),
        (DPMSolverSinglestepScheduler, {}, 420),
        (UniPCMultistepScheduler, {}, 500),
        (SASolverScheduler, {}, 500),
        (DEISMultistepScheduler, {}, 500),
        (LMSDiscreteScheduler, {}, 500),
        (PNDMScheduler, {"skip_prk_steps": True}, 500),
        (PNDMScheduler, {}, 820),  # within a Runge-Kutta step
        (HeunDiscreteScheduler, {}, 700),
        (KDPM2DiscreteScheduler, {}, 700),
    ],
)
def test_a_switch_does_not_mix_the_contexts(tiny_pipeline, scheduler_class, options, boundary):
    """At the switch the multistep update is the first-order one: that of a scheduler which has only ever seen the
    present prediction. It must not depend on what the empty context predicted before."""
    embeds = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 10, "boundary": boundary, "output_type": "latent", "guide_from_boundary": True}

    def run(disturbance):
        """Latents are set to the same state just before the switch, whatever came before."""
        seen = []

        def callback(pipe, step, timestep, tensors):
            seen.append((float(timestep), tensors["stage_two"].item(), tensors["latents"].clone()))
            following = pipe.scheduler.timesteps[step + 1] if step + 1 < pipe.num_timesteps else -1
            if not tensors["stage_two"].item():
                return {"latents": latents.clone() if following <= boundary else tensors["latents"] + disturbance}
            return {}

        tiny_pipeline.scheduler = scheduler_class(**BETAS, **options)
        generator = torch.Generator().manual_seed(2)
        inputs = ["latents", "stage_two"]
        tiny_pipeline(
            embeds,
            latents=latents,
            generator=generator,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=inputs,
            **call,
        )
        return seen

    calm, disturbed = run(0.0), run(1.0)
    switch = next(i for i, (_, stage_two, _) in enumerate(calm) if stage_two)
    assert switch > 1 and calm[switch][0] <= boundary
    assert max_difference(calm[switch - 1][2], disturbed[switch - 1][2]) > 1e-3  # stage one did differ
    for (_, _, a), (_, _, b) in zip(calm[switch:], disturbed[switch:], strict=True):
        assert max_difference(a, b) <= 1e-6 * a.abs().max()


def test_dpm_solver_restarts_at_the_switch(tiny_pipeline):
    """The update at the switch equals that of a fresh DPM-Solver++ begun at this timestep."""
    embeds = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    trace = Trace()
    tiny_pipeline.scheduler = DPMSolverMultistepScheduler(**BETAS)
    call = {"num_inference_steps": 10, "boundary": 500, "injection": None, "guide_from_boundary": True}
    generator = torch.Generator().manual_seed(1)
    tiny_pipeline(embeds, generator=generator, output_type="latent", **call, **trace.options())
    switch = next(i for i, flags in enumerate(trace.stage_two) if flags.all())
    fresh = DPMSolverMultistepScheduler(**BETAS)
    fresh.set_timesteps(10)
    fresh.set_begin_index(switch)
    t, latents = fresh.timesteps[switch], trace.latents[switch - 1]
    pipe = tiny_pipeline
    with torch.no_grad():
        identity = pipe.identity_projector(F.normalize(embeds)).context
        e_empty, e_identity = (
            pipe.unet(latents, t, pipe.empty_context(1).context).sample,
            pipe.unet(latents, t, identity).sample,
        )
        expected = fresh.step(e_empty + 2 * (e_identity - e_empty), t, latents).prev_sample
    assert max_difference(expected, trace.latents[switch]) <= 1e-6 * expected.abs().max()


# --- behaves like diffusers' pipelines -------------------------------------------------------------------------------


def call_tiny(pipe, embeds=None, seeds=(0, 1), **options):
    embeds = torch.eye(16)[:2] if embeds is None else embeds
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(embeds, **{"num_inference_steps": 4, "generator": generator, "output_type": "pt", **options})


def test_forms_of_identity_embeds(tiny_pipeline):
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    expected = call_tiny(tiny_pipeline, rows).images
    bank = IdentityBank(rows, "toy")
    for form in (rows * 7.5, rows.numpy(), list(rows), rows.tolist(), bank, rows.double(), rows.half().float()):
        assert max_difference(call_tiny(tiny_pipeline, form).images, expected) <= 2e-3
    assert torch.equal(
        call_tiny(tiny_pipeline, rows[0], seeds=(3,)).images, call_tiny(tiny_pipeline, rows[:1], seeds=(3,)).images
    )


def test_images_of_one_identity_are_neighbors(tiny_pipeline):
    rows = torch.eye(16)[:2]
    both = call_tiny(tiny_pipeline, rows, seeds=range(6), num_images_per_prompt=3).images
    second = call_tiny(tiny_pipeline, rows[1], seeds=range(3, 6), num_images_per_prompt=3).images
    assert max_difference(both[3:], second) <= 1e-4


def test_output_types(tiny_pipeline):
    pt = call_tiny(tiny_pipeline).images
    np_images = call_tiny(tiny_pipeline, output_type="np").images
    pil = call_tiny(tiny_pipeline, output_type="pil").images
    latent = call_tiny(tiny_pipeline, output_type="latent").images
    assert pt.shape == (2, 3, 16, 16) and latent.shape == (2, 4, 8, 8)
    assert np.allclose(np_images, pt.permute(0, 2, 3, 1).numpy())
    assert isinstance(pil[0], PIL.Image.Image) and pil[0].size == (16, 16)
    assert np.abs(np.asarray(pil[0]) / 255 - np_images[0]).max() <= 0.5 / 255 + 1e-6
    images, boundaries = call_tiny(tiny_pipeline, return_dict=False)
    assert torch.equal(images, pt) and boundaries.dtype == torch.int64


def test_callback_can_interrupt_and_change_latents(tiny_pipeline):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = call_tiny(tiny_pipeline, output_type="latent", callback_on_step_end=stop).images
    assert steps == [0, 1] and images.abs().max() == 0


def test_processors_are_restored_even_after_an_error(tiny_pipeline):
    before = dict(tiny_pipeline.unet.attn_processors)

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_tiny(tiny_pipeline, callback_on_step_end=fail)
    assert tiny_pipeline.unet.attn_processors == before
    call_tiny(tiny_pipeline)
    assert tiny_pipeline.unet.attn_processors == before


def test_an_image_does_not_depend_on_its_batch(tiny_pipeline):
    """In pixels: the tolerance of the latents in `test_a_sample_does_not_depend_on_its_batch` is for large values."""
    embeds = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 10, "boundary_threshold": 0.02}
    together = call_tiny(tiny_pipeline, embeds, seeds=range(4), **call)
    for i in range(4):
        alone = call_tiny(tiny_pipeline, embeds[i], seeds=(i,), **call)
        assert max_difference(alone.images[0], together.images[i]) <= 1e-4
        assert alone.boundary_timesteps[0] == together.boundary_timesteps[i]


def test_inner_evaluations_keep_their_regime(tiny_pipeline):
    """Heun's second evaluation of a step is guided exactly if the first one is."""
    rows = count_rows(tiny_pipeline.unet)
    tiny_pipeline.scheduler = HeunDiscreteScheduler(**BETAS)
    call_tiny(tiny_pipeline, num_inference_steps=8, boundary=900, injection=None)
    # a start and its inner evaluation, but for the last step, which is of first order
    assert all(start == inner for start, inner in zip(rows[0::2], rows[1::2], strict=False))


def test_detector_is_float32_under_half_precision(tiny_pipeline):
    maps = []
    for autocast in (False, True):
        recorder = AttentionMapRecorder(8, 8)
        torch.manual_seed(0)
        query, key = torch.randn(2, 3, 16, 8).bfloat16(), torch.randn(2, 3, 4, 8).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            recorder.record(query, key, 0.35)
        maps.append(recorder.block_maps[0])
    exact = (0.35 * query.double() @ key.double().transpose(-2, -1)).softmax(2).mean((1, 3))
    exact = (exact / exact.amax(1, keepdim=True)).reshape(2, 1, 4, 4)
    exact = F.interpolate(exact, size=(32, 32), mode="bilinear")[:, 0]
    assert all(m.dtype == torch.float32 and max_difference(m, exact) <= 1e-5 for m in maps)
    tiny_pipeline.to(torch.bfloat16)
    out = call_tiny(tiny_pipeline, output_type="latent")
    assert tiny_pipeline.unet.dtype == torch.bfloat16
    assert out.images.dtype == torch.float32 and out.images.isfinite().all()


def test_compiles_without_changing_the_result(tiny_pipeline):
    """The processors take part in torch.compile's graph of the UNet (eager backend: no compiler is needed)."""
    expected = call_tiny(tiny_pipeline).images
    tiny_pipeline.unet = torch.compile(tiny_pipeline.unet, backend="eager")
    assert max_difference(call_tiny(tiny_pipeline).images, expected) <= 1e-5


# --- bad input -------------------------------------------------------------------------------------------------------

NAN = torch.eye(16)[:2].clone()
NAN[1, 3] = torch.nan
ZERO = torch.eye(16)[:2].clone()
ZERO[0] = 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeds": torch.randn(2, 512)}, r"\(2, 512\), the identity projector takes \(batch, 16\) from `toy`"),
        ({"embeds": NAN}, r"NaN or infinite values in row\(s\) \[1\]"),
        ({"embeds": ZERO}, r"zero in row\(s\) \[0\]"),
        ({"embeds": []}, "empty list"),
        ({"embeds": [torch.ones(16), torch.ones(8)]}, "different shapes"),
        ({"embeds": IdentityBank(torch.eye(16)[:2], "buffalo_l")}, "`buffalo_l`.*`toy`"),
        ({"seeds": (0, 1, 2)}, "list of 3 for a batch of 2"),
        ({"boundary": "adaptiv"}, "`boundary`.*'adaptiv'"),
        ({"boundary": True}, "`boundary`"),
        ({"boundary": -1}, "`boundary`"),
        ({"injection": "all"}, "`injection`.*'all'"),
        ({"injection_strength": 1.5}, "injection_strength"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"reuse_empty_branch": 0}, "reuse_empty_branch"),
        ({"guidance_interval": (200,)}, "`guidance_interval` has to be two timesteps"),
        ({"guidance_interval": (1000, 200)}, "the lower one first"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"`latents` has shape \(2, 3, 8, 8\), expected is \(2, 4"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_bad_arguments_are_named_before_the_first_step(tiny_pipeline, options, message):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *args: pytest.fail("the denoiser ran"))
    with pytest.raises(ValueError, match=message):
        call_tiny(tiny_pipeline, **options)


def test_sample_prediction_is_refused(tiny_pipeline):
    tiny_pipeline.scheduler = DDIMScheduler(**BETAS, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        call_tiny(tiny_pipeline)


@pytest.mark.parametrize(
    ("name", "component", "message"),
    [
        ("unet", lambda: UNet2DModel(in_channels=4, out_channels=4, block_out_channels=(32,), layers_per_block=1,
                                     down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)),
         "no cross-attention"),
        ("vae", lambda: VQModel(latent_channels=3, norm_num_groups=4, block_out_channels=(8,)),
         "3 latent channels, `unet` takes 4"),
        ("identity_projector", lambda: IdentityProjector(16, 64), "width 64, `unet` attends to width 32"),
        ("empty_context", lambda: EmptyContext(64), "width 64"),
        ("empty_context", lambda: EmptyContext(32, num_tokens=2), "1 tokens, `empty_context` 2"),
    ],
)  # fmt: skip
def test_components_that_do_not_fit_are_named(name, component, message):
    with pytest.raises(ValueError, match=message):
        UIFacePipeline(**{**tiny_components(), name: component()})
