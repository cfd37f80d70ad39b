#!/usr/bin/env python
"""Draws how faces come to be in two stages by the embedded checkpoint: docs/figures/two_stages.png.

    python docs/figures/two_stages.py --output docs/figures/two_stages.png

For each face: what the denoiser expects it to be at some timesteps, and the attention map there, until it has come to
rest (paper, sec. 3.3). Below: how much the map changed since the step before.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from uiface_diffusers import IdentityBank, UIFacePipeline, default_checkpoint
from uiface_diffusers.latents import decode_latents
from uiface_diffusers.two_stage import AttentionAtRest, attention_map, map_distance
from uiface_diffusers.two_stage.boundary import Observation

SHOWN = (980, 940, 900, 840, 740, 640, 540, 440, 340, 240, 120, 0)
COLORS = ("tab:blue", "tab:orange", "tab:green")
OBSERVE = AttentionAtRest.observe


class Steps:
    """What a call does: timesteps, latents before and after every step, attention maps by timestep and sample."""

    def __init__(self, pipe: UIFacePipeline, latents: torch.Tensor):
        self.pipe, self.latents, self.timesteps = pipe, [latents], []
        self.maps: list[dict[int, torch.Tensor]] = []

    def observe(self, rule: AttentionAtRest, seen: Observation) -> None:
        self.maps.append(dict(zip(seen.samples.tolist(), attention_map(seen.block_maps), strict=True)))
        OBSERVE(rule, seen)

    def __call__(self, pipe, step, timestep, tensors):
        self.timesteps.append(int(timestep))
        self.latents.append(tensors["latents"].clone())
        return {}

    @torch.no_grad()
    def expected(self, step: int) -> np.ndarray:
        """The faces that the denoiser expects at a step, `(B, height, width, 3)` in [0, 1]: two latents of a DDIM
        step are two equations of the image and the noise."""
        cumprod, final = self.pipe.scheduler.alphas_cumprod, self.pipe.scheduler.final_alpha_cumprod
        later = self.timesteps[step + 1 : step + 2]
        now, then = cumprod[self.timesteps[step]], cumprod[later[0]] if later else final
        a, s, a_then, s_then = now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt()
        image = (s_then * self.latents[step] - s * self.latents[step + 1]) / (s_then * a - s * a_then)
        return self.pipe.image_processor.postprocess(decode_latents(self.pipe.vae, image), output_type="np")


def sample(
    identities: Sequence[int], seeds: Sequence[int], num_inference_steps: int
) -> tuple[Steps, torch.Tensor, float]:
    """The steps of one call, the boundaries and the threshold."""
    pipe = UIFacePipeline.from_pretrained(default_checkpoint())
    bank = IdentityBank.load(default_checkpoint() / "identities.safetensors")
    size = (1, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    steps = Steps(pipe, torch.cat(noise))
    # the pipeline has no use for the maps beyond the boundary, and gives them to the rule alone
    AttentionAtRest.observe = lambda rule, seen: steps.observe(rule, seen)
    options = {"latents": steps.latents[0], "callback_on_step_end": steps}
    out = pipe(bank.take(identities), num_inference_steps=num_inference_steps, **options)
    AttentionAtRest.observe = OBSERVE
    return steps, out.boundary_timesteps, pipe.default_sampling(num_inference_steps)["boundary_threshold"]


def draw(steps: Steps, boundaries: torch.Tensor, threshold: float) -> plt.Figure:
    faces = len(boundaries)
    figure = plt.figure(figsize=(len(SHOWN), 2 * faces + 2.6), dpi=100)
    grid = figure.add_gridspec(2 * faces + 1, len(SHOWN), height_ratios=[1] * 2 * faces + [2.2], wspace=0.06)
    for column, shown in enumerate(SHOWN):
        step = min(range(len(steps.timesteps)), key=lambda i: abs(steps.timesteps[i] - shown))
        timestep = steps.timesteps[step]
        pictures = steps.expected(step)
        for face in range(faces):
            has_map = step < len(steps.maps) and face in steps.maps[step]
            for row, picture in (
                (2 * face, pictures[face]),
                (2 * face + 1, steps.maps[step][face] if has_map else None),
            ):
                axes = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
                if picture is not None:
                    axes.imshow(picture, vmin=0, vmax=1, cmap="magma")
                two = timestep <= boundaries[face]
                axes.spines[:].set(color=COLORS[face] if two else "0.8", linewidth=2.5 if two and not row % 2 else 0.8)
                axes.spines[:].set_visible(picture is not None)
                if not row:
                    axes.set_title(f"t = {timestep}", fontsize=9)
                if not column:
                    axes.set_ylabel("face" if row == 2 * face else "attention", fontsize=8)
    axes = figure.add_subplot(grid[-1, :])
    for face in range(faces):
        pairs = zip(steps.maps, steps.maps[1:], strict=False)
        distances = [map_distance(now[face][None], last[face][None]).item() for last, now in pairs if face in now]
        axes.plot(steps.timesteps[1 : len(distances) + 1], distances, ".-", color=COLORS[face])
        axes.axvline(boundaries[face], color=COLORS[face], linestyle=":")
        top = (boundaries[face], 1)
        axes.annotate(f"{boundaries[face]}", top, (0, 3), ("data", "axes fraction"), "offset points",
                      color=COLORS[face], fontsize=9, ha="center")  # fmt: skip
    axes.axhline(threshold, color="0.4", linewidth=0.8)
    axes.annotate(
        f"threshold {threshold:g}", (8, threshold), (0, 3), textcoords="offset points", ha="right", fontsize=9
    )
    axes.set(xlim=(990, 0), ylim=(0, None), xlabel="timestep", ylabel="change of the map")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--identities", type=int, nargs=3, default=[0, 8, 5])
    parser.add_argument("--seeds", type=int, nargs=3, default=[3, 6, 12])
    parser.add_argument("--num-inference-steps", type=int, default=50)
    args = parser.parse_args()
    steps, boundaries, threshold = sample(args.identities, args.seeds, args.num_inference_steps)
    draw(steps, boundaries, threshold).savefig(args.output, bbox_inches="tight")
    print(f"{args.output}: boundaries {', '.join(map(str, boundaries.tolist()))}, threshold {threshold:g}")


if __name__ == "__main__":
    main()
