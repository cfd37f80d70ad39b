#!/usr/bin/env python
"""The exact sampler against a plain one and against its floor, side by side in one process.

- plain: the published code's course: two UNet passes over the whole batch in every step, the first under the empty
  context, which keeps the logits of every attention, the second under the identity, which takes them;
- exact: `UIFacePipeline`;
- approximate, with `--approximate JSON`: the pipeline with other arguments and, as `scheduler`, another scheduler;
- floor: the UNet rows of the exact sampler's plan, each step's in one call of the bare UNet with diffusers' own
  processors, and decoding.

    python benchmarks/sampling.py                               the embedded checkpoint
    python benchmarks/sampling.py --model published --batch-size 8 --num-inference-steps 10
    python benchmarks/sampling.py --dtype bfloat16              the pipeline and its floor in bfloat16
    python benchmarks/sampling.py --scaling                     cost over batches of 1 to 64 and latents of 16, 32, 64
    python benchmarks/sampling.py --device cuda --precision float32 tf32 bf16 --batch-sizes 16 64 256
                                                                a table of rates, decoding included; with --plain also
                                                                of the plain sampler in the same precision

`published` is the published size with random weights. The boundary threshold is 0 if none is given: every sample seeks
its boundary until the cap. Prints a table, and JSON with the machine. The rate of a matrix product in each dtype says
what a dtype can gain on it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, VQModel
from diffusers.models.attention_processor import AttnProcessor2_0
from machine import (
    Roofline,
    Table,
    add_device_arguments,
    describe_device,
    describe_machine,
    median_seconds,
    peak_gib,
    use_precision,
)
from torch.utils.flop_counter import FlopCounterMode

from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline, UIFaceUNet2DModel, default_checkpoint
from uiface_diffusers.attention_processor import cross_attention_names
from uiface_diffusers.convert_original import NOISE_SCHEDULE, SAMPLER
from uiface_diffusers.latents import decode_latents
from uiface_diffusers.two_stage import attention_map, block_attention_map, map_distance
from uiface_diffusers.two_stage.schedulers import scheduler_like


def published_pipeline() -> UIFacePipeline:
    """The published size with random weights."""
    torch.manual_seed(0)
    unet = UIFaceUNet2DModel()
    vae = VQModel(
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=8192,
        scaling_factor=1.0,
    )
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, **SAMPLER)
    return UIFacePipeline(vae.eval(), unet.eval(), scheduler, IdentityProjector(512, 256).eval(), EmptyContext(256))


@torch.no_grad()
def decode(pipe: UIFacePipeline, latents: torch.Tensor) -> torch.Tensor:
    """As the pipeline does."""
    return decode_latents(pipe.vae, latents.to(pipe.vae.dtype))


class MaterializingProcessor:
    """Attention with its map in memory; under the empty context the logits are kept, under the identity they replace
    (self-attention) or renormalize (cross-attention) the own ones, in the samples of `selected`."""

    def __init__(self):
        self.is_empty_pass, self.logits, self.injects, self.selected = True, None, (False, False), None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        is_cross = encoder_hidden_states is not None
        context = hidden_states
        if is_cross:
            context = (
                attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else (encoder_hidden_states)
            )
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        logits = attn.scale * query @ key.transpose(-2, -1)
        if self.is_empty_pass:
            self.logits = logits
        elif self.injects[is_cross]:
            injected = self.logits
            if is_cross:
                std, empty_std = logits.std(-1, keepdim=True), self.logits.std(-1, keepdim=True)
                scale = (0.5 * empty_std + 0.5 * std) / std
                shift = 0.5 * self.logits.mean(-1, keepdim=True) + 0.5 * logits.mean(-1, keepdim=True)
                injected = (logits - logits.mean(-1, keepdim=True)) * scale + shift
            logits = torch.where(self.selected[:, None, None, None], injected, logits)
        return attn.to_out[0]((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


@torch.no_grad()
def plain_sampler(pipe: UIFacePipeline, embeds, noise, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Final latents and boundary timesteps of the published code's course."""
    processors = {name: MaterializingProcessor() for name in pipe.unet.attn_processors}
    cross = [processors[f"{name}.processor"] for name in cross_attention_names(pipe.unet)]
    stock = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(dict(processors))
    try:
        identity, empty = pipe.encode_identity(embeds), pipe.empty_context(len(embeds)).context
        pipe.scheduler.set_timesteps(args.num_inference_steps)
        latents, flags, previous = noise, torch.zeros(len(embeds), dtype=torch.bool, device=noise.device), None
        boundaries = torch.full((len(embeds),), -1, device=noise.device)
        for t in pipe.scheduler.timesteps:
            below_cap = t < args.latest_boundary
            stage_two = flags | below_cap
            boundaries[stage_two & (boundaries < 0)] = int(t)
            for processor in processors.values():
                processor.is_empty_pass = True
            of_empty = pipe.unet(latents, t, empty).sample
            block_maps = []
            for processor in cross:
                side = round(processor.logits.shape[2] ** 0.5)
                block_maps.append(block_attention_map(processor.logits, side, side))
            for processor in processors.values():
                processor.is_empty_pass, processor.injects, processor.selected = False, (True, below_cap), stage_two
            of_identity = pipe.unet(latents, t, identity).sample
            current = attention_map(block_maps)
            if previous is not None and not below_cap:
                flags = flags | (map_distance(current, previous) < args.boundary_threshold)
            previous = current
            if below_cap:
                prediction = of_empty + 2.0 * (of_identity - of_empty)
            else:
                prediction = torch.where(stage_two[:, None, None, None], of_identity, of_empty)
            latents = pipe.scheduler.step(prediction, t, latents, return_dict=False)[0]
    finally:
        pipe.unet.set_attn_processor(stock)
    if not args.only:
        decode(pipe, latents)
    return latents, boundaries


def exact_sampler(pipe: UIFacePipeline, embeds, noise, args) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"boundary_threshold": args.boundary_threshold, "latest_boundary": args.latest_boundary}
    options |= {"guidance_scale": 2.0, "injection_strength": 0.5}
    steps = args.num_inference_steps
    out = pipe(embeds, num_inference_steps=steps, latents=noise, output_type="latent", **options)
    if not args.only:
        decode(pipe, out.images)
    return out.images, out.boundary_timesteps


def approximate_sampler(pipe: UIFacePipeline, embeds, noise, args) -> None:
    """The pipeline's call with the arguments of `--approximate`."""
    options = dict(args.approximate)
    exact = pipe.scheduler
    if "scheduler" in options:
        pipe.scheduler = scheduler_like(getattr(diffusers, options.pop("scheduler")), exact)
    out = pipe(embeds, latents=noise, output_type="latent", latest_boundary=args.latest_boundary, **options)
    pipe.scheduler = exact
    decode(pipe, out.images)


@torch.no_grad()
def bare_rows(pipe: UIFacePipeline, row_counts: list[int], noise: torch.Tensor) -> None:
    stock = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    try:
        for rows in row_counts:
            states = noise[torch.arange(rows, device=noise.device) % len(noise)]
            pipe.unet(states, 500, pipe.empty_context(rows).context.to(noise.dtype))
        decode(pipe, noise)
    finally:
        pipe.unet.set_attn_processor(stock)


def record_rows(pipe: UIFacePipeline, sample: Callable) -> tuple[list[int], tuple]:
    """The rows of every UNet call, and what `sample` returns."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, inputs, kwargs: rows.append(len(inputs[0] if inputs else kwargs["sample"])), with_kwargs=True
    )
    result = sample()
    hook.remove()
    return rows, result


def load(args: argparse.Namespace) -> UIFacePipeline:
    pipe = published_pipeline() if args.model == "published" else UIFacePipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_inputs(pipe: UIFacePipeline, args: argparse.Namespace, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and noise of a batch."""
    generator = torch.Generator().manual_seed(args.seed)
    embeds = torch.nn.functional.normalize(torch.randn(batch_size, 512, generator=generator))
    side, channels = args.latent_size or pipe.unet.config.sample_size, pipe.unet.config.in_channels
    return embeds, torch.randn(batch_size, channels, side, side, generator=generator)


def build(args: argparse.Namespace) -> tuple[UIFacePipeline, UIFacePipeline, torch.Tensor, torch.Tensor]:
    """The pipeline in float32 for the plain sampler, the one to be measured, embeddings and noise."""
    plain = load(args)
    pipe = plain if args.dtype == "float32" else load(args).to(dtype=getattr(torch, args.dtype))
    return plain, pipe, *draw_inputs(plain, args, args.batch_size)


def rates(args: argparse.Namespace) -> None:
    """Images per second, decoding included, over precisions and batches. A call of fewer than 50 steps stands for one
    of 50, in proportion."""
    machine = describe_device(args.device, args.precision)
    print(json.dumps(machine), flush=True)
    table = Table(args, machine=machine)
    args.only = "exact"  # decoding is timed alone
    for precision in args.precision:
        pipe = load(args).to(args.device, use_precision(precision))
        if args.channels_last:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)

        def measure(batch_size: int, pipe=pipe, precision=precision) -> dict:
            embeds, noise = draw_inputs(pipe, args, batch_size)
            embeds, noise = embeds.to(args.device), noise.to(args.device, pipe.unet.dtype)
            with Roofline(machine, precision) as sampling:
                rows, (latents, _) = record_rows(pipe, lambda: exact_sampler(pipe, embeds, noise, args))

            with Roofline(machine, precision) as decoding:
                decode(pipe, latents)
            peak_gib()
            decode_seconds = median_seconds(lambda: decode(pipe, latents), args.rounds)
            decode_peak = peak_gib()
            exact_sampler(pipe, embeds, noise, args)
            seconds = median_seconds(lambda: exact_sampler(pipe, embeds, noise, args), args.rounds)
            peak = peak_gib()
            longer = 50 / args.num_inference_steps
            total = longer * seconds + decode_seconds
            found = {
                "images/s at 50 steps": batch_size / total,
                "rows/s": sum(rows) / seconds,
                "rows/image": sum(rows) / batch_size,
                "share of the roofline": (longer * sampling.seconds + decoding.seconds) / total,
                "share of matmul": (longer * sampling.flops + decoding.flops) / total / sampling.flops_per_second,
                "sampling, s": seconds,
                "decoding, s": decode_seconds,
                "sampling, GiB": peak,
                "decoding, GiB": decode_peak,
            }
            if args.plain:
                plain_sampler(pipe, embeds, noise, args)
                plain = median_seconds(lambda: plain_sampler(pipe, embeds, noise, args), args.rounds)
                found |= {"plain / exact": (longer * plain + decode_seconds) / total, "plain, GiB": peak_gib()}
            return found

        for batch_size in args.batch_sizes:
            table.measure(
                lambda batch_size=batch_size, measure=measure: measure(batch_size),
                model="published" if args.model == "published" else Path(args.model).name,
                precision=precision,
                layout="channels_last" if args.channels_last else "contiguous",
                batch=batch_size,
                steps=args.num_inference_steps,
            )


def scaling(pipe: UIFacePipeline, args: argparse.Namespace) -> list[dict]:
    """Seconds and arithmetic of an image, over the batch and the latents: four steps, half of them in stage two."""
    table = []
    for side in (16, 32, 64):
        for batch_size in (1, 2, 4, 8, 16, 32, 64):
            generator = torch.Generator().manual_seed(args.seed)
            embeds = torch.randn(batch_size, 512, generator=generator)
            noise = torch.randn(batch_size, pipe.unet.config.in_channels, side, side, generator=generator)
            noise = noise.to(pipe.unet.dtype)

            def sample(embeds=embeds, noise=noise):
                call = {"num_inference_steps": 4, "boundary_threshold": 0.0, "output_type": "latent"}
                pipe(embeds, latents=noise, **call)

            with FlopCounterMode(display=False) as counter:
                sample()
            seconds = median_seconds(sample, args.rounds) / batch_size
            gflop = counter.get_total_flops() / 1e9 / batch_size
            table.append({"latents": side, "batch": batch_size, "ms": 1e3 * seconds, "GFLOP": gflop})
            table[-1]["GFLOP/s"] = gflop / seconds
            print("".join(f"{name} {value:8.1f}   " for name, value in table[-1].items()))
    return table


def peak_memory(args: argparse.Namespace, which: str) -> float:
    """GiB that denoising took at most in a process of its own (on Linux), beyond the loaded model. Decoding, which is
    the same for all, is left out."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
    # glibc gives freed blocks back at once: what is counted is what is held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(default_checkpoint()), help="folder, or `published`")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--latent-size", type=int, help="default: the model's")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--boundary-threshold", type=float, default=0.0)
    parser.add_argument("--latest-boundary", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--approximate", type=json.loads, help="arguments of the pipeline's call, and `scheduler`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="also the peak memory, of a process each")
    parser.add_argument("--scaling", action="store_true", help="only the table over batches and latents")
    parser.add_argument("--only", choices=("plain", "exact"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    add_device_arguments(parser)
    parser.add_argument("--channels-last", action="store_true", help="of the table of rates: memory format")
    parser.add_argument("--plain", action="store_true", help="of the table of rates: the plain sampler, too")
    args = parser.parse_args()
    if args.batch_sizes is not None:
        rates(args)
        return
    plain, pipe, embeds, noise = build(args)
    own_noise = noise.to(pipe.unet.dtype)
    settings = {
        name: str(value) if name == "device" else value for name, value in vars(args).items() if name != "only"
    }
    if args.scaling:
        print(json.dumps({"settings": settings, "machine": describe_machine(), "table": scaling(pipe, args)}))
        return
    if args.only is not None:

        def gib(name: str) -> float:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return int(status[name].split()[0]) / 2**20

        loaded = gib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        sampler, of = (plain_sampler, plain) if args.only == "plain" else (exact_sampler, pipe)
        sampler(of, embeds, noise if args.only == "plain" else own_noise, args)
        print(gib("VmHWM") - loaded)
        return

    plain_rows, (expected, expected_boundaries) = record_rows(plain, lambda: plain_sampler(plain, embeds, noise, args))
    rows, (latents, boundaries) = record_rows(pipe, lambda: exact_sampler(pipe, embeds, own_noise, args))
    candidates = {
        "plain": lambda: plain_sampler(plain, embeds, noise, args),
        "exact": lambda: exact_sampler(pipe, embeds, own_noise, args),
        "floor": lambda: bare_rows(pipe, rows, own_noise),
    }
    if args.approximate is not None:
        candidates["approximate"] = lambda: approximate_sampler(pipe, embeds, own_noise, args)
        approximate_rows, _ = record_rows(pipe, candidates["approximate"])
    seconds = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    number = args.batch_size
    counts = {"plain": sum(plain_rows), "exact": sum(rows), "floor": sum(rows)}
    if args.approximate is not None:
        counts["approximate"] = sum(approximate_rows)
    for name, count in counts.items():
        rate = number / medians[name]
        print(f"{name}: {medians[name]:8.2f} s, {rate:6.3f} images/s, {count / number:.1f} UNet rows per image")
    result = {
        "plain / exact": medians["plain"] / medians["exact"],
        "exact / floor": medians["exact"] / medians["floor"],
        "largest difference of the final latents": (latents.float() - expected).abs().max().item(),
        "largest final latent": expected.abs().max().item(),
        "equal boundaries": torch.equal(boundaries, expected_boundaries),
    }
    if args.approximate is not None:
        result["plain / approximate"] = medians["plain"] / medians["approximate"]
    if args.memory:
        memory = {which: peak_memory(args, which) for which in ("plain", "exact")}
        result |= {f"GiB for denoising, {which}": value for which, value in memory.items()}
        result["memory, exact / plain"] = memory["exact"] / memory["plain"]
    for name, value in result.items():
        print(f"{name}: {value if isinstance(value, bool) else format(value, '.4g')}")
    machine = describe_machine()
    print(f"matrix product, GFLOP/s: {machine['matmul GFLOP/s']}")
    print(json.dumps({"settings": settings, "machine": machine, "seconds": seconds, "rows": rows, **result}))


if __name__ == "__main__":
    main()
