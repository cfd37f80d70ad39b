"""Two-stage sampling (Lin et al., ICLR 2025, arXiv 2502.19803), to be read beside the paper.

`mathematics`: attention map, distance, temperature. `rows`: the rows of one denoiser call. `boundary`: when a sample
changes stage. `sampler`: the state of one call. `schedulers`: what a solver remembers when a sample changes stage.
`layout`: a picture in place of stage one.
"""

from .boundary import AttentionAtRest, BoundaryRule, FixedTimestep, SingleStage
from .mathematics import (
    ATTENTION_MAP_SIZE,
    attention_map,
    block_attention_map,
    cross_temperature,
    key_covariance,
    logit_std,
    map_distance,
    update_flags,
)
from .rows import RowPlan, combine_rows, guidance_difference, plan_rows
from .sampler import TwoStageSampler

__all__ = [
    "ATTENTION_MAP_SIZE",
    "AttentionAtRest",
    "BoundaryRule",
    "FixedTimestep",
    "RowPlan",
    "SingleStage",
    "TwoStageSampler",
    "attention_map",
    "block_attention_map",
    "combine_rows",
    "cross_temperature",
    "guidance_difference",
    "key_covariance",
    "logit_std",
    "map_distance",
    "plan_rows",
    "update_flags",
]
