"""Our configuration of diffusers' own testers.

They are not part of the diffusers package: point DIFFUSERS_CHECKOUT at a checkout of huggingface/diffusers, whose
`tests` folder is imported; the diffusers under test stays the installed one.

    DIFFUSERS_CHECKOUT=path/to/diffusers python -m pytest tests/conformance
"""

import os
import sys

import pytest
import torch

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("DIFFUSERS_CHECKOUT names no checkout of huggingface/diffusers", allow_module_level=True)
# a regular package wins over our `tests` folder, which has no __init__.py
sys.path.insert(0, CHECKOUT)

from conftest import TINY_UNET, tiny_components
from tests.models.testing_utils import (
    AttentionTesterMixin,
    BaseModelTesterConfig,
    MemoryTesterMixin,
    ModelTesterMixin,
    TrainingTesterMixin,
)
from tests.pipelines.testing_utils import (
    BasePipelineTesterConfig,
    PipelineTesterMixin,
)
from tests.pipelines.testing_utils import MemoryTesterMixin as PipelineMemoryTesterMixin
from tests.testing_utils import torch_device

from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline, UIFaceUNet2DModel


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch_device)


class UNetConfig(BaseModelTesterConfig):
    model_class = UIFaceUNet2DModel
    output_shape = (4, 8, 8)

    def get_init_dict(self):
        return dict(TINY_UNET)

    def get_dummy_inputs(self):
        timestep = torch.tensor([10, 500], device=torch_device)
        return {"sample": random(2, 4, 8, 8), "timestep": timestep, "encoder_hidden_states": random(2, 1, 32)}


class IdentityProjectorConfig(BaseModelTesterConfig):
    model_class = IdentityProjector
    output_shape = (2, 32)

    def get_init_dict(self):
        return {"identity_dim": 16, "context_dim": 32, "num_tokens": 2, "identity_encoder": "toy"}

    def get_dummy_inputs(self):
        return {"identity_embeds": random(3, 16)}


class EmptyContextConfig(BaseModelTesterConfig):
    model_class = EmptyContext
    output_shape = (2, 32)

    def get_init_dict(self):
        return {"context_dim": 32, "num_tokens": 2}

    def get_dummy_inputs(self):
        return {"batch_size": 3}


class TestUNet(UNetConfig, ModelTesterMixin):
    pass


class TestUNetTraining(UNetConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"UIFaceBlock"})


class TestUNetAttention(UNetConfig, AttentionTesterMixin):
    pass


class TestUNetMemory(UNetConfig, MemoryTesterMixin):
    pass


class TestIdentityProjector(IdentityProjectorConfig, ModelTesterMixin):
    pass


class TestIdentityProjectorTraining(IdentityProjectorConfig, TrainingTesterMixin):
    pass


class TestEmptyContext(EmptyContextConfig, ModelTesterMixin):
    def test_sharded_checkpoints_with_parallel_loading(self):
        pytest.skip("its one tensor cannot be sharded")


class TestEmptyContextTraining(EmptyContextConfig, TrainingTesterMixin):
    pass


class PipelineConfig(BasePipelineTesterConfig):
    pipeline_class = UIFacePipeline
    required_input_params_in_call_signature = frozenset(
        ["identity_embeds", "guidance_scale", "boundary", "injection", "callback_on_step_end"]
    )
    batch_input_params = frozenset(["identity_embeds"])
    callback_cfg_params = frozenset()
    output_shape = (3, 16, 16)

    def get_dummy_components(self):
        return tiny_components()

    def get_dummy_inputs(self):
        return {
            "identity_embeds": random(16),
            "generator": self.get_generator(0),
            "num_inference_steps": 4,
            "guidance_scale": 2.0,
            "output_type": "pt",
        }


class TestPipeline(PipelineConfig, PipelineTesterMixin):
    pass


class TestPipelineMemory(PipelineConfig, PipelineMemoryTesterMixin):
    pass
