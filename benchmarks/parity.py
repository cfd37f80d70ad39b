#!/usr/bin/env python
"""Prints how far this package is from the reference implementation's tensors (tests/fixtures), by the tests' means.

python benchmarks/parity.py
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import Predictor, Reference, Trace, all_samples, max_difference, reference_call

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.attention_processor import AttentionMapRecorder
from uiface_diffusers.two_stage import attention_map, plan_rows


def report(name: str, value) -> None:
    print(f"{name:<60} {value if isinstance(value, bool | str) else format(value, '.2e')}")


def main() -> None:
    reference = Reference()
    predict = Predictor(reference)
    plans = {
        "eps_empty": plan_rows(all_samples(False), guided=False),
        "eps_identity": plan_rows(all_samples(True), guided=False),
        "eps_selfonly_flag": plan_rows(reference["flag"], guided=False, self_injection=True),
        "eps_injected": plan_rows(all_samples(True), guided=False, self_injection=True, cross_injection=True),
    }
    for name, plan in plans.items():
        report(f"{name}: max abs difference", max_difference(predict(plan), reference[name]))
    for branch, context in (("empty", predict.empty), ("identity", predict.identity)):
        recorder = AttentionMapRecorder(16, 16, map_size=16)
        predict(plan_rows(all_samples(False), guided=False, record=True), context, recorder)
        difference = max_difference(attention_map(recorder.block_maps), reference[f"attn_map_{branch}"])
        report(f"attn_map_{branch}: max abs difference", difference)

    pipe, trace = reference.pipeline(), Trace()
    out = reference_call(reference, pipe, **trace.options())
    largest = reference["trajectory"].abs().max().item()
    report("flags of every step identical", torch.equal(torch.stack(trace.stage_two[:10]), reference["stage1_flags"]))
    difference = max_difference(torch.stack(trace.latents), reference["trajectory"])
    report(f"trajectory (values up to {largest:.0f}): max abs difference", difference)
    report("final latents: max abs difference", max_difference(out.images, reference["x_0"]))
    alone = reference_call(reference, pipe, slice(0, 1))
    report("sample 0 alone / in a batch of 4: max abs difference", max_difference(alone.images, out.images[:1]))
    report(
        "  the same, of its largest value", max_difference(alone.images, out.images[:1]) / out.images[0].abs().max()
    )
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        loaded = UIFacePipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    report("saved, loaded, run again: identical", torch.equal(reference_call(reference, loaded).images, out.images))


if __name__ == "__main__":
    main()
