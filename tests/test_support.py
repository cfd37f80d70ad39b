"""No class of diffusers' schedulers and denoisers is silently neither sampled nor refused."""

import importlib.util

import diffusers
import pytest
import torch
from conftest import REPOSITORY

from uiface_diffusers import denoisers
from uiface_diffusers.two_stage import schedulers

spec = importlib.util.spec_from_file_location("support", REPOSITORY / "benchmarks" / "support.py")
support = importlib.util.module_from_spec(spec)
spec.loader.exec_module(support)


def test_every_scheduler_is_in_one_list():
    sampled = schedulers.SUPPORTED.keys() | schedulers.FLOW.keys()
    assert not sampled & schedulers.REFUSED.keys()
    assert sampled | schedulers.REFUSED.keys() == set(support.scheduler_names())


def test_every_denoiser_is_in_one_list():
    assert not denoisers.REFUSED.keys() & set(denoisers.SUPPORTED)
    assert denoisers.REFUSED.keys() | set(denoisers.SUPPORTED) == {"UIFaceUNet2DModel", *support.denoiser_names()}


def test_the_table_has_every_denoiser():
    rows = dict(support.denoiser_rows())
    assert rows.keys() == denoisers.REFUSED.keys() | set(denoisers.SUPPORTED)
    assert all(rows[name].startswith("right") for name in denoisers.SUPPORTED)
    assert rows["SD3Transformer2DModel"] == f"refused: it {denoisers.REFUSED['SD3Transformer2DModel']}"


OF_PICTURES = [
    name
    for name in support.denoiser_names()
    if name in denoisers.REFUSED and denoisers.REFUSED[name] not in ("denoises video", "denoises sound")
]
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
# these have no default configuration
WITHOUT_DEFAULTS = {
    "DreamLiteTransformer2DModel": {"in_channels": 32, "cross_attention_dim": 8, **SMALL},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "caption_channels": [8, 8],
        "text_emb_dim": 8, "axes_dims_rope": (4, 2, 2), **SMALL,
    },
    "HunyuanDiT2DModel": {"patch_size": 2, "in_channels": 4, "hidden_size": 32, **SMALL},
    "LuminaNextDiT2DModel": {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0], "long_factor": [1.0]}, "num_layers": 1},
    "Transformer2DModel": {"in_channels": 32, "cross_attention_dim": 8, **SMALL},
    "TransformerTemporalModel": {"in_channels": 32, **SMALL},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_PICTURES)
def test_refused_denoisers_are_refused(name):
    """Instances of them, without weights."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**WITHOUT_DEFAULTS.get(name, {}))
    with pytest.raises(ValueError, match=rf"{name}\b"):
        denoisers.denoiser_kind(model)
