import pytest
import torch
from conftest import Predictor, all_samples, max_difference

from uiface_diffusers.attention_processor import AttentionMapRecorder
from uiface_diffusers.two_stage import (
    attention_map,
    block_attention_map,
    combine_rows,
    cross_temperature,
    key_covariance,
    logit_std,
    map_distance,
    plan_rows,
    update_flags,
)


@pytest.fixture(scope="module")
def predict(reference):
    return Predictor(reference)


def test_parity_of_the_empty_branch(reference, predict):
    prediction = predict(plan_rows(all_samples(False), guided=False))
    assert max_difference(prediction, reference["eps_empty"]) <= 1e-4


def test_parity_of_the_identity_branch(reference, predict):
    prediction = predict(plan_rows(all_samples(True), guided=False))
    assert max_difference(prediction, reference["eps_identity"]) <= 1e-4


def test_parity_of_both_injections(reference, predict):
    plan = plan_rows(all_samples(True), guided=False, self_injection=True, cross_injection=True)
    assert max_difference(predict(plan), reference["eps_injected"]) <= 1e-4


def test_parity_of_self_injection_for_flagged_samples(reference, predict):
    plan = plan_rows(reference["flag"], guided=False, self_injection=True)
    assert len(plan.samples) == 4 + reference["flag"].sum()
    assert max_difference(predict(plan), reference["eps_selfonly_flag"]) <= 1e-4


@pytest.mark.parametrize("branch", ["empty", "identity"])
def test_parity_of_attention_maps(reference, predict, branch):
    recorder = AttentionMapRecorder(16, 16, map_size=16)
    context = predict.empty if branch == "empty" else predict.identity
    predict(plan_rows(all_samples(False), guided=False, record=True), context, recorder)
    assert max_difference(attention_map(recorder.block_maps), reference[f"attn_map_{branch}"]) <= 1e-4


def test_parity_of_block_maps_from_the_reference_logits(reference, predict):
    recorder = AttentionMapRecorder(16, 16)
    predict(plan_rows(all_samples(False), guided=False, record=True), recorder=recorder)
    names = sorted((n for n in reference.tensors if n.startswith("cross_logits")), key=lambda n: int(n.split(".")[1]))
    assert len(names) == len(recorder.block_maps) == 11
    for name, block_map in zip(names, recorder.block_maps, strict=True):
        logits = reference[name].unflatten(0, (4, -1))
        side = int(logits.shape[2] ** 0.5)
        assert max_difference(block_attention_map(logits, side, side), block_map) <= 1e-4


def test_a_flat_attention_map_is_no_nan():
    assert torch.equal(attention_map([torch.ones(1, 32, 32)]), torch.zeros(1, 32, 32))


def test_distance_is_the_mean_of_the_roots_of_squares():
    a, b = torch.rand(3, 32, 32), torch.rand(3, 32, 32)
    assert torch.allclose(map_distance(a, b), ((a - b) ** 2).sqrt().flatten(1).mean(1))


def test_flags_never_fall_back():
    flags = torch.tensor([True, False, False])
    distance = torch.tensor([1.0, 0.001, torch.nan])
    assert update_flags(flags, distance, 0.006).tolist() == [True, True, False]


def reference_cross_injection(logits, empty_logits, strength):
    """The published code, literally."""
    mean, std = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True)
    empty_mean, empty_std = empty_logits.mean(-1, keepdim=True), empty_logits.std(-1, keepdim=True)
    s = strength * empty_std + (1 - strength) * std
    m = strength * empty_mean + (1 - strength) * mean
    return ((logits - mean) / std * s + m).softmax(-1)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_temperature_equals_the_renormalized_logits(strength):
    torch.manual_seed(0)
    query, empty_query = torch.randn(2, 2, 3, 64, 32).unbind()
    key, empty_key = torch.randn(2, 2, 3, 20, 32).unbind()
    std, empty_std = logit_std(query, key_covariance(key)), logit_std(empty_query, key_covariance(empty_key))
    temperature = cross_temperature(std, empty_std, strength)
    ours = (temperature * query @ key.transpose(-2, -1)).softmax(-1)
    theirs = reference_cross_injection(
        query @ key.transpose(-2, -1), empty_query @ empty_key.transpose(-2, -1), strength
    )
    assert max_difference(ours, theirs) <= 1e-5


def test_temperature_of_a_single_token_is_one():
    """Nothing varies over one token: the reference's 0 / 0 would be NaN."""
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 1, 8)
    std = logit_std(query, key_covariance(key))
    assert torch.equal(cross_temperature(std, std, 0.5), torch.ones(1, 2, 5, 1))


@pytest.mark.parametrize(
    ("stage_two", "options", "empty", "identity", "source", "recorded"),
    [
        # nobody has reached stage two: one row per sample
        ([0, 0, 0], {"record": True}, [0, 1, 2], [], None, [0, 1, 2]),
        # a flagged sample with self-injection has two rows
        ([0, 1, 0], {"self_injection": True, "record": True}, [0, 1, 2], [1], [0, 1, 2, 1], [0, 2]),
        # without injection and guidance it needs its identity row only
        ([0, 1, 1], {}, [0], [1, 2], None, None),
        ([0, 1, 1], {"record": True}, [0], [1, 2], None, [0]),
        # guidance alone needs both
        ([1, 1, 0], {"guided": True}, [0, 1, 2], [0, 1], [0, 1, 2, 0, 1], None),
        (
            [1, 1, 1],
            {"guided": True, "cross_injection": True, "record": True},
            [0, 1, 2],
            [0, 1, 2],
            [0, 1, 2] * 2,
            None,
        ),
        # only the identity rows where the empty ones are reused
        ([1, 1, 1], {"guided": True, "reuse_empty": True}, [], [0, 1, 2], [0, 1, 2], None),
    ],
)
def test_row_plan(stage_two, options, empty, identity, source, recorded):
    plan = plan_rows(torch.tensor(stage_two, dtype=torch.bool), **{"guided": False, **options})
    assert plan.empty.tolist() == empty and plan.identity.tolist() == identity
    assert (None if plan.source is None else plan.source.tolist()) == source
    assert (None if plan.recorded is None else plan.recorded.tolist()) == recorded
    assert plan.samples.tolist() == empty + identity
    assert plan.contexts.tolist() == [0] * len(empty) + [1 + sample for sample in identity]


def test_rows_are_combined_to_every_samples_prediction():
    plan = plan_rows(torch.tensor([False, True, True]), guided=True)
    rows = torch.tensor([1.0, 2.0, 3.0, 20.0, 30.0]).reshape(5, 1, 1, 1)
    assert combine_rows(rows, plan, 3.0).flatten().tolist() == [1, 2 + 3 * 18, 3 + 3 * 27]
    assert combine_rows(rows, plan, None).flatten().tolist() == [1, 20, 30]
