"""What users of diffusers' pipelines run into: threads, exchanged components, compiled models, odd arguments."""

import copy
import functools
import importlib
import json
import math
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import BETAS, DDIM, max_difference, stock_pipeline, stock_unet, tiny_components
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaTransformer2DModel,
    SASolverScheduler,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

import uiface_diffusers.latents
from uiface_diffusers import IdentityBank, UIFacePipeline, generate_dataset
from uiface_diffusers.attention_processor import UIFaceAttnProcessor, installed_processors
from uiface_diffusers.fingerprint import model_fingerprint, pipeline_fingerprint
from uiface_diffusers.latents import decode_latents
from uiface_diffusers.seeds import CANDIDATE, PERTURBATION, image_generator, noise_generator, noise_seed
from uiface_diffusers.two_stage.schedulers import step_after_switch

EMBEDS = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))

# --- calls that share a UNet -----------------------------------------------------------------------------------------

# scheduler, boundary and further arguments of each thread's calls
COURSES = [
    (DDIMScheduler, "adaptive", {"boundary_threshold": 0.06, "latest_boundary": 300}),
    (DPMSolverMultistepScheduler, 700, {"reuse_empty_branch": 2, "guide_from_boundary": True}),
    (DDPMScheduler, None, {"guidance_scale": 3.0}),
    (UniPCMultistepScheduler, "adaptive", {"boundary_threshold": 0.04, "injection": "cross", "latest_boundary": 400}),
]


def in_threads(*functions) -> list:
    """What the functions return, each in a thread of its own, which alternate within a step. Raises their errors."""
    start = threading.Barrier(len(functions))

    def run(function):
        torch.set_num_threads(1)
        start.wait(60)
        return function()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(functions)) as threads:
            return list(threads.map(run, functions))
    finally:
        sys.setswitchinterval(interval)


def thread_call(pipe, thread: int, call: int) -> torch.Tensor:
    scheduler_class, boundary, options = COURSES[thread]
    own = UIFacePipeline.from_pipe(pipe, scheduler=scheduler_class(**BETAS))
    own.set_progress_bar_config(disable=True)
    number = 5 * thread + call
    generators = [torch.Generator().manual_seed(2 * number + i) for i in range(2)]
    embeds = EMBEDS[[number, (number + 7) % 20]]
    call = {"num_inference_steps": 8, "generator": generators, "output_type": "latent"}
    return own(embeds, boundary=boundary, **call, **options).images


@pytest.mark.parametrize("stock", [False, True])
def test_calls_in_threads_are_bit_identical_to_those_alone(tiny_pipeline, stock):
    pipe = stock_pipeline(tiny_pipeline) if stock else tiny_pipeline
    before = dict(pipe.unet.attn_processors)

    def calls(thread: int) -> list[torch.Tensor]:
        return [thread_call(pipe, thread, call) for call in range(5)]

    alone = [calls(thread) for thread in range(4)]
    for ours, expected in zip(in_threads(*(functools.partial(calls, i) for i in range(4))), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    after = pipe.unet.attn_processors
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.float32}])
def test_pipelines_of_from_pipe_sample_beside_each_other(tiny_pipeline, options):
    tiny_pipeline.scheduler = UniPCMultistepScheduler(**BETAS)
    other = UIFacePipeline.from_pipe(tiny_pipeline, **options)
    assert type(other.scheduler) is UniPCMultistepScheduler and other.scheduler is not tiny_pipeline.scheduler
    assert other.scheduler.config == tiny_pipeline.scheduler.config
    other.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    calls = [
        functools.partial(
            pipe, EMBEDS[0], num_inference_steps=steps, latents=noise, output_type="latent", boundary=500
        )
        for pipe, steps in ((tiny_pipeline, 20), (other, 30))
    ]
    alone = [call().images for call in calls]
    for ours, expected in zip(in_threads(*calls), alone, strict=True):
        assert torch.equal(ours.images, expected)


@pytest.mark.parametrize("shares", ["pipeline", "scheduler"])
def test_a_second_call_while_one_is_running_is_refused(tiny_pipeline, shares):
    second = tiny_pipeline if shares == "pipeline" else UIFacePipeline(**tiny_pipeline.components)
    call = {"num_inference_steps": 4, "output_type": "latent", "boundary": 500}
    call |= {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    expected = tiny_pipeline(EMBEDS[0], **call).images
    running, refused = threading.Event(), threading.Event()

    def wait(pipe, step, t, tensors):
        running.set()
        assert refused.wait(60)
        return {}

    def first():
        return tiny_pipeline(EMBEDS[0], callback_on_step_end=wait, **call).images

    def beside():
        assert running.wait(60)
        try:
            with pytest.raises(RuntimeError, match="is running.*from_pipe"):
                second(EMBEDS[1], **call | {"num_inference_steps": 6})
            # a check of arguments changes nothing
            second.check_sampling(num_inference_steps=9)
        finally:
            refused.set()

    images, _ = in_threads(first, beside)
    assert torch.equal(images, expected)
    assert torch.equal(tiny_pipeline(EMBEDS[0], **call).images, expected)


def test_a_callback_that_calls_its_own_pipeline_is_refused(tiny_pipeline):
    call = {"num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(RuntimeError, match="from_pipe"):
        tiny_pipeline(EMBEDS[0], callback_on_step_end=lambda pipe, *_: pipe(EMBEDS[1], **call), **call)
    # neither that nor an error in the call keeps the pipeline from the next one
    with pytest.raises(ValueError, match="num_images_per_prompt"):
        tiny_pipeline(EMBEDS[0], num_images_per_prompt=0)
    assert tiny_pipeline(EMBEDS[0], **call).images.isfinite().all()


@pytest.mark.parametrize("position", [0, 1])
def test_a_list_of_generators_without_one_of_them_is_refused(tiny_pipeline, position):
    generators = [torch.Generator(), torch.Generator()]
    generators[position] = None
    with pytest.raises(ValueError, match=f"`generator` .* position {position} is None"):
        tiny_pipeline(EMBEDS[:2], generator=generators, num_inference_steps=2)


def test_a_call_within_a_call_of_another_pipeline(tiny_pipeline):
    """The worst order, without chance: every step of one call is followed by a whole other call."""
    other = UIFacePipeline.from_pipe(tiny_pipeline, scheduler=DPMSolverMultistepScheduler(**BETAS))
    other.set_progress_bar_config(disable=True)
    before = dict(tiny_pipeline.unet.attn_processors)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 6, "latents": noise, "output_type": "latent", "boundary": 500}
    call |= {"reuse_empty_branch": 2}
    expected, expected_other = tiny_pipeline(EMBEDS[0], **call).images, other(EMBEDS[1], **call).images
    seen = []

    def call_other(pipe, step, t, tensors):
        seen.append(other(EMBEDS[1], **call).images)
        return {}

    assert torch.equal(tiny_pipeline(EMBEDS[0], callback_on_step_end=call_other, **call).images, expected)
    assert len(seen) == 6 and all(torch.equal(images, expected_other) for images in seen)
    assert tiny_pipeline.unet.attn_processors == before


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_without_a_plan_processors_are_those_that_they_replace(tiny_pipeline, processor):
    for unet in (tiny_pipeline.unet, stock_unet(32)):
        unet.set_attn_processor(processor())
        noise = torch.randn(2, 4, *[unet.config.sample_size] * 2, generator=torch.Generator().manual_seed(0))
        context = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = unet(noise, 500, context).sample
            with installed_processors(unet):
                assert all(isinstance(each, UIFaceAttnProcessor) for each in unet.attn_processors.values())
                assert torch.equal(unet(noise, 500, context).sample, expected)
        assert all(type(each) is processor for each in unet.attn_processors.values())


def test_processors_that_a_callback_sets_stay(tiny_pipeline):
    own = AttnProcessor()

    def exchange(pipe, step, t, tensors):
        if step == 1:
            pipe.unet.set_attn_processor(own)
        return {}

    tiny_pipeline(EMBEDS[0], num_inference_steps=2, output_type="latent", callback_on_step_end=exchange)
    assert all(each is own for each in tiny_pipeline.unet.attn_processors.values())


def test_rows_of_other_threads_are_not_counted(tiny_pipeline, tmp_path):
    """`generate_dataset` reports UNet rows per image; another thread may use the UNet at the same time, here within
    each of the data set's own calls."""
    bank = IdentityBank(EMBEDS[:2], "toy")
    options = {"images_per_identity": 2, "size": 16, "num_inference_steps": 4, "boundary": 500}
    expected = generate_dataset(tiny_pipeline, bank, tmp_path / "alone", **options).unet_rows_per_image
    generating, others = threading.get_ident(), []
    with ThreadPoolExecutor(1) as thread:

        def use(unet, arguments) -> None:
            if threading.get_ident() == generating:
                call = thread.submit(unet, torch.zeros(1, 4, 8, 8), 500, torch.zeros(1, 1, 32))
                others.append(len(call.result().sample))

        tiny_pipeline.unet.register_forward_pre_hook(use)
        report = generate_dataset(tiny_pipeline, bank, tmp_path / "beside", **options)
    assert others and report.unet_rows_per_image == expected


# --- the model's own defaults ----------------------------------------------------------------------------------------


def test_components_without_the_models_defaults_warn():
    own = {"guidance_scale": 3.0, "latest_boundary": 300}
    pipe = UIFacePipeline(**tiny_components(), **own)
    for build in (lambda: UIFacePipeline(**pipe.components), lambda: UIFacePipeline(**pipe.components)):
        with pytest.warns(
            UserWarning, match="guidance_scale=3.0, latest_boundary=300.*2.0, latest_boundary=500.*from_pipe"
        ):
            assert build().config.guidance_scale == 2.0
    # the one that is not given
    with pytest.warns(UserWarning, match="pipeline with guidance_scale=3.0, which"):
        UIFacePipeline(**pipe.components, latest_boundary=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UIFacePipeline(**pipe.components, **own)
        assert UIFacePipeline.from_pipe(pipe, scheduler=DDPMScheduler(**BETAS)).default_sampling() == (
            pipe.default_sampling()
        )
        assert UIFacePipeline.from_pipe(pipe, guidance_scale=2.5).default_sampling() == (
            pipe.default_sampling() | {"guidance_scale": 2.5}
        )
        UIFacePipeline(**tiny_components())  # never had others


def test_values_of_a_later_pipeline_are_not_the_models_own(tiny_pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert UIFacePipeline(**tiny_pipeline.components, guidance_scale=3.0).config.guidance_scale == 3.0
        assert UIFacePipeline.from_pipe(tiny_pipeline, latest_boundary=100).config.latest_boundary == 100
        for _ in range(2):
            assert UIFacePipeline(**tiny_pipeline.components).config.guidance_scale == 2.0


def test_from_pipe_leaves_the_shared_models_as_they_are(tiny_pipeline):
    """diffusers' own casts them to float32, under the other pipeline's feet."""
    tiny_pipeline.unet.to(torch.bfloat16)
    pipe = UIFacePipeline.from_pipe(tiny_pipeline, scheduler=DDPMScheduler(**BETAS))
    assert pipe.unet is tiny_pipeline.unet and pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert isinstance(pipe.scheduler, DDPMScheduler) and isinstance(tiny_pipeline.scheduler, DDIMScheduler)
    assert UIFacePipeline.from_pipe(tiny_pipeline, torch_dtype=torch.float16).vae.dtype == torch.float16


def test_components_of_a_loaded_pipeline_warn(tiny_pipeline, tmp_path):
    UIFacePipeline(**tiny_pipeline.components, guidance_scale=3.0).save_pretrained(tmp_path)
    loaded = UIFacePipeline.from_pretrained(tmp_path)
    loaded.unet = torch.compile(loaded.unet, backend="eager")
    with pytest.warns(UserWarning, match="guidance_scale=3.0"):
        UIFacePipeline(**loaded.components)


# --- denoisers -------------------------------------------------------------------------------------------------------


def sana() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=32, sample_size=8, caption_channels=8,
    )  # fmt: skip


def video() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",), block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (sana, r"attention `transformer_blocks.0.attn1` of SanaTransformer2DModel .* SanaLinearAttnProcessor2_0"),
        (pixart, "contexts of width 32, `unet` attends to width 8"),
        (video, "`unet` is UNet3DConditionModel, .* denoises video. .*UIFaceUNet2DModel, UNet2DConditionModel"),
    ],
)
def test_denoisers_of_another_kind_are_refused(tiny_pipeline, unet, message):
    with pytest.raises(ValueError, match=message):
        UIFacePipeline(**tiny_components() | {"unet": unet()})
    tiny_pipeline.unet = unet()  # exchanged afterward
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(EMBEDS[0], num_inference_steps=2)


def test_other_processors_are_refused_and_stay(tiny_pipeline):
    name = next(name for name in tiny_pipeline.unet.attn_processors if "mid" in name)
    sliced = SlicedAttnProcessor(1)
    tiny_pipeline.unet.get_submodule(name.removesuffix(".processor")).set_processor(sliced)
    before = dict(tiny_pipeline.unet.attn_processors)
    with pytest.raises(ValueError, match=rf"`{name.removesuffix('.processor')}`.*SlicedAttnProcessor"):
        tiny_pipeline(EMBEDS[0], num_inference_steps=2)
    assert tiny_pipeline.unet.attn_processors == before


def test_a_unet_of_another_package_is_taken(tiny_pipeline):
    """Not a subclass, but called in the same way."""

    class Wrapped(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.inner, self.config = unet, unet.config

        dtype = property(lambda self: self.inner.dtype)
        device = property(lambda self: self.inner.device)

        def forward(self, sample, timestep, encoder_hidden_states, cross_attention_kwargs=None, return_dict=True):
            return self.inner(sample, timestep, encoder_hidden_states, cross_attention_kwargs, return_dict)

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    expected = tiny_pipeline(EMBEDS[0], **call).images
    components = tiny_pipeline.components
    pipe = UIFacePipeline(**{**components, "unet": Wrapped(components["unet"])})
    pipe.set_progress_bar_config(disable=True)
    assert max_difference(pipe(EMBEDS[0], **call).images, expected) <= 1e-5 * expected.abs().max()


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_wrappers_do_not_change_the_fingerprint(tiny_pipeline):
    before = pipeline_fingerprint(tiny_pipeline)
    of_unet = model_fingerprint(tiny_pipeline.unet)
    assert model_fingerprint(torch.nn.DataParallel(tiny_pipeline.unet)) == of_unet
    for name in ("unet", "vae", "identity_projector", "empty_context"):
        setattr(tiny_pipeline, name, torch.compile(getattr(tiny_pipeline, name), backend="eager"))
    assert pipeline_fingerprint(tiny_pipeline) == before
    unet = copy.deepcopy(tiny_pipeline.unet._orig_mod)
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")  # a part alone
    assert model_fingerprint(unet) == of_unet
    with torch.no_grad():
        unet.conv_in.bias += 1
    assert model_fingerprint(unet) != of_unet


# --- noise -----------------------------------------------------------------------------------------------------------


def test_two_million_images_have_distinct_noise():
    """Seeds of all images: 2,000 identities of 1,000 images; second attempts, other streams and seeds among them."""
    numbers = range(250)
    seeds = [
        noise_seed(seed, identity, index, attempt, stream)
        for seed in (0, 1)
        for identity in map("{:06d}".format, range(1000))
        for attempt, stream in ((0, 0), (1, 0), (0, PERTURBATION), (0, CANDIDATE))
        for index in numbers
    ]
    assert len(seeds) == 2_000_000
    assert len(np.unique(np.array(seeds, np.uint64))) == len(seeds)
    assert 0 <= min(seeds) and max(seeds) < 2**63
    # of 32 bits, as torch's generators on the CPU use, hundreds are the same
    assert len(np.unique(np.array(seeds, np.uint64) & 0xFFFFFFFF)) < len(seeds) - 300


def test_all_bits_of_a_seed_count():
    def noise(seed):
        return torch.randn(64, generator=noise_generator(seed))

    low = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(*(torch.randn(64, generator=each) for each in low))  # the fault of torch's own
    for bit in range(63):
        assert not torch.equal(noise(5), noise(5 ^ (1 << bit)))
    assert torch.equal(noise(5), noise(5)) and noise_generator(2**63 - 1).initial_seed() == 2**63 - 1


def test_the_state_of_a_generator_is_the_mersenne_twisters():
    """What `noise_generator` writes to, against numpy's Mersenne Twister."""
    state = torch.Generator().manual_seed(5).get_state().numpy()
    assert state.shape == (5056,)
    assert np.array_equal(state[24 : 24 + 8 * 624].view(np.uint64), np.random.RandomState(5).get_state()[1])
    generator = noise_generator(7)
    words = np.random.Philox(key=7).random_raw(312).view(np.uint32)
    theirs = np.random.RandomState()
    theirs.set_state(("MT19937", words, 624))
    # torch gives the lower 53 of 64 bits, of which the first word of two is the upper half
    first, second = theirs.randint(0, 2**32, 2, dtype=np.uint32).astype(object)
    expected = ((first << 32 | second) & (2**53 - 1)) / 2**53
    assert torch.rand((), generator=generator, dtype=torch.float64).item() == expected


def test_noise_is_normal_and_that_of_neighbors_unrelated():
    noise = torch.stack([torch.randn(3072, generator=image_generator(0, "000007", n)) for n in range(1000)])
    values, number = noise.double().flatten(), noise.numel()
    assert abs(values.mean()) < 4 / math.sqrt(number)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / number)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / number)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / number)
    # Kolmogorov-Smirnov, at one in a thousand
    uniform = torch.special.ndtr(values).sort().values
    steps = torch.arange(number + 1, dtype=torch.float64) / number
    distance = torch.maximum((steps[1:] - uniform).max(), (uniform - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(number)
    correlations = torch.corrcoef(noise.double())
    correlations.fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(3072)
    # across images, at one place
    assert torch.corrcoef(noise[:, :50].T.double()).fill_diagonal_(0).abs().max() < 5 / math.sqrt(1000)


def test_noise_of_version_2():
    """Whoever changes these numbers changes every data set: `NOISE_VERSION` goes up."""
    assert noise_seed(0, "000000", 0) == 9075406779085658166
    noise = torch.randn(3, 32, 32, generator=image_generator(0, "000000", 0))
    assert noise[0, 0, :4].tolist() == pytest.approx([-0.344382, 0.747063, -0.211049, -0.599099], abs=1e-5)


@pytest.mark.parametrize("output_format", ["imagefolder", "webdataset"])
def test_only_a_finished_folder_of_other_noise_is_taken(tiny_pipeline, tmp_path, output_format):
    """A finished one draws nothing: its call may be there for the upload."""
    bank, options = IdentityBank(EMBEDS[:1], "toy"), {"images_per_identity": 2, "size": 16, "num_inference_steps": 2}
    options |= {"output_format": output_format}
    generate_dataset(tiny_pipeline, bank, tmp_path, **options)
    file = tmp_path / "generation.json"
    written = json.loads(file.read_text())
    assert written["settings"].pop("noise") == 2  # as older versions, which did not write it
    file.write_text(json.dumps(written))
    report = generate_dataset(tiny_pipeline, bank, tmp_path, **options)
    assert report.complete and not report.made and json.loads(file.read_text()) == written
    with pytest.raises(ValueError, match="other settings .*seed"):
        generate_dataset(tiny_pipeline, bank, tmp_path, seed=1, **options)
    next(path for path in tmp_path.rglob("*") if path.suffix == ".tar" or path.match("images/*/*.png")).unlink()
    with pytest.raises(
        ValueError, match="begun with noise of version 1, this uiface-diffusers draws version 2.*32 bits"
    ):
        generate_dataset(tiny_pipeline, bank, tmp_path, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_seed_gives_the_same_noise_under_every_dtype(tiny_pipeline, dtype):
    def start(pipe):
        seen = []
        hook = pipe.scheduler.scale_model_input
        pipe.scheduler.scale_model_input = lambda latents, t: seen.append(latents) or hook(latents, t)
        generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        pipe(EMBEDS[:2], num_inference_steps=3, generator=generator, output_type="latent")
        del pipe.scheduler.scale_model_input
        return seen

    expected = start(tiny_pipeline)[0]
    tiny_pipeline.to(dtype)
    latents = start(tiny_pipeline)
    assert torch.equal(latents[0].float(), expected)
    # between the steps, nothing is rounded
    assert {each.dtype for each in latents} == {torch.promote_types(dtype, torch.float32)}


def test_half_precision_rounds_the_unet_alone(tiny_pipeline):
    """Of bfloat16, the exact steps from the UNet's predictions."""
    tiny_pipeline.to(torch.bfloat16)
    predictions = []
    tiny_pipeline.unet.register_forward_hook(lambda module, args, out: predictions.append(out[0]))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 4, "boundary": None, "guidance_scale": 1.0, "output_type": "latent"}
    out = tiny_pipeline(EMBEDS[:2], latents=noise, **call).images
    scheduler, latents = DDIMScheduler(**BETAS, **DDIM), noise
    scheduler.set_timesteps(4)
    for t, prediction in zip(scheduler.timesteps, predictions, strict=True):
        assert prediction.dtype == torch.bfloat16
        latents = scheduler.step(prediction.float(), t, latents).prev_sample
    assert torch.equal(out, latents)


# --- decoding --------------------------------------------------------------------------------------------------------


def test_large_batches_are_decoded_in_parts(monkeypatch):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks |= {"block_out_channels": (8, 8), "norm_num_groups": 4}
    vae = VQModel(latent_channels=3, num_vq_embeddings=16, **blocks).eval()
    latents = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        whole = decode_latents(vae, latents)
        sizes = []
        vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        monkeypatch.setattr(uiface_diffusers.latents, "PIXELS_AT_ONCE", 2 * 16 * 16)
        assert max_difference(decode_latents(vae, latents), whole) <= 1e-5
        monkeypatch.setattr(uiface_diffusers.latents, "PIXELS_AT_ONCE", 1)
        assert max_difference(decode_latents(vae, latents), whole) <= 1e-5
    assert sizes == [2, 2, 1] + [1] * 5


def test_64_pictures_of_128_are_one_part():
    assert 64 * 128 * 128 == uiface_diffusers.latents.PIXELS_AT_ONCE


# --- random states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")),
        pytest.param("mps", marks=pytest.mark.skipif(not torch.mps.is_available(), reason="no MPS")),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_switch_draws_as_a_step_draws(device, given):
    """From the generator that the scheduler draws from, which is that of the device if none is given."""
    model_output, latents = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    following = []
    for switched in (torch.tensor([], dtype=torch.long), torch.tensor([0, 1])):
        scheduler = SASolverScheduler(**BETAS)
        scheduler.set_timesteps(10)
        torch.manual_seed(3)
        options = {"generator": torch.Generator(device).manual_seed(4)} if given else {}
        for i, t in enumerate(scheduler.timesteps[:3]):
            if i == 2:
                step_after_switch(scheduler, switched.to(device), model_output, t, latents, **options)
            else:
                scheduler.step(model_output, t, latents, **options)
        following.append(torch.randn(4, device=device, generator=options.get("generator")))
    assert torch.equal(*following)


def test_a_device_without_a_known_generator_needs_a_given_one():
    """A copied step would draw other noise than the step itself."""
    model_output, latents = torch.zeros(2, 2, 4, 8, 8, device="meta")
    scheduler = SASolverScheduler(**BETAS)
    scheduler.set_timesteps(10)
    scheduler.step(model_output, scheduler.timesteps[0], latents)
    with pytest.raises(ValueError, match="default random generator of the device `meta` is not known: give `gener"):
        step_after_switch(scheduler, torch.tensor([0]), model_output, scheduler.timesteps[1], latents)


# --- callbacks -------------------------------------------------------------------------------------------------------


class Flags(PipelineCallback):
    tensor_inputs = ["stage_two"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.seen = [*getattr(self, "seen", []), callback_kwargs["stage_two"].tolist()]
        return callback_kwargs


class Zero(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        return callback_kwargs | {"latents": torch.zeros_like(callback_kwargs["latents"])}


def test_callbacks_of_diffusers_say_which_tensors_they_take(tiny_pipeline):
    call = {"num_inference_steps": 4, "boundary": 300, "output_type": "latent"}
    flags = Flags()
    tiny_pipeline(EMBEDS[0], callback_on_step_end=flags, **call)
    assert flags.seen == [[False], [False], [True], [True]]
    flags = Flags()
    out = tiny_pipeline(EMBEDS[0], callback_on_step_end=MultiPipelineCallbacks([flags, Zero()]), **call)
    assert len(flags.seen) == 4 and out.images.abs().max() == 0

    class Unknown(Flags):
        tensor_inputs = ["prompt_embeds"]

    with pytest.raises(ValueError, match="prompt_embeds.*latents.*stage_two"):
        tiny_pipeline(EMBEDS[0], callback_on_step_end=Unknown(), **call)


# --- arguments -------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_taken(tiny_pipeline, tmp_path):
    call = {"num_inference_steps": 4, "guidance_scale": 2.5, "boundary": 500, "latest_boundary": 300}
    call |= {"injection_strength": 0.25, "boundary_threshold": 0.5, "reuse_empty_branch": 2}
    call |= {"num_images_per_prompt": 2, "guide_from_boundary": True, "guidance_interval": (0.0, 900.0)}
    kinds = {int: np.int64, float: np.float32, bool: np.bool_}
    of_numpy = {name: kinds[type(value)](value) for name, value in call.items() if type(value) in kinds}
    of_numpy["guidance_interval"] = (np.int32(0), np.float64(900))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [
        tiny_pipeline(EMBEDS[0], latents=noise, output_type="latent", **each).images for each in (call, of_numpy)
    ]
    assert torch.equal(*images)
    del of_numpy["num_images_per_prompt"]
    numbers = {"images_per_identity": np.int64(1), "seed": np.int32(3), "size": np.int64(16), "batch_size": np.int8(2)}
    bank = IdentityBank(EMBEDS[:2], "toy")
    assert generate_dataset(tiny_pipeline, bank, tmp_path, **numbers, **of_numpy).made == 2
    del call["num_images_per_prompt"]
    assert generate_dataset(tiny_pipeline, bank, tmp_path, 1, seed=3, size=16, **call).made == 0
    own = UIFacePipeline(**tiny_pipeline.components, guidance_scale=np.float32(2.5), latest_boundary=np.int64(300))
    own.save_pretrained(tmp_path / "model")
    assert UIFacePipeline.from_pretrained(tmp_path / "model").default_sampling(np.int64(25)) == {
        "guidance_scale": 2.5, "boundary_threshold": 0.012, "latest_boundary": 300, "injection_strength": 0.5,
    }  # fmt: skip


BAD_SAMPLING = [
    ({"guidance_scale": math.nan}, "`guidance_scale` has to be a finite number but is nan"),
    ({"guidance_scale": "high"}, "`guidance_scale`.*'high'"),
    ({"guidance_scale": True}, "`guidance_scale`"),
    ({"guidance_scale": np.float32("inf")}, "`guidance_scale`"),
    ({"boundary_threshold": "x"}, "`boundary_threshold`.*'x'"),
    ({"boundary_threshold": math.inf}, "`boundary_threshold`"),
    ({"latest_boundary": -1}, "`latest_boundary` has to be a finite number from 0 but is -1"),
    ({"latest_boundary": "500"}, "`latest_boundary`"),
    ({"injection_strength": math.nan}, "`injection_strength`"),
    ({"injection_strength": [0.5]}, "`injection_strength` has to be a finite number from 0 to 1"),
    ({"injection": "strong"}, "`injection`.*'strong'"),
    ({"injection": 1}, "`injection`"),
    ({"guide_from_boundary": "no"}, "`guide_from_boundary` has to be True or False but is 'no'"),
    ({"guidance_interval": ("a", 3)}, "`guidance_interval`"),
    ({"guidance_interval": (0, math.nan)}, "`guidance_interval`"),
    ({"guidance_interval": 5}, "`guidance_interval`"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps`"),
    ({"num_inference_steps": True}, "`num_inference_steps`"),
    ({"num_inference_steps": "ten"}, "`num_inference_steps`"),
    ({"reuse_empty_branch": np.float64(2)}, "`reuse_empty_branch`"),
    ({"boundary": math.nan}, "`boundary`"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *BAD_SAMPLING,
        ({"num_images_per_prompt": np.int64(0)}, "`num_images_per_prompt`"),
        ({"generator": 5}, "`generator` has to be a torch.Generator or a list of them but is 5"),
        ({"generator": [1, 2]}, "`generator`"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "`latents` has to be a tensor but is ndarray"),
    ],
)
def test_wrong_arguments_are_named_before_the_first_step(tiny_pipeline, options, message):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *args: pytest.fail("the denoiser ran"))
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(EMBEDS[0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *BAD_SAMPLING,
        ({"num_inference_steps": 1001}, "`num_inference_steps`: 1001 cannot be larger"),
        ({"images_per_identity": "all"}, "`images_per_identity`"),
        ({"seed": 0.5}, "`seed` has to be an integer"),
        ({"min_similarity": math.nan}, "`min_similarity` has to be a cosine"),
    ],
)
def test_wrong_settings_of_a_data_set_do_not_begin_a_folder(tiny_pipeline, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        generate_dataset(tiny_pipeline, IdentityBank(EMBEDS[:2], "toy"), tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_a_scheduler_that_cannot_be_right_does_not_begin_a_folder(tiny_pipeline, tmp_path):
    from diffusers import LCMScheduler

    tiny_pipeline.scheduler = LCMScheduler(**BETAS)
    with pytest.raises(ValueError, match="`scheduler` is LCMScheduler"):
        generate_dataset(tiny_pipeline, IdentityBank(EMBEDS[:2], "toy"), tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["guidance_scale", "boundary_threshold", "latest_boundary", "injection_strength"])
def test_defaults_of_a_model_are_finite_numbers(name):
    for value in (math.nan, "high"):
        with pytest.raises(ValueError, match=f"`{name}` has to be a finite number"):
            UIFacePipeline(**tiny_components(), **{name: value})


# --- what is private in diffusers, torch and accelerate, and in use here ---------------------------------------------


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        ("diffusers.hooks.group_offloading", ["_is_group_offload_enabled"]),
        ("diffusers.pipelines.pipeline_loading_utils", ["variant_compatible_siblings"]),
        ("diffusers:DiffusionPipeline", ["_get_signature_keys", "_upload_folder", "_execution_device"]),
        ("diffusers:DiffusionPipeline", ["_optional_components", "_load_connected_pipes"]),
        (
            "diffusers:ModelMixin",
            ["_supports_gradient_checkpointing", "_no_split_modules", "_skip_layerwise_casting_patterns"],
        ),
        ("diffusers:ModelMixin", ["_repeated_blocks"]),
        ("diffusers.models.attention_processor:Attention", ["get_processor", "set_processor"]),
        (
            "diffusers.models.attention_processor:Attention",
            ["prepare_attention_mask", "norm_encoder_hidden_states"],
        ),
        ("torch", ["default_generator"]),
        ("torch.cuda", ["default_generators"]),
    ],
)
def test_private_names_in_use_are_there(owner, names):
    module, _, cls = owner.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, cls) if cls else holder
    missing = [name for name in names if not hasattr(holder, name)]
    assert not missing, f"{owner} has lost {missing}: uiface_diffusers uses them"


def test_private_attributes_of_instances_in_use_are_there(tiny_pipeline):
    from accelerate.hooks import ModelHook, add_hook_to_module

    unet = tiny_pipeline.unet
    unet.enable_gradient_checkpointing()
    held = {
        "a compiled module": (torch.compile(unet, backend="eager"), ["_orig_mod"]),
        "a module with accelerate's hook": (add_hook_to_module(torch.nn.Linear(1, 1), ModelHook()), ["_hf_hook"]),
        "a block with gradient checkpointing": (unet.mid_block.blocks[0], ["_gradient_checkpointing_func"]),
        "a pipeline": (tiny_pipeline, ["_callback_tensor_inputs"]),
        "attention": (next(m for m in unet.modules() if hasattr(m, "get_processor")), [
            "is_cross_attention", "added_kv_proj_dim", "spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k",
            "to_q", "to_k", "to_v", "to_out", "heads", "scale", "residual_connection", "rescale_output_factor",
        ]),
    }  # fmt: skip
    # of schedulers: what they remember between steps, and where they are within a step
    for scheduler, names in (
        (DPMSolverMultistepScheduler(), ["model_outputs"]),
        (DPMSolverSinglestepScheduler(), ["model_outputs", "order_list", "step_index"]),
        (PNDMScheduler(), ["ets", "counter", "prk_timesteps"]),
        (LMSDiscreteScheduler(), ["derivatives"]),
        (UniPCMultistepScheduler(), ["model_outputs", "last_sample"]),
        (SASolverScheduler(), ["model_outputs", "last_sample"]),
        (HeunDiscreteScheduler(), ["state_in_first_order"]),
    ):
        scheduler.set_timesteps(4)
        held[type(scheduler).__name__] = (scheduler, names)
    missing = {what: [n for n in names if not hasattr(holder, n)] for what, (holder, names) in held.items()}
    assert not any(missing.values()), f"lost, and in use by uiface_diffusers: {missing}"
