#!/usr/bin/env python
"""Prints, for every scheduler and every denoiser class of diffusers, whether it is sampled rightly, as measured, or
refused, with the reason.

    python benchmarks/support.py

Right is a scheduler whose samples are those of the exact solution, by a denoiser that knows it (of a stochastic one:
of the distribution), and a denoiser whose predictions with all injections are those of attention maps in memory.
"""

import importlib
import inspect
import pkgutil
import sys
import warnings
from pathlib import Path

import diffusers.models.controlnets.controlnet_xs
import diffusers.models.transformers
import diffusers.models.unets
import diffusers.schedulers
from diffusers import ModelMixin

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import test_flow
import test_schedulers
from conftest import Predictor, Reference, all_samples, max_difference
from test_pipeline import stock_unet
from test_transformer import difference_to_materialized_maps, pixart

from uiface_diffusers import denoisers
from uiface_diffusers.two_stage import plan_rows, schedulers

FLOW_REFUSED = "refused: its last step would leave noise"


def scheduler_names() -> list[str]:
    """Every scheduler class of diffusers."""
    return sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))


def denoiser_names() -> list[str]:
    """Every class of diffusers that is, or could be taken for, a denoiser."""
    modules = [diffusers.models.controlnets.controlnet_xs]
    for package in (diffusers.models.transformers, diffusers.models.unets):
        modules += [
            importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)
        ]
    return sorted(
        name
        for module in modules
        for name, each in vars(module).items()
        if inspect.isclass(each) and issubclass(each, ModelMixin) and each.__module__ == module.__name__
        if "Adapter" not in name
    )


def scheduler_rows() -> list[tuple[str, str, str]]:
    """Name, with epsilon or v prediction, with flow matching."""
    exact, exact_flow, rows = test_schedulers.make_exact_pipeline(), test_flow.make_exact_pipeline(), []
    for name in scheduler_names():
        if name in schedulers.REFUSED:
            rows.append((name, f"refused: {schedulers.REFUSED[name]}", ""))
            continue
        with_noise = "refused: only of flow matching"
        if name in schedulers.SUPPORTED:
            is_stochastic = name in test_schedulers.STOCHASTIC
            error, _ = test_schedulers.error_of(exact, test_schedulers.make_scheduler(name), is_stochastic)
            with_noise = f"right, {error:.1%} {'of the deviation' if is_stochastic else 'from the solution'}"
        with_flow = "refused: it has no flow sigmas"
        if name in schedulers.FLOW:
            latents = test_flow.sample(exact_flow, test_flow.make_scheduler(name), boundary=None).images
            with_flow = f"right, {test_flow.error_of(latents):.1%} from the solution"
        elif "use_flow_sigmas" in inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters:
            with_flow = FLOW_REFUSED
        rows.append((name, with_noise, with_flow))
    return rows


def denoiser_rows() -> list[tuple[str, str]]:
    """Name, and what becomes of it."""
    reference = Reference()
    plan = plan_rows(all_samples(True), guided=False, self_injection=True, cross_injection=True)
    measured = {"UIFaceUNet2DModel": max_difference(Predictor(reference)(plan), reference["eps_injected"])}
    for name, model in (("UNet2DConditionModel", stock_unet(24)), ("PixArtTransformer2DModel", pixart())):
        measured[name] = max(difference_to_materialized_maps(model, each) for each in (None, "self", "cross", "both"))
    rows = [(name, f"right, {measured[name]:.0e} from maps in memory") for name in denoisers.SUPPORTED]
    refused = [name for name in denoiser_names() if name not in denoisers.SUPPORTED]
    return rows + [(name, f"refused: it {denoisers.REFUSED[name]}") for name in refused]


def print_table(header: tuple[str, ...], rows: list) -> None:
    for row in (header, tuple("---" for _ in header), *rows):
        print("| " + " | ".join(row) + " |")


def main() -> None:
    warnings.simplefilter("ignore")
    print_table(("denoiser", "two-stage sampling"), denoiser_rows())
    print()
    print_table(("scheduler", "epsilon or v prediction", "flow matching"), scheduler_rows())


if __name__ == "__main__":
    main()
