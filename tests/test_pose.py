"""The head pose as a condition: tokens in both contexts, in sampling, training and data sets."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    BETAS,
    DDIM,
    REPOSITORY,
    complaint,
    max_difference,
    stock_pipeline,
    tiny_components,
    write_toy_pack,
)
from diffusers import DDIMScheduler, DDPMScheduler
from generated_sets import bank, images_of, rows_of
from safetensors.torch import load_file
from slow_references import MaterializingProcessor
from tiny_training import train, write_workspace
from torch.nn import functional as F

from uiface_cli import generate as generate_command
from uiface_diffusers import PoseProjector, UIFacePipeline, cli, generate_dataset
from uiface_diffusers.attention_processor import AttentionMapRecorder, cross_attention_names
from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.faces import FaceEncoder, head_pose
from uiface_diffusers.faces.geometry import FRONTAL_NOSE
from uiface_diffusers.fingerprint import model_fingerprint, pipeline_fingerprint
from uiface_diffusers.models import CONDITIONS
from uiface_diffusers.seeds import noise_generator
from uiface_diffusers.training import denoising
from uiface_diffusers.training.datasets import read_condition

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import pose as pose_benchmark  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"
IDENTITIES = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
POSES = [(30.0, -10.0), None, (-60.0, 5.0)]
NAN = float("nan")


def pose_projector(context_dim: int = 32, num_tokens: int = 1, **options) -> PoseProjector:
    """As a trained one: its tokens are not zero."""
    torch.manual_seed(3)
    projector = PoseProjector(context_dim, num_tokens, **options).eval()
    torch.nn.init.normal_(projector.mlp[-1].weight, std=0.3)
    torch.nn.init.normal_(projector.without)
    return projector


def pose_pipeline(pipe: UIFacePipeline, projector: PoseProjector | None = None, **components) -> UIFacePipeline:
    context = pipe.empty_context.config
    own = {"pose_projector": projector or pose_projector(context.context_dim, context.num_tokens)} | components
    new = UIFacePipeline(**pipe.components | own)
    new.set_progress_bar_config(disable=True)
    return new


@pytest.fixture
def pipe(tiny_pipeline) -> UIFacePipeline:
    return pose_pipeline(tiny_pipeline)


def call(pipe: UIFacePipeline, identities=IDENTITIES, **options):
    given = {"num_inference_steps": 10, "boundary_threshold": 0.05, "latents": NOISE, "output_type": "latent"}
    return pipe(identities, **given | options)


# --- the pipeline ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def contexts_by_hand(pipe: UIFacePipeline, poses: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty and identity contexts of the samples, each followed by the pose's tokens."""
    values = torch.tensor([(NAN, NAN) if pose is None else pose for pose in poses])
    empty = pipe.empty_context(len(values)).context
    identity = pipe.identity_projector(F.normalize(IDENTITIES)).context
    tokens = pipe.pose_projector(values).tokens
    assert tokens.shape[1] == 2 * empty.shape[1]
    return tuple(torch.cat([own, own + tokens[:, : own.shape[1]], own + tokens[:, own.shape[1] :]], dim=1)
                 for own in (empty, identity))  # fmt: skip


@torch.no_grad()
def by_hand(pipe: UIFacePipeline, poses: list, injection: str | None) -> torch.Tensor:
    """Fixed boundary 500, guidance of scale 2 from there, every attention map in memory: first the empty pass, which
    keeps its maps, then the identities', which takes them."""
    scheduler, latents = DDIMScheduler(**BETAS, **DDIM), NOISE
    scheduler.set_timesteps(10)
    unet, contexts = pipe.unet, contexts_by_hand(pipe, poses)
    before, processors = unet.attn_processors, {name: NormingProcessor() for name in unet.attn_processors}
    unet.set_attn_processor(dict(processors))
    for t in scheduler.timesteps:
        predictions = []
        for mode, context in zip(("empty", "identity"), contexts, strict=True):
            for processor in processors.values():
                processor.mode, processor.injection = mode, injection
            predictions.append(unet(latents, t, context).sample)
        empty, identity = predictions
        prediction = empty if t > 500 else empty + 2 * (identity - empty)
        latents = scheduler.step(prediction, t, latents).prev_sample
    unet.set_attn_processor(before)
    return latents


class NormingProcessor(MaterializingProcessor):
    """With the group norm that UIFace's blocks have for their keys and values: over all tokens of a context."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        if encoder_hidden_states is not None and attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


@pytest.mark.parametrize("denoiser", ["uiface", "stock"])
@pytest.mark.parametrize("injection", [None, "self", "cross", "both"])
def test_sampling_is_two_passes_with_concatenated_contexts(tiny_pipeline, denoiser, injection):
    """One pose per sample, none for one of them; the same pose for all, which one empty context serves."""
    base = tiny_pipeline if denoiser == "uiface" else stock_pipeline(tiny_pipeline)
    pipe = pose_pipeline(base, pose_projector(32, 2 * base.empty_context.config.num_tokens))
    options = {"boundary": 500, "latest_boundary": 501, "injection": injection, "guidance_scale": 2.0}
    plain = call(base, **options).images
    for poses, given in ((POSES, POSES), ([POSES[0]] * 3, POSES[0]), ([None] * 3, None)):
        expected = by_hand(pipe, poses, injection)
        assert max_difference(call(pipe, **options, pose=given).images, expected) <= 1e-4 * expected.abs().max()
        assert max_difference(plain, expected) > 0.1


def test_one_empty_context_serves_all_samples_that_share_a_pose(pipe, tiny_pipeline):
    """The contexts that are encoded, once per call, and the rows of its steps."""

    def contexts_and_rows(pipe: UIFacePipeline, **options) -> tuple[int, int]:
        encoded, rows = [], 0

        def count(module, args, kwargs):
            nonlocal rows
            rows += len(args[0])

        attention = pipe.unet.get_submodule(cross_attention_names(pipe.unet)[0])
        hooks = [attention.to_k.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))]
        hooks.append(pipe.unet.register_forward_pre_hook(count, with_kwargs=True))
        call(pipe, **options)
        for hook in hooks:
            hook.remove()
        assert len(encoded) == 1
        return encoded[0], rows

    fixed = {"boundary": 500}
    without = contexts_and_rows(tiny_pipeline, **fixed)
    assert without[0] == 1 + 3
    for pose in (None, (20, 0), [(20, 0)] * 3, torch.tensor([20.0, 0.0])):
        assert contexts_and_rows(pipe, pose=pose, **fixed) == without
    assert contexts_and_rows(pipe, pose=POSES, **fixed) == (3 + 3, without[1])


@pytest.mark.parametrize("pose", [None, (50.0, 10.0), POSES])
def test_a_fresh_projector_changes_nothing(tiny_pipeline, pose):
    """Its tokens are copies of the context's own, which softmax, group norms, covariances and maps do not notice."""
    pipe, maps = pose_pipeline(tiny_pipeline, PoseProjector(32)), []

    def keep(pipe, step, timestep, tensors):
        maps.append(tensors["attention_maps"].clone())
        return {}

    options = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["attention_maps"]}
    ours, plain = call(pipe, pose=pose, **options), call(tiny_pipeline, **options)
    assert max_difference(ours.images, plain.images) <= 1e-4 * plain.images.abs().max()
    assert ours.boundary_timesteps.tolist() == plain.boundary_timesteps.tolist()
    assert max_difference(maps[0], maps[10]) < 1e-5


def test_the_boundary_is_found_by_the_contexts_own_tokens():
    """Those of the pose come after them, and take no part in the attention map."""
    query, key = torch.randn(2, 2, 3, 64, 16, generator=torch.Generator().manual_seed(0)).unbind()
    whole, own = AttentionMapRecorder(8, 8, share=(1, 4)), AttentionMapRecorder(8, 8)
    whole.record(query, key, 0.25)
    own.record(query, key[:, :, :16], 0.25)
    assert torch.equal(whole.block_maps[0], own.block_maps[0])


def test_no_sample_depends_on_the_others(pipe):
    together = call(pipe, pose=POSES)
    for i, pose in enumerate(POSES):
        alone = call(pipe, IDENTITIES[i : i + 1], latents=NOISE[i : i + 1], pose=[pose])
        assert max_difference(alone.images, together.images[i : i + 1]) < 1e-4
        assert alone.boundary_timesteps == together.boundary_timesteps[i]
    # a list, a tensor, an array
    values = torch.tensor([pose or (NAN, NAN) for pose in POSES])
    assert torch.equal(call(pipe, pose=values).images, together.images)
    assert torch.equal(call(pipe, pose=values.numpy()).images, together.images)
    # several images of an identity, nobody in particular, a layout, an approximation
    several = call(pipe, IDENTITIES[:1], num_images_per_prompt=3, pose=POSES).images
    assert max_difference(several[:1], together.images[:1]) < 1e-4
    nobody = call(pipe, None, num_images_per_prompt=3, pose=POSES)
    assert nobody.boundary_timesteps.tolist() == [-1] * 3
    assert max_difference(nobody.images, call(pipe, None, num_images_per_prompt=3).images) > 0.1
    assert call(pipe, pose=POSES, layout=NOISE, boundary=500).images.isfinite().all()
    assert call(pipe, pose=POSES, boundary=None, reuse_empty_branch=2).images.isfinite().all()


def test_it_is_saved_with_the_pipeline_and_shared(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = UIFacePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.pose_projector, PoseProjector)
    assert torch.equal(call(loaded, pose=POSES).images, call(pipe, pose=POSES).images)
    assert pipeline_fingerprint(loaded) == pipeline_fingerprint(pipe)
    assert UIFacePipeline.from_pipe(pipe).pose_projector is pipe.pose_projector
    alone = PoseProjector.from_pretrained(tmp_path, subfolder="pose_projector")
    assert torch.equal(
        alone(torch.tensor([[20.0, 0.0]])).tokens, pipe.pose_projector(torch.tensor([[20.0, 0.0]])).tokens
    )
    # left out on loading
    without = UIFacePipeline.from_pretrained(tmp_path, pose_projector=None)
    assert without.pose_projector is None


def test_absent_it_leaves_no_trace(tiny_pipeline, pipe, tmp_path):
    """In the saved form, and in the fingerprint, which is that of the five components."""
    assert tiny_pipeline.pose_projector is None and "pose_projector" in tiny_pipeline.components
    tiny_pipeline.save_pretrained(tmp_path)
    assert "pose_projector" not in json.loads((tmp_path / "model_index.json").read_text())
    assert not (tmp_path / "pose_projector").exists()
    parts = {name: model_fingerprint(each) for name, each in tiny_components().items()}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    assert pipeline_fingerprint(tiny_pipeline) == digest != pipeline_fingerprint(pipe)


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        ((91, 0), r"from -90 to 90 \(yaw, pitch\) but is \[\[91.0, 0.0\]\]"),
        ((NAN, 0), "finite numbers"),
        ([(0, 0)] * 2, r"has to be \(yaw, pitch\), or one such value per sample, 3 of them, but is"),
        ((1, 2, 3), "but is"),
        (20, "but is 20"),
        ("left", "but is 'left'"),
    ],
)
def test_wrong_poses_are_refused(pipe, tiny_pipeline, pose, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, pose=pose)
    with pytest.raises(ValueError, match="`pose` needs a pipeline with a `pose_projector`.*--pose-projector '{}'"):
        call(tiny_pipeline, pose=(20, 0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'posture'"):
        call(pipe, posture=pose)


def test_a_projector_of_another_width_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="`pose_projector` gives contexts of width 16, `unet` attends to width 32"):
        pose_pipeline(tiny_pipeline, PoseProjector(16))
    with pytest.raises(ValueError, match="`pose_projector` gives 7 tokens, which are not a multiple of the 5"):
        pose_pipeline(stock_pipeline(tiny_pipeline), PoseProjector(32, 7))


# --- the projector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (35, 0), (-70, 0), (0, 25), (0, -40)])
def test_degrees_are_those_of_a_turned_head(yaw, pitch):
    """Landmarks of a head in three dimensions, turned and seen in parallel projection; its nose stands out by the
    depth that is taken for all."""
    length = 0.5 / 0.43
    nose = FRONTAL_NOSE * length - length / 2
    points = np.array([(-0.5, -length / 2, 0), (0.5, -length / 2, 0), (0, nose, 0.5), (-0.4, length / 2, 0),
                       (0.4, length / 2, 0)])  # fmt: skip
    a, b = np.radians([yaw, pitch])
    turned = points @ np.array([(np.cos(a), 0, -np.sin(a)), (0, 1, 0), (np.sin(a), 0, np.cos(a))])
    turned = turned @ np.array([(1, 0, 0), (0, np.cos(b), -np.sin(b)), (0, np.sin(b), np.cos(b))])
    degrees = PoseProjector.from_columns(np.array([head_pose(turned[:, :2])]))
    assert degrees[0] == pytest.approx([yaw, pitch], abs=1e-3)
    # the mirrored face: left and right change places
    mirrored = (turned[:, :2] * [-1, 1])[[1, 0, 2, 4, 3]]
    again = PoseProjector.from_columns(np.array([head_pose(mirrored)]))
    assert again[0] == pytest.approx(PoseProjector.mirrored(torch.from_numpy(degrees))[0].tolist(), abs=1e-3)


def test_a_pose_that_is_not_given_has_learned_tokens():
    projector = pose_projector()
    values = torch.tensor([(NAN, NAN), (10.0, 5.0), (10.0, NAN)])
    tokens = projector(values).tokens
    assert torch.equal(tokens[0], projector.without) and torch.equal(tokens[2], projector.without)
    tokens.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in projector.parameters())
    assert not PoseProjector(32)(values).tokens.any()


def test_a_fresh_projector_tells_poses_apart():
    """What its last layer, which begins at zero, has to learn from: values of unit size that differ by the pose."""
    torch.manual_seed(0)
    hidden = PoseProjector().mlp[:-1]
    with torch.no_grad():
        values = torch.tensor(
            [(yaw, pitch) for yaw in range(-45, 46, 5) for pitch in (-15, 0, 15)], dtype=torch.float32
        )
        angles = torch.deg2rad(values)[..., None] * 2.0 ** torch.arange(4)
        found = hidden(torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1))
    assert found.std(dim=0).mean() > 0.4 and 0.5 < found.abs().mean() < 1.5


# --- training --------------------------------------------------------------------------------------------------------


class Listener(torch.nn.Module):
    """Predicts nothing and keeps what it is asked."""

    def forward(self, noisy, timesteps, identity_embeds, is_empty, values=None):
        self.noisy, self.timesteps, self.is_empty, self.values = noisy, timesteps, is_empty, values
        return noisy


def test_mirrored_faces_are_trained_with_mirrored_poses():
    """The latents say which flip it is; the pose is dropped as often as asked, under both contexts."""
    flips = [torch.full((2000, 1, 2, 2), value) for value in (3.0, -3.0)]
    poses = torch.tensor([[20.0, 7.0]]).repeat(2000, 1)
    poses[:100] = torch.nan  # not known
    model, scheduler = Listener(), DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    torch.manual_seed(0)
    options = {"values": {"pose_projector": poses}, "dropouts": {"pose_projector": 0.25}}
    embeds = torch.zeros(2000, 4)
    loss = denoising.denoising_loss(model, scheduler, torch.stack(flips, 1), embeds, 0.2, None, **options)
    given, is_mirrored = model.values["pose_projector"], loss.latents.mean(dim=(1, 2, 3)) < 0
    known = given.isfinite().all(dim=1)
    assert not known[:100].any() and abs(known[100:].float().mean() - 0.75) < 0.03
    assert torch.equal(given[known, 0], torch.where(is_mirrored[known], -20.0, 20.0))
    assert torch.equal(given[known, 1], torch.full((int(known.sum()),), 7.0))
    assert abs(known[100:][model.is_empty[100:]].float().mean() - 0.75) < 0.08
    # without a condition, the random numbers and the call are those of before
    torch.manual_seed(0)
    plain = denoising.denoising_loss(model, scheduler, torch.stack(flips, 1), embeds, 0.2, None)
    assert model.values is None and torch.equal(plain.timesteps, loss.timesteps)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_root, toy_photographs) -> Path:
    return write_workspace(tmp_path_factory.mktemp("pose"), toy_root, toy_photographs)


POSE = ("--pose-projector", '{"hidden_dim": 16}', "--max-train-steps", "4", "--checkpointing-steps", "2")


@pytest.fixture(scope="module")
def trained(workspace) -> Path:
    result = train(workspace, "whole", *POSE, "--learning-rate", "0.01")
    assert result.returncode == 0, result.stderr
    return workspace / "whole"


def test_a_projector_is_trained_averaged_and_saved(trained, workspace):
    pipe = UIFacePipeline.from_pretrained(trained)
    assert pipe.pose_projector.config.hidden_dim == 16 and pipe.pose_projector.mlp[-1].weight.any()
    parameters = [*pipe.unet.parameters(), *pipe.identity_projector.parameters(), *pipe.empty_context.parameters()]
    own = dict(pipe.pose_projector.named_parameters())
    average = load_file(trained / "checkpoint-4" / "ema.safetensors")
    assert len(average) == len(parameters) + len(own)
    for number, (name, parameter) in enumerate(own.items(), start=len(parameters)):
        assert torch.equal(average[str(number)], parameter), name
    pipe.set_progress_bar_config(disable=True)
    pipe(torch.eye(16)[:1], pose=(20, 0), num_inference_steps=2)


def test_a_training_goes_on_with_its_projector(trained, workspace):
    shutil.copytree(trained, workspace / "again")
    shutil.rmtree(workspace / "again" / "checkpoint-4")
    options = (*POSE, "--learning-rate", "0.01", "--resume-from-checkpoint", "latest")
    result = train(workspace, "again", *options)
    assert result.returncode == 0, result.stderr
    ours, theirs = (load_file(each / "pose_projector" / WEIGHTS) for each in (workspace / "again", trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # not with another dropout, or without
    result = train(workspace, "again", *options, "--pose-dropout", "0.5")
    assert "pose_dropout: 0.1 then, 0.5 now" in result.stderr
    result = train(workspace, "again", "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    assert "pose_projector: {'hidden_dim': 16} then, None now" in result.stderr


def test_a_projector_is_added_to_a_trained_pipeline(trained, workspace):
    """It begins where it changes nothing. One that is there is trained further, and needs no option."""
    start = workspace / "start"
    pipe = UIFacePipeline.from_pretrained(trained, pose_projector=None)
    pipe.save_pretrained(start)
    options = ("--init-from", str(start), "--learning-rate", "0", "--max-train-steps", "1")
    result = train(workspace, "added", *options, "--unet", "{}", "--pose-projector", "{}")
    assert result.returncode == 0, result.stderr
    added = UIFacePipeline.from_pretrained(workspace / "added")
    added.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    given = {"identities": torch.eye(16)[:3], "num_inference_steps": 4}
    assert max_difference(call(added, **given, pose=POSES).images, call(pipe, **given).images) < 1e-4
    options = ("--init-from", str(workspace / "added"), "--max-train-steps", "1", "--unet", "{}")
    assert train(workspace, "further", *options).returncode == 0
    assert UIFacePipeline.from_pretrained(workspace / "further").pose_projector is not None
    result = train(workspace, "changed", *options, "--pose-projector", '{"hidden_dim": 8}')
    assert result.returncode and "--pose-projector cannot change that of" in result.stderr


def test_a_cache_without_poses_is_named_with_the_remedy(workspace, toy_root, tmp_path):
    (tmp_path / "faces" / "a").mkdir(parents=True)
    for index in range(4):
        PIL.Image.new("RGB", (112, 112), (0, 0, 255)).save(tmp_path / "faces" / "a" / f"{index}.png")
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(tmp_path / "faces", tmp_path / "aligned", encoder, image_size=16, aligned=True)
    data = ("--train-data", str(workspace / "cache"), str(tmp_path / "aligned"))
    result = train(workspace, "refused", *data, *POSE)
    assert result.returncode != 0 and not list((tmp_path / "aligned").glob("latents-*"))
    said = f"--pose-projector needs yaw and pitch of the faces, which {tmp_path / 'aligned'} do not have: run `uiface"
    assert said in result.stderr and "without --aligned" in result.stderr
    result = train(workspace, "refused", "--pose-projector", '{"frequencies": 2}')
    assert '--pose-projector {"frequencies": 2} makes no PoseProjector' in result.stderr
    values = read_condition(PoseProjector, [FaceCache(workspace / "cache")])
    assert values.shape == (24, 2) and values.abs().max() < 90


# --- data sets -------------------------------------------------------------------------------------------------------

SET = {"num_inference_steps": 4, "size": 16, "batch_size": 4}
UNIFORM = {"pose": "uniform:-60:60"}


def test_every_image_of_a_set_draws_a_pose(pipe, tmp_path):
    """Reproducible from its seed in any batch, recorded, and made again by the pipeline alone."""
    generate_dataset(pipe, bank(), tmp_path / "a", 4, distributions=UNIFORM, **SET)
    generate_dataset(pipe, bank().take([1]), tmp_path / "b", 4, distributions=UNIFORM, **SET | {"batch_size": 1})
    rows = rows_of(tmp_path / "a")
    assert rows[4:8] == rows_of(tmp_path / "b")
    yaws = [row["yaw"] for row in rows]
    assert len(set(yaws)) == 12 and max(map(abs, yaws)) <= 60 and min(yaws) < -10 and max(yaws) > 10
    assert {row["pitch"] for row in rows} == {0.0}
    images = images_of(tmp_path / "a")
    for one, other in zip(images[4:8], images_of(tmp_path / "b"), strict=True):
        assert np.abs(one - other).max() <= 1
    row = rows[6]
    options = {"num_inference_steps": 4, "generator": noise_generator(row["seed"])}
    again = pipe(bank().embeddings[1], pose=(row["yaw"], row["pitch"]), **options).images[0]
    assert np.abs(np.array(again).astype(int) - images[6]).max() <= 1
    generate_dataset(pipe, bank(), tmp_path / "c", 4, seed=1, distributions=UNIFORM, **SET)
    assert not set(yaws) & {row["yaw"] for row in rows_of(tmp_path / "c")}
    settings = json.loads((tmp_path / "a" / "generation.json").read_text())["settings"]
    assert settings["conditions"] == {"pose": "uniform:-60:60,0:0"}
    assert "| pose | drawn from `uniform:-60:60,0:0` |" in (tmp_path / "a" / "README.md").read_text()


def test_a_set_goes_on_with_its_distribution_only(pipe, workspace, tmp_path):
    """Of a cache, the poses of its faces; from the journal and from finished metadata."""
    faces = {"pose": workspace / "cache"}
    options = {"distributions": faces, **SET}
    generate_dataset(pipe, bank(), tmp_path / "a", 2, shard=(0, 2), **options)
    for other in (UNIFORM, None):
        with pytest.raises(ValueError, match="was begun with other settings .*conditions"):
            generate_dataset(pipe, bank(), tmp_path / "a", 2, shard=(1, 2), **options | {"distributions": other})
    assert generate_dataset(pipe, bank(), tmp_path / "a", 2, shard=(1, 2), **options).complete
    generate_dataset(pipe, bank(), tmp_path / "whole", 2, output_format="parquet", **options)
    assert [(row["yaw"], row["pitch"]) for row in rows_of(tmp_path / "a")] == [
        (row["yaw"], row["pitch"]) for row in rows_of(tmp_path / "whole")
    ]
    known = {tuple(pose) for pose in read_condition(PoseProjector, [FaceCache(workspace / "cache")]).tolist()}
    assert {(row["yaw"], row["pitch"]) for row in rows_of(tmp_path / "a")} <= known
    assert pq.read_table(tmp_path / "whole" / "data").to_pylist()[0]["yaw"] == rows_of(tmp_path / "whole")[0]["yaw"]
    assert generate_dataset(pipe, bank(), tmp_path / "a", 2, **options).made == 0


def test_a_set_without_poses_is_written_as_before(pipe, tiny_pipeline, tmp_path):
    for name, each in (("with", pipe), ("without", tiny_pipeline)):
        generate_dataset(each, bank(), tmp_path / name, 1, **SET)
        assert not {"yaw", "pitch", "conditions"} & rows_of(tmp_path / name)[0].keys()
        assert "conditions" not in json.loads((tmp_path / name / "generation.json").read_text())["settings"]


@pytest.mark.parametrize(
    "given", ["uniform:", "uniform:1", "uniform:60:-60", "uniform:0:91", "uniform:a:b", "uniform:0:1,0:1,0:1"]
)
def test_wrong_distributions_are_named_before_anything_is_made(pipe, tmp_path, given):
    with pytest.raises(ValueError, match="is no distribution of the pose: give uniform:LOW:HIGH, numbers from -90"):
        generate_dataset(pipe, bank(), tmp_path / "set", 1, distributions={"pose": given}, **SET)
    assert not (tmp_path / "set").exists()


def test_generate_takes_a_distribution_of_poses(pipe, tiny_pipeline, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    tiny_pipeline.save_pretrained(tmp_path / "plain")
    bank(2).save(tmp_path / "bank.safetensors")
    words = ["--identities", tmp_path / "bank.safetensors", "--images-per-identity", 1, "--num-inference-steps", 4,
             "--device", "cpu", "--output", tmp_path / "set", "--pose-distribution"]  # fmt: skip
    cli.main([str(word) for word in ["generate", tmp_path / "model", *words, "uniform:-60:60,5:6"]])
    assert all(5 <= row["pitch"] <= 6 for row in rows_of(tmp_path / "set"))
    assert "was begun with other settings" in complaint("generate", tmp_path / "model", *words, "uniform:-60:60")
    said = complaint("generate", tmp_path / "plain", *words, "uniform:-60:60")
    assert "`pose` needs a pipeline with a `pose_projector`" in " ".join(said.split())
    assert "no cache of prepared faces" in " ".join(
        complaint("generate", tmp_path / "model", *words, tmp_path).split()
    )


def test_the_command_line_has_the_conditions_of_the_package():
    assert [*generate_command.CONDITIONS] == [projector.condition for projector in CONDITIONS.values()]


def test_the_benchmark_runs(pipe, tmp_path, capsys):
    for name in ("toy", "judge"):
        write_toy_pack(tmp_path, name)
    pipe.save_pretrained(tmp_path / "model")
    bank(2).save(tmp_path / "bank.safetensors")
    options = {"model": tmp_path / "model", "bank": tmp_path / "bank.safetensors", "encoder": "toy", "faces": 4,
               "encoder-root": tmp_path, "num-inference-steps": 2, "output": tmp_path / "out.json"}  # fmt: skip
    pose_benchmark.main([str(word) for name, value in options.items() for word in (f"--{name}", value)])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["pose"] for row in rows] == ["without", "with"]
    assert all(0 <= row["EER"] <= 1 for row in rows)


def test_the_benchmark_compares_degrees():
    generator = np.random.default_rng(0)
    asked = generator.uniform(-45, 45, (200, 2))
    measured = asked * 0.5 + generator.normal(0, 1, asked.shape)
    measured[:5] = np.nan
    figures = pose_benchmark.of_poses(asked, measured)
    assert figures["yaw"] > 0.99 and figures["slope"] == pytest.approx(0.5, abs=0.02)
    assert figures["error"] == pytest.approx(11.25, abs=1.5)
