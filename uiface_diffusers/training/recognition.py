"""What the training of a recognizer is made of: network and head, the classes of a step, its log, its benchmarks, how
it is saved and described."""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from torch import nn

from .. import IResNetConfig, IResNetImageProcessor, IResNetModel
from ..data.benchmarks import Benchmark
from ..evaluation import verify_benchmarks
from ..evaluation.recognizers import ModelRecognizer
from ..files import write_json
from ..hub import load_card
from ..models.margin_heads import MarginHead
from ..seeds import mix_seed
from .means import RunningMeans
from .options import describe_recipe
from .run import Product, Run

logger = get_logger(__name__)

# step -> benchmark -> accuracy
ACCURACIES = "accuracies.json"
# of the last epoch; the name is transformers'
RESULTS = "train_results.json"
# below this next to nothing was learned
LEAST_ACCURACY = 0.05
# the stream of random numbers of a step's classes
CLASSES = 2


class FaceClassifier(nn.Module):
    """Recognizer and head as one module, so that all gradients are reduced together."""

    def __init__(self, recognizer: IResNetModel, head: MarginHead):
        super().__init__()
        self.recognizer, self.head = recognizer, head

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the head, see `MarginHead.forward`."""
        return self.head(self.recognizer(pixel_values, return_dict=False)[0], labels, classes)


def sample_classes(labels: torch.Tensor, num_classes: int, number: int, seed: int) -> torch.Tensor:
    """The classes that a step compares its faces with, as Partial FC (An et al., CVPR 2022) draws them: all that the
    faces have, and as many others at random as make it `number`.

    Args:
        labels (`torch.Tensor` of shape `(batch_size,)`): of all processes' faces.
        num_classes (`int`): identities.
        number (`int`): as many as there can be different labels, or more.
        seed (`int`): of the draw.

    Returns:
        `torch.Tensor` of shape `(number,)`: in ascending order, none twice.
    """
    generator = torch.Generator(labels.device).manual_seed(seed)
    scores = torch.rand(num_classes, generator=generator, device=labels.device).index_fill_(0, labels, 2.0)
    return scores.topk(number).indices.sort().values


class ClassSampling:
    """Sampling of classes as in Partial FC: a share of them per step, always with those of the batch. The choice
    depends on the training's seed, the step and the labels. All processes compare with the same classes, among them
    those of the faces of all. Each keeps the whole head: what is saved is the time and the memory of the logits.

    Args:
        accelerator (`Accelerator`): of the training.
        num_classes (`int`): identities.
        rate (`float`): the share, in (0, 1]; 1 is the exact head.
        batch_size (`int`): of one process.
        seed (`int`): of the training.
    """

    def __init__(self, accelerator: Accelerator, num_classes: int, rate: float, batch_size: int, seed: int):
        self.accelerator, self.num_classes, self.seed = accelerator, num_classes, seed
        # known beforehand, so that a step waits for nothing
        positive = min(batch_size * accelerator.num_processes, num_classes)
        self.number = max(int(rate * num_classes), positive)

    def __call__(self, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The labels `(batch_size,)` as positions among the classes of this step, and the classes `(number,)`; `None`
        for all of them."""
        if self.number >= self.num_classes:
            return labels, None
        seed = mix_seed(self.seed, step, CLASSES)
        classes = sample_classes(self.accelerator.gather(labels), self.num_classes, self.number, seed)
        return torch.searchsorted(classes, labels), classes


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


def report_last_epoch(args: argparse.Namespace, accelerator: Accelerator, last_epoch: LastEpoch, people: int) -> None:
    """Writes what was learned in it, and warns if that is next to nothing."""
    means, finite = last_epoch.take(accelerator)
    if not finite:
        return
    loss, accuracy = means["loss"], means["accuracy"]
    if accelerator.is_main_process:
        write_json(args.output_dir / RESULTS, {"step": args.max_train_steps, "loss": loss, "accuracy": accuracy})
    if accuracy < LEAST_ACCURACY:
        logger.warning(
            f"the recognizer tells hardly any of its {people} identities apart: in the last epoch {accuracy:.1%} of"
            " the faces were classified right with the margin. Try --max-grad-norm 5, a smaller --margin or"
            " --learning-rate, or more --epochs."
        )


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
{config.image_size}x{config.image_size} faces, of the Python package `uiface-diffusers`.

```python
import uiface_diffusers  # registers the model
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{repo_id}")
processor = AutoImageProcessor.from_pretrained("{repo_id}")
embeddings = model(**processor(faces, return_tensors="pt")).embeddings  # faces: RGB bytes, not normalized
```

## Training

{recipe}
""")


class Recognizer(Product):
    """The recognizer without its head; on the way, its accuracy on benchmarks."""

    name = "recognizer"

    def __init__(self, recognizer: IResNetModel, benchmarks: list[DecodedBenchmark], log: RecognitionLog):
        self.recognizer, self.benchmarks, self.log = recognizer, benchmarks, log

    def save(self, run: Run, folder: Path) -> None:
        save_recognizer(self.recognizer, folder)

    def _measured(self, run: Run) -> dict[str, dict[str, float]]:
        file = run.args.output_dir / ACCURACIES
        return json.loads(file.read_text()) if file.exists() else {}

    def is_validated(self, run: Run) -> bool:
        return str(run.step) in self._measured(run)

    def validate(self, run: Run) -> None:
        recognizer = ModelRecognizer(self.recognizer, image_processor(self.recognizer.config), self.name)
        results = verify_benchmarks(recognizer, self.benchmarks)
        accuracies = {name: float(result.accuracy) for name, result in results.items()}
        accuracies["mean"] = sum(accuracies.values()) / len(accuracies)
        run.report({f"accuracy/{name}": value for name, value in accuracies.items()})
        write_json(run.args.output_dir / ACCURACIES, self._measured(run) | {str(run.step): accuracies})
        self.log.since = time.monotonic()  # this was no time of training

    def upload(self, run: Run, repo_id: str, message: str) -> None:
        """A card that the repository has stays."""
        args = run.args
        repo_id = create_repo(repo_id, private=args.hub_private or None, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            save_recognizer(self.recognizer, Path(folder))
            if load_card(repo_id) is None:
                paths = ("train_data", "output_dir", "hub_model_id", "benchmarks")
                recipe = describe_recipe("training/train_face_recognition.py", args, paths)
                card = model_card(repo_id, self.recognizer.config, args.license, recipe)
                card.save(Path(folder) / "README.md")
            upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
