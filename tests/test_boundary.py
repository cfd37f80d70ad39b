"""The registry of boundary rules: what each takes, and that an entry is all that another rule needs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

import uiface_cli
from uiface_cli.generate import SAMPLING
from uiface_diffusers import IdentityBank, demo, generate_dataset
from uiface_diffusers.two_stage import AttentionAtRest, FixedTimestep, SingleStage, boundary
from uiface_diffusers.two_stage.boundary import RULES, BoundaryRule, Observation, rule_kind

EMBEDS = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
CALL = {"num_inference_steps": 5, "latest_boundary": 300, "output_type": "latent"}


class EverySecond(BoundaryRule):
    """Every second sample, from the step on after two were seen."""

    word = label = "every-second"
    seen: list[Observation]

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = EverySecond.seen = []

    def observe(self, seen):
        self.seen.append(seen)

    def found(self):
        return (torch.arange(self.num_samples) % 2 == 0) & (len(self.seen) >= 2)


@pytest.fixture
def every_second(monkeypatch):
    for module in (boundary, demo):
        monkeypatch.setattr(module, "RULES", (*RULES, EverySecond))


@pytest.mark.parametrize(
    ("value", "kind"),
    [("adaptive", AttentionAtRest), (0, FixedTimestep), (np.int64(500), FixedTimestep), (None, SingleStage)],
)
def test_a_value_means_one_rule(value, kind):
    assert rule_kind(value) is kind and [rule for rule in RULES if rule.accepts(value)] == [kind]


@pytest.mark.parametrize("value", ["adaptiv", "500", "none", -1, 1.5, True, np.arange(2), torch.ones(2)])
def test_other_values_are_refused_with_all_that_rules_take(value):
    with pytest.raises(ValueError, match=r'^`boundary` has to be "adaptive", a timestep \(.*\) or None but is '):
        rule_kind(value)


def test_words_and_labels_are_of_one_rule_each():
    words = [rule.word for rule in RULES if rule.word is not None]
    assert len(set(words)) == len(words) and len({rule.label for rule in RULES}) == len(RULES)


def test_another_rule_in_the_pipeline(tiny_pipeline, every_second):
    tiny_pipeline.scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, set_alpha_to_one=True, clip_sample=False)
    steps = []
    out = tiny_pipeline(
        EMBEDS, **CALL, boundary="every-second", generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, t, tensors: steps.append((int(t), tensors)) or {},
        callback_on_step_end_tensor_inputs=["latents", "stage_two", "attention_maps"],
    )  # fmt: skip
    assert [t for t, _ in steps] == [800, 600, 400, 200, 0]
    assert out.boundary_timesteps.tolist() == [400, 200, 400]
    # of the third step, nothing would take effect above the latest boundary
    assert [seen.timestep for seen in EverySecond.seen] == [800, 600]
    for seen, (t, after) in zip(EverySecond.seen, steps, strict=False):
        assert seen.prediction_type == "epsilon"
        latents = tiny_pipeline.scheduler.step(seen.prediction, t, seen.latents).prev_sample
        assert torch.equal(latents, after["latents"])
        # it did not ask for attention, and none was recorded
        assert len(seen.block_maps) == len(seen.samples) == 0 and after["attention_maps"] is None
    with pytest.raises(ValueError, match=r"None or .every-second. but is 'every'"):
        tiny_pipeline(EMBEDS, **CALL, boundary="every")


def test_a_layout_is_noised_to_the_latest_boundary(tiny_pipeline, every_second):
    """Of any rule that would have to find it."""
    layout, call = torch.zeros(1, 4, 8, 8), CALL | {"latest_boundary": 600}
    results = [
        tiny_pipeline(EMBEDS, **call, boundary=value, layout=layout, generator=torch.Generator().manual_seed(0))
        for value in ("every-second", 600)
    ]
    assert torch.equal(results[0].images, results[1].images)


def test_another_rule_in_the_commands_and_the_demo(tiny_pipeline, every_second, tmp_path, capsys):
    assert SAMPLING["boundary"].type("every-second") == "every-second"
    with pytest.raises(SystemExit):
        uiface_cli.build_parser().parse_args(["generate", "--boundary", "every"])
    assert "'every' is not one of adaptive, every-second, nor none, nor a whole number" in capsys.readouterr().err
    bank = IdentityBank(EMBEDS, "toy", ["a", "b", "c"])
    settings = {"number": 3, "seed": 5, "steps": 5, "guidance_scale": 2.0, "timestep": 400, "injection": "both"}
    page = demo.Demo(tiny_pipeline, bank).make(
        bank.take([0]), **settings, boundary="every-second", beside=False, with_maps=True
    )
    assert "a: two stages" in page and page.count("boundary ") == 3
    generate_dataset(tiny_pipeline, bank, tmp_path, 1, size=16, num_inference_steps=5, boundary="every-second")
    settings = json.loads((tmp_path / "generation.json").read_text())["settings"]
    assert settings["sampling"]["boundary"] == "every-second"
