import contextlib
import io
import json
import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# before torch is loaded: without it a matrix product's last bits depend on where in memory its operands lie, and tests
# that compare two runs of one model fail on AMD's processors
os.environ.setdefault("MKL_CBWR", "AVX2")

import numpy as np
import onnx
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from uiface_diffusers import (
    EmptyContext,
    IdentityProjector,
    UIFacePipeline,
    UIFaceUNet2DModel,
    cli,
    convert_original_state_dict,
)
from uiface_diffusers.attention_processor import two_stage_processors
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.two_stage import combine_rows

# the tests run in two processes, on two cores
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
ASSETS = Path(os.environ.get("UIFACE_ASSETS", REPOSITORY.parent / "shared" / "assets"))

# the sampler that the published code means
DDIM = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": False}
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


if torch.cuda.is_available():
    torch.cuda.init()  # here, so that hiding the GPU from a test's child processes does not hide it from this one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests run on the CPU also where there is a GPU, with all their fixtures and child processes; only those marked
    `cuda` use it."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("cuda") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setenv("ACCELERATE_USE_CPU", "true")
        return (yield)


def pytest_terminal_summary(terminalreporter) -> None:
    """What tests measured (`record_property`), also as JSON in the file that UIFACE_CUDA_REPORT names."""
    reports = [report for each in terminalreporter.stats.values() for report in each if hasattr(report, "when")]
    measured = {report.nodeid.split("::")[-1]: dict(report.user_properties) for report in reports
                if report.when == "call" and report.user_properties}  # fmt: skip
    if not measured:
        return
    terminalreporter.section("measured")
    for name, figures in measured.items():
        terminalreporter.write_line(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    if "UIFACE_CUDA_REPORT" in os.environ:
        Path(os.environ["UIFACE_CUDA_REPORT"]).write_text(json.dumps(measured, indent=1) + "\n")


class Outcome(NamedTuple):
    """Of a script: as of a process, exit code and what it wrote to stderr."""

    returncode: int
    stderr: str


def run_script(main: Callable[[list[str]], None], argv: list[str], **environment: str) -> Outcome:
    """Runs a training script's `main` in this process: starting another one takes longer than the trainings of the
    tests."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    written, returncode, root = io.StringIO(), 0, logging.getLogger()
    handler, level = logging.StreamHandler(written), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(written):
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main(argv)
        except SystemExit as error:
            returncode = error.code
        except Exception:
            returncode = 1
            written.write(traceback.format_exc())
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
    return Outcome(returncode, written.getvalue())


def complaint(*argv: object) -> str:
    """What `uiface` writes to stderr before it ends with an error."""
    written = io.StringIO()
    with contextlib.redirect_stderr(written), pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in argv])
    assert ended.value.code not in (0, None)
    message = written.getvalue() + (ended.value.code if isinstance(ended.value.code, str) else "")
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real photographs and models beside the repository; tests that need them skip without."""
    if not ASSETS.is_dir():
        pytest.skip(f"{ASSETS} is missing: set UIFACE_ASSETS to run on real photographs")
    return ASSETS


class Reference:
    """The reference implementation's tensors and its model, converted."""

    def __init__(self):
        options = json.loads((FIXTURES / "reference_a.json").read_text())
        self.model_config, self.sampling = options["model"], options["sampling"]
        self.state_dict = load_file(FIXTURES / "reference_a.weights.safetensors")
        self.tensors = load_file(FIXTURES / "reference_a.io.safetensors")
        self.components = convert_original_state_dict(self.state_dict, self.model_config)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()

    def pipeline(self, scheduler=None) -> UIFacePipeline:
        unet, identity_projector, empty_context = self.components
        vae = AutoencoderTiny(latent_channels=3, encoder_block_out_channels=(8,), decoder_block_out_channels=(8,),
                              num_encoder_blocks=(1,), num_decoder_blocks=(1,)).eval()  # fmt: skip
        pipe = UIFacePipeline(
            vae, unet, scheduler or DDIMScheduler(**BETAS, **DDIM), identity_projector, empty_context
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


def all_samples(value: bool) -> torch.Tensor:
    return torch.full((4,), value)


class Predictor:
    """Single predictions of the reference's model through the row plan."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self.unet, projector, empty_context = reference.components
        self.processors = two_stage_processors(self.unet)
        with torch.no_grad():
            self.empty = empty_context(4).context
            self.identity = projector(reference["context"]).context

    @torch.no_grad()
    def __call__(self, plan, empty=None, recorder=None):
        x, t = self.reference["x"], self.reference["t"]
        context = torch.cat([(self.empty if empty is None else empty)[plan.empty], self.identity[plan.identity]])
        kwargs = {"row_plan": plan, "injection_strength": 0.5, "recorder": recorder}
        processors = self.unet.attn_processors
        self.unet.set_attn_processor(dict(self.processors))  # it empties the dict
        try:
            rows = self.unet(x[plan.samples], t[plan.samples], context, kwargs).sample
        finally:
            self.unet.set_attn_processor(processors)
        return combine_rows(rows, plan, None)


class Trace:
    """Callback that keeps the latents and flags of every step."""

    tensor_inputs = ["latents", "stage_two"]

    def __init__(self):
        self.latents, self.stage_two, self.timesteps = [], [], []

    def __call__(self, pipe, step, timestep, tensors):
        self.latents.append(tensors["latents"].clone())
        self.stage_two.append(tensors["stage_two"].clone())
        self.timesteps.append(float(timestep))
        return {}

    def options(self) -> dict:
        return {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": self.tensor_inputs}


def reference_call(reference: Reference, pipe: UIFacePipeline, samples=slice(None), **options):
    arguments = {"num_inference_steps": 20, "boundary_threshold": 0.012, "latest_boundary": 500}
    arguments |= {"latents": reference["x_T"][samples], "output_type": "latent", **options}
    return pipe(reference["context"][samples], **arguments)


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "attention_levels": (False, True),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_context_tokens": 4,
}


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(latent_channels=4, **blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()


def tiny_components() -> dict:
    torch.manual_seed(0)
    return {
        "vae": tiny_autoencoder(),
        "unet": UIFaceUNet2DModel(**TINY_UNET).eval(),
        "scheduler": DDIMScheduler(**BETAS, **DDIM),
        "identity_projector": IdentityProjector(16, 32, identity_encoder="toy").eval(),
        "empty_context": EmptyContext(32).eval(),
    }


@pytest.fixture
def tiny_pipeline() -> UIFacePipeline:
    pipe = UIFacePipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_unet(cross_attention_dim=16) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=8,
    ).eval()


def stock_pipeline(tiny_pipeline) -> UIFacePipeline:
    dim = tiny_pipeline.unet.config.cross_attention_dim
    contexts = {"identity_projector": IdentityProjector(16, dim, 5).eval(), "empty_context": EmptyContext(dim, 5)}
    pipe = UIFacePipeline(**tiny_pipeline.components | {"unet": stock_unet(dim), **contexts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _constant(name: str, value) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def _save_onnx(path: Path, nodes, inputs, outputs, constants) -> None:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


# of the toy detector: eyes, nose and corners of the mouth about the center of a disc, in units of 8 pixels
TOY_POINTS = ((-2, -2), (2, -2), (0, 0), (-1.6, 2), (1.6, 2))


def write_toy_pack(
    root: Path, name: str = "toy", batch: int | str = "n", needs_blue: bool = False, points=TOY_POINTS, dim: int = 16
) -> None:
    """An insightface model pack whose faces are red discs: a detector of red in SCRFD's form (scores, box distances,
    landmark distances at strides 8, 16, 32), and a fixed random projection of the 112x112 face as the recognizer; all
    zero of a face without any blue, if it needs some."""
    folder = root / "models" / name
    folder.mkdir(parents=True)
    constants = [
        _constant("red", np.array([0.5, -0.25, -0.25], np.float32).reshape(1, 3, 1, 1)),
        _constant("column", np.array([-1, 1], np.int64)),
        _constant("zero", np.float32(0)),
        _constant("gain", np.float32(4)),
        _constant("offset", np.float32(-2.3)),
        _constant("box", np.full((1, 4), 5, np.float32)),
        _constant("points", np.array(points, np.float32).reshape(1, 10)),
    ]
    nodes = [helper.make_node("Conv", ["image", "red"], ["redness"])]
    scores, boxes, landmarks = [], [], []
    for stride in (8, 16, 32):
        cell, blurred, flat, pair, score = (f"{kind}{stride}" for kind in ("cell", "blur", "flat", "pair", "score"))
        nodes += [
            helper.make_node("AveragePool", ["redness"], [cell], kernel_shape=[stride] * 2, strides=[stride] * 2),
            helper.make_node(
                "AveragePool", [cell], [blurred], kernel_shape=[11, 11], pads=[5] * 4, count_include_pad=1
            ),
            # a disc fills three quarters of the window only when it is in its middle
            helper.make_node("Mul", [blurred, "gain"], [f"gained{stride}"]),
            helper.make_node("Add", [f"gained{stride}", "offset"], [f"sharp{stride}"]),
            helper.make_node("Reshape", [f"sharp{stride}", "column"], [flat]),
            helper.make_node("Concat", [flat, flat], [pair], axis=1),
            helper.make_node("Reshape", [pair, "column"], [f"raw{stride}"]),
            helper.make_node("Mul", [f"raw{stride}", "zero"], [f"nothing{stride}"]),
            # only the finest level finds anything
            helper.make_node("Identity", [f"raw{stride}" if stride == 8 else f"nothing{stride}"], [score]),
            helper.make_node("Add", [f"nothing{stride}", "box"], [f"box{stride}"]),
            helper.make_node("Add", [f"nothing{stride}", "points"], [f"points{stride}"]),
        ]
        scores.append(helper.make_tensor_value_info(score, TensorProto.FLOAT, ["n", 1]))
        boxes.append(helper.make_tensor_value_info(f"box{stride}", TensorProto.FLOAT, ["n", 4]))
        landmarks.append(helper.make_tensor_value_info(f"points{stride}", TensorProto.FLOAT, ["n", 10]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "height", "width"])
    _save_onnx(folder / "detector.onnx", nodes, [image], scores + boxes + landmarks, constants)

    # packs of other names are other recognizers
    projection = np.random.default_rng(list(name.encode())).normal(size=(3 * 14 * 14, dim)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["face"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "projection"], ["projected" if needs_blue else "embedding"]),
    ]
    constants = [_constant("projection", projection)]
    if needs_blue:
        nodes += [
            helper.make_node("Gather", ["face", "third"], ["blue"], axis=1),
            helper.make_node("ReduceMax", ["blue"], ["most"], axes=[2, 3], keepdims=0),
            helper.make_node("Add", ["most", "one"], ["gain"]),
            helper.make_node("Mul", ["projected", "gain"], ["embedding"]),
        ]
        constants += [_constant("third", np.array([2], np.int64)), _constant("one", np.float32(1))]
    face = helper.make_tensor_value_info("face", TensorProto.FLOAT, [batch, 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, dim])
    _save_onnx(folder / "recognizer.onnx", nodes, [face], [embedding], constants)


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("insightface")
    write_toy_pack(root)
    return root


# layer -> channels out, channels in, side of the kernel
ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    """AlexNet's convolutions with random weights, under torchvision's names."""
    path, generator = tmp_path_factory.mktemp("alexnet") / "features.safetensors", torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (out, inner, size) in ALEXNET.items():
        weight = torch.randn(out, inner, size, size, generator=generator) * (2 / (inner * size * size)) ** 0.5
        tensors[f"features.{layer}.weight"] = weight
        tensors[f"features.{layer}.bias"] = torch.randn(out, generator=generator) * 0.1
    save_file(tensors, path)
    return path


def draw_person(color: tuple[int, int, int], discs=((80, 80, 44),), size=(160, 160)) -> PIL.Image.Image:
    """A red disc for a face, with a patch of the person's color below the center."""
    image = PIL.Image.new("RGB", size, (90, 90, 90))
    draw = PIL.ImageDraw.Draw(image)
    for x, y, radius in discs:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 0, 0))
        draw.rectangle((x - 6, y + 10, x + 6, y + 18), fill=color)
    return image


@pytest.fixture(scope="session")
def toy_photographs(tmp_path_factory) -> Path:
    """ROOT/IDENTITY/*.png of 4 people x 6 photographs."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for person in range(4):
        folder = root / f"person_{person}"
        folder.mkdir()
        color = tuple(int(value) for value in generator.integers(0, 255, 3))
        for index in range(6):
            x, y = (int(value) for value in generator.integers(70, 90, 2))
            draw_person(color, ((x, y, 44),)).save(folder / f"{index}.png")
    return root


def write_study_inputs(root: Path, photographs: Path) -> None:
    """What studies and evaluation take, all tiny: `packs` (toy, judge), a pipeline `model`, the `cache` of
    photographs, and that of `unseen` people, who do not include `someone_else`."""
    for name in ("toy", "judge"):
        write_toy_pack(root / "packs", name)
    UIFacePipeline(**tiny_components()).save_pretrained(root / "model")
    encoder = FaceEncoder("toy", str(root / "packs"), det_size=160)
    prepare_faces(photographs, root / "cache", encoder, image_size=112)
    # the first person is one of the training under another name
    for number, person in enumerate(("someone_else", "person_x", "person_y")):
        (root / "others" / person).mkdir(parents=True)
        for index in range(2):
            face = draw_person((10, 90 * number, 200 - 90 * number), ((80, 80, 44),))
            if not number:
                face = PIL.Image.open(photographs / "person_0" / f"{index}.png")
            face.save(root / "others" / person / f"{index}.png")
    prepare_faces(root / "others", root / "unseen", encoder, image_size=112)


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, without a window. It reaches no network: what a page asks for is recorded by `visit`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Visit:
    """A page in the browser; `problems` has its errors and what it asked for elsewhere."""

    def __init__(self, browser, address: str, width: int = 1280, height: int = 900):
        self.problems: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.route("**/*", self._only_here)
        self.page.goto(address)

    def _only_here(self, route) -> None:
        if route.request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:")):
            route.continue_()
        else:
            self.problems.append(f"asked for {route.request.url}")
            route.abort()
