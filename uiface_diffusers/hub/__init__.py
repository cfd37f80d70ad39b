"""Pipelines on the Hub: what to `download`, the model `card`, and the files with which stock diffusers loads them."""

from ..identities import IDENTITIES
from .card import fill_card, load_card, save_card
from .download import download_pipeline
from .remote_code import own_class_names, write_remote_code

__all__ = [
    "IDENTITIES",
    "download_pipeline",
    "fill_card",
    "load_card",
    "own_class_names",
    "save_card",
    "write_remote_code",
]
