#!/usr/bin/env python
"""Prints what becomes of the situations that people of this field hit first: the right value, or the error's text.

python benchmarks/faults.py [--rows 1 2 pack ...]

Every row writes its own small inputs. Exit code 1 if a row fails.
"""

import argparse
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

if __name__ == "__main__":  # the suite, which imports this, has its own
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "training")]

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import yaml
from conftest import BETAS, TINY_UNET, draw_person, tiny_autoencoder, tiny_components, write_toy_pack
from conftest import run_script as run_in_process
from diffusers.callbacks import PipelineCallback
from test_faults_readers import POINTER, picture, write, write_records, write_tar

import uiface_cli
from uiface_diffusers import IdentityBank, IResNetImageProcessor, UIFacePipeline, generate_dataset
from uiface_diffusers.data import FaceCache, make_benchmark, prepare_faces, read_benchmark, read_pairs
from uiface_diffusers.data.labeled_faces import LabeledFaces
from uiface_diffusers.data.recordio import picture_range
from uiface_diffusers.data.sources import describe_left_out, open_source, summarize_left_out
from uiface_diffusers.evaluation import load_lpips
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import complete_file, read_lines
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.seeds import noise_generator, noise_seed
from uiface_diffusers.two_stage.schedulers import FLOW, SUPPORTED

NEEDS_GPU = "needs a GPU"
ROWS: list[tuple[str, str, Callable[[Path], str]]] = []


def row(number: str, situation: str) -> Callable:
    """Registers a check: it gets a folder and returns the right value, or raises."""

    def register(check: Callable[[Path], str]) -> Callable[[Path], str]:
        ROWS.append((number, situation, check))
        return check

    return register


def require(condition: object, found: object = "") -> None:
    if not condition:
        raise AssertionError(f"wrong: {found}")


def uiface(*argv: object) -> tuple[int, str]:
    """Exit code of a `uiface` command, and all that it printed."""
    written, code = io.StringIO(), 0
    with redirect_stdout(written), redirect_stderr(written):
        try:
            uiface_cli.main([str(word) for word in argv])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            written.write(end.code if isinstance(end.code, str) else "")
    return code or 0, written.getvalue()


def refused(what: Callable | tuple, message: str) -> str:
    """The text of the error, which has to match `message`; of a command, its last line."""
    if isinstance(what, tuple):
        code, text = uiface(*what)
        require(code, f"exit code 0: {text}")
        text = text.strip().splitlines()[-1]
    else:
        try:
            value = what()
        except (ValueError, OSError) as error:
            text = str(error)
        else:
            raise AssertionError(f"not refused but {value!r}")
    require(re.search(message, text, re.DOTALL) and "Traceback" not in text, text)
    return text


def people(source) -> str:
    counts: dict[str, int] = {}
    for photograph in source.photographs:
        counts[photograph.identity] = counts.get(photograph.identity, 0) + 1
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def left_out(source) -> str:
    return "; ".join(describe_left_out(summarize_left_out(source.left_out)))


def write_photographs(root: Path, persons: int = 2, number: int = 3) -> Path:
    for person in range(persons):
        (root / f"person_{person}").mkdir(parents=True)
        for index in range(number):
            face = draw_person((0, 60 * person, 200 - 40 * index), ((78 + 2 * index, 80, 44),))
            face.save(root / f"person_{person}" / f"{index}.png")
    return root


def toy(root: Path) -> FaceEncoder:
    if not (root / "models" / "toy").exists():
        write_toy_pack(root)
    return FaceEncoder("toy", str(root), det_size=160)


def pack(root: Path) -> list[object]:
    if not (root / "models" / "toy").exists():
        write_toy_pack(root)
    return ["--encoder", "toy", "--encoder-root", root, "--det-size", 160]


def tiny_pipeline(**options) -> UIFacePipeline:
    pipe = UIFacePipeline(**tiny_components() | options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(folder: Path, *options: object) -> tuple[int, str]:
    """A tiny training of the denoiser."""
    import train as train_script

    if not (folder / "cache").exists():
        prepare_faces(write_photographs(folder / "photos", 2, 4), folder / "cache", toy(folder / "root"), 16)
        tiny_autoencoder().save_pretrained(folder / "vae")
    unet = {k: v for k, v in TINY_UNET.items() if k not in ("in_channels", "out_channels", "sample_size")}
    recipe = {"train_data": str(folder / "cache"), "vae": str(folder / "vae"), "unet": unet, "train_batch_size": 2}
    recipe |= {"max_train_steps": 2, "validation_steps": 0, "report_to": "none", "checkpointing_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    words = ["--config", folder / "recipe.yaml", "--output_dir", folder / "run", *options]
    outcome = run_in_process(train_script.main, [str(word) for word in words])
    return outcome.returncode, outcome.stderr


# Wrong without a word


@row("1", "4 threads x 5 calls sharing a UNet, against the same calls alone")
def threads(folder: Path) -> str:
    pipe = tiny_pipeline()
    schedulers = [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.DDPMScheduler]
    schedulers.append(diffusers.UniPCMultistepScheduler)
    boundaries = ["adaptive", 700, None, 400]
    embeds = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))

    def call(thread: int, number: int) -> torch.Tensor:
        own = UIFacePipeline.from_pipe(pipe, scheduler=schedulers[thread](**BETAS))
        own.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(100 * thread + 2 * number + i) for i in range(2)]
        options = {"num_inference_steps": 8, "boundary": boundaries[thread], "boundary_threshold": 0.05}
        options |= {"generator": generator, "output_type": "latent", "latest_boundary": 300}
        return own(embeds[[5 * thread + number, (5 * thread + number + 7) % 20]], **options).images

    before = dict(pipe.unet.attn_processors)
    alone = [[call(thread, number) for number in range(5)] for thread in range(4)]
    together: list[list] = [[None] * 5 for _ in range(4)]
    start = threading.Barrier(4)

    def run(thread: int) -> None:
        start.wait()
        for number in range(5):
            together[thread][number] = call(thread, number)

    workers = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.setswitchinterval(interval)
    pairs = [(a, b) for ours, others in zip(together, alone, strict=True) for a, b in zip(ours, others, strict=True)]
    equal = sum(a is not None and torch.equal(a, b) for a, b in pairs)
    require(equal == 20 and pipe.unet.attn_processors == before, f"{equal} of 20 are bit-identical")
    return "20 of 20 calls are bit-identical; the UNet's processors are its own afterward"


@row("2", "DCFace's .rec: all labels 0, the identities in list.txt")
def list_beside_records(folder: Path) -> str:
    write_records(folder / "file.rec", [0] * 6)
    error = refused(lambda: open_source(folder), "all 6 pictures in .* have the label 0")
    (folder / "list.txt").write_text("".join(f"{key}\tperson_{key // 2}/{key}.jpg\n" for key in range(6)))
    found = people(open_source(folder))
    require(found == "person_0: 2, person_1: 2, person_2: 2", found)
    return f"{found}; without the list: {error}"


@row("3", ".idx with repeated keys")
def repeated_keys(folder: Path) -> str:
    path = write_records(folder / "train.rec", [0, 0, 1, 1], keys=[0, 0, 0, 0])
    return refused(lambda: open_source(path), "key 0 twice, at byte 0 and at byte")


@row("4", "glob characters in a path: run[2] beside run2")
def literal_paths(folder: Path) -> str:
    encoder, shown = toy(folder / "root"), []
    for number, name in enumerate(("run2", "run[2]")):
        photos = write_photographs(folder / f"{name}/photos", 2, 3 + number)
        prepare_faces(photos, folder / name / "cache", encoder, 16)
        # its faces tell the two apart
    for name, expected in (("run[2]", 8), ("run2", 6)):
        cache = FaceCache(folder / name / "cache")
        source = open_source(folder / name / "cache")
        faces = LabeledFaces([folder / name / "cache"], 16)
        read = [source.read(photograph) for photograph in source.photographs]
        require(len(cache) == len(read) == len(faces) == expected, (len(cache), len(read), len(faces)))
        shown.append(f"{name}: {len(read)} faces")
    write_toy_pack(folder / "root[1]")
    write_toy_pack(folder / "root1")
    require(str(FaceEncoder("toy", str(folder / "root[1]")).recognizer.model_file).startswith(str(folder / "root[1]")))
    return ", ".join(shown) + "; --encoder-root root[1] is itself"


@row("5", "EXIF rotation, transparency, 16-bit gray, CMYK, palette: FaceEncoder.embed and the image processor")
def pictures(folder: Path) -> str:
    encoder, image = toy(folder / "root"), draw_person((0, 255, 0), ((90, 70, 44),))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    gray = PIL.Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16)) * 257)
    clear = np.asarray(image.convert("RGBA")).copy()
    clear[(clear[..., :3] == 90).all(axis=2)] = (255, 0, 0, 0)
    white = np.asarray(image).copy()
    white[(white == 90).all(axis=2)] = 255
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(folder / "exif.png", exif=exif)
    PIL.Image.fromarray(clear).save(folder / "transparent.png")
    image.convert("CMYK").save(folder / "cmyk.tif")
    image.quantize(64).save(folder / "palette.png")
    gray.save(folder / "gray16.png")
    truths = {"exif.png": np.asarray(image), "transparent.png": white, "cmyk.tif": np.asarray(image)}
    truths |= {"palette.png": np.asarray(image), "gray16.png": np.asarray(image.convert("L").convert("RGB"))}
    shown, processor = [], IResNetImageProcessor()
    for name, truth in truths.items():
        with PIL.Image.open(folder / name) as opened:
            ours, theirs = encoder.embed_pictures([opened]), encoder.embed_pictures([truth])
            cosine = F.cosine_similarity(ours, theirs).item()
            pixels = [processor(each, return_tensors="pt").pixel_values for each in (opened, truth)]
        difference = (pixels[0] - pixels[1]).abs().max().item()
        require(cosine > 0.999 and difference < 0.05, (name, cosine, difference))
        shown.append(f"{name} {cosine:.4f}")
    return f"cosine to the true embedding: {', '.join(shown)}"


@row("6", "a pack of the right name with another recognizer's weights; exchanged in the middle of prepare")
def exchanged_pack(folder: Path) -> str:
    encoder = toy(folder / "one")
    write_toy_pack(folder / "two")
    write_toy_pack(folder / "two", "other")
    models = folder / "two" / "models"
    shutil.copy(models / "other" / "recognizer.onnx", models / "toy" / "recognizer.onnx")
    other = FaceEncoder("toy", str(folder / "two"), det_size=160)
    photos = write_photographs(folder / "photos")
    prepare_faces(photos, folder / "cache", encoder, 16)
    mixed = refused(lambda: prepare_faces(photos, folder / "cache", other, 16), "was begun with other settings")
    bank = IdentityBank(torch.eye(2, 16), "toy", ["a", "b"], encoder.fingerprint)
    call = lambda: generate_dataset(tiny_pipeline(), bank, folder / "data", encoder=other)  # noqa: E731
    return refused(call, f"{encoder.fingerprint}.*{other.fingerprint}.*one model pack for both") + " | " + mixed


@row("7", "hidden and system entries beside the identities")
def hidden(folder: Path) -> str:
    names = ["anna/a.png", "bert/a.png", ".ipynb_checkpoints/a-checkpoint.png", "anna/.hidden.png", "anna/Thumbs.db"]
    source = open_source(write(folder, dict.fromkeys([*names, ".DS_Store", "__MACOSX/._a.png"], picture())))
    require(people(source) == "anna: 1, bert: 1" and len(source.left_out) == 5, people(source))
    return f"{people(source)}; {left_out(source)}"


@row("8", "webdataset keys with dots; several images of one key")
def dotted_keys(folder: Path) -> str:
    members = {f"J.{who}._0001.{end}": data for who, number in (("R", b"0"), ("K", b"1"))
               for end, data in (("jpg", picture(1, "jpeg")), ("cls", number))}  # fmt: skip
    members |= {"x/1.left.png": picture(), "x/1.right.png": picture(), "x/1.cls": b"2"}
    source = open_source(write_tar(folder / "0.tar", list(members.items())))
    require(people(source) == "0: 1, 1: 1, 2: 2", people(source))
    return people(source)


@row("9", "other suffixes, pictures one folder deeper, what is no picture")
def suffixes(folder: Path) -> str:
    kinds = {"jfif": "jpeg", "tif": "tiff", "ppm": "ppm", "gif": "gif", "jpe": "jpeg", "avif": "avif", "bmp": "bmp"}
    files = {f"anna/{end}.{end}": picture(1, kind) for end, kind in kinds.items()}
    files |= {"anna/deeper/1.png": picture(), "anna/notes.txt": b"", "alone.png": picture()}
    source = open_source(write(folder, files))
    readable = sum(source.read(photograph).shape == (8, 8, 3) for photograph in source.photographs)
    require(readable == 8 and len(source.left_out) == 2, (readable, source.left_out))
    return f"{readable} read; left out {left_out(source)}"


@row("10", "UIFacePipeline(**pipe.components): the model's own guidance and boundary")
def own_defaults(folder: Path) -> str:
    pipe = tiny_pipeline(guidance_scale=3.0, latest_boundary=300)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        UIFacePipeline(**pipe.components)
    require(caught and "guidance_scale=3.0, latest_boundary=300" in str(caught[0].message), caught)
    again = UIFacePipeline.from_pipe(pipe).default_sampling()
    require((again["guidance_scale"], again["latest_boundary"]) == (3.0, 300), again)
    return f"warns: {caught[0].message}"


@row("11", "every scheduler class of diffusers")
def schedulers(folder: Path) -> str:
    pipe, right, wrong = tiny_pipeline(), [], []
    for name in sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")):
        if name in FLOW and name not in SUPPORTED:
            continue  # of a denoiser trained otherwise
        cls = getattr(diffusers.schedulers, name)
        pipe.scheduler = cls(**BETAS) if name in SUPPORTED else object.__new__(cls)
        call = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        if name in SUPPORTED:
            require(pipe(torch.ones(16), **call).images.isfinite().all(), name)
            right.append(name)
        else:
            error = refused(lambda: pipe(torch.ones(16), **call), f"`scheduler` is {name}: .*DDIMScheduler")  # noqa: B023
            wrong.append(name)
    named = ["IPNDMScheduler", "EDMEulerScheduler", "CMStochasticIterativeScheduler", "DDIMInverseScheduler"]
    require(set(named) <= set(wrong) and len(right) == len(SUPPORTED), wrong)
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_type="continuous")
    refused(lambda: pipe(torch.ones(16)), "timestep_type='continuous'")
    return f"{len(right)} sample, {len(wrong)} and continuous Euler are refused, as {error[:90]}..."


@row("12", "a denoiser whose attention is no softmax attention")
def no_softmax(folder: Path) -> str:
    sana = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    return refused(lambda: tiny_pipeline(unet=sana), "SanaLinearAttnProcessor2_0")


@row("13", "torch.compile(pipe.unet): the model's hash")
def compiled(folder: Path) -> str:
    pipe = tiny_pipeline()
    before = pipeline_fingerprint(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    require(pipeline_fingerprint(pipe) == before)
    return f"{before}, compiled or not"


@row("14", "noise of 200,000 images; seeds that differ above bit 32")
def noise(folder: Path) -> str:
    seeds = [noise_seed(0, f"{person:06d}", index) for person in range(4000) for index in range(50)]
    require(len(set(seeds)) == 200_000)
    same = torch.randn(8, generator=noise_generator(5)), torch.randn(8, generator=noise_generator(5 + 2**32))
    require(not torch.equal(*same))
    pipe = tiny_pipeline()
    bank = IdentityBank(torch.eye(2, 16), "toy")
    generate_dataset(pipe, bank, folder / "data", 1, num_inference_steps=1, size=8)
    version = json.loads((folder / "data" / "generation.json").read_text())["settings"]["noise"]
    return f"200000 distinct seeds of 63 bits, all of which count; generation.json: noise {version}"


@row("15", "resume of a training: another schedule, another cache with as many faces")
def resume(folder: Path) -> str:
    code, text = train(folder)
    require(not code, text)
    shown = []
    for options, message in (
        (("--lr_restart_steps", 7), "lr_restart_steps: 10000 then, 7 now"),
        (("--lr_restart_factor", 3), "lr_restart_factor: 2 then, 3 now"),
    ):
        code, text = train(folder, "--resume_from_checkpoint", "latest", *options)
        require(code and message in text, text)
        shown.append(message)
    photos = folder / "photos" / "person_0"
    draw_person((9, 9, 9)).save(photos / "3.png")
    prepare_faces(folder / "photos", folder / "other", toy(folder / "root"), 16)
    code, text = train(folder, "--resume_from_checkpoint", "latest", "--train_data", folder / "other")
    require(code and "train_data: " in text, text)
    return f"refused: {'; '.join(shown)}; train_data"


@row("16", "--providers cuda without CUDA")
def providers(folder: Path) -> str:
    photos = write_photographs(folder / "photos")
    words = ("prepare", photos, "--output", folder / "cache", *pack(folder), "--providers", "tensorrt")
    return refused(words, "execution provider `tensorrt`.*not available|cannot be used")


@row("17", "step_after_switch with generator=None on CUDA")
def switch_on_cuda(folder: Path) -> str:
    return NEEDS_GPU


# Tracebacks and words that mislead


@row("T1", "truncated, empty, LFS-pointer .onnx, .safetensors, .parquet")
def damaged(folder: Path) -> str:
    shown = []
    photos = write_photographs(folder / "photos")
    for content, reason in ((b"", "empty"), (POINTER, "git lfs pull"), (None, "damaged|cut short")):
        root = Path(tempfile.mkdtemp(dir=folder))
        encoder = toy(root)
        prepare_faces(photos, root / "cache", encoder, 16)
        UIFacePipeline(**tiny_components()).save_pretrained(root / "model")
        IdentityBank(torch.eye(2, 16), "toy").save(root / "bank.safetensors")
        model = root / "models" / "toy" / "recognizer.onnx"
        shard, weights = root / "cache" / "faces-00000.parquet", root / "model" / "unet"
        weights = weights / "diffusion_pytorch_model.safetensors"
        bank = root / "bank.safetensors"
        generate = ("generate", root / "model", "--identities", bank, "--output", root / "out")
        for file, words in (
            (model, ("prepare", photos, "--output", root / "new", *pack(root))),
            (shard, ("identities", "inspect", root / "cache")),
            (weights, generate),
            (bank, generate),
        ):
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2] if content is None else content)
            text = refused(words, f"{re.escape(file.name)}.*({reason})")
            shown.append(text.split(": ", 1)[1].replace(str(root), "")[:70])
            file.write_bytes(whole)
    return " | ".join(shown[:4])


@row("T2", "a broken file of the pack that is not needed")
def spare_file(folder: Path) -> str:
    write_toy_pack(folder)
    write(folder / "models" / "toy", {"aaa.onnx": POINTER})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FaceEncoder("toy", str(folder), det_size=160)
    return f"warns: {str(caught[0].message)[-90:]}"


@row("T3", "a pack unzipped one folder too deep")
def too_deep(folder: Path) -> str:
    write_toy_pack(folder)
    inner = folder / "models" / "toy"
    inner.rename(folder / "x")
    inner.mkdir()
    (folder / "x").rename(inner / "toy")
    return refused(lambda: FaceEncoder("toy", str(folder)), "one folder too deep")


@row("T4", "--det-size 300")
def det_size(folder: Path) -> str:
    return refused(("prepare", folder, "--output", folder / "x", "--det-size", 300), "multiple of 32")


@row("T5", "PipelineCallback of diffusers")
def callbacks(folder: Path) -> str:
    class Count(PipelineCallback):
        tensor_inputs = ["latents"]
        calls = 0

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            require(list(callback_kwargs) == ["latents"], callback_kwargs)
            Count.calls += 1
            return callback_kwargs

    tiny_pipeline()(torch.ones(16), num_inference_steps=3, callback_on_step_end=Count(), output_type="latent")
    require(Count.calls == 3)
    return "called 3 times with `latents`"


@row("T6", "FlowMatch schedulers")
def flow_match(folder: Path) -> str:
    pipe = tiny_pipeline()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return refused(lambda: pipe(torch.ones(16)), "FlowMatchEulerDiscreteScheduler")[:110]


@row("T7", "PixArtTransformer2DModel")
def pixart(folder: Path) -> str:
    unet = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=32, sample_size=8, caption_channels=8,
    )  # fmt: skip
    return refused(lambda: tiny_pipeline(unet=unet), "PixArtTransformer2DModel")


@row("T8", "--guidance-scale high, nan; --injection strong; --boundary-threshold x")
def sampling_options(folder: Path) -> str:
    words = (("guidance-scale", "high"), ("guidance-scale", "nan"), ("injection", "strong"))
    return " | ".join(
        refused(("generate", f"--{name}", value), f"argument --{name}: '{value}' is not").split("error: ")[1]
        for name, value in (*words, ("boundary-threshold", "x"))
    )


@row("T9", "guidance_scale=nan from Python")
def nan(folder: Path) -> str:
    return refused(lambda: tiny_pipeline()(torch.ones(16), guidance_scale=float("nan")), "finite number")


@row("T10", "file names that are not UTF-8")
def not_utf8(folder: Path) -> str:
    os.mkdir(os.fsencode(folder) + b"/Jos\xe9")
    with open(os.fsencode(folder) + b"/Jos\xe9/\xfc.png", "wb") as file:
        file.write(picture())
    source = open_source(write(folder, {"anna/a.png": picture()}))
    require([source.read(photograph).shape for photograph in source.photographs] == 2 * [(8, 8, 3)])
    return people(source)


@row("T11", "the same name in two Unicode normal forms")
def normal_forms(folder: Path) -> str:
    name = unicodedata.normalize("NFD", "José")
    write(folder / "set", {f"{name}/a.png": picture(), "anna/a.png": picture()})
    source = open_source(folder / "set", identities=[unicodedata.normalize("NFC", name)])
    require(len(source.photographs) == 1)
    return f"{people(source)} of 2 people by the other form"


@row("T12", "a byte-order mark or another encoding in lists")
def encodings(folder: Path) -> str:
    for encoding in ("utf-8-sig", "utf-16"):
        (folder / encoding).write_bytes("José\r\nanna\n".encode(encoding))
        require(read_lines(folder / encoding) == ["José", "anna"])
        (folder / encoding).write_bytes("a.jpg b.jpg 1\na.jpg c.jpg 0\n".encode(encoding))
        require(len(read_pairs(folder / encoding)) == 2)
    (folder / "latin").write_bytes("anna\nJosé\n".encode("latin-1"))
    return refused(lambda: read_lines(folder / "latin"), "line 2, is not UTF-8")


@row("T13", "LPIPS backbone not found offline, or a .pth")
def backbones(folder: Path) -> str:
    torch.save({"features.0.weight": torch.ones(2)}, folder / "alexnet.pth")
    error = refused(lambda: load_lpips("alex", folder / "alexnet.pth"), "torch.save|safetensors")
    home = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(folder / "nothing")
    original = torch.hub.download_url_to_file

    def offline(*_, **__):
        raise OSError("no network")

    torch.hub.download_url_to_file = offline
    try:
        missing = refused(lambda: load_lpips("alex"), "lpips.backbone")
    finally:
        torch.hub.download_url_to_file = original
        os.environ.pop("TORCH_HOME") if home is None else os.environ.update(TORCH_HOME=home)
    return f"{error} | {missing}"


@row("T14", "`~` in YAML and options")
def home(folder: Path) -> str:
    before = os.environ["HOME"]
    os.environ["HOME"] = str(folder)
    try:
        IdentityBank(torch.eye(3, 16), "toy").save("~/bank.safetensors")
        code, text = uiface("identities", "perturb", "~/bank.safetensors", "--output=~/turned.safetensors")
        require(not code and (folder / "turned.safetensors").exists(), text)
    finally:
        os.environ["HOME"] = before
    return text.strip().replace(str(folder), "HOME")


@row("T15", "one gray picture in a training set")
def gray(folder: Path) -> str:
    files = {f"{person}/{index}.png": picture(40 * index, size=32) for person in "ab" for index in range(3)}
    write(folder, files)
    PIL.Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(folder / "a" / "0.png")
    face = LabeledFaces([folder], 32).face(0)
    require(face.shape == (32, 32, 3) and (face[..., 0] == face[..., 2]).all())
    return "32x32x3, as three equal channels"


@row("T16", "np.int64 steps")
def numpy_numbers(folder: Path) -> str:
    pipe, latents = tiny_pipeline(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [pipe(torch.ones(16), num_inference_steps=kind(3), latents=latents, output_type="latent").images
              for kind in (int, np.int64)]  # fmt: skip
    require(torch.equal(*images))
    return "as int"


@row("T17", "names over 255 bytes")
def long_names(folder: Path) -> str:
    with complete_file(folder / ("ä" * 127)) as beside:
        beside.write_text("whole")
    bank = IdentityBank(torch.eye(2, 16), "toy", ["a" * 300, "b"])
    error = refused(lambda: generate_dataset(tiny_pipeline(), bank, folder / "out"), "255 bytes")
    return f"254 bytes written; 300: {error}"


@row("T18", "a picture over Pillow's limit")
def over_limit(folder: Path) -> str:
    content = bytearray(picture(1, "bmp"))
    content[18:26] = b"\xff\xff\x0f\x00\xff\xff\x0f\x00"
    write_photographs(folder / "photos")
    write(folder / "photos", {"person_0/bomb.bmp": bytes(content)})
    report = prepare_faces(folder / "photos", folder / "cache", toy(folder), 16)
    require(report["faces"] == 6 and len(report["skipped"]) == 1, report)
    return f"{report['faces']} faces; skipped {report['skipped']}"


@row("T19", ".idx of more than 2^24 records")
def many_records(folder: Path) -> str:
    pictures = 2**24 + 6
    found = picture_range(range(pictures + 4), float(np.float32(pictures + 1)), lambda key: key <= pictures)
    require(found == (pictures, pictures), found)
    return f"{found[0]} pictures, though float32 says {int(np.float32(pictures + 1)) - 1}"


@row("T20", "undeclared direct dependencies")
def declared(folder: Path) -> str:
    from test_faults_cli import test_what_is_imported_is_declared

    test_what_is_imported_is_declared()
    return "what is imported is declared, and nothing else"


@row("T21", "diffusers' private functions in use")
def private(folder: Path) -> str:
    import test_faults_pipeline

    (mark,) = [mark for mark in test_faults_pipeline.test_private_names_in_use_are_there.pytestmark if mark.args]
    for owner, names in mark.args[1]:
        test_faults_pipeline.test_private_names_in_use_are_there(owner, names)
    return f"{sum(len(names) for _, names in mark.args[1])} are there"


# Missing and expected


@row("M1", ".rec without .idx")
def no_index(folder: Path) -> str:
    path = write_records(folder / "train.rec", [0, 0, 1, 1])
    path.with_suffix(".idx").unlink()
    found = people(open_source(path))
    require(found == "0000000: 2, 0000001: 2", found)
    return found


@row("M2", "uiface convert: imagefolder, RecordIO, webdataset into each other")
def convert(folder: Path) -> str:
    write_photographs(folder / "imagefolder", 3, 2)
    before = folder / "imagefolder"
    for number, form in enumerate(("recordio", "webdataset", "imagefolder", "webdataset", "recordio")):
        after = folder / f"{number}-{form}"
        code, text = uiface("convert", before, after, "--format", form)
        require(not code and "6 pictures of 3 identities" in text, text)
        before = after
    source, first = open_source(before), open_source(folder / "imagefolder")
    contents = [sorted(each.content(photograph) for photograph in each.photographs) for each in (source, first)]
    require(contents[0] == contents[1] and people(source) == people(first), people(source))
    return f"{people(source)}, byte for byte after five conversions"


@row("M3", "published weights + published identities -> data set")
def published(folder: Path) -> str:
    UIFacePipeline(**tiny_components()).save_pretrained(folder / "model")
    embeddings, shown = 5 * np.eye(3, 16), []
    np.save(folder / "a.npy", embeddings)
    np.savez(folder / "a.npz", embeddings=embeddings)
    torch.save(torch.from_numpy(embeddings), folder / "a.pt")
    for end in ("npy", "npz", "pt"):
        words = ("identities", "import", folder / f"a.{end}", "--encoder", "toy", "--output", folder / f"{end}.bank")
        code, text = uiface(*words)
        require(not code and "3 identities of `toy`, 16-d" in text, text)
        shown.append(IdentityBank.load(folder / f"{end}.bank").embeddings)
    require(all(torch.equal(shown[0], each) for each in shown[1:]))
    words = ("--identities", folder / "npy.bank", "--device", "cpu", "--num-inference-steps", 1, "--size", 8)
    code, text = uiface("generate", folder / "model", *words, "--images-per-identity", 2, "--output", folder / "out")
    images = len(list((folder / "out" / "images").glob("*/*.png")))
    require(not code and images == 6, text)
    return f"3 identities of .npy, .npz and .pt alike; {images} images"


@row("M4", "pair lists in other forms; fewer than ten pairs")
def pair_lists(folder: Path) -> str:
    forms = {
        "path path 0/1": "a.png b.png 1\na.png c.png 0\n",
        "CSV": "path1,path2,label\na.png,b.png,1\na.png,c.png,0\n",
        "folds": "img1,img2,is_same,fold\na.png,b.png,1,1\na.png,c.png,0,2\n",
    }
    write(folder / "images", {f"{name}.png": picture(number, size=112) for number, name in enumerate("abc")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, text in forms.items():
            (folder / "pairs.txt").write_text(text)
            pairs = read_pairs(folder / "pairs.txt")
            require(pairs == [("a.png", "b.png", True), ("a.png", "c.png", False)], (name, pairs))
            make_benchmark(folder / "pairs.txt", folder / "images", folder / "x.bin", None)
            require(read_benchmark(folder / "x.bin").same.tolist() == [True, False])
    words = ("verify", "toy", "--pairs", folder / "pairs.txt", "--images", folder / "images")
    return f"{', '.join(forms)}; {refused(words, '10 pairs are needed')}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="only these, by their numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    failed, started = [], time.monotonic()
    for number, situation, check in ROWS:
        if args.rows and number not in args.rows:
            continue
        written = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(written), redirect_stdout(written):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    value, outcome = check(Path(folder)).replace(folder, "..."), "ok"
                except Exception:
                    value, outcome = traceback.format_exc().replace(folder, "..."), "FAILED"
                    failed.append(number)
        outcome = NEEDS_GPU if value == NEEDS_GPU else outcome
        value = " ".join(value.split()) if outcome == "ok" else value
        print(f"{number:>4}  {situation}\n      {value}\n      {outcome}", flush=True)
    print(f"{len(failed)} failed{': ' + ', '.join(failed) if failed else ''}, {time.monotonic() - started:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
