"""The head pose as a condition: tokens in both contexts, in sampling, training and data sets."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import BETAS, DDIM, max_difference, stock_pipeline, tiny_components
from diffusers import DDIMScheduler
from slow_references import MaterializingProcessor
from torch.nn import functional as F

from uiface_diffusers import PoseProjector, UIFacePipeline
from uiface_diffusers.attention_processor import AttentionMapRecorder, cross_attention_names
from uiface_diffusers.faces import head_pose
from uiface_diffusers.faces.geometry import FRONTAL_NOSE
from uiface_diffusers.fingerprint import model_fingerprint, pipeline_fingerprint

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
    """The contexts that are encoded, once a call, and the rows of its steps."""

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
