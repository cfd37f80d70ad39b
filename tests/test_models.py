import math

import pytest
import torch
from conftest import TINY_UNET
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from uiface_diffusers import EmptyContext, IdentityBank, IdentityProjector, UIFaceUNet2DModel
from uiface_diffusers.convert_original import convert_original_state_dict


def test_the_published_configuration_has_the_published_size():
    """216.3M parameters in the reference's form. Two linear layers without anything between make each time projection
    there; folded to one they are 5.9M fewer."""
    with torch.device("meta"):
        unet, projector, empty = UIFaceUNet2DModel(), IdentityProjector(), EmptyContext()
    ours = sum(p.numel() for model in (unet, projector, empty) for p in model.parameters())
    unfolded = 0
    for name, module in unet.named_modules():
        if name.endswith("time_emb_proj"):
            width, time_embed_dim = module.out_features // 2, module.in_features
            unfolded += (time_embed_dim * width + width) + 2 * (width * width + width)
            unfolded -= sum(p.numel() for p in module.parameters())
    assert round(ours / 1e6, 1) == 210.4
    assert round((ours + unfolded) / 1e6, 1) == 216.3
    attention = [name for name in unet.attn_processors if "attn2" in name]
    assert len(attention) == 16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_out_channels": (32, 32, 64), "attention_levels": (True, False, True)},
        {"layers_per_block": 3, "attention_head_dim": 32},
        {"cross_attention_dim": 64, "num_context_tokens": 1, "norm_num_groups": 16},
    ],
)
def test_configurations(options, tmp_path):
    torch.manual_seed(0)
    unet = UIFaceUNet2DModel(**{**TINY_UNET, **options}).eval()
    sample, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    context = torch.randn(2, 3, unet.config.cross_attention_dim)
    with torch.no_grad():
        expected = unet(sample, t, context).sample
        assert expected.shape == sample.shape
        unet.save_pretrained(tmp_path)
        assert torch.equal(UIFaceUNet2DModel.from_pretrained(tmp_path)(sample, t, context).sample, expected)
        # every input matters
        assert not torch.allclose(unet(sample, t + 1, context).sample, expected)
        assert not torch.allclose(unet(sample, t, context + 1).sample, expected)
        one = unet(sample[:1], 3, context[:1]).sample
        assert (one - expected[:1]).abs().max() < 1e-5


def test_tokens_of_a_context_are_laid_out_as_in_the_reference():
    """There: Linear(C -> C * tokens) reshaped to (b, C, tokens): channels first."""
    unet = UIFaceUNet2DModel(**TINY_UNET)
    block = unet.mid_block.blocks[0].attention
    seen = {}
    block.attn2.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(tokens=kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    context = torch.randn(2, 1, 32)
    with torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), 0, context)
        expected = block.context_proj(context[:, 0]).reshape(2, 32, 4).transpose(1, 2)
    assert torch.equal(seen["tokens"], expected)


def test_processors_can_be_set_as_in_diffusers():
    unet = UIFaceUNet2DModel(**TINY_UNET)
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    inputs = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 1, 32))
    with torch.no_grad():
        fused = unet(*inputs).sample
        unet.set_attn_processor(AttnProcessor())
        assert (unet(*inputs).sample - fused).abs().max() < 1e-5


def test_gradients_reach_everything_and_checkpointing_keeps_them():
    torch.manual_seed(0)
    unet = UIFaceUNet2DModel(**TINY_UNET)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 1, 32))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(*inputs).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_zero_initialized_residual_branches_leave_the_input():
    unet = UIFaceUNet2DModel(**TINY_UNET)
    unet.zero_init_residual_branches()
    with torch.no_grad():
        assert unet(torch.randn(1, 4, 8, 8), 0, torch.randn(1, 1, 32)).sample.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"attention_levels": (True,)}, 8, "`attention_levels` has 1"),
        ({"attention_head_dim": 24}, 8, r"`attention_head_dim` is 24.*\[32, 64\]"),
        ({"cross_attention_dim": 40}, 8, r"`norm_num_groups` is 32.*\[40\]"),
        ({}, 7, "multiples of 2"),
    ],
)
def test_unet_refuses_what_does_not_fit(options, size, message):
    with pytest.raises(ValueError, match=message):
        UIFaceUNet2DModel(**{**TINY_UNET, **options})(torch.randn(1, 4, size, size), 0, torch.randn(1, 1, 32))


def test_identity_projector():
    projector = IdentityProjector(512, 256, num_tokens=2, identity_encoder="edgeface")
    embeds = torch.nn.functional.normalize(torch.randn(1000, 512), dim=-1)
    out = projector.eval()(embeds)
    assert out.context.shape == (1000, 2, 256)
    assert torch.equal(out.context, projector(embeds, return_dict=False)[0])
    assert abs(out.context.std().item() - 1) < 0.1  # on a par with the empty context
    dropped = projector.train()(embeds).context
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.01
    kept = dropped != 0
    assert torch.allclose(dropped[kept], out.context[kept] / 0.75, atol=1e-5)


def test_empty_context_is_one_learnable_vector():
    empty = EmptyContext(256)
    context = empty(3).context
    assert context.shape == (3, 1, 256) and torch.equal(context[0], context[2])
    context.sum().backward()
    assert torch.equal(empty.embedding.grad, torch.full((1, 256), 3.0))
    assert abs(EmptyContext(4096).embedding.std().item() - 1) < 0.1


@pytest.mark.parametrize("model", [EmptyContext(32, 2), IdentityProjector(16, 32, 2, 0.1, "toy")])
def test_small_models_are_used_alone(model, tmp_path):
    model.save_pretrained(tmp_path / "component")
    assert (tmp_path / "component" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = type(model).from_pretrained(tmp_path, subfolder="component")
    public = {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == public
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


# --- the published checkpoint's form ---------------------------------------------------------------------------------


def test_prefixes_are_taken_off(reference):
    prefixed = {f"module.eps_model.{name}": tensor for name, tensor in reference.state_dict.items()}
    converted = convert_original_state_dict(prefixed, reference.model_config)
    for ours, theirs in zip(converted, reference.components, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not any(model.training for model in converted)


def test_folding_the_time_projection_is_exact(reference):
    unet = reference.components[0]
    state = {name: tensor.double() for name, tensor in reference.state_dict.items() if name.startswith("up.6.res.")}
    resnet = unet.up_blocks[1].blocks[2].resnet
    assert resnet.conv1.weight.shape == state["up.6.res.conv1.weight"].shape
    temb = torch.randn(3, 128, dtype=torch.float64)
    inner = temb @ state["up.6.res.time_emb.1.weight"].T + state["up.6.res.time_emb.1.bias"]
    parts = [inner @ state[f"up.6.res.{n}.weight"].T + state[f"up.6.res.{n}.bias"] for n in ("scale_emb", "shift_emb")]
    assert (resnet.time_emb_proj(temb.float()) - torch.cat(parts, -1)).abs().max() < 1e-5


def broken(state_dict: dict, how: str) -> dict:
    state_dict = dict(state_dict)
    if how == "missing":
        del state_dict["down.3.attn.c_norm.bias"]
    elif how == "unknown":
        state_dict["down.3.attn.extra.weight"] = torch.zeros(1)
    elif how == "misshapen":
        state_dict["middle.res1.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    elif how == "time projection":
        state_dict["up.0.res.shift_emb.weight"] = torch.zeros(64, 32)
    elif how == "twice":
        state_dict["module.norm.weight"] = torch.zeros(32)
    return state_dict


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing: down.3.attn.c_norm.bias"),
        ("unknown", "unknown: down.3.attn.extra.weight"),
        ("misshapen", r"shape of middle.res1.conv1.weight: \(64, 64, 1, 1\) instead of \(64, 64, 3, 3\)"),
        ("time projection", "shape of up.0.res.shift_emb.weight"),
        ("twice", "two tensors are named `norm.weight`"),
    ],
)
def test_conversion_is_strict(reference, how, message):
    with pytest.raises(ValueError, match=message):
        convert_original_state_dict(broken(reference.state_dict, how), reference.model_config)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("condition_type", "FiLM"),
        ("n_context_classes", 10),
        ("channel_multipliers", [2, 1, 1]),
        ("attention_heads", 4),
    ],
)
def test_options_without_a_counterpart_are_named(reference, option, value):
    with pytest.raises(ValueError, match=option):
        convert_original_state_dict(reference.state_dict, {**reference.model_config, option: value})


def test_every_tensor_is_converted(reference):
    """A change of any tensor of the checkpoint changes a parameter of ours."""
    baseline = [p.clone() for model in reference.components for p in model.parameters()]
    names = sorted(reference.state_dict)
    for name in names[:: math.ceil(len(names) / 12)]:
        changed = {**reference.state_dict, name: reference.state_dict[name] + 1}
        converted = convert_original_state_dict(changed, reference.model_config)
        parameters = [p for model in converted for p in model.parameters()]
        assert sum(not torch.equal(a, b) for a, b in zip(baseline, parameters, strict=True)) >= 1, name


# --- identity banks --------------------------------------------------------------------------------------------------


def test_bank_round_trip(tmp_path):
    bank = IdentityBank(torch.randn(3, 8), "edgeface", ["a", "b", "c"])
    bank.save(tmp_path / "bank.safetensors")
    loaded = IdentityBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(loaded.embeddings, bank.embeddings) and len(loaded) == 3
    assert (loaded.identity_encoder, loaded.names) == ("edgeface", ["a", "b", "c"])
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]


def test_bank_refuses_what_is_none(tmp_path):
    with pytest.raises(ValueError, match="2 names for 3"):
        IdentityBank(torch.randn(3, 8), names=["a", "b"])
    with pytest.raises(ValueError, match=r"\(8,\)"):
        IdentityBank(torch.randn(8))
    IdentityBank(torch.randn(30, 8)).save(tmp_path / "bank.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "bank.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="half.safetensors is damaged, cut short"):
        IdentityBank.load(tmp_path / "half.safetensors")
    EmptyContext(8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not an identity bank"):
        IdentityBank.load(tmp_path / "diffusion_pytorch_model.safetensors")
