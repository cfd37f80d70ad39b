"""`uiface_cli.options`, for the training scripts."""

from uiface_cli.options import (
    any_of,
    boolean,
    device,
    expand_home,
    json_object,
    none,
    one_of,
    part,
    path,
    provider,
    real,
    timestep_pair,
    whole,
)

__all__ = [
    "any_of",
    "boolean",
    "device",
    "expand_home",
    "json_object",
    "none",
    "one_of",
    "part",
    "path",
    "provider",
    "real",
    "timestep_pair",
    "whole",
]
