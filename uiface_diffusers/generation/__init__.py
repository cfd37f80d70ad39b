"""A data set from a pipeline and a bank of identities: plan, run, resume.

A run belongs to a folder:

    generation.json    every setting, the model's hash, versions
    images/            one folder per identity; for `webdataset` or `parquet`, `shards/` or `data/` instead
    metadata.parquet   one row per image, when all are made; until then the rows are in `journal/`
    identities.safetensors, preview.png, README.md

Image n of an identity depends on the weights, the settings, the identity's embedding and name, n and the seed, and on
nothing else: not on the batch, the number of processes or an interruption.

`run` is the whole call. `settings` and `plan` say which images, `resume` what is there, `making` brings them from the
pipeline to one of the `writers`; a complete set gets its `finish`, `card` and `upload`. `identities` makes new ones
from a pipeline.
"""

from ..identities import bank_hash
from .card import dataset_card
from .identities import make_identities
from .making import default_batch_size
from .plan import Attempt, ImageKey
from .run import GenerationReport, generate_dataset
from .settings import GenerationSettings
from .upload import upload_dataset

__all__ = [
    "Attempt",
    "GenerationReport",
    "GenerationSettings",
    "ImageKey",
    "bank_hash",
    "dataset_card",
    "default_batch_size",
    "generate_dataset",
    "make_identities",
    "upload_dataset",
]
