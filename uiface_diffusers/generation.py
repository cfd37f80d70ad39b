"""A data set from a pipeline and a bank of identities: plan, run, resume.

A run belongs to a folder:

    generation.json    every setting, the model's hash, versions
    images/            one folder per identity; for `webdataset`, tar shards instead
    metadata.parquet   one row per image, when all are made; until then the rows are in `journal/`
    identities.safetensors, preview.png, README.md

Image n of an identity depends on the weights, the settings, the identity's embedding and name, n and the seed, and on
nothing else: not on the batch, the number of processes or an interruption.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers.utils import make_image_grid
from filelock import FileLock, Timeout
from huggingface_hub import create_repo, upload_folder
from tqdm import tqdm

from .data.image_folder import (
    GENERATION,
    IMAGE_FORMATS,
    IMAGES_A_SHARD,
    JOURNAL,
    METADATA,
    ImageRow,
    Journal,
    encode_image,
    image_name,
    is_complete_image,
    pack_shard,
    read_rows,
    shard_name,
    write_metadata,
)
from .encoders import check_same_encoder
from .faces import FaceEncoder
from .files import MAX_NAME, check_settings, complete_file, local_path, plain_numbers, read_settings
from .fingerprint import pipeline_fingerprint
from .hub import IDENTITIES
from .identities import IdentityBank, perturb_embeddings
from .latents import decode_latents
from .pipeline_uiface import UIFacePipeline
from .seeds import NOISE_VERSION, PERTURBATION, image_generator, noise_seed

OUTPUT_FORMATS = ("imagefolder", "webdataset")
SIZE_CATEGORIES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (float("inf"), "10M<n<100M"),
)
# of the preview
GRID_ROWS, GRID_COLUMNS = 8, 8
# batches that wait to be decoded and written, at most
WAITING = 2
# threads that encode pictures beside a GPU, at most: one makes about 300 PNG files per second
MAX_ENCODERS = 8


def default_batch_size(pipeline: UIFacePipeline) -> int:
    """Images per call of the pipeline where none are given.

    16 on a CPU, whose cores are busy by then. A GPU takes about as long for a step of a few rows as for one of
    hundreds: 256 there for latents of 32x32, in proportion to the area for others, from 16 to 1024.
    """
    side = pipeline.unet.config.sample_size
    if pipeline.unet.device.type == "cpu" or side is None:  # the pipeline's call refuses the latter
        return 16
    height, width = (side, side) if isinstance(side, int) else side
    return min(max(16, 256 * 32 * 32 // (height * width)), 1024)


@dataclass(frozen=True)
class GenerationReport:
    """
    Args:
        made (`int`): images of this run and process, repeated attempts not counted.
        planned (`int`): images of the whole data set.
        complete (`bool`): all of them are there, metadata and preview are written.
        images_per_second (`float`): of this run and process.
        unet_rows_per_image (`float`): UNet samples that an image took, on average.
    """

    made: int
    planned: int
    complete: bool
    images_per_second: float
    unet_rows_per_image: float


@dataclass(frozen=True)
class Attempt:
    """One image to be made: identity's position in the bank, number, and how often it has been tried before."""

    identity: int
    index: int
    number: int = 0


def generate_dataset(
    pipeline: UIFacePipeline,
    identities: IdentityBank,
    output: str | os.PathLike,
    images_per_identity: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    size: int = 112,
    image_format: str = "png",
    output_format: str = "imagefolder",
    shard: tuple[int, int] = (0, 1),
    identity_perturbation: tuple[float, float] | None = None,
    min_similarity: float | None = None,
    encoder: FaceEncoder | None = None,
    max_attempts: int = 3,
    push_to_hub: str | None = None,
    **sampling: Any,
) -> GenerationReport:
    """Generates `images_per_identity` faces of every identity of a bank. The same call goes on where an earlier one
    was stopped. Under `accelerate launch`, the processes share the work.

    Args:
        pipeline: samples; its own progress bar is switched off.
        identities: of the faces; their names become folders.
        output: the data set's folder.
        images_per_identity (`int`, defaults to 50).
        seed (`int`, defaults to 0).
        batch_size (`int`, *optional*): images per call of the pipeline, filled across identities; by default
            `default_batch_size(pipeline)`.
        size (`int`, defaults to 112): height and width of the images (bilinear, with antialiasing).
        image_format (`str`, defaults to `"png"`): `"png"`, `"jpeg"` or `"webp"`, the last two with quality 95.
        output_format (`str`, defaults to `"imagefolder"`): `images/IDENTITY/NNNN.png`, or `"webdataset"` tar shards.
        shard (`tuple[int, int]`, defaults to `(0, 1)`): part i of n, for jobs that do not know each other.
        identity_perturbation (`tuple[float, float]`, *optional*): every image follows its own embedding, with a cosine
            drawn from this range to the identity's; see `perturb_embeddings`.
        min_similarity (`float`, *optional*): an image whose embedding has a smaller cosine to the identity's is made
            anew from the next sub-seed; the best of all attempts is kept.
        encoder: measures the similarity, also without `min_similarity`; the encoder of the bank.
        max_attempts (`int`, defaults to 3): attempts at an image, if `min_similarity` is given.
        push_to_hub (`str`, *optional*): `"org/name"` of a data set on the Hub to upload to when complete.
        sampling: further arguments of the pipeline's call, as `guidance_scale`.

    Raises:
        ValueError: an argument is out of range, or `output` was begun with other settings.
        RuntimeError: another process is at work on the same part of `output`.
    """
    sampling = {name: plain_numbers(value) for name, value in sampling.items()}
    batch_size = default_batch_size(pipeline) if batch_size is None else batch_size
    _check_arguments(pipeline, identities, locals())
    images_per_identity, seed, size, max_attempts = map(int, (images_per_identity, seed, size, max_attempts))
    batch_size, shard = int(batch_size), (int(shard[0]), int(shard[1]))
    state = PartialState()
    part = (shard[0] * state.num_processes + state.process_index, shard[1] * state.num_processes)
    output = local_path(output)
    settings = {
        "model": pipeline_fingerprint(pipeline),
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.unet.dtype),
        "noise": NOISE_VERSION,
        "identities": bank_hash(identities),
        "number_of_identities": len(identities),
        "identity_encoder": identities.identity_encoder,
        "identity_encoder_fingerprint": identities.identity_encoder_fingerprint,
        "images_per_identity": images_per_identity,
        "seed": seed,
        "size": size,
        "image_format": image_format,
        "output_format": output_format,
        "identity_perturbation": None if identity_perturbation is None else [float(c) for c in identity_perturbation],
        "min_similarity": None if min_similarity is None else float(min_similarity),
        "encoder": None if encoder is None else encoder.name,
        "encoder_fingerprint": None if encoder is None else encoder.fingerprint,
        "max_attempts": max_attempts if min_similarity is not None else 1,
        "sampling": _sampling(pipeline, sampling),
    }
    if (output / "prepare.json").exists():
        raise ValueError(f"{output} is a cache of faces, not a data set of generated ones: choose another folder.")
    run = _Run(pipeline, identities, output, settings, encoder, batch_size)
    with _locked(output, part):
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"diffusers": diffusers.__version__, "uiface_diffusers": version("uiface-diffusers")}
        run.check_noise(part)
        prints = ("identity_encoder_fingerprint", "encoder_fingerprint")
        check_settings(output / GENERATION, settings, if_known=prints, versions=versions)
        made, seconds = run.make(part)
    # the last one to come here completes the data set
    complete, wrote = run.finish()
    if push_to_hub is not None and (wrote or (complete and part[0] == 0)):
        upload_dataset(output, push_to_hub)
    return GenerationReport(
        made=made,
        planned=len(run.plan),
        complete=complete,
        images_per_second=made / seconds if made else 0.0,
        unet_rows_per_image=run.unet_rows / made if made else 0.0,
    )


def _sampling(pipeline: UIFacePipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline's call will take, with the values of its configuration."""
    sampling = pipeline.sampling_defaults() | given
    defaults = pipeline.default_sampling(sampling["num_inference_steps"])
    return sampling | {name: value for name, value in defaults.items() if sampling[name] is None}


def _check_arguments(pipeline: UIFacePipeline, identities: IdentityBank, arguments: Mapping[str, Any]) -> None:
    if not len(identities):
        raise ValueError("the bank of identities is empty.")
    bad = [name for name in identities.names if not name or Path(name).name != name or ":" in name or name[0] == "."]
    if bad:
        raise ValueError(f"the identity's name {bad[0]!r} cannot be a folder's.")
    long = next((name for name in identities.names if len(os.fsencode(name)) > MAX_NAME), None)
    if long is not None:
        raise ValueError(f"the identity's name {long[:40]!r}... is longer than {MAX_NAME} bytes, a folder's limit.")
    if len(set(identities.names)) < len(identities):
        raise ValueError("two identities of the bank have one name: their images would fall together.")
    for name in ("images_per_identity", "batch_size", "size", "max_attempts"):
        value = arguments[name]
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` has to be positive, an integer, but is {value!r}.")
    if not isinstance(arguments["seed"], Integral) or isinstance(arguments["seed"], bool):
        raise ValueError(f"`seed` has to be an integer but is {arguments['seed']!r}.")
    for name, values in (("image_format", tuple(IMAGE_FORMATS)), ("output_format", OUTPUT_FORMATS)):
        if arguments[name] not in values:
            raise ValueError(f"`{name}` has to be one of {values} but is {arguments[name]!r}.")
    position, number = arguments["shard"]
    if not 0 <= position < number:
        raise ValueError(f"`shard` is (i, n) with 0 <= i < n, not ({position}, {number}).")
    encoder = arguments["encoder"]
    if encoder is not None:
        check_same_encoder("the bank", identities.encoder_mark, "the pack that measures", encoder.encoder_mark)
    similarity = arguments["min_similarity"]
    if similarity is not None and not (isinstance(similarity, Real) and -1 <= similarity <= 1):
        raise ValueError(f"`min_similarity` has to be a cosine, from -1 to 1, but is {similarity!r}.")
    if similarity is not None and encoder is None:
        raise ValueError("`min_similarity` needs an `encoder` to measure by.")
    if any(hasattr(module, "_hf_hook") for module in pipeline.components.values()):
        raise ValueError("the pipeline is offloaded; images are decoded beside sampling: put it on one device.")
    # wrong embeddings and settings are named before anything is loaded or written
    pipeline.check_sampling(pipeline.prepare_identity_embeds(identities), **arguments["sampling"])
    if arguments["identity_perturbation"] is not None:
        perturb_embeddings(identities.embeddings[:1], arguments["identity_perturbation"], [torch.Generator()])


class _Run:
    """A data set in the making: what is planned, made and written."""

    def __init__(self, pipeline, identities, output, settings, encoder, batch_size):
        self.pipeline, self.identities, self.output, self.settings = pipeline, identities, output, settings
        self.encoder, self.batch_size = encoder, batch_size
        self.images = output / "images"
        self.plan = [(i, n) for i in range(len(identities)) for n in range(settings["images_per_identity"])]
        self.unet_rows = 0
        self.stream: torch.cuda.Stream | None = None
        self.rows: dict[tuple[str, int], ImageRow] = {}
        # of images that were not similar enough yet: the best attempt
        self.best: dict[tuple[int, int], tuple[PIL.Image.Image, ImageRow]] = {}

    def key(self, number: tuple[int, int]) -> tuple[str, int]:
        return self.identities.names[number[0]], number[1]

    def name(self, number: tuple[int, int]) -> str:
        return image_name(*self.key(number), self.settings["image_format"])

    def shard(self, number: tuple[int, int]) -> Path:
        """The tar shard of an image, for webdataset: one a thousand planned images."""
        position = number[0] * self.settings["images_per_identity"] + number[1]
        return self.output / "shards" / shard_name(position // IMAGES_A_SHARD)

    def check_noise(self, part: tuple[int, int]) -> None:
        """Refuses to draw in a folder that was begun with another version of the noise. Where nothing of the part is
        missing, nothing is drawn, and the folder keeps its version."""
        file = self.output / GENERATION
        begun = read_settings(file).get("noise", 1) if file.exists() else NOISE_VERSION
        if begun == NOISE_VERSION:
            return
        units, done = self._units(part)
        if len(done) < sum(map(len, units)):
            raise ValueError(
                f"{self.output} was begun with noise of version {begun}, this uiface-diffusers draws version"
                f" {NOISE_VERSION}: the same seed gives other images (version 1 used 32 bits of a seed, so that images"
                " shared their noise). Choose another folder, or complete this one with the version that began it."
            )
        self.settings["noise"] = read_settings(file).get("noise")

    def _units(self, part: tuple[int, int]) -> tuple[list[list[tuple[int, int]]], set[tuple[int, int]]]:
        """What part i of n has to make, and what of it is done."""
        self.rows = read_rows(self.output)
        # of a shard, all images are made by one process; the division does not depend on the batch size, which may be
        # another one on another machine
        units = [self.plan[part[0] :: part[1]]]
        if self.settings["output_format"] == "webdataset":
            shards = [self.plan[k : k + IMAGES_A_SHARD] for k in range(0, len(self.plan), IMAGES_A_SHARD)]
            units = shards[part[0] :: part[1]]
        return units, {number for numbers in units for number in numbers if self._is_done(number)}

    def make(self, part: tuple[int, int]) -> tuple[int, float]:
        """Makes what is missing of part i of n; returns the number of images and the seconds."""
        packs = self.settings["output_format"] == "webdataset"
        units, done = self._units(part)
        journal = Journal(self.output, part)
        started, made = time.monotonic(), 0
        self.pipeline.set_progress_bar_config(disable=True)
        self.thread = threading.get_ident()
        hook = self.pipeline.unet.register_forward_pre_hook(self._count_rows, with_kwargs=True)
        total = sum(map(len, units))
        try:
            with tqdm(total=total, initial=len(done), desc="generate", unit="image") as progress:
                # a batch is filled within a unit: a shard's images do not wait for another shard's
                for numbers in units:
                    made += self._make_images([n for n in numbers if n not in done], journal, progress)
                    if packs:
                        self._pack(numbers)
        except OSError as error:
            raise OSError(
                f"{self.output} cannot be written ({error}). {made + len(done)} images or more of {total} are"
                " complete: make room and run the same command again."
            ) from error
        finally:
            hook.remove()
        return made, time.monotonic() - started

    def _is_done(self, number: tuple[int, int]) -> bool:
        row = self.rows.get(self.key(number))
        if row is None:
            return False
        if self.settings["output_format"] == "webdataset" and self.shard(number).exists():
            return True
        return is_complete_image(self.images / self.name(number), row.size, self.settings["image_format"])

    def _count_rows(self, module, args, kwargs) -> None:
        # the UNet may be sampled from in other threads, too
        if threading.get_ident() == self.thread:
            self.unet_rows += len(args[0] if args else kwargs["sample"])

    def _make_images(self, numbers: list[tuple[int, int]], journal: Journal, progress: tqdm) -> int:
        """Samples in this thread; another one measures, resizes, encodes and writes, batch after batch. Beside a GPU a
        third one decodes, and several encode. On a CPU this thread decodes, too: side by side, they would only take
        the cores from each other."""
        pending = deque(Attempt(*number) for number in numbers)
        waiting: deque[Future] = deque()
        on_cpu = self.pipeline.unet.device.type == "cpu"
        with (
            nullcontext() if on_cpu else ThreadPoolExecutor(_encoder_threads()) as encoders,
            nullcontext() if on_cpu else ThreadPoolExecutor(1) as decoder,
            ThreadPoolExecutor(1) as writer,
        ):
            while pending or waiting:
                # attempts that fail come back before a batch is left short
                while waiting and (len(waiting) > WAITING or len(pending) < self.batch_size):
                    again = waiting.popleft().result()
                    pending.extendleft(again)
                if not pending:
                    continue
                batch = [pending.popleft() for _ in range(min(self.batch_size, len(pending)))]
                latents, *figures = self._sample(batch)
                if decoder is None:
                    decoded = self._decode(latents)
                else:
                    is_cuda = latents.device.type == "cuda"
                    sampled = torch.cuda.current_stream(latents.device).record_event() if is_cuda else None
                    decoded = decoder.submit(self._decode, latents, sampled)
                waiting.append(writer.submit(self._write, batch, decoded, *figures, journal, progress, encoders))
        return len(numbers)

    def _sample(self, batch: list[Attempt]) -> tuple[torch.Tensor, list[int], list[float | None]]:
        """Latents, boundaries and perturbations of a batch."""
        seed, names = self.settings["seed"], self.identities.names
        embeddings = F.normalize(self.identities.embeddings[[a.identity for a in batch]])
        perturbations: list[float | None] = [None] * len(batch)
        keys = [(names[a.identity], a.index, a.number) for a in batch]
        if self.settings["identity_perturbation"] is not None:
            generators = [image_generator(seed, *key, stream=PERTURBATION) for key in keys]
            embeddings, cosines = perturb_embeddings(embeddings, self.settings["identity_perturbation"], generators)
            perturbations = cosines.tolist()
        out = self.pipeline(
            replace(self.identities, embeddings=embeddings, names=[]),
            generator=[image_generator(seed, *key) for key in keys],
            output_type="latent",
            **self.settings["sampling"],
        )
        return out.images, out.boundary_timesteps.tolist(), perturbations

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, sampled: torch.cuda.Event | None = None) -> list[PIL.Image.Image]:
        """Pictures of latents, on a stream of its own if these are still being `sampled`: only this thread waits."""
        stream = nullcontext()
        if sampled is not None:
            self.stream = self.stream or torch.cuda.Stream(latents.device)
            self.stream.wait_event(sampled)
            stream = torch.cuda.stream(self.stream)
        with stream:
            decoded = decode_latents(self.pipeline.vae, latents.to(self.pipeline.vae.dtype))
            decoded = self.pipeline.image_processor.postprocess(decoded, output_type="pt")
            # rounded as diffusers does, but where they are: bytes are a quarter of what is to be copied
            pixels = (255 * decoded.float()).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
        return [PIL.Image.fromarray(picture) for picture in pixels.numpy()]

    def _save(self, number: tuple[int, int], picture: PIL.Image.Image) -> int:
        """Writes an image; returns the size of the file."""
        side = (self.settings["size"], self.settings["size"])
        if picture.size != side:
            picture = picture.resize(side, PIL.Image.Resampling.BILINEAR)
        content = encode_image(picture, self.settings["image_format"])
        path = self.images / self.name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as beside:
            beside.write_bytes(content)
        return len(content)

    def _write(self, batch, decoded, boundaries, perturbations, journal, progress, encoders) -> list[Attempt]:
        """Writes a batch's images and, when all of them are there, their rows; or gives back the attempts to make
        instead."""
        settings = self.settings
        pictures = decoded.result() if isinstance(decoded, Future) else decoded
        similarities: list[float | None] = [None] * len(batch)
        if self.encoder is not None:
            wanted = F.normalize(self.identities.embeddings[[a.identity for a in batch]])
            similarities = (self.encoder.embed_pictures(pictures) * wanted).sum(dim=1).tolist()
        rows, chosen, again = [], [], []
        for attempt, picture, *figures in zip(batch, pictures, boundaries, perturbations, similarities, strict=True):
            name = self.identities.names[attempt.identity]
            seed = noise_seed(settings["seed"], name, attempt.index, attempt.number)
            row = ImageRow(name, attempt.index, seed, attempt.number, *figures, size=0)
            number = (attempt.identity, attempt.index)
            if settings["min_similarity"] is not None:
                best = self.best.pop(number, None)
                if best is not None and best[1].similarity >= row.similarity:
                    picture, row = best
                if row.similarity < settings["min_similarity"] and attempt.number + 1 < settings["max_attempts"]:
                    self.best[number] = (picture, row)
                    again.append(replace(attempt, number=attempt.number + 1))
                    continue
            rows.append(row)
            chosen.append((number, picture))
        sizes = (map if encoders is None else encoders.map)(self._save, *zip(*chosen, strict=True)) if chosen else []
        rows = [replace(row, size=size) for row, size in zip(rows, sizes, strict=True)]
        journal.append(rows)
        self.rows |= {(row.identity, row.index): row for row in rows}
        progress.update(len(rows))
        progress.set_postfix({"UNet rows/image": f"{self.unet_rows / max(progress.n - progress.initial, 1):.1f}"})
        return again

    def _pack(self, numbers: list[tuple[int, int]]) -> None:
        names, rows = [self.name(number) for number in numbers], [self.rows[self.key(number)] for number in numbers]
        pack_shard(self.shard(numbers[0]), self.images, names, [identity for identity, _ in numbers], rows)

    def finish(self) -> tuple[bool, bool]:
        """Metadata, preview and card, once all parts are complete; says whether they are, and whether this call wrote
        them."""
        with _lock(self.output, "finish", timeout=-1):
            self.rows = read_rows(self.output)
            packs = self.settings["output_format"] == "webdataset"
            # images that wait to be packed by another process are not done yet
            if not all(self._is_done(number) and (not packs or self.shard(number).exists()) for number in self.plan):
                return False, False
            if not (self.output / JOURNAL).exists() and (self.output / METADATA).exists():
                return True, False
            names = [f"images/{self.name(number)}" for number in self.plan]
            if packs:
                names = [f"shards/{self.shard(number).name}/{self.name(number)}" for number in self.plan]
                shutil.rmtree(self.images, ignore_errors=True)  # empty folders
            ordered = [self.rows[self.key(number)] for number in self.plan]
            write_metadata(self.output, ordered, names)
            self.identities.save(self.output / IDENTITIES)
            self._write_preview()
            with complete_file(self.output / "README.md") as beside:
                beside.write_text(dataset_card(self.settings, ordered))
            for cut_short in self.images.glob("*/*.part"):
                cut_short.unlink()
            shutil.rmtree(self.output / JOURNAL)
        return True, True

    def _write_preview(self) -> None:
        columns = min(GRID_COLUMNS, self.settings["images_per_identity"])
        rows = min(GRID_ROWS, len(self.identities))
        cells = [self._open((identity, index)) for identity in range(rows) for index in range(columns)]
        with complete_file(self.output / "preview.png") as beside:
            make_image_grid(cells, rows=rows, cols=columns).save(beside, "png")

    def _open(self, number: tuple[int, int]) -> PIL.Image.Image:
        if self.settings["output_format"] == "imagefolder":
            return PIL.Image.open(self.images / self.name(number))
        with tarfile.open(self.shard(number)) as tar:
            return PIL.Image.open(io.BytesIO(tar.extractfile(self.name(number)).read()))


def _encoder_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_ENCODERS, cores)


def bank_hash(identities: IdentityBank) -> str:
    """By which `generation.json` tells banks from each other: of names and embeddings, in their order."""
    digest = hashlib.sha256(json.dumps(identities.names).encode())
    digest.update(identities.embeddings.contiguous().numpy())
    return digest.hexdigest()[:16]


@contextmanager
def _lock(output: Path, name: str, timeout: float = 0) -> Iterator[None]:
    path = output / f".{name}.lock"
    with FileLock(path, timeout=timeout):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # a finished folder has no locks


@contextmanager
def _locked(output: Path, part: tuple[int, int]) -> Iterator[None]:
    """No two processes at one part, and no two divisions into parts at one time."""
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(_lock(output, f"{part[0]}-of-{part[1]}"))
            for other in output.glob(".*-of-*.lock"):
                if other.stem.split("-of-")[1] != str(part[1]):
                    with _lock(output, other.stem.removeprefix(".")):
                        pass
        except Timeout as error:
            raise RuntimeError(
                f"another process is generating into {output} ({Path(error.lock_file).stem}): wait for it, or give"
                " this one a part of its own with `shard`."
            ) from error
        yield


def dataset_card(settings: Mapping[str, Any], rows: list[ImageRow]) -> str:
    """README.md of a generated data set, with metadata for the Hub."""
    number = len(rows)
    category = next(name for limit, name in SIZE_CATEGORIES if number < limit)
    folder = '["images/**", metadata.parquet]' if settings["output_format"] == "imagefolder" else "shards/*.tar"
    similarities = [row.similarity for row in rows if row.similarity is not None]
    measured = (
        f"| mean cosine to the identity (`{settings['encoder']}`) | {np.mean(similarities):.3f} |\n"
        if similarities
        else ""
    )
    sampling = (
        ", ".join(f"{name}={value!r}" for name, value in settings["sampling"].items()) or "the pipeline's defaults"
    )
    return f"""---
pretty_name: Synthetic faces by UIFace
task_categories:
- image-classification
size_categories:
- {category}
tags:
- uiface
- face-recognition
- synthetic-data
configs:
- config_name: default
  data_files: {folder}
---

# Synthetic faces

Faces of people who do not exist, generated by uiface-diffusers
([UIFace](https://arxiv.org/abs/2502.19803)). `metadata.parquet` has one row per image, `generation.json` all settings.

![The first identities in rows](preview.png)

| | |
|---|---|
| identities | {settings["number_of_identities"]} |
| images | {number}, {settings["size"]}x{settings["size"]} {settings["image_format"]} |
| model | `{settings["model"]}` |
| identity encoder | `{settings["identity_encoder"] or "not stated"}` |
| seed | {settings["seed"]} |
| sampling | {sampling} |
| identity perturbation | {settings["identity_perturbation"] or "none"} |
{measured}
The license and consent of the generator's training data apply: see the model's card.
"""


def upload_dataset(output: Path, repo_id: str) -> str:
    """Uploads a finished data set to the Hub; returns its address."""
    repo_id = create_repo(repo_id, repo_type="dataset", exist_ok=True).repo_id
    commit = upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=output,
        commit_message="Upload synthetic faces",
        ignore_patterns=["*.part", "*.lock"],
    )
    return str(commit)
