"""The documents' blocks of commands and Python are run, in small and in a world of toys; their links lead somewhere.

A block that is not run says why in a comment before it: `<!-- not run: why -->`.
"""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import onnx
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import (
    FIXTURES,
    REPOSITORY,
    TINY_UNET,
    draw_person,
    run_script,
    stock_unet,
    tiny_components,
    write_toy_pack,
)
from diffusers import AutoencoderKL, DDIMScheduler
from onnx import numpy_helper
from original_weights import original_first_stage
from safetensors.torch import load_file
from toy_faces import write_benchmark

import uiface_cli
from uiface_diffusers import (
    IdentityBank,
    IdentityProjector,
    IResNetConfig,
    IResNetModel,
    UIFacePipeline,
    generate_dataset,
)
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.encoders import IDENTITY_ENCODER, EncoderMark
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.training.distillation import save_carried

PATTERNS = ("*.md", "docs/**/*.md")
DOCUMENTS = sorted(file.relative_to(REPOSITORY).as_posix() for each in PATTERNS for file in REPOSITORY.glob(each))
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.*?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    kind: str
    text: str
    why_not: str | None


def blocks(document: str) -> list[Block]:
    text = (REPOSITORY / document).read_text()
    return [Block(found["kind"], found["text"], found["why"]) for found in BLOCK.finditer(text)]


def commands(block: Block) -> list[str]:
    """The commands of a block of the shell: lines without comments, continued ones joined."""
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


# pages that begin with the sets `data` and `other_data`, and do not make them
HAVE_DATA = ("docs/how-to/judge.md", "docs/how-to/recognizer.md", "docs/how-to/formats.md", "docs/demo.md")
TINY_TRAINING = [
    "--train-batch-size",
    "2",
    "--validation-steps",
    "0",
    "--report-to",
    "none",
    "--mixed-precision",
    "no",
]
TINY_TRAINING += ["--dataloader-num-workers", "0"]
UNET = {name: value for name, value in TINY_UNET.items() if name not in ("in_channels", "out_channels", "sample_size")}
AUTOENCODER = {f"{side}_block_out_channels": [8, 8, 8, 8] for side in ("encoder", "decoder")}
AUTOENCODER |= {f"num_{side}_blocks": [1, 1, 1, 1] for side in ("encoder", "decoder")}
# what makes a command small; the last of an option that is given twice counts
SMALL = {
    "uiface prepare": ["--det-size", "160"],
    "uiface generate": ["--num-inference-steps", "2", "--images-per-identity", "2", "--max-identities", "2"],
    "uiface identities make": ["--number", "2", "--max-similarity", "1", "--det-size", "160"],
    "uiface evaluate": ["--det-size", "160", "--lpips-backbone", "alexnet.safetensors"],
    "uiface audit": ["--det-size", "160"],
    "uiface clean": ["--det-size", "160"],
    "uiface make-benchmark": ["--det-size", "160"],
    "uiface verify": ["--det-size", "160"],
    "uiface convert-original": ["--model-config", "reference.json", "--sample-size", "16"],
    "two_stages.py": ["--num-inference-steps", "5"],
    "train_autoencoder.py": [
        *("--autoencoder", json.dumps({"_class_name": "AutoencoderTiny", **AUTOENCODER})),
        *("--lpips-backbone", "alexnet.safetensors", "--encoder-root", ".insightface", "--max-train-steps", "1"),
        *("--lr-warmup-steps", "1", *TINY_TRAINING),
    ],
    "distill_encoder.py": [
        *("--recognizer", json.dumps({"layers": 18, "width": 4, "image_size": 32}), "--max-train-steps", "1"),
        *TINY_TRAINING,
    ],
    "train.py": ["--unet", json.dumps(UNET), "--max-train-steps", "1", *TINY_TRAINING],
    "train_face_recognition.py": [
        *("--recognizer", json.dumps({"layers": 18, "width": 4, "embedding_dim": 16}), "--epochs", "1"),
        *("--lr-milestones", "1", *TINY_TRAINING),
    ],
}


def write_models(root: Path) -> None:
    """Packs, a pipeline of one of them with a bank, a stock pipeline, and the published files, all tiny."""
    for name in ("buffalo_l", "antelopev2"):
        write_toy_pack(root / ".insightface", name)
    write_toy_pack(root / ".insightface", "edgeface", dim=512)
    for recognizer, detector, pack in (
        ("edgeface_xs", "scrfd_2.5g_bnkps", "edgeface"),
        ("elasticface", "det_10g", "buffalo_l"),
    ):
        folder = root / ".insightface" / "models" / pack
        shutil.copy(folder / "recognizer.onnx", root / f"{recognizer}.onnx")
        shutil.copy(folder / "detector.onnx", root / f"{detector}.onnx")
    # the same recognizer with a detector that finds a face in anything: a tiny pipeline makes none
    write_toy_pack(root / "eager", "buffalo_l")
    detector = root / "eager" / "models" / "buffalo_l" / "detector.onnx"
    model = onnx.load(detector)
    (offset,) = (each for each in model.graph.initializer if each.name == "offset")
    offset.CopyFrom(numpy_helper.from_array(np.float32(10), "offset"))
    onnx.save(model, detector)
    projector = IdentityProjector(16, TINY_UNET["cross_attention_dim"], identity_encoder="buffalo_l").eval()
    UIFacePipeline(**tiny_components() | {"identity_projector": projector}).save_pretrained(root / "org" / "model")
    copy = IResNetModel(IResNetConfig(18, width=4, embedding_dim=16, image_size=32))
    save_carried(copy, root / "org" / "model" / IDENTITY_ENCODER, EncoderMark("buffalo_l"), [])
    people = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    IdentityBank(torch.from_numpy(people), "buffalo_l").save(root / "bank.safetensors")

    stock, blocks_of = root / "org" / "stable-diffusion-like", {}
    blocks_of |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**blocks_of, block_out_channels=(8, 16), norm_num_groups=4)
    parts = {"unet": stock_unet(), "vae": vae, "scheduler": DDIMScheduler()}
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"}
    for name, module in parts.items():
        module.save_pretrained(stock / name)
        index[name] = ["diffusers", type(module).__name__]
    (stock / "model_index.json").write_text(json.dumps(index))

    state = {name: tensor.float() for name, tensor in load_file(FIXTURES / "reference_a.weights.safetensors").items()}
    torch.save({"state_dict": state}, root / "unet.pt")
    config = json.loads((FIXTURES / "reference_a.json").read_text())["model"]
    (root / "reference.json").write_text(json.dumps(config))
    first_stage = original_first_stage()
    encoder = {name: tensor for name, tensor in first_stage.items() if name.startswith(("encoder.", "quant_conv."))}
    torch.save(encoder, root / "encoder.pt")
    torch.save({name: tensor for name, tensor in first_stage.items() if name not in encoder}, root / "decoder.pt")
    width = load_file(FIXTURES / "reference_a.io.safetensors")["context"].shape[1]
    np.save(root / "identities.npy", np.random.default_rng(0).normal(size=(3, width)).astype(np.float32))


@pytest.fixture(scope="module")
def world(tmp_path_factory, toy_photographs, backbone) -> Path:
    """A home folder with what the documents speak of."""
    root = tmp_path_factory.mktemp("world")
    write_models(root)
    (root / "training").symlink_to(REPOSITORY / "training")
    (root / "docs" / "figures").mkdir(parents=True)
    shutil.copy(backbone, root / "alexnet.safetensors")
    shutil.copytree(toy_photographs, root / "photos")
    for name in ("photo.jpg", "face.png"):
        draw_person((10, 200, 90)).save(root / name, quality=95)
    encoder = FaceEncoder("buffalo_l", root / ".insightface", det_size=160)
    prepare_faces(root / "photos", root / "cache" / "photos", encoder, image_size=112)
    prepare_faces(root / "photos", root / "cache" / "others", encoder, image_size=112, identities=["person_3"])
    pipe = UIFacePipeline.from_pretrained(root / "org" / "model")
    bank = IdentityBank.load(root / "bank.safetensors")
    for seed, name in enumerate(("data", "other_data")):
        generate_dataset(pipe, bank, root / name, images_per_identity=3, seed=seed, num_inference_steps=2)
    for person in range(2):
        folder = root / "lfw" / "images" / f"person_{person}"
        folder.mkdir(parents=True)
        for number in range(6):
            source = root / "photos" / f"person_{person}" / f"{number}.png"
            shutil.copy(source, folder / f"person_{person}_{number + 1:04d}.png")
    fold = "".join(f"person_0\t{i}\t{i + 1}\n" for i in range(1, 6))
    fold += "".join(f"person_0\t{i}\tperson_1\t{i}\n" for i in range(1, 6))
    (root / "lfw" / "pairs.txt").write_text("2\t5\n" + fold * 2)
    (root / "bins").mkdir()
    write_benchmark(root / "bins" / "toy.bin")
    return root


@pytest.fixture
def here(world, tmp_path, monkeypatch, request) -> Iterator[Path]:
    """A copy of the world, as the home folder and the current one."""
    root = tmp_path / "home"
    shutil.copytree(world, root, symlinks=True)
    document = request.node.callspec.params["document"]
    if document not in HAVE_DATA:
        shutil.rmtree(root / "data")
    if document == "docs/encoders.md":
        shutil.rmtree(root / ".insightface" / "models" / "edgeface")
    monkeypatch.chdir(root)
    for name, value in {"HOME": root, "SLURM_ARRAY_TASK_ID": 0, "HF_HUB_OFFLINE": 1, "TQDM_DISABLE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
    # what a page sets for the process
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    yield root
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def without_launcher(words: list[str]) -> list[str]:
    """`accelerate launch --num_processes 8 -m uiface_diffusers.cli generate` -> `uiface generate`."""
    if words[0] == "srun":
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
        while words[0].startswith("-") and words[0] != "-m":
            words = words[1 if words[0] == "--multi_gpu" else 2 :]
        if words[:2] == ["-m", "uiface_diffusers.cli"]:
            words = ["uiface", *words[2:]]
    return words[1:] if words[0] == "python" else words


def run_command(line: str, monkeypatch) -> None:
    words = without_launcher([os.path.expandvars(word) for word in shlex.split(line, comments=True)])
    if words[0] == "export":
        for assignment in words[1:]:
            monkeypatch.setenv(*assignment.split("=", 1))
        return
    script = Path(words[0]).name
    name = script if script.endswith(".py") else " ".join(words[: 3 if words[1] == "identities" else 2])
    small = SMALL.get(name, [])
    if name == "uiface identities make" and "--from-images" not in words:
        small = [*small, "--num-inference-steps", "2", "--encoder-root", "eager"]
    words = [*words, *small]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    if words[0] == "uiface":
        uiface_cli.main(words[1:])
    elif words[0].startswith("training/"):
        monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
        outcome = run_script(importlib.import_module(script.removesuffix(".py")).main, words[1:])
        assert outcome.returncode == 0, outcome.stderr
    elif (REPOSITORY / words[0]).is_file():
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
    else:
        pytest.fail(f"{words[0]} is no command that is known here: add it, or say in the document why it is not run")


def run_python(text: str, namespace: dict) -> None:
    """With two steps per call of a pipeline, unless the lines say how many."""
    calls = re.compile(r"^(?!.*num_inference_steps)(.*?)\bpipe\(", re.MULTILINE)
    exec(compile(calls.sub(r"\1pipe(num_inference_steps=2, identity_embeds=", text), "snippet", "exec"), namespace)


def quantized_recognizer() -> torch.nn.Module:
    """In the place of a model that is downloaded."""
    layers = [torch.nn.AvgPool2d(28), torch.nn.Flatten(), torch.nn.Linear(48, 24), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(24, 16)).eval()
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if any(b.why_not is None for b in blocks(each)
                                                                       if b.kind in ("bash", "python"))])  # fmt: skip
def test_what_a_document_says_can_be_done(document, here, monkeypatch):
    namespace = {"model": quantized_recognizer()} if document == "docs/encoders.md" else {}
    for block in blocks(document):
        if block.why_not is not None or block.kind not in ("bash", "python"):
            continue
        written = io.StringIO()
        try:
            with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
                if block.kind == "python":
                    run_python(block.text, namespace)
                else:
                    for line in commands(block):
                        run_command(line, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{document}: {error}\n{block.text}\n{written.getvalue()[-2000:]}") from error
    if document == "docs/encoders.md":
        check_export(namespace["model"], here / "exported.onnx")


def check_export(model: torch.nn.Module, file: Path) -> None:
    """The exported recognizer has the embeddings of the quantized one, but for the rounding of its activations."""
    import onnxruntime

    faces = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {"input": faces.numpy()})
    assert exported.shape == (3, 16)
    assert torch.nn.functional.cosine_similarity(torch.from_numpy(exported), model(faces)).min() > 0.999


def test_every_block_is_run_or_says_why_not(record_property):
    run, skipped, calls = 0, 0, 0
    for document in DOCUMENTS:
        text = (REPOSITORY / document).read_text()
        reasons = sum(block.why_not is not None for block in blocks(document))
        assert len(re.findall("^<!-- not run: ", text, re.MULTILINE)) == reasons, document
        assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(blocks(document)), document
        for block in blocks(document):
            assert block.kind in ("bash", "python", "bibtex"), f"{document}: a block without a language"
            assert block.why_not is None or len(block.why_not) > 10
            if block.kind in ("bash", "python"):
                run, skipped = run + (block.why_not is None), skipped + (block.why_not is not None)
                calls += len(commands(block)) if block.kind == "bash" and block.why_not is None else 0
    assert run > 30 and skipped < run / 2
    record_property("blocks run", run)
    record_property("commands in them", calls)
    record_property("blocks not run, with a reason", skipped)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and mkdocs name them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {heading.strip().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(record_property):
    dead, checked = [], 0
    for document in DOCUMENTS:
        file = REPOSITORY / document
        for target in LINK.findall(re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S)):
            if target.startswith(("https://", "http://", "mailto:")):
                continue
            checked += 1
            path, _, anchor = target.partition("#")
            there = (file.parent / path).resolve() if path else file
            if not there.is_relative_to(REPOSITORY) or not there.exists():
                dead.append(f"{document}: {target}")
            elif anchor and anchor not in anchors(there.read_text()):
                dead.append(f"{document}: {target} has no such heading")
    assert not dead
    record_property("internal links", checked)
