"""What the training of a recognizer is made of: its log, its benchmarks, how it is saved and described."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData

from .. import IResNetConfig, IResNetImageProcessor, IResNetModel
from ..data.benchmarks import Benchmark
from .means import RunningMeans


class AnswersLog(RunningMeans):
    """Means of the loss, and of the share of faces whose own logit is the largest in spite of its margin."""

    def add(self, losses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        finite = self.count(losses)
        self.add_mean("loss", losses, finite)
        self.add_mean("accuracy", logits.argmax(dim=1) == labels, finite)


class RecognitionLog(AnswersLog):
    """Also the images per second since `since`."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.since = time.monotonic()

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        means, finite = super().take(accelerator)
        before, self.since = self.since, time.monotonic()
        return means | {"images/s": self.taken / (self.since - before)}, finite


class LastEpoch(AnswersLog):
    """The log of the steps from `first` on, which a checkpoint keeps: it is to be registered."""

    def __init__(self, accelerator: Accelerator, first: int):
        super().__init__(accelerator.device)
        self.accelerator, self.first = accelerator, first

    def state_dict(self) -> dict[str, Any]:
        """Called on every process; the main one's is saved, which takes over the sums of all."""
        nothing = torch.zeros(2, device=self.device)
        loss, accuracy = (self._means.get(name, nothing) for name in ("loss", "accuracy"))
        sums = self.accelerator.reduce(torch.stack([loss[0], accuracy[0], *self._losses]), "sum")
        self._keep_on_main(sums)
        return {"sums": sums, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["first"] == self.first:  # otherwise the training was to end at another step
            self._keep_on_main(state["sums"].to(self.device))

    def _keep_on_main(self, sums: torch.Tensor) -> None:
        loss, right, finite, number = sums if self.accelerator.is_main_process else torch.zeros_like(sums)
        self._means = {"loss": torch.stack([loss, finite]), "accuracy": torch.stack([right, finite])}
        self._losses = torch.stack([finite, number])


@dataclass
class DecodedBenchmark(Benchmark):
    """A benchmark that is measured again and again: its pictures are decoded once, 37 KiB each in memory."""

    decoded: dict[bytes, np.ndarray] = field(init=False, default_factory=dict, repr=False)

    def face(self, position: int) -> np.ndarray:
        image = self.images[position]
        if image not in self.decoded:
            self.decoded[image] = super().face(position)
        return self.decoded[image]


def image_processor(config: IResNetConfig) -> IResNetImageProcessor:
    return IResNetImageProcessor({"height": config.image_size, "width": config.image_size})


def save_recognizer(recognizer: IResNetModel, folder: Path) -> None:
    """The model and its image processor, for transformers' Auto classes."""
    recognizer.save_pretrained(folder)
    image_processor(cast(IResNetConfig, recognizer.config)).save_pretrained(folder)


def model_card(repo_id: str, config: IResNetConfig, license_name: str | None, recipe: str) -> ModelCard:
    """What the recognizer is, how to use it, how it was trained."""
    data = ModelCardData(
        license=license_name,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["face-recognition", "iresnet", "uiface"],
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

A face recognizer: IResNet-{config.layers} of width {config.width}, {config.embedding_dim}-d embeddings of aligned
{config.image_size}x{config.image_size} faces, of [uiface-diffusers](https://pypi.org/project/uiface-diffusers).

```python
import uiface_diffusers  # registers the model; pip install uiface-diffusers
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{repo_id}")
processor = AutoImageProcessor.from_pretrained("{repo_id}")
embeddings = model(**processor(faces, return_tensors="pt")).embeddings  # faces: RGB bytes, not normalized
```

## Training

{recipe}
""")
