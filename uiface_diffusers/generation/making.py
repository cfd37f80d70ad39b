"""The images of one process: sampled in batches; decoded, measured and written beside it."""

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..data.image_folder import ImageKey, ImageRow, Journal
from ..faces import FaceEncoder
from ..identities import IdentityBank, perturb_embeddings, safe_cosines
from ..latents import decode_latents
from ..models import IdentityFlow
from ..pipeline_uiface import UIFacePipeline
from ..seeds import COMMON_PERTURBATION, PERTURBATION, image_generator, noise_seed
from .distributions import Distribution
from .layouts import Layouts
from .plan import Attempt, Part
from .resume import made_images
from .settings import GenerationSettings
from .writers import ImageFolder

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


def _encoder_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_ENCODERS, cores)


@dataclass(frozen=True)
class Sampled:
    """A batch of attempts: latents, and what their rows of metadata take from sampling."""

    attempts: list[Attempt]
    latents: torch.Tensor
    boundaries: list[int]
    perturbations: list[float | None]
    layouts: list[str | None]
    conditions: list[dict[str, float]]


class ImageMaker:
    """
    Args:
        pipeline: samples and decodes.
        bank: of the identities.
        encoder (*optional*): measures the similarity.
        settings: of the data set.
        batch_size (`int`): images per call of the pipeline.
        writer: of the images.
        flow (*optional*): gives the directions of the perturbation.
        layouts (*optional*): each image draws one.
        distributions (*optional*): of conditions; each image draws a value.
    """

    def __init__(
        self,
        pipeline: UIFacePipeline,
        bank: IdentityBank,
        encoder: FaceEncoder | None,
        settings: GenerationSettings,
        batch_size: int,
        writer: ImageFolder,
        flow: IdentityFlow | None = None,
        layouts: Layouts | None = None,
        distributions: Mapping[str, Distribution] | None = None,
    ):
        self.layouts, self.distributions = layouts, distributions or {}
        self.pipeline, self.bank, self.encoder = pipeline, bank, encoder
        self.settings, self.batch_size, self.writer = settings, batch_size, writer
        self.flow = flow
        # of each identity, with a neighbor-safe perturbation
        self.safe = safe_cosines(bank) if settings.identity_perturbation == "auto" else None
        self.unet_rows = 0
        self.stream: torch.cuda.Stream | None = None
        self.rows: dict[ImageKey, ImageRow] = {}
        # of images that were not similar enough yet: the best attempt
        self.best: dict[ImageKey, tuple[PIL.Image.Image, ImageRow]] = {}

    def make(self, part: Part) -> tuple[int, float]:
        """Makes what is missing of a part; returns the number of images and the seconds."""
        units, output = self.writer.units(part), self.writer.output
        self.rows, done = made_images(self.writer, units)
        self.journal = Journal(output, part)
        started, made = time.monotonic(), 0
        self.pipeline.set_progress_bar_config(disable=True)
        self.thread = threading.get_ident()
        hook = self.pipeline.unet.register_forward_pre_hook(self._count_rows, with_kwargs=True)
        total = sum(map(len, units))
        try:
            with tqdm(total=total, initial=len(done), desc="generate", unit="image") as self.progress:
                # a batch is filled within a unit
                for unit in units:
                    made += self._make_images([key for key in unit if key not in done])
                    self.writer.close(unit, self.rows)
        except OSError as error:
            raise OSError(
                f"{output} cannot be written ({error}). {made + len(done)} images or more of {total} are"
                " complete: make room and run the same command again."
            ) from error
        finally:
            hook.remove()
        return made, time.monotonic() - started

    def _count_rows(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # the UNet may be sampled from in other threads, too
        if threading.get_ident() == self.thread:
            self.unet_rows += len(args[0] if args else kwargs["sample"])

    def _make_images(self, keys: list[ImageKey]) -> int:
        """Samples in this thread; another one measures, resizes, encodes and writes, batch after batch. Beside a GPU a
        third one decodes, and several encode. On a CPU this thread decodes, too: side by side, they would only take
        the cores from each other."""
        pending = deque(map(Attempt, keys))
        waiting: deque[Future[list[Attempt]]] = deque()
        on_cpu = self.pipeline.unet.device.type == "cpu"
        with ExitStack() as stack:
            encoders = None if on_cpu else stack.enter_context(ThreadPoolExecutor(_encoder_threads()))
            decoder = None if on_cpu else stack.enter_context(ThreadPoolExecutor(1))
            writer = stack.enter_context(ThreadPoolExecutor(1))
            while pending or waiting:
                # attempts that fail come back before a batch is left short
                while waiting and (len(waiting) > WAITING or len(pending) < self.batch_size):
                    pending.extendleft(waiting.popleft().result())
                if not pending:
                    continue
                sampled = self._sample([pending.popleft() for _ in range(min(self.batch_size, len(pending)))])
                pictures = self._start_decoding(sampled.latents, decoder)
                waiting.append(writer.submit(self._write, sampled, pictures, encoders))
        return len(keys)

    def _sample(self, attempts: list[Attempt]) -> Sampled:
        seed = self.settings.seed
        embeddings = self._embeddings(attempts)
        perturbations: list[float | None] = [None] * len(attempts)
        if self.settings.identity_perturbation is not None or self.flow is not None:
            generators = [image_generator(seed, *attempt.seed_key, stream=PERTURBATION) for attempt in attempts]
            common = []  # of a flow alone
            if self.flow is not None:
                common = [image_generator(seed, a.key.identity, 0, stream=COMMON_PERTURBATION) for a in attempts]
            cosine_range = self._cosine_range(attempts)
            embeddings, cosines = perturb_embeddings(embeddings, cosine_range, generators, self.flow, common)
            perturbations = cosines.tolist()
        names: list[str | None] = [None] * len(attempts)
        layout = None
        if self.layouts is not None:
            drawn = [self.layouts.drawn(seed, attempt) for attempt in attempts]
            names, layout = [each.file for each in drawn], [self.layouts.read(each) for each in drawn]
        conditions, values = self._draw_conditions(attempts)
        out = self.pipeline(
            replace(self.bank, embeddings=embeddings, names=[]),
            generator=[image_generator(seed, *attempt.seed_key) for attempt in attempts],
            output_type="latent",
            layout=layout,
            **conditions,
            **self.settings.sampling,
        )
        return Sampled(attempts, out.images, out.boundary_timesteps.tolist(), perturbations, names, values)

    def _draw_conditions(self, attempts: list[Attempt]) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """Of the attempts: arguments of the pipeline's call, and columns of each one's metadata."""
        arguments: dict[str, Any] = {}
        columns: list[dict[str, float]] = [{} for _ in attempts]
        for name, distribution in self.distributions.items():
            drawn = [distribution.drawn(self.settings.seed, attempt) for attempt in attempts]
            arguments[name] = torch.tensor([list(value.values()) for value in drawn])
            columns = [before | value for before, value in zip(columns, drawn, strict=True)]
        return arguments, columns

    def _embeddings(self, attempts: list[Attempt]) -> torch.Tensor:
        """Of the attempts' identities, or of their images where the bank has one for each, `(N, identity_dim)`, of
        unit length."""
        rows = self._bank_rows(attempts)
        if self.bank.images is None:
            return F.normalize(self.bank.embeddings[rows])
        return F.normalize(self.bank.embeddings[rows, [attempt.key.index for attempt in attempts]])

    def _bank_rows(self, attempts: list[Attempt]) -> list[int]:
        return [self.writer.plan.rows[attempt.key.identity] for attempt in attempts]

    def _cosine_range(self, attempts: list[Attempt]) -> Sequence[float] | torch.Tensor | None:
        """As `perturb_embeddings` takes it."""
        given = self.settings.identity_perturbation
        if self.safe is None:
            assert given != "auto"
            return given
        low = self.safe[self._bank_rows(attempts)]
        return torch.stack([low, torch.ones_like(low)], dim=1)

    def _start_decoding(
        self, latents: torch.Tensor, decoder: ThreadPoolExecutor | None
    ) -> "list[PIL.Image.Image] | Future[list[PIL.Image.Image]]":
        if decoder is None:
            return self._decode(latents)
        is_cuda = latents.device.type == "cuda"
        sampled = torch.cuda.current_stream(latents.device).record_event() if is_cuda else None
        return decoder.submit(self._decode, latents, sampled)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, sampled: torch.cuda.Event | None = None) -> list[PIL.Image.Image]:
        """Pictures of latents, on a stream of its own if these are still being `sampled`: only this thread waits."""
        stream: AbstractContextManager[Any] = nullcontext()
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

    def _write(
        self,
        sampled: Sampled,
        decoded: "list[PIL.Image.Image] | Future[list[PIL.Image.Image]]",
        encoders: ThreadPoolExecutor | None,
    ) -> list[Attempt]:
        """Writes a batch's images and, when all of them are there, their rows; or gives back the attempts to make
        instead."""
        pictures = decoded.result() if isinstance(decoded, Future) else decoded
        kept: list[tuple[ImageKey, PIL.Image.Image, ImageRow]] = []
        again = []
        for attempt, picture, row in zip(sampled.attempts, pictures, self._rows(sampled, pictures), strict=True):
            best = self._best(attempt, picture, row)
            if best is None:
                again.append(replace(attempt, number=attempt.number + 1))
            else:
                kept.append((attempt.key, *best))
        if kept:
            keys, chosen, rows = zip(*kept, strict=True)
            sizes = (map if encoders is None else encoders.map)(self.writer.save, keys, chosen)
            finished = {key: replace(row, size=size) for key, row, size in zip(keys, rows, sizes, strict=True)}
            self.journal.append(finished.values())
            self.rows |= finished
        self.progress.update(len(kept))
        made = max(self.progress.n - self.progress.initial, 1)
        self.progress.set_postfix({"UNet rows/image": f"{self.unet_rows / made:.1f}"})
        return again

    def _rows(self, sampled: Sampled, pictures: list[PIL.Image.Image]) -> list[ImageRow]:
        """The rows of a batch; the size is that of no file yet."""
        similarities: list[float | None] = [None] * len(pictures)
        if self.encoder is not None:
            wanted = self._embeddings(sampled.attempts)
            similarities = (self.encoder.embed_pictures(pictures) * wanted).sum(dim=1).tolist()
        marks = (sampled.boundaries, sampled.perturbations, similarities, sampled.layouts, sampled.conditions)
        return [
            ImageRow(
                attempt.key.identity,
                attempt.key.index,
                seed=noise_seed(self.settings.seed, *attempt.seed_key),
                attempt=attempt.number,
                boundary_timestep=boundary,
                perturbation=perturbation,
                similarity=similarity,
                size=0,
                layout=layout,
                conditions=conditions,
            )
            for attempt, boundary, perturbation, similarity, layout, conditions in zip(
                sampled.attempts, *marks, strict=True
            )
        ]

    def _best(
        self, attempt: Attempt, picture: PIL.Image.Image, row: ImageRow
    ) -> tuple[PIL.Image.Image, ImageRow] | None:
        """The best attempt at an image so far; none if it is not similar enough and may be tried again."""
        threshold = self.settings.min_similarity
        if threshold is None:
            return picture, row
        best = max(filter(None, [self.best.pop(attempt.key, None), (picture, row)]), key=_similarity)
        if _similarity(best) >= threshold or attempt.number + 1 >= self.settings.max_attempts:
            return best
        self.best[attempt.key] = best
        return None


def _similarity(made: tuple[PIL.Image.Image, ImageRow]) -> float:
    assert made[1].similarity is not None  # an encoder measures wherever there is a threshold
    return made[1].similarity
