"""A layout from a picture in place of stage one."""

import copy
import json
from pathlib import Path

import diffusers
import exact_diffusion
import exact_flow
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BETAS, DDIM, Predictor, Trace, all_samples, complaint, max_difference, tiny_components
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from exact_denoisers import DEVIATION, IDENTITY_MEAN, NOISE, make_exact_pipeline, sample_exactly
from exact_flow import flow_level
from generated_sets import bank, images_of, rows_of

from uiface_diffusers import UIFacePipeline, cli, generate_dataset
from uiface_diffusers.data.sources import open_source, source_fingerprint
from uiface_diffusers.latents import encode_images
from uiface_diffusers.seeds import noise_generator
from uiface_diffusers.two_stage import plan_rows
from uiface_diffusers.two_stage.layout import NO_START_WITHIN
from uiface_diffusers.two_stage.schedulers import FLOW, SUPPORTED

LAYOUT = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(3))
IDENTITIES = np.eye(16, dtype=np.float32)[:3]
CAN_START = sorted(name for name in SUPPORTED if not issubclass(getattr(diffusers, name), NO_START_WITHIN))


@pytest.fixture
def pipe(tiny_pipeline) -> UIFacePipeline:
    return UIFacePipeline.from_pipe(tiny_pipeline)


def generators(number: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def call(pipe, layout, identities=IDENTITIES, **options):
    options = {"generator": generators(len(identities)), "num_inference_steps": 20, "boundary": 500} | options
    pipe.set_progress_bar_config(disable=True)
    return pipe(identities, layout=layout, output_type="latent", **options)


def picture(seed: int = 0, side: int = 16) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", CAN_START)
def test_every_scheduler_goes_from_the_noised_layout_along_the_exact_solution(name):
    """Of a stochastic one, the samples are those of the distribution."""
    pipe, is_stochastic = make_exact_pipeline(exact_diffusion.best_noise), name in exact_diffusion.STOCHASTIC
    pipe.scheduler = exact_diffusion.make_scheduler(name)
    trace = Trace()
    options = {"boundary": 700, "injection": None, "num_inference_steps": 100 if is_stochastic else 50}
    latents = sample_exactly(pipe, layout=LAYOUT, **options, **trace.options()).images
    start = trace.timesteps[0]
    assert 650 < start <= 700 and len(trace.timesteps) < len(pipe.scheduler.timesteps)
    alpha, sigma = exact_diffusion.noise_level(start)
    mean = IDENTITY_MEAN
    begun = exact_diffusion.standardized(alpha * LAYOUT + sigma * NOISE, start, mean)
    if is_stochastic:
        result = exact_diffusion.standardized(latents, -1e9, mean)
        assert abs(result.std() - 1) < 0.05 * begun.std() and result.mean(dim=(0, 2, 3)).abs().max() < 0.35
        return
    exact = mean + DEVIATION * begun
    assert (latents - exact).square().mean().sqrt() < 0.05 * DEVIATION


@pytest.mark.parametrize("name", FLOW)
def test_flow_matching_begins_at_the_same_noise(name):
    pipe = make_exact_pipeline(exact_flow.best_velocity)
    trace = Trace()
    scheduler = exact_flow.make_scheduler(name)
    latents = exact_flow.sample(pipe, scheduler, boundary=500, layout=LAYOUT, **trace.options()).images
    begun = float(scheduler.sigmas[-1 - len(trace.timesteps)])
    # noise levels are compared in whole timesteps
    assert begun == max(s for s in scheduler.sigmas.tolist() if s < (flow_level(500) + flow_level(501)) / 2)
    noisy = (1 - begun) * LAYOUT + begun * NOISE
    exact = IDENTITY_MEAN + DEVIATION * exact_flow.standardized(noisy, begun, IDENTITY_MEAN)
    assert (latents - exact).square().mean().sqrt() < 0.05 * DEVIATION


def test_two_stages_from_a_layout_are_a_loop_by_hand(reference):
    """Noise, guidance, injection and DDIM written out."""
    own = copy.copy(reference)
    own.tensors = dict(reference.tensors)
    pipe, predict, noise = reference.pipeline(), Predictor(own), reference["x_T"]
    layout = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
    out = pipe(
        reference["context"], layout=layout, latents=noise, boundary=620, latest_boundary=500, num_inference_steps=20,
        guidance_scale=2.0, output_type="latent",
    )  # fmt: skip
    assert out.boundary_timesteps.tolist() == [600] * 4
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = alphas[600].sqrt() * layout + (1 - alphas[600]).sqrt() * noise
    for t in range(600, -1, -50):
        own.tensors |= {"x": x.float(), "t": torch.full((4,), t)}
        predicted = predict(plan_rows(all_samples(True), False, self_injection=True, cross_injection=t < 500))
        if t < 500:
            empty = predict(plan_rows(all_samples(False), False))
            predicted = empty + 2 * (predicted - empty)
        after = alphas[t - 50] if t else torch.tensor(1.0)
        clean = (x - (1 - alphas[t]).sqrt() * predicted) / alphas[t].sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * predicted
    assert max_difference(out.images, x.float()) < 1e-4


@pytest.mark.parametrize("scheduler", [DDIMScheduler(**BETAS, **DDIM), FlowMatchEulerDiscreteScheduler()])
def test_equal_noise_under_any_schedule(pipe, scheduler):
    """The first step is the first one whose noise is at most the boundary's."""
    pipe.scheduler, trace = scheduler, Trace()
    out = call(pipe, LAYOUT[:3], **trace.options())
    assert (out.boundary_timesteps <= 500).all() and len(set(out.boundary_timesteps.tolist())) == 1
    first = trace.timesteps[0]
    if isinstance(scheduler, DDIMScheduler):
        assert first == 500 and len(trace.timesteps) == 11
    else:
        assert first / 1000 <= flow_level(500) < first / 1000 + 0.06


def test_a_picture_is_its_latents(pipe):
    """Encoded without chance, resized to the pipeline's size: one for all, or one per sample; as image, array or
    file."""
    images = [picture(seed, side) for seed, side in ((0, 16), (1, 16), (2, 16))]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 127.5 - 1
    with torch.no_grad():
        latents = encode_images(pipe.vae, pixels)
    several = call(pipe, images).images
    assert max_difference(several, call(pipe, latents).images) < 1e-5
    assert max_difference(call(pipe, [np.array(image) for image in images]).images, several) == 0
    one = call(pipe, images[0]).images
    assert max_difference(one, call(pipe, [images[0]] * 3).images) < 1e-5 and max_difference(one, several) > 1e-2
    larger = images[0].resize((32, 32), PIL.Image.Resampling.NEAREST)
    assert max_difference(call(pipe, larger).images, one) < 0.2


def test_an_autoencoders_mean_is_taken():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks).eval()
    pipe = UIFacePipeline(**tiny_components() | {"vae": vae})
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert max_difference(call(pipe, picture()).images, call(pipe, mean).images) < 1e-5


def test_no_sample_depends_on_the_others(pipe):
    """One generator and one layout per sample: alone, it is the same; and the noise is that without a layout."""
    together = call(pipe, LAYOUT[:3])
    for i in range(3):
        alone = call(pipe, LAYOUT[i], IDENTITIES[i : i + 1], generator=[torch.Generator().manual_seed(i)])
        assert max_difference(alone.images, together.images[i : i + 1]) < 1e-5
    noise = torch.stack([torch.randn(4, 8, 8, generator=each) for each in generators()])
    assert max_difference(call(pipe, LAYOUT[:3], latents=noise).images, together.images) == 0
    several = pipe(
        IDENTITIES, 2, layout=LAYOUT[:6], boundary=500, num_inference_steps=4, output_type="latent",
        generator=generators(6),
    )  # fmt: skip
    assert several.images.shape == (6, 4, 8, 8)


def test_nothing_is_left_for_the_next_call(pipe):
    for scheduler in (DDIMScheduler(**BETAS, **DDIM), diffusers.DPMSolverMultistepScheduler(**BETAS)):
        pipe.scheduler = scheduler
        before = call(pipe, None, boundary="adaptive")
        call(pipe, LAYOUT[:3])
        after = call(pipe, None, boundary="adaptive")
        assert torch.equal(before.images, after.images)
        twin = UIFacePipeline.from_pipe(pipe)
        assert torch.equal(call(twin, LAYOUT[:3]).images, call(pipe, LAYOUT[:3]).images)


def test_limits_of_the_boundary(pipe):
    """At 0, one step from nearly no noise is left; at the first timestep, nearly nothing of the layout; adaptive is
    the latest boundary."""
    low, trace = Trace(), Trace()
    assert call(pipe, LAYOUT[:3], boundary=0, **low.options()).boundary_timesteps.tolist() == [0] * 3
    assert low.timesteps == [0]
    call(pipe, LAYOUT[:3], boundary=999, **trace.options())
    assert len(trace.timesteps) == 20 and pipe.num_timesteps == 20
    adaptive = call(pipe, LAYOUT[:3], boundary="adaptive", latest_boundary=700)
    assert torch.equal(adaptive.images, call(pipe, LAYOUT[:3], boundary=700, latest_boundary=700).images)
    # without identities, the empty context goes on from it
    nobody = pipe(None, 3, layout=LAYOUT[:3], boundary=500, num_inference_steps=4, output_type="latent")
    assert nobody.boundary_timesteps.tolist() == [-1] * 3
    trailing = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    pipe.scheduler = trailing
    with pytest.raises(ValueError, match="last step of DDIMScheduler is at the timestep 49, above the boundary 10"):
        call(pipe, LAYOUT[:3], boundary=10)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (LAYOUT[:2], {}, "`layout` has 2 pictures for a batch of 3"),
        (LAYOUT[:3, :2], {}, r"`layout` has shape \(3, 2, 8, 8\)"),
        (LAYOUT[:3] / 0, {}, "finite"),
        (LAYOUT[:3], {"boundary": None}, "boundary=None has none"),
        ([], {}, "empty list"),
        (picture().resize((20, 16)), {}, "`layout` 0 is 20x16"),
        (np.zeros((16, 16, 3), np.float32), {}, "uint8"),
        ("missing.png", {}, "missing.png"),
    ],
)
def test_wrong_layouts_are_refused(pipe, layout, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        call(pipe, layout, **options)


@pytest.mark.parametrize("scheduler", NO_START_WITHIN)
def test_schedulers_that_cannot_begin_within_are_refused(pipe, scheduler):
    pipe.scheduler = scheduler(**BETAS)
    with pytest.raises(ValueError, match=f"{scheduler.__name__} cannot begin within its schedule"):
        call(pipe, LAYOUT[:3])


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for i in range(5):
        (folder / f"person_{i % 2}").mkdir(exist_ok=True)
        picture(i).save(folder / f"person_{i % 2}" / f"{i}.png")
    return folder


SET = {"num_inference_steps": 4, "boundary": 500, "size": 16, "batch_size": 4}


def test_every_image_of_a_set_draws_a_layout(pipe, layouts, tmp_path):
    """Reproducible from its seed in any batch, recorded, and made again by the pipeline alone."""
    generate_dataset(pipe, bank(), tmp_path / "a", 4, layouts=layouts, **SET)
    generate_dataset(pipe, bank().take([1]), tmp_path / "b", 4, layouts=layouts, **SET | {"batch_size": 1})
    rows, part = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert len({row["layout"] for row in rows}) > 2 and rows[4:8] == part
    assert [row["layout"] for row in rows[4:8]] == [row["layout"] for row in part]
    images = images_of(tmp_path / "a")
    for one, other in zip(images[4:8], images_of(tmp_path / "b"), strict=True):
        assert np.abs(one - other).max() <= 1
    row = rows[6]
    options = {"num_inference_steps": 4, "boundary": 500, "generator": noise_generator(row["seed"])}
    again = pipe(bank().embeddings[1], layout=layouts / row["layout"], **options).images[0]
    assert np.abs(np.array(again).astype(int) - images[6]).max() <= 1
    # another seed draws others
    generate_dataset(pipe, bank(), tmp_path / "c", 4, seed=1, layouts=layouts, **SET)
    assert [row["layout"] for row in rows_of(tmp_path / "c")] != [row["layout"] for row in rows]
    settings = json.loads((tmp_path / "a" / "generation.json").read_text())["settings"]
    assert settings["layouts"] == source_fingerprint(open_source(layouts)) and settings["sampling"]["boundary"] == 500


def test_a_set_goes_on_with_its_layouts_alone(pipe, layouts, tmp_path):
    generate_dataset(pipe, bank(), tmp_path / "a", 2, layouts=layouts, shard=(0, 2), **SET)
    other = tmp_path / "flat"
    other.mkdir()
    picture(7).save(other / "7.png")
    (other / "notes.txt").write_text("no picture")
    # what is no layout is named
    with pytest.warns(UserWarning, match=r"1 not an image by its suffix: notes.txt"):
        for given in (other, None):
            with pytest.raises(ValueError, match="was begun with other settings .*layouts"):
                generate_dataset(pipe, bank(), tmp_path / "a", 2, layouts=given, shard=(1, 2), **SET)
    assert generate_dataset(pipe, bank(), tmp_path / "a", 2, layouts=layouts, shard=(1, 2), **SET).complete
    generate_dataset(pipe, bank(), tmp_path / "whole", 2, layouts=layouts, **SET)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "whole")
    # complete, it is read again; a folder of pictures without identities is one of layouts, too
    assert generate_dataset(pipe, bank(), tmp_path / "a", 2, layouts=layouts, **SET).made == 0
    generate_dataset(pipe, bank(), tmp_path / "flat_set", 1, layouts=other, output_format="webdataset", **SET)
    assert {row["layout"] for row in rows_of(tmp_path / "flat_set")} == {"7.png"}


def test_parquet_files_of_a_set_have_its_layouts(pipe, layouts, tmp_path):
    generate_dataset(pipe, bank(), tmp_path, 2, layouts=layouts, output_format="parquet", **SET)
    rows = pq.read_table(tmp_path / "data").to_pylist()
    assert [row["layout"] for row in rows] == [row["layout"] for row in rows_of(tmp_path)] and rows[0]["layout"]


def test_a_set_without_layouts_is_written_as_before(pipe, tmp_path):
    generate_dataset(pipe, bank(), tmp_path, 1, **SET)
    assert "layout" not in rows_of(tmp_path)[0]
    assert "layouts" not in json.loads((tmp_path / "generation.json").read_text())["settings"]
    assert "layouts" not in (tmp_path / "README.md").read_text()


def test_wrong_layouts_of_a_set_are_named_before_anything_is_made(pipe, tmp_path):
    picture().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"1 of 2 layouts in .* cannot be read: remove them.*bad.png"):
        generate_dataset(pipe, bank(), tmp_path / "set", 1, layouts=tmp_path, **SET)
    picture().resize((20, 16)).save(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="`layout` 0 is 20x16"):
        generate_dataset(pipe, bank(), tmp_path / "set", 1, layouts=tmp_path, **SET)
    (tmp_path / "bad.png").unlink()
    with pytest.raises(ValueError, match="boundary=None has none"):
        generate_dataset(pipe, bank(), tmp_path / "set", 1, layouts=tmp_path, **SET | {"boundary": None})
    assert not (tmp_path / "set").exists()


def test_generate_takes_layouts(pipe, layouts, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    bank(2).save(tmp_path / "bank.safetensors")
    words = ["generate", tmp_path / "model", "--identities", tmp_path / "bank.safetensors", "--output",
             tmp_path / "set", "--images-per-identity", 1, "--num-inference-steps", 4, "--boundary", 500, "--device",
             "cpu", "--layouts"]  # fmt: skip
    cli.main([str(word) for word in [*words, layouts]])
    assert all(row["layout"].endswith(".png") for row in rows_of(tmp_path / "set"))
    assert "was begun with other settings" in complaint(*words, layouts / "person_0")
