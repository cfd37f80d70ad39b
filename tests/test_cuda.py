"""What a GPU adds: parity, precisions, host waits, devices of inputs, offloading, data sets and trainings on it.

Every test records what it measured; it is printed at the end and written to the file that UIFACE_CUDA_REPORT names.
With UIFACE_TEST_DEVICE=cpu, tiny versions run on the CPU, to try the tests themselves; waits and memory are not
counted there.
"""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from conftest import (
    BETAS,
    DDIM,
    REPOSITORY,
    TINY_UNET,
    Predictor,
    Reference,
    Trace,
    all_samples,
    max_difference,
    reference_call,
    run_script,
    tiny_autoencoder,
)
from diffusers import DDIMScheduler, VQModel
from safetensors.torch import load_file

from uiface_diffusers import (
    EmptyContext,
    IdentityBank,
    IdentityProjector,
    UIFacePipeline,
    UIFaceUNet2DModel,
    default_checkpoint,
    generate_dataset,
)
from uiface_diffusers.attention_processor import AttentionMapRecorder
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.latents import encode_images
from uiface_diffusers.two_stage import attention_map, plan_rows
from uiface_diffusers.two_stage.schedulers import SUPPORTED, check_timesteps

DEVICE = torch.device(os.environ.get("UIFACE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
STEPS = 20 if ON_GPU else 4
# of the data sets
IDENTITIES, IMAGES = (40, 5) if ON_GPU else (6, 5)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
]

sys.path.insert(0, str(REPOSITORY / "training"))


@contextmanager
def tensor_cores(convolutions: bool, products: bool):
    """Whether float32 is rounded to TF32; PyTorch's default is in convolutions only."""
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [each.allow_tf32 for each in flags]
    for each, value in zip(flags, (convolutions, products), strict=True):
        each.allow_tf32 = value
    try:
        yield
    finally:
        for each, value in zip(flags, before, strict=True):
            each.allow_tf32 = value


@pytest.fixture(autouse=True)
def full_float32():
    with tensor_cores(convolutions=False, products=False):
        yield


def load(dtype: torch.dtype = torch.float32) -> UIFacePipeline:
    pipe = UIFacePipeline.from_pretrained(default_checkpoint(), dtype=dtype).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> UIFacePipeline:
    """The embedded checkpoint in float32; tests leave it as it is."""
    return load()


@pytest.fixture(scope="module")
def bank() -> IdentityBank:
    return IdentityBank.load(default_checkpoint() / "identities.safetensors")


def seeds(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def gray_levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Differences of pictures in [0, 1]."""
    return 255 * (a.float() - b.float()).abs()


def waits_of(run: Callable[[], None]) -> Counter:
    """The lines at which the host waits for the GPU, by CUDA's own count."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "called a synchroniz" in str(each.message)
    )


# --- parity ----------------------------------------------------------------------------------------------------------


# of predictions and maps, of the trajectory (whose latents reach 200); None: flags, and with them it, may differ
@pytest.mark.parametrize(
    ("convolutions", "products", "bound", "trajectory_bound"),
    [(False, False, 1e-4, 1e-3), (True, False, 0.1, None), (True, True, 0.1, None)],
    ids=["float32", "default", "tf32"],
)
def test_parity_with_the_reference(convolutions, products, bound, trajectory_bound, record_property):
    reference = Reference()
    reference.tensors = {k: v.to(DEVICE) if v.is_floating_point() else v for k, v in reference.tensors.items()}
    reference.components = tuple(each.to(DEVICE) for each in reference.components)
    plans = {
        "eps_empty": plan_rows(all_samples(False), guided=False),
        "eps_identity": plan_rows(all_samples(True), guided=False),
        "eps_selfonly_flag": plan_rows(reference["flag"], guided=False, self_injection=True),
        "eps_injected": plan_rows(all_samples(True), guided=False, self_injection=True, cross_injection=True),
    }
    differences = {}
    with tensor_cores(convolutions, products):
        predict = Predictor(reference)
        for name, plan in plans.items():
            differences[name] = max_difference(predict(plan), reference[name])
        for branch, context in (("empty", predict.empty), ("identity", predict.identity)):
            recorder = AttentionMapRecorder(16, 16, map_size=16)
            predict(plan_rows(all_samples(False), guided=False, record=True), context, recorder)
            expected = reference[f"attn_map_{branch}"]
            differences[f"map_{branch}"] = max_difference(attention_map(recorder.block_maps), expected)
        pipe, trace = reference.pipeline(), Trace()
        pipe.vae.to(DEVICE)
        reference_call(reference, pipe, **trace.options())
    flags = torch.equal(torch.stack(trace.stage_two[:10]).cpu(), reference["stage1_flags"].cpu())
    trajectory = max_difference(torch.stack(trace.latents), reference["trajectory"])
    for name, value in {**differences, "trajectory": trajectory, "flags equal": flags}.items():
        record_property(name, value)
    assert max(differences.values()) <= bound
    assert trajectory_bound is None or (flags and trajectory <= trajectory_bound)


def test_the_cpu_and_the_gpu_sample_the_same(pipe, bank, record_property):
    call = {"num_inference_steps": STEPS, "output_type": "latent"}
    here = pipe(bank.take(range(8)), generator=seeds(8), **call)
    on_cpu = copy.deepcopy(pipe.unet).to("cpu")
    parts = {name: copy.deepcopy(getattr(pipe, name)).to("cpu") for name in ("vae", "identity_projector")}
    parts |= {"empty_context": copy.deepcopy(pipe.empty_context).to("cpu"), "scheduler": pipe.scheduler}
    cpu_pipe = UIFacePipeline(unet=on_cpu, **parts, **{k: pipe.config[k] for k in pipe.default_sampling()})
    cpu_pipe.set_progress_bar_config(disable=True)
    there = cpu_pipe(bank.take(range(8)), generator=seeds(8), **call)
    difference = max_difference(here.images.cpu(), there.images)
    record_property("latents", difference)
    record_property("largest latent", there.images.abs().max().item())
    assert torch.equal(here.boundary_timesteps, there.boundary_timesteps)
    assert difference <= 1e-2


@pytest.mark.parametrize("precision", ["float32", "default", "tf32", "bfloat16"])
def test_an_image_does_not_depend_on_its_batch(bank, precision, record_property):
    """A face alone, in 5 and in 16. Promised in float32, measured in the others."""
    pipe = load(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with tensor_cores(precision != "float32", precision in ("tf32", "bfloat16")):
        outputs = [
            pipe(bank.take(range(n)), generator=seeds(n), num_inference_steps=STEPS, output_type="pt")
            for n in (1, 5, 16)
        ]
    alone = outputs[0]
    levels = max(gray_levels(each.images[:1], alone.images).max().item() for each in outputs[1:])
    boundaries = {int(each.boundary_timesteps[0]) for each in outputs}
    record_property("gray levels", levels)
    record_property("boundaries", sorted(boundaries))
    assert precision != "float32" or (levels <= 1 and len(boundaries) == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_the_same_faces(pipe, bank, dtype, record_property):
    number = 128 if ON_GPU else 2
    identities = bank.embeddings[torch.arange(number) % len(bank)]
    noise = torch.randn(number, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"latents": noise, "num_inference_steps": STEPS, "output_type": "pt"}
    expected, found = pipe(identities, **call), load(dtype)(identities, **call)
    levels = gray_levels(found.images, expected.images)
    equal = (found.boundary_timesteps == expected.boundary_timesteps).float().mean().item()
    record_property("gray levels, mean", levels.mean().item())
    record_property("gray levels, worst image", levels.mean(dim=(1, 2, 3)).max().item())
    record_property("equal boundaries", equal)
    assert found.images.isfinite().all()
    assert levels.mean() <= 1
    assert equal >= 0.99


def test_the_first_stage_encodes_the_same(pipe, record_property):
    pictures = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        here = encode_images(pipe.vae, pictures.to(DEVICE)).cpu()
        there = encode_images(copy.deepcopy(pipe.vae).to("cpu"), pictures)
    record_property("latents", max_difference(here, there))
    assert max_difference(here, there) <= 1e-3


def test_a_translated_recognizer_embeds_the_same_and_waits_for_nothing(assets, record_property):
    pytest.importorskip("onnx2torch")
    recognizer = FaceEncoder("edgeface", str(assets / "insightface"), det_size=160).to_torch()
    faces = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = recognizer(faces)
    recognizer.to(DEVICE)
    faces = faces.to(DEVICE)
    difference = max_difference(recognizer(faces).cpu(), expected)
    waits = waits_of(lambda: recognizer(faces))
    record_property("embeddings", difference)
    record_property("waits", dict(waits))
    assert difference <= 1e-3
    assert not waits


# --- sampling --------------------------------------------------------------------------------------------------------


@contextmanager
def scheduler_of(pipe: UIFacePipeline, name: str):
    own = pipe.scheduler
    pipe.scheduler = getattr(diffusers, name).from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own


def sampling_waits(pipe: UIFacePipeline, bank: IdentityBank, steps: int, **options) -> Counter:
    def run():
        call = {"num_inference_steps": steps, "output_type": "latent", **options}
        pipe(bank.take(range(4)), generator=seeds(4), **call)

    run()
    return waits_of(run)


@pytest.mark.parametrize("boundary", [0, 500])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_no_step_with_a_fixed_boundary_waits(pipe, bank, name, boundary, record_property):
    """The start of a call may: hence two lengths."""
    with scheduler_of(pipe, name):
        few, many = (sampling_waits(pipe, bank, steps, boundary=boundary) for steps in (10, 20))
    record_property("waits of 10 steps", sum(few.values()))
    record_property("waits of 20 steps", sum(many.values()))
    record_property("of the 10 steps more", dict(many - few))
    assert not many - few


def test_a_seeking_step_waits_once(pipe, bank, record_property):
    fixed = sampling_waits(pipe, bank, 20, boundary=0)
    adaptive = sampling_waits(pipe, bank, 20, boundary_threshold=0.0, latest_boundary=500)
    record_property("waits, fixed", sum(fixed.values()))
    record_property("waits, adaptive", sum(adaptive.values()))
    record_property("of the seeking steps", dict(adaptive - fixed))
    # ten steps from 950 to 500
    assert sum(adaptive.values()) - sum(fixed.values()) <= 10


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DDPMScheduler", "SASolverScheduler"])
def test_waits_of_schedulers_that_copy(pipe, bank, name, record_property):
    """Measured only: diffusers makes tensors on the device in every step of these."""
    with scheduler_of(pipe, name):
        few, many = (sampling_waits(pipe, bank, steps, boundary=0) for steps in (10, 20))
    record_property("waits a step", (sum(many.values()) - sum(few.values())) / 10)


@pytest.mark.parametrize("name", SUPPORTED)
def test_schedulers_run(pipe, bank, name):
    if name in ("LMSDiscreteScheduler",):
        pytest.importorskip("scipy")
    call = {"num_inference_steps": 8, "output_type": "latent", "reuse_empty_branch": 2}
    with scheduler_of(pipe, name):
        pipe.scheduler.set_timesteps(call["num_inference_steps"])
        try:
            check_timesteps(pipe.scheduler)
        except ValueError as error:
            pytest.skip(f"refused: {error}")
        out = pipe(bank.take(range(3)), generator=seeds(3), **call)
    assert out.images.device.type == DEVICE.type
    assert out.images.isfinite().all()


def test_embeddings_generators_and_latents_of_either_device(pipe, bank):
    call = {"num_inference_steps": STEPS // 2, "output_type": "latent"}
    embeddings = bank.embeddings[:3]
    expected = pipe(embeddings, generator=seeds(3), **call).images
    assert torch.equal(pipe(embeddings.to(DEVICE), generator=seeds(3), **call).images, expected)
    assert torch.equal(pipe(embeddings.numpy(), generator=seeds(3), **call).images, expected)
    own = [torch.Generator(DEVICE).manual_seed(seed) for seed in range(3)]
    out = pipe(embeddings, generator=own, **call).images
    own = [torch.Generator(DEVICE).manual_seed(seed) for seed in range(3)]
    assert torch.equal(pipe(embeddings.to(DEVICE), generator=own, **call).images, out)
    assert pipe(embeddings, generator=torch.Generator(DEVICE).manual_seed(1), **call).images.isfinite().all()
    noise = torch.randn(3, 8, 16, 16)
    out = pipe(embeddings, latents=noise, **call).images
    assert torch.equal(pipe(embeddings, latents=noise.to(DEVICE), **call).images, out)
    assert pipe(None, 3, latents=noise, output_type="np", num_inference_steps=2).images.shape == (3, 128, 128, 3)


@pytest.mark.parametrize("offloading", ["model", "sequential", "group"])
def test_offloading_gives_the_same(pipe, bank, offloading, record_property):
    if not ON_GPU and offloading != "group":
        pytest.skip("there is nothing to offload from")
    call = {"num_inference_steps": 6, "output_type": "pt"}
    expected = pipe(bank.take(range(2)), generator=seeds(2), **call).images
    offloaded = UIFacePipeline.from_pretrained(default_checkpoint())
    offloaded.set_progress_bar_config(disable=True)
    if offloading == "model":
        offloaded.enable_model_cpu_offload()
    elif offloading == "sequential":
        offloaded.enable_sequential_cpu_offload()
    else:
        for part in (offloaded.vae, offloaded.identity_projector, offloaded.empty_context):
            part.to(DEVICE)
        offloaded.unet.enable_group_offload(onload_device=DEVICE, offload_type="leaf_level")
    for _ in range(2):  # what is offloaded comes back
        out = offloaded(bank.take(range(2)), generator=seeds(2), **call).images
    levels = gray_levels(out.to(expected.device), expected).max().item()
    record_property("gray levels", levels)
    assert levels <= 1


@pytest.mark.skipif(not ON_GPU, reason="memory is counted on a GPU")
def test_memory_of_decoding_is_bounded(record_property):
    """256 pictures of the published first stage, whose code search takes 32 MiB per picture, need what 64 need: they
    are decoded in parts."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    codes = {"latent_channels": 3, "num_vq_embeddings": 8192, "scaling_factor": 1.0}
    vae = VQModel(block_out_channels=(128, 256, 512), layers_per_block=2, **blocks, **codes).eval()
    unet = UIFaceUNet2DModel(**TINY_UNET | {"sample_size": 32, "in_channels": 3, "out_channels": 3}).eval()
    contexts = (IdentityProjector(16, 32).eval(), EmptyContext(32).eval())
    pipe = UIFacePipeline(vae, unet, DDIMScheduler(**BETAS, **DDIM), *contexts).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    peaks = {}
    for number, output_type in ((64, "latent"), (64, "pt"), (256, "latent"), (256, "pt")):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pipe(None, number, output_type=output_type, **call)
        peaks[number, output_type] = (torch.cuda.max_memory_allocated() - before) / 2**30
    for (number, output_type), peak in peaks.items():
        record_property(f"GiB, {number} {output_type}", round(peak, 2))
    # the pictures themselves are 0.05 GiB
    assert peaks[256, "pt"] <= max(1.05 * peaks[64, "pt"], peaks[256, "latent"]) + 0.2


# --- data sets -------------------------------------------------------------------------------------------------------


def read_dataset(folder: Path) -> dict[str, np.ndarray]:
    names = pyarrow.parquet.read_table(folder / "metadata.parquet")["file_name"].to_pylist()
    return {name: np.array(PIL.Image.open(folder / name)).astype(int) for name in names}


def compare_datasets(first: Path, second: Path) -> tuple[int, float]:
    """Largest difference in gray levels, and the share of values that differ."""
    a, b = read_dataset(first), read_dataset(second)
    assert a.keys() == b.keys() and len(a) == IDENTITIES * IMAGES
    differences = np.stack([abs(a[name] - b[name]) for name in a])
    return int(differences.max()), float((differences > 0).mean())


def generate(pipe: UIFacePipeline, bank: IdentityBank, folder: Path, batch_size: int) -> Path:
    identities = bank.take(range(IDENTITIES))
    generate_dataset(pipe, identities, folder, IMAGES, batch_size=batch_size, num_inference_steps=STEPS)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, bank) -> Path:
    """Made in one call, in full float32."""
    with tensor_cores(convolutions=False, products=False):
        return generate(load(), bank, tmp_path_factory.mktemp("dataset") / "whole", 16)


def start_generation(folder: Path, *options: str) -> subprocess.Popen:
    """The command in a process of its own, in full float32."""
    model = default_checkpoint()
    command = [sys.executable, "-m", "uiface_diffusers.cli", "generate", str(model), "--output", str(folder)]
    command += ["--identities", str(model / "identities.safetensors"), "--device", DEVICE.type]
    command += ["--max-identities", str(IDENTITIES), "--images-per-identity", str(IMAGES)]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0", "TQDM_MININTERVAL": "0"}
    if not ON_GPU:
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += ["--num-inference-steps", str(STEPS), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)


def test_killed_twice_and_resumed_a_data_set_is_the_same(dataset, tmp_path, record_property):
    total, folder = IDENTITIES * IMAGES, tmp_path / "killed"
    for share in (0.25, 0.6):
        process, seen, made = start_generation(folder, "--batch-size", "8"), b"", 0
        while made < share * total and process.poll() is None:
            seen += process.stderr.read1()
            made = max(map(int, re.findall(rf"(\d+)/{total} \[".encode(), seen)), default=0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, seen.decode()
    last = start_generation(folder, "--batch-size", "16")
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    levels, share = compare_datasets(folder, dataset)
    record_property("gray levels", levels)
    record_property("share of values", share)
    assert levels <= 1


def test_two_processes_on_one_gpu_make_one_data_set(dataset, tmp_path, record_property):
    folder = tmp_path / "shared"
    processes = [start_generation(folder, "--batch-size", "16", "--shard", f"{part}/2") for part in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    levels, share = compare_datasets(folder, dataset)
    record_property("gray levels", levels)
    record_property("share of values", share)
    assert levels <= 1


@pytest.mark.parametrize("precision", ["float32", "default", "bfloat16"])
def test_batches_of_another_size_make_the_same_data_set(bank, precision, tmp_path, record_property):
    """Promised in float32, measured in the others."""
    pipe = load(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with tensor_cores(precision != "float32", precision == "bfloat16"):
        folders = [generate(pipe, bank, tmp_path / str(size), size) for size in (16, 5)]
    levels, share = compare_datasets(*folders)
    record_property("gray levels", levels)
    record_property("share of values", share)
    assert precision != "float32" or levels <= 1


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory, toy_root, toy_photographs) -> dict[int, Path]:
    """Prepared faces by their size."""
    pytest.importorskip("datasets")
    root, encoder = tmp_path_factory.mktemp("faces"), FaceEncoder("toy", str(toy_root), det_size=160)
    for size in (16, 64):
        prepare_faces(toy_photographs, root / str(size), encoder, image_size=size)
    return {size: root / str(size) for size in (16, 64)}


RARELY = ["--checkpointing-steps", "1000", "--logging-steps", "1000", "--validation-steps", "0", "--report-to", "none"]


@pytest.fixture(scope="module")
def train_options(faces, tmp_path_factory) -> list[str]:
    """Of training/train.py, tiny."""
    vae = tmp_path_factory.mktemp("vae")
    tiny_autoencoder().save_pretrained(vae)
    unet = {k: v for k, v in TINY_UNET.items() if k not in ("in_channels", "out_channels", "sample_size")}
    options = ["--train-data", str(faces[16]), "--vae", str(vae), "--unet", json.dumps(unet)]
    return [*options, "--train-batch-size", "4", "--learning-rate", "1e-4", *RARELY]


def run_training(script, folder: Path, steps: int, options: list[str]) -> Path:
    result = run_script(script.main, [*options, "--max-train-steps", str(steps), "--output-dir", str(folder)])
    assert result.returncode == 0, result.stderr
    return folder


def training_waits(script, folder: Path, options: list[str]) -> Counter:
    """Of ten steps. Beginning and end of a training may wait: hence two lengths."""
    run_training(script, folder / "warm", 2, options)
    few, many = (
        waits_of(lambda steps=steps: run_training(script, folder / str(steps), steps, options)) for steps in (10, 20)
    )
    return many - few


@pytest.mark.parametrize("identity", [False, True], ids=["plain", "identity"])
def test_a_step_of_train_waits_for_nothing(train_options, toy_root, identity, tmp_path, record_property):
    import train as script

    options = [*train_options, "--max-train-hours", "1", "--max-grad-norm", "1", "--prediction-type", "v_prediction"]
    if identity:
        pytest.importorskip("onnx2torch")
        options += ["--encoder-root", str(toy_root), "--identity-weight", "0.3", "--decoded-samples", "2"]
    waits = training_waits(script, tmp_path, options)
    record_property("waits of 10 steps", dict(waits))
    assert not waits


@pytest.mark.parametrize("identity", [False, True], ids=["plain", "identity"])
def test_a_step_of_train_autoencoder_waits_for_nothing(faces, toy_root, backbone, identity, tmp_path, record_property):
    pytest.importorskip("lpips")
    import train_autoencoder as script

    blocks = {f"{part}_block_out_channels": [16, 16] for part in ("encoder", "decoder")}
    blocks |= {f"num_{part}_blocks": [1, 1] for part in ("encoder", "decoder")}
    config = json.dumps({"_class_name": "AutoencoderTiny", **blocks})
    options = ["--train-data", str(faces[64]), "--autoencoder", config, "--lpips-backbone", str(backbone)]
    options += ["--train-batch-size", "4", "--adversarial-weight", "0.1", "--max-grad-norm", "1", *RARELY]
    if identity:
        pytest.importorskip("onnx2torch")
        options += ["--identity-weight", "0.5", "--identity-encoder", "toy", "--encoder-root", str(toy_root)]
    waits = training_waits(script, tmp_path, options)
    record_property("waits of 10 steps", dict(waits))
    assert not waits


def test_a_step_of_train_face_recognition_waits_for_nothing(tmp_path, record_property):
    import train_face_recognition as script

    generator = np.random.default_rng(0)
    for identity in range(8):
        (tmp_path / "faces" / f"person_{identity}").mkdir(parents=True)
        for index in range(4):
            picture = PIL.Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            picture.save(tmp_path / "faces" / f"person_{identity}" / f"{index}.png")
    config = json.dumps({"layers": 18, "width": 4, "embedding_dim": 16, "image_size": 32, "dropout": 0.1})
    options = ["--train-data", str(tmp_path / "faces"), "--recognizer", config, "--train-batch-size", "8"]
    options += ["--max-grad-norm", "5", *RARELY]
    waits = training_waits(script, tmp_path, options)
    record_property("waits of 10 steps", dict(waits))
    assert not waits


def saved_parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob("*/diffusion_pytorch_model.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_a_resumed_training_goes_on(train_options, tmp_path, record_property):
    """To about the same parameters: gradients are not summed in the same order twice."""
    import train as script

    whole = [saved_parameters(run_training(script, tmp_path / f"whole-{i}", 20, train_options)) for i in range(2)]
    begun = saved_parameters(run_training(script, tmp_path / "halves", 10, train_options))
    halves = [*train_options, "--resume-from-checkpoint", "latest"]
    resumed = saved_parameters(run_training(script, tmp_path / "halves", 20, halves))

    def difference(a, b) -> tuple[float, float]:
        differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
        return differences.max().item(), differences.mean().item()

    again, halved, moved = (difference(whole[0], other) for other in (whole[1], resumed, begun))
    record_property("largest difference, the same twice", again[0])
    record_property("largest difference, resumed", halved[0])
    record_property("mean difference, resumed", halved[1])
    record_property("mean movement of ten steps", moved[1])
    assert halved[1] <= 0.01 * moved[1]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains(train_options, precision, tmp_path, record_property):
    """fp16 with a gradient scaler, which skips steps that overflow."""
    import train as script

    if not ON_GPU and precision == "fp16":
        pytest.skip("fp16 needs a GPU")
    options = [*train_options, "--max-grad-norm", "1", "--mixed-precision", precision]
    few, many = (saved_parameters(run_training(script, tmp_path / str(n), n, options)) for n in (10, 40))
    moved = torch.cat([(few[name] - many[name]).abs().flatten() for name in few])
    record_property("mean movement", moved.mean().item())
    assert moved.isfinite().all() and moved.max() > 0
