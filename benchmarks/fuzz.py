#!/usr/bin/env python
"""Mutated inputs over all `uiface` commands and readers: no traceback, and nothing lost in silence.

python benchmarks/fuzz.py [--cases 300] [--seed 0] [--only 17] [--verbose]

A case copies small inputs, damages one of their files, exchanges two, or gives a wrong option, and runs a command or a
reader on them. It fails if there is a traceback, an error without a message of one paragraph, a message that shows a
library's innards, or where what was given of a set is neither taken nor named. Exit code 1 if a case fails.
"""

import argparse
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # the suite, which imports this, has its own
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import diffusers
import numpy as np
import pyarrow.parquet as pq
import torch
from conftest import ALEXNET, FIXTURES, draw_person, tiny_components, write_toy_pack
from insightface.utils.face_align import arcface_dst
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from written_files import POINTER

import uiface_cli
from uiface_diffusers import IdentityBank, UIFacePipeline, generate_dataset
from uiface_diffusers.data import FaceCache, convert_dataset, make_benchmark, prepare_faces, read_benchmark, read_pairs
from uiface_diffusers.data.labeled_faces import LabeledFaces, check_faces
from uiface_diffusers.data.recordio import RecordReader
from uiface_diffusers.data.sources import is_system_entry, open_source
from uiface_diffusers.evaluation import load_recognizer
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import printable
from uiface_diffusers.identities import import_identities
from uiface_diffusers.models.face_recognition import IResNetConfig, IResNetImageProcessor, IResNetModel

# what a library says to its programmer, not to a user
INNARDS = re.compile(
    r"Traceback|object has no attribute|NoneType|not subscriptable|not iterable|unhashable|index out of range"
    r"|mat1 and mat2|expected str, bytes|unexpected keyword|missing \d+ required|0x[0-9a-f]{6}|\.py[\":]"
    r"|invalid literal|could not convert|too many values|not enough values|must be real number|size of tensor"
    r"|nonzero is not|Sizes of tensors|zero-size|division by zero|list object|dict object"
)


def write_corpus(root: Path) -> None:
    """Everything that commands read, tiny and whole."""
    for person in range(3):
        (root / "photos" / f"person_{person}").mkdir(parents=True)
        (root / "faces" / f"person_{person}").mkdir(parents=True)
        for index in range(3):
            color = (10 * index, 90 * person, 200 - 80 * person)
            draw_person(color, ((78 + 2 * index, 80, 44),)).save(root / f"photos/person_{person}/{index}.png")
            face = draw_person(color, ((56 + index, 56, 40),), size=(112, 112))
            face.save(root / f"faces/person_{person}/{index}.jpg", quality=95)
    write_toy_pack(root / "packs")
    encoder = FaceEncoder("toy", str(root / "packs"), det_size=160)
    prepare_faces(root / "photos", root / "cache", encoder, image_size=112)
    for form in FORMS:
        convert_dataset(root / "faces", root / form, form)
    UIFacePipeline(**tiny_components()).save_pretrained(root / "model")
    generator = torch.Generator().manual_seed(0)
    bank = IdentityBank(torch.randn(4, 16, generator=generator), "toy", ["a", "b", "c", "d"], encoder.fingerprint)
    (root / "banks").mkdir()
    bank.save(root / "banks" / "bank.safetensors")
    np.save(root / "banks" / "bank.npy", bank.embeddings.numpy())
    np.savez(root / "banks" / "bank.npz", embeddings=bank.embeddings.numpy())
    torch.save(bank.embeddings, root / "banks" / "bank.pt")
    pipe = UIFacePipeline.from_pretrained(root / "model")
    for name, options in (("made", {}), ("made_shards", {"output_format": "webdataset"})):
        generate_dataset(pipe, bank, root / name, 2, num_inference_steps=1, **options)
    lines = [f"person_{a}/{i}.jpg person_{b}/{j}.jpg {int(a == b)}" for a in range(3) for b in range(3)
             for i, j in ((0, 1), (1, 2))]  # fmt: skip
    (root / "lists").mkdir()
    (root / "lists" / "pairs.txt").write_text("\n".join(lines) + "\n")
    rows = [line.replace(" ", ",") for line in lines]
    (root / "lists" / "pairs.csv").write_text("\n".join(["path1,path2,label", *rows]) + "\n")
    (root / "lists" / "names.txt").write_text("person_0\nperson_2\n")
    write_protocols(root)
    (root / "benchmarks").mkdir()
    make_benchmark(root / "lists" / "pairs.txt", root / "faces", root / "benchmarks" / "toy.bin", None)
    IResNetModel(IResNetConfig(layers=18, width=8, embedding_dim=16)).save_pretrained(root / "recognizer")
    IResNetImageProcessor().save_pretrained(root / "recognizer")
    (root / "lpips").mkdir()
    tensors = {}
    for layer, (out, inner, size) in ALEXNET.items():
        tensors[f"features.{layer}.weight"] = torch.randn(out, inner, size, size, generator=generator) * 0.05
        tensors[f"features.{layer}.bias"] = torch.zeros(out)
    save_file(tensors, root / "lpips" / "alexnet.safetensors")
    (root / "original").mkdir()
    torch.save(load_file(FIXTURES / "reference_a.weights.safetensors"), root / "original" / "unet.pt")
    config = json.loads((FIXTURES / "reference_a.json").read_text())["model"]
    (root / "original" / "config.json").write_text(json.dumps(config))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.VQModel(**blocks, block_out_channels=[32, 32], num_vq_embeddings=8)
    vae.save_pretrained(root / "original" / "vae")
    words = ["evaluate", "faces", *pack(), "--lpips-backbone", "lpips/alexnet.safetensors", "--output", "report"]
    here = os.getcwd()
    os.chdir(root)
    try:
        uiface_cli.main(words)
    finally:
        os.chdir(here)
    shutil.rmtree(root / "report" / "cache")


def write_protocols(root: Path) -> None:
    """Lists of a search, groups, a folder of templates, a recipe of the bench."""
    files = [(f"person_{person}", f"faces/person_{person}/{index}.jpg") for person in range(3) for index in range(3)]
    gallery, probes = files[:1] + files[3:4], files[1:3] + files[4:]
    (root / "gallery.csv").write_text("".join(f"{file},{name}\n" for name, file in gallery))
    (root / "probes.txt").write_text("".join(f"{file}\n" for _, file in probes))
    (root / "groups.csv").write_text("person_0,one\nperson_1,one\nperson_2,two\n")
    (root / "templates" / "meta").mkdir(parents=True)
    (root / "templates" / "loose_crop").mkdir()
    landmarks = " ".join(f"{x} {y}" for x, y in arcface_dst)
    media, points = "", ""
    for number, (_, file) in enumerate(files):
        shutil.copy(root / file, root / "templates" / "loose_crop" / f"{number}.jpg")
        media += f"{number}.jpg {number // 2} {number}\n"
        points += f"{number}.jpg {landmarks} 0.9\n"
    pairs = "".join(f"{a} {b} {int((a, b) == (0, 1))}\n" for a in range(4) for b in range(a + 1, 5))
    for name, lines in (("face_tid_mid", media), ("name_5pts_score", points), ("template_pair_label", pairs)):
        (root / "templates" / "meta" / f"toy_{name}.txt").write_text(lines)
    recipe = {"recognizer": {"layers": 18, "width": 4, "embedding_dim": 16}, "max-train-steps": 1}
    recipe |= {"train-batch-size": 4, "report-to": "none", "lr-scheduler": "constant", "validation-steps": 0}
    (root / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML, and is damaged as JSON is


def pack() -> list[str]:
    return ["--encoder", "toy", "--encoder-root", "packs", "--det-size", "160"]


# command -> what it reads, and how it is called; within the copied inputs
SAMPLE = ["--num-inference-steps", "1", "--device", "cpu", "--size", "8", "--images-per-identity", "1"]
FORMS = ("recordio", "webdataset", "parquet", "zip", *(() if importlib.util.find_spec("lmdb") is None else ("lmdb",)))
SETS = ("photos", "faces", "recordio", "webdataset", "cache", "made", "made_shards")
COMMANDS: list[tuple[str, list[str], list[str]]] = [
    *(("prepare", [name], ["prepare", name, "--output", "out", *pack()]) for name in ("photos", "cache")),
    *(
        ("prepare --aligned", [name], ["prepare", name, "--output", "out", *pack(), "--aligned"])
        for name in ("faces", "recordio", "webdataset", "made")
    ),
    ("prepare --identities", ["lists/names.txt", "faces"],
     ["prepare", "faces", "--output", "out", *pack(), "--aligned", "--identities", "lists/names.txt"]),
    *(("convert", [name], ["convert", name, "out", "--format", form])
      for name, form in zip(SETS, ("recordio", "webdataset", "imagefolder") * 3, strict=False)),
    ("generate", ["model", "banks/bank.safetensors"],
     ["generate", "model", "--identities", "banks/bank.safetensors", "--output", "out", *SAMPLE]),
    ("generate again", ["made"],
     ["generate", "model", "--identities", "banks/bank.safetensors", "--output", "made", "--num-inference-steps", "1",
      "--device", "cpu", "--images-per-identity", "2"]),
    ("identities make", ["model", "banks/bank.safetensors", "packs"],
     ["identities", "make", "model", "--number", "2", "--output", "out/new", "--max-similarity", "1", *pack(),
      "--exclude", "banks/bank.safetensors", "--num-inference-steps", "1", "--max-candidates", "4", "--device",
      "cpu"]),
    ("identities make --from-images", ["photos", "cache"],
     ["identities", "make", "--from-images", "photos", "--number", "2", "--output", "out/new", "--max-similarity", "1",
      "--exclude", "cache", *pack()]),
    ("identities make --random", ["banks/bank.safetensors"],
     ["identities", "make", "--random", "--exclude", "banks/bank.safetensors", "--number", "2", "--output", "out/new",
      "--max-similarity", "0.9"]),
    *(("identities import", [f"banks/bank.{end}"],
       ["identities", "import", f"banks/bank.{end}", "--encoder", "toy", "--output", "out/new"])
      for end in ("npy", "npz", "pt", "safetensors")),
    ("identities perturb", ["banks/bank.safetensors"],
     ["identities", "perturb", "banks/bank.safetensors", "--output", "out/new"]),
    ("identities inspect", ["banks/bank.safetensors", "cache"],
     ["identities", "inspect", "banks/bank.safetensors", "--against", "cache"]),
    ("audit", ["faces", "cache"], ["audit", "faces", "--against", "cache", "--plot", "out/audit.png", *pack()]),
    ("audit", ["made_shards", "cache"],
     ["audit", "made_shards", "--against", "cache", "--plot", "out/audit.png", *pack()]),
    *(("clean", [name], ["clean", name, "--list", "out/list.csv", "--output", "out/clean", *pack()])
      for name in ("faces", "recordio", "cache")),
    ("card", ["made"], ["card", "made"]),
    ("make-benchmark", ["lists/pairs.txt", "faces"],
     ["make-benchmark", "--pairs", "lists/pairs.txt", "--images", "faces", "--output", "out/x.bin", "--aligned"]),
    ("make-benchmark", ["lists/pairs.csv", "faces"],
     ["make-benchmark", "--pairs", "lists/pairs.csv", "--images", "faces", "--output", "out/x.bin", *pack()]),
    ("verify", ["benchmarks", "packs"],
     ["verify", "toy", "--encoder-root", "packs", "--benchmarks", "benchmarks", "--output", "out"]),
    ("verify", ["recognizer"], ["verify", "./recognizer", "--benchmarks", "benchmarks", "--device", "cpu"]),
    ("verify --pairs", ["lists/pairs.txt", "faces"],
     ["verify", "toy", "--pairs", "lists/pairs.txt", "--images", "faces", "--aligned", *pack()]),
    ("evaluate", ["faces", "lpips"],
     ["evaluate", "faces", *pack(), "--lpips-backbone", "lpips/alexnet.safetensors", "--output", "out"]),
    ("evaluate", ["recordio", "cache"],
     ["evaluate", "recordio", *pack(), "--lpips-backbone", "lpips/alexnet.safetensors", "--output", "out", "--real",
      "cache", "--features", "encoder", "--skip-unusable"]),
    ("evaluate", ["made", "banks/bank.safetensors"],
     ["evaluate", "made", *pack(), "--lpips-backbone", "lpips/alexnet.safetensors", "--output", "out"]),
    ("compare", ["report"], ["compare", "report", "report/report.json", "--output", "out"]),
    ("convert-original", ["original"],
     ["convert-original", "--unet", "original/unet.pt", "--model-config", "original/config.json", "--vq-model",
      "original/vae", "--output", "out"]),
    ("identify", ["photos", "faces"],
     ["identify", "toy", "--gallery", "photos", "--probes", "faces", "--output", "out", *pack()]),
    ("identify lists", ["gallery.csv", "probes.txt", "faces"],
     ["identify", "toy", "--gallery", "gallery.csv", "--probes", "probes.txt", "--aligned", *pack()]),
    ("verify --templates", ["templates"],
     ["verify", "toy", "--templates", "templates", "--output", "out", *pack()]),
    ("verify --groups", ["groups.csv", "lists/pairs.txt"],
     ["verify", "toy", "--pairs", "lists/pairs.txt", "--images", "faces", "--aligned", "--groups", "groups.csv",
      "--output", "out", *pack()]),
    ("verify --corruptions", ["benchmarks"],
     ["verify", "toy", "--encoder-root", "packs", "--benchmarks", "benchmarks", "--corruptions", "--output", "out"]),
    ("poses", ["cache", "groups.csv"], ["poses", "cache", "--groups", "groups.csv", "--output", "out.json"]),
    *(("browse", [name], ["browse", name, "--output", "out.html"]) for name in ("faces", "parquet", "made", "cache")),
    ("make-pack", ["packs"],
     ["make-pack", "--recognizer", "packs/models/toy/recognizer.onnx", "--detector", "packs/models/toy/detector.onnx",
      "--output", "out/models/new"]),
    ("bench", ["recipe.json", "faces", "benchmarks"],
     ["bench", "faces", "other=zip", "--recipe", "recipe.json", "--benchmarks", "benchmarks", "--seeds", "0",
      "--output", "out"]),
    ("card", ["made/README.md"], ["card", "made"]),
    *(("convert", [name], ["convert", name, "out", "--format", form])
      for name, form in zip(FORMS, ("zip", "parquet", "lmdb" if "lmdb" in FORMS else "zip", "recordio", "imagefolder"),
                            strict=False)),
    ("clean", ["zip", "parquet"], ["clean", "zip", "--list", "out/list.csv", "--output", "out/clean", *pack()]),
]  # fmt: skip
READERS: dict[str, tuple[list[str], Callable[[], object]]] = {
    "open_source": ([*SETS, *FORMS[2:]], None),
    "LabeledFaces": (["faces", "recordio", "cache", "made_shards", *FORMS[2:]], None),
    "FaceCache": (["cache"], lambda: FaceCache("cache").embeddings()),
    "RecordReader": (["recordio"], lambda: RecordReader("recordio/train.rec").image_keys()),
    "read_pairs": (["lists/pairs.txt"], lambda: read_pairs("lists/pairs.txt")),
    "read_benchmark": (["benchmarks"], lambda: read_benchmark("benchmarks/toy.bin")),
    "IdentityBank": (["banks/bank.safetensors"], lambda: IdentityBank.load("banks/bank.safetensors")),
    "import_identities": (["banks/bank.npy"], lambda: import_identities("banks/bank.npy", "toy")),
    "FaceEncoder": (["packs"], lambda: FaceEncoder("toy", "packs", det_size=160)),
    "load_recognizer": (["recognizer"], lambda: load_recognizer("./recognizer", device="cpu")),
}
WORDS = ["nan", "-1", "0", "1e999", "9" * 30, "", "none", "high", "3.5", "0,1", "ä", "../x", " ", "[]", "{", "a\nb"]
ODD_NAMES = [
    "a b", "a\nb", "ä" * 60, "#x", "x" * 200, "[a]", "a*b", "~a", "-x", "a:b", "a\\b", "x.", "..x", "日本", "a'b\"c",
    "%20", unicodedata.normalize("NFD", "José"), "nul", "007", "7", "CON", "a::b", "{a}", "$HOME", "&", "<b>",
]  # fmt: skip


class Mutation(NamedTuple):
    what: str
    path: str


# --- mutations: each changes a file, and says what it did; None where it does not apply ------------------------------


def cut(file: Path, rng) -> str:
    content = file.read_bytes()
    end = int(rng.integers(0, max(1, len(content))))
    file.write_bytes(content[:end])
    return f"cut after {end} of {len(content)} bytes"


def empty(file: Path, rng) -> str:
    file.write_bytes(b"")
    return "emptied"


def pointer(file: Path, rng) -> str:
    file.write_bytes(POINTER)
    return "a Git LFS pointer"


def scramble(file: Path, rng) -> str | None:
    content = bytearray(file.read_bytes())
    if not content:
        return None
    start = int(rng.integers(0, len(content)))
    end = min(len(content), start + int(rng.integers(1, 64)))
    content[start:end] = rng.bytes(end - start)
    file.write_bytes(content)
    return f"bytes {start} to {end} are random"


def append(file: Path, rng) -> str:
    with open(file, "ab") as stream:
        stream.write(file.read_bytes() if rng.random() < 0.5 else rng.bytes(50))
    return "something was appended"


def exchange(file: Path, rng) -> str | None:
    near = file.parents[-2] if len(file.parents) > 1 else Path(".")
    others = sorted(path for path in near.rglob("*") if path.is_file() and path.suffix != file.suffix)
    others = others or sorted(path for path in Path(".").rglob("*") if path.is_file() and path.suffix != file.suffix)
    other = others[rng.integers(len(others))]
    shutil.copy(other, file)
    return f"has the content of {other}"


def remove(file: Path, rng) -> str:
    file.unlink()
    return "removed"


def folder(file: Path, rng) -> str:
    file.unlink()
    file.mkdir()
    return "is a folder"


def dangling(file: Path, rng) -> str:
    file.unlink()
    file.symlink_to("nowhere")
    return "is a link to nothing"


def loop(file: Path, rng) -> str:
    file.unlink()
    file.symlink_to(file.name)
    return "is a link to itself"


def loop_of_folders(file: Path, rng) -> str:
    (file.parent / "loop").symlink_to("..")
    return "has a link to its parent's folder beside it"


def rename(file: Path, rng) -> str:
    name = ODD_NAMES[rng.integers(len(ODD_NAMES))] + (file.suffix if rng.random() < 0.7 else "")
    if not (file.parent / name).exists():
        file.rename(file.parent / name)
    return f"is called {name!r}"


def rename_folder(file: Path, rng) -> str | None:
    if file.parent == Path("."):
        return None
    name = ODD_NAMES[rng.integers(len(ODD_NAMES))]
    if not (file.parent.parent / name).exists() and len(file.parts) > 2:
        file.parent.rename(file.parent.parent / name)
    return f"its folder is called {name!r}"


def not_utf8(file: Path, rng) -> str:
    os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/\xfc\xe9" + os.fsencode(file.suffix))
    return "has a name that is not UTF-8"


def clutter(file: Path, rng) -> str:
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._x.png", "empty.png"):
        (file.parent / name).write_bytes(b"" if name == "empty.png" else b"clutter")
    return "has clutter beside it"


def text(file: Path, rng) -> str | None:
    """Of lists and JSON."""
    if file.suffix not in (".txt", ".csv", ".lst", ".idx", ".json"):
        return None
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    kind = rng.integers(11)
    place = int(rng.integers(len(lines)))
    if kind == 0:
        content = b"\xef\xbb\xbf" + content
    elif kind == 1:
        content = content.decode().encode("utf-16")
    elif kind == 2:
        content = content.replace(b"\n", b"\r\n") + b"\r\n\r\n"
    elif kind == 3:
        content = b"".join(lines[i] for i in rng.permutation(len(lines)))
    elif kind == 4:
        content = b"".join([*lines, lines[place]])
    elif kind == 5:
        content = b"".join([*lines[:place], b"Jos\xe9 \xff\n", *lines[place:]])
    elif kind == 6:
        content = re.sub(rb"\d+", lambda match: rng.choice([b"nan", b"1e999", b"-5", b"9" * 25, b""]), content)
    elif kind == 7:
        content = re.sub(rb"[\t, ]", rng.choice([b" ", b";", b"\t", b""]), content)
    elif kind == 8:
        content = content.replace(b"/", b"\\")
    elif kind == 9:
        content = b"".join(b" ".join(line.split()[:-1]) + b"\n" for line in lines)
    else:
        content = b"\n\n \t\n" + content + 3 * b"\n"
    file.write_bytes(content)
    return f"text mutation {kind}"


def structure(file: Path, rng) -> str | None:
    """Of JSON: one value has another type, or is not there."""
    if file.suffix != ".json":
        return None
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return None
    inner = content
    while True:
        if not isinstance(inner, dict | list) or not inner:
            return None
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = keys[rng.integers(len(keys))]
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.4:
            break
        inner = inner[key]
    kind = int(rng.integers(8))
    if kind == 0:
        del inner[key]
    else:
        inner[key] = [None, [], {}, -1, 1e300, "x", float("nan"), True][kind]
    file.write_text(json.dumps(content))
    return f"{key!r} is {'gone' if not kind else inner[key]!r}"


def tensors(file: Path, rng) -> str | None:
    """Of numbers: another type or shape, or values that cannot be."""
    if file.suffix not in (".npy", ".npz", ".pt", ".safetensors"):
        return None
    metadata = None
    if file.suffix == ".npy":
        arrays = {"": np.load(file)}
    elif file.suffix == ".npz":
        arrays = dict(np.load(file))
    elif file.suffix == ".pt":
        content = torch.load(file, weights_only=True)
        arrays = content if isinstance(content, dict) else {"": content}
    else:
        with safe_open(file, "pt") as opened:
            metadata, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    arrays = {name: torch.as_tensor(value) for name, value in arrays.items()}
    name = sorted(arrays)[rng.integers(len(arrays))]
    kinds: dict[str, Callable] = {
        "float64": lambda t: t.double(),
        "float16": lambda t: t.half(),
        "int64": lambda t: t.long(),
        "bool": lambda t: t > 0,
        "flat": lambda t: t.flatten(),
        "three axes": lambda t: t[None],
        "without rows": lambda t: t[:0],
        "one row": lambda t: t[:1],
        "half the columns": lambda t: t[..., : t.shape[-1] // 2],
        "NaN": lambda t: t.index_fill(0, torch.tensor([0]), float("nan")) if t.is_floating_point() else t,
        "infinite": lambda t: t.index_fill(0, torch.tensor([0]), float("inf")) if t.is_floating_point() else t,
        "zero": torch.zeros_like,
        "huge": lambda t: t * 1e30 if t.is_floating_point() else t,
        "scalar": lambda t: t.flatten()[0],
        "gone": lambda t: None,
        "twice": lambda t: torch.cat([t, t]),
    }
    kind = sorted(kinds)[rng.integers(len(kinds))]
    arrays[name] = kinds[kind](arrays[name]) if arrays[name].ndim and arrays[name].numel() else arrays[name]
    arrays = {key: value.contiguous() for key, value in arrays.items() if value is not None}
    if file.suffix == ".npy":
        np.save(file, arrays[""].numpy() if arrays else np.array([None, "x"]))
    elif file.suffix == ".npz":
        np.savez(file, **{key: value.numpy() for key, value in arrays.items()})
    elif file.suffix == ".pt":
        torch.save(arrays if "" not in arrays else arrays[""], file)
    else:
        save_file(arrays, file, metadata=metadata)
    return f"tensor {name!r} is {kind}"


ANY = (cut, cut, empty, pointer, scramble, scramble, append, exchange, remove, folder, dangling, loop, rename,
       rename_folder, not_utf8, clutter, loop_of_folders)  # fmt: skip
OF_KIND = (text, text, structure, structure, tensors, tensors)


def mutate(inputs: list[str], rng) -> Mutation:
    """Damages one file of the inputs."""
    while True:
        name = inputs[rng.integers(len(inputs))]
        files = (
            sorted(path for path in Path(name).rglob("*") if path.is_file()) if Path(name).is_dir() else [Path(name)]
        )
        file = files[rng.integers(len(files))]
        # half of the mutations know the file's form
        choices = OF_KIND if rng.random() < 0.5 else ANY
        what = choices[rng.integers(len(choices))](file, rng)
        if what is not None:
            return Mutation(what, str(file))


def wrong_option(words: list[str], rng) -> Mutation:
    """Exchanges a word of the command line."""
    places = [place for place, word in enumerate(words) if place and not word.startswith("--")]
    place = places[rng.integers(len(places))]
    kind = rng.integers(3)
    if kind == 0:
        words[place] = WORDS[rng.integers(len(WORDS))]
    elif kind == 1:
        folders = sorted(str(path) for path in Path(".").rglob("*"))
        words[place] = folders[rng.integers(len(folders))]
    else:
        order = rng.permutation(len(words) - 1) + 1
        words[1:] = [words[i] for i in order]
    return Mutation("other words", " ".join(words))


# --- checks ----------------------------------------------------------------------------------------------------------


def given_files(path: Path) -> Counter | None:
    """What lies in a set, counted without the package: files of a folder, members of tars, rows of parquet. None for
    what it does not count."""
    if not path.is_dir() or (path / "prepare.json").exists() or (path / "generation.json").exists():
        return None
    names = sorted(os.listdir(path))
    counted_otherwise = (".rec", ".parquet", ".lmdb", ".zip")
    if any(name.endswith(counted_otherwise) for _, _, files in os.walk(path) for name in files):
        return None
    found: Counter = Counter()
    shards = [path / name for name in names if name.endswith(".tar") and not is_system_entry(name)]
    shards = [shard for shard in shards if shard.is_file()]
    if shards:
        for shard in shards:
            with tarfile.open(shard, "r:") as tar:
                members = [member.name for member in tar if not member.isdir()]
            found.update(f"{shard.name}:{name}" for name in members if not name.endswith(".cls"))
        found.update(name for name in names if path / name not in shards and name != "README.md")
        return found
    for parent, folders, files in os.walk(path):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found.update(os.path.relpath(os.path.join(parent, name), path) for name in files + links)
    del found["README.md"]
    return Counter({printable(name): number for name, number in found.items()})


def check_source(path: str) -> None:
    """Whatever is given is either taken or named."""
    given = given_files(Path(path))
    source = open_source(path)
    taken = Counter(photograph.file for photograph in source.photographs)
    assert max(taken.values()) == 1, f"taken twice: {taken.most_common(1)}"
    if given is not None:
        named = Counter(source.left_out)
        lost = [name for name in given if name not in taken and name not in named]
        assert not lost, f"lost in silence: {lost[:5]} of {len(given)}, {len(taken)} taken, {dict(source.left_out)}"
        both = taken.keys() & named.keys()
        assert not both, f"taken and named: {sorted(both)[:5]}"
    for photograph in source.photographs:
        source.stamp(photograph)
        try:
            source.read(photograph)
        except OSError:
            pass


def check_labeled(path: str) -> None:
    faces = LabeledFaces([path])
    check_faces(faces)
    assert len(faces) == sum(len(source.photographs) for source in faces.sources)
    assert faces.fingerprint


def check_outcome(command: str, words: list[str], printed: str) -> None:
    """Of a command that ended well: what it read is in its report."""
    if command.startswith("prepare"):
        report = json.loads(Path("out/report.json").read_text())
        assert report["photographs"] == report["faces"] + len(report["skipped"]), report
        rows = sum(pq.read_metadata(shard).num_rows for shard in Path("out").glob("*.parquet"))
        assert rows == report["faces"], (rows, report["faces"])
        given = given_files(Path(words[1])) if len(words) > 1 else None
        if given is not None:
            left_out = sum(entry["count"] for entry in report["left_out"].values())
            total = report["photographs"] + left_out
            assert total >= len(given) or "tar" in str(report["left_out"]), (total, len(given), report)
    if command == "convert":
        pictures = int(re.search(r"(\d+) pictures of", printed)[1])
        taken = len(open_source(words[2]).photographs)
        assert pictures == taken, (pictures, taken)
        source = open_source(words[1])
        assert len(source.photographs) == taken + len(re.findall("unreadable|LFS|Pillow", printed)), printed
    if command.startswith("identities") and Path("out/new").exists():
        assert IdentityBank.load("out/new").embeddings.isfinite().all()


def run_command(words: list[str]) -> tuple[int, str, str]:
    """Exit code, what was printed, and the error's text."""
    printed, complaint = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(printed), redirect_stderr(complaint):
        try:
            uiface_cli.main(words)
        except SystemExit as end:
            code, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
            complaint.write(f"\n{message}" if message else "")
    # an error of argparse follows the usage; progress bars come before
    text = complaint.getvalue()
    error = text[text.rfind("uiface ") if "\nuiface " not in text else text.rindex("\nuiface ") :].strip()
    return code, printed.getvalue(), error


def fault(corpus: Path, case: int, seed: int) -> tuple[str, str, str | None]:
    """Runs a case; gives its command, mutation and outcome, and what is wrong, if anything is."""
    rng = np.random.default_rng([seed, case])
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "work"
        shutil.copytree(corpus, root, symlinks=True)
        os.chdir(root)
        try:
            # every command and reader in turn
            number = case % (len(COMMANDS) + len(READERS))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if number < len(COMMANDS):
                    return fault_of_command(*COMMANDS[number], rng)
                return fault_of_reader(list(READERS)[number - len(COMMANDS)], rng)
        finally:
            os.chdir(here)


def fault_of_command(command: str, inputs: list[str], words: list[str], rng) -> tuple[str, str, str | None]:
    words = list(words)
    mutation = wrong_option(words, rng) if rng.random() < 0.15 else mutate(inputs, rng)
    label = f"{command} | {mutation.path}: {mutation.what}"
    try:
        code, printed, error = run_command(words)
        if code == 0:
            if mutation.what != "other words":
                check_outcome(command, words, printed)
            return label, "done", None
        return label, error, complain(error)
    except Exception:
        return label, "", traceback.format_exc()


def fault_of_reader(name: str, rng) -> tuple[str, str, str | None]:
    inputs, read = READERS[name]
    chosen = inputs[rng.integers(len(inputs))]
    mutation = mutate([chosen], rng)
    label = f"{name} | {mutation.path}: {mutation.what}"
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            if name == "open_source":
                check_source(chosen)
            elif name == "LabeledFaces":
                check_labeled(chosen)
            else:
                read()
        return label, "done", None
    except (ValueError, OSError) as error:
        return label, str(error), complain(str(error))
    except Exception:
        return label, "", traceback.format_exc()


def complain(message: str) -> str | None:
    """What is wrong with an error's text."""
    if not message:
        return "an error without a message"
    body = message.split("error: ", 1)[-1]
    if "\n\n" in body or len(body) > 2500:
        return f"not one paragraph: {message}"
    if INNARDS.search(body.split(" damaged")[0]):  # behind it, what was found there may stand
        return f"innards of a library: {message}"
    return None


def run(cases: list[int], seed: int = 0, verbose: bool = False) -> list[str]:
    """Runs cases; returns those that fail, with the reason."""
    diffusers.utils.logging.set_verbosity_error()
    failures, outcomes = [], Counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        corpus = Path(folder) / "corpus"
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_corpus(corpus)
        for case in cases:
            started = time.monotonic()
            label, outcome, wrong = fault(corpus, case, seed)
            outcomes["failed" if wrong else "done" if outcome == "done" else "refused"] += 1
            if wrong:
                failures.append(f"case {case}: {label}\n    {wrong}")
            if verbose:
                print(f"{case:>4} {time.monotonic() - started:.1f} s {label}\n      {wrong or outcome}", flush=True)
    print(", ".join(f"{number} {name}" for name, number in sorted(outcomes.items())))
    return failures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="these cases, for example to repeat them")
    parser.add_argument("--verbose", action="store_true", help="a line for each case, with the error's text")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.monotonic()
    failures = run(args.only or list(range(args.cases)), args.seed, args.verbose)
    print("\n".join(failures))
    print(f"{len(failures)} failed, {time.monotonic() - started:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
