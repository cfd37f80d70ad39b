"""IResNet, the network of the field's face recognition models, as a transformers model.

`import uiface_diffusers` registers it: `AutoConfig`, `AutoModel` and `AutoImageProcessor` load a saved folder or a Hub
repository from then on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import ModelOutput

from ..pictures import Picture, as_pictures, rgb_bytes, scale_to_unit_range

# blocks of each of the four stages, by the number of layers
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
# every stage halves height and width
DOWNSAMPLING = 2**4
# of the channels, within a squeeze-and-excitation block
SE_REDUCTION = 16


class IResNetConfig(PretrainedConfig):
    """
    Args:
        layers (`int`, defaults to 50): 18, 34, 50, 100 or 200.
        width (`int`, defaults to 64): channels of the first stage; each of the next three doubles them.
        embedding_dim (`int`, defaults to 512): width of the embedding.
        image_size (`int`, defaults to 112): height and width of the faces; the last layer's shape depends on it.
        dropout (`float`, defaults to 0.0): of the features before the last layer, while training.
        use_se (`bool`, defaults to `False`): squeeze-and-excitation in every block, as in the field's IR-SE networks.

    Raises:
        ValueError: there is no IResNet of so many layers.
    """

    model_type = "iresnet"

    def __init__(
        self,
        layers: int = 50,
        width: int = 64,
        embedding_dim: int = 512,
        image_size: int = 112,
        dropout: float = 0.0,
        use_se: bool = False,
        **kwargs: Any,
    ):
        if layers not in DEPTHS:
            raise ValueError(f"`layers` has to be one of {tuple(DEPTHS)} but is {layers!r}.")
        self.layers, self.width, self.embedding_dim = layers, width, embedding_dim
        self.image_size, self.dropout, self.use_se = image_size, dropout, use_se
        super().__init__(**kwargs)


@dataclass
class IResNetModelOutput(ModelOutput):
    """
    Args:
        embeddings (`torch.FloatTensor` of shape `(batch_size, embedding_dim)`): not normalized; their direction tells
            the identity, their length something of the picture's quality.
    """

    embeddings: torch.FloatTensor | None = None


class SqueezeExcitation(nn.Module):
    """Weighs channels by what all positions show (Hu et al., CVPR 2018), with the layers of the IR-SE networks: mean,
    1x1 conv to a sixteenth of the channels, ReLU, 1x1 conv, sigmoid; no biases."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // SE_REDUCTION, 1)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(hidden_states, 1)))).sigmoid()


class IResNetBlock(nn.Module):
    """The improved residual unit (Deng et al. 2019, sec. 3.1): BN, conv, BN, PReLU, strided conv, BN; then
    squeeze-and-excitation with `use_se`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, use_se: bool = False):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcitation(out_channels) if use_se else None
        self.downsample = None
        if stride > 1:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.prelu(self.bn2(self.conv1(self.bn1(hidden_states))))
        residual = self.bn3(self.conv2(residual))
        if self.se is not None:
            residual = self.se(residual)
        return residual + (hidden_states if self.downsample is None else self.downsample(hidden_states))


class IResNetModel(PreTrainedModel):
    """IResNet (Deng et al., ArcFace, CVPR 2019), as InsightFace's arcface_torch defines it; modules have its names.

    43.6M parameters with 50 layers, 24.0M with 18.
    """

    config: IResNetConfig
    config_class = IResNetConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["IResNetBlock"]

    def __init__(self, config: IResNetConfig):
        super().__init__(config)
        width, stages = config.width, []
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        channels = width
        for stage, depth in enumerate(DEPTHS[config.layers]):
            out_channels = width * 2**stage
            blocks = [IResNetBlock(channels, out_channels, 2, config.use_se)]
            blocks += [IResNetBlock(out_channels, out_channels, 1, config.use_se) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = out_channels
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(config.dropout)
        side = -(-config.image_size // DOWNSAMPLING)
        self.fc = nn.Linear(channels * side**2, config.embedding_dim)
        self.features = nn.BatchNorm1d(config.embedding_dim)
        # its scale is a constant of one; a parameter would be trainable again after loading
        del self.features.weight
        self.features.register_buffer("weight", torch.ones(config.embedding_dim))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """arcface_torch's. transformers guards `nn.init` so that weights that were loaded stay."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.Linear | nn.PReLU):
            module.reset_parameters()
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            state = module.state_dict(keep_vars=True)
            for name, tensor in state.items():
                (nn.init.ones_ if name in ("weight", "running_var") else nn.init.zeros_)(tensor)

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None
    ) -> IResNetModelOutput | tuple[torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`): aligned faces, RGB in
                [-1, 1].
            return_dict (`bool`, *optional*): a plain tuple when `False`.

        Returns:
            `IResNetModelOutput` with `embeddings` of shape `(batch_size, embedding_dim)`, not normalized.

        Raises:
            ValueError: the faces are of another size.
        """
        hidden_states = self.dropout(self.spatial_features(pixel_values).flatten(1))
        # the embedding has the weights' precision within autocast, too
        with torch.autocast(hidden_states.device.type, enabled=False):
            embeddings = self.features(self.fc(hidden_states.to(self.fc.weight.dtype)))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return IResNetModelOutput(embeddings=embeddings) if return_dict else (embeddings,)

    def spatial_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The map of features that the last layer takes, `(batch_size, 8 * width, h, w)`: 7x7 of 112x112 faces.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`): as `forward` takes them.

        Raises:
            ValueError: the faces are of another size.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"faces have to be (N, 3, {size}, {size}) but are {tuple(pixel_values.shape)}.")
        hidden_states = self.prelu(self.bn1(self.conv1(pixel_values.to(self.conv1.weight.dtype))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden_states = stage(hidden_states)
        return self.bn2(hidden_states)

    @classmethod
    def from_insightface_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], image_size: int = 112
    ) -> "IResNetModel":
        """A model with the weights of an arcface_torch `iresnet`, as `torch.load("backbone.pth", weights_only=True)`
        reads them. Layers, width and embedding are those of the tensors. Every tensor has to be there and no other;
        only batch norm's counters, which nothing reads, may be missing.

        Args:
            state_dict: InsightFace's names: `conv1.weight`, `layer1.0.bn1.weight`, ..., `features.bias`; with
                squeeze-and-excitation also `layer1.0.se.fc1.weight`, ....
            image_size (`int`, defaults to 112): of the faces that it was trained on.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; the message names it.
        """
        model = cls(_insightface_config(state_dict, image_size)).eval()
        own = model.state_dict()
        counters = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
        given = {**counters, **state_dict}
        wrong = [f"`{name}` is missing" for name in own if name not in given]
        wrong += [f"`{name}` is unknown" for name in given if name not in own]
        wrong += [
            f"`{name}` is of shape {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
            for name in own
            if name in given and given[name].shape != own[name].shape
        ]
        if wrong:
            raise ValueError(f"no IResNet-{model.config.layers} for {image_size}x{image_size} faces: {wrong[0]}.")
        model.load_state_dict(given)
        return model


def _insightface_config(state_dict: Mapping[str, torch.Tensor], image_size: int) -> IResNetConfig:
    """Layers, width and embedding of an IResNet by its tensors."""
    missing = [name for name in ("conv1.weight", "fc.weight") if name not in state_dict]
    if missing:
        raise ValueError(f"no IResNet of InsightFace: `{missing[0]}` is missing.")
    blocks = {tuple(name.split(".")[:2]) for name in state_dict if name.startswith("layer")}
    depths = tuple(sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5))
    layers = next((layers for layers, known in DEPTHS.items() if known == depths), None)
    if layers is None:
        raise ValueError(f"no IResNet of InsightFace has {depths} blocks in its stages: {DEPTHS} are known.")
    width, embedding_dim = state_dict["conv1.weight"].shape[0], state_dict["fc.weight"].shape[0]
    return IResNetConfig(
        layers=layers,
        width=width,
        embedding_dim=embedding_dim,
        image_size=image_size,
        use_se="layer1.0.se.fc1.weight" in state_dict,
    )


class IResNetImageProcessor(BaseImageProcessor):
    """Pictures of aligned faces to what `IResNetModel` takes: resized if need be (bilinear, with antialiasing), RGB in
    [-1, 1].

    Args:
        size (`dict[str, int]`, *optional*): `height` and `width`; 112x112 if not given.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: dict[str, int] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.size = {"height": 112, "width": 112} if size is None else dict(size)

    def preprocess(
        self, images: Picture | Sequence[Picture], return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """
        Args:
            images: a face or a list of them: what `rgb_bytes` takes, such as `PIL.Image.Image` of any mode,
                `(height, width, 3)` RGB bytes, or a file's path.
            return_tensors: `"pt"` or `"np"`; a list of arrays if not given.

        Returns:
            `BatchFeature` with `pixel_values` of shape `(N, 3, height, width)`, float32 in [-1, 1].

        Raises:
            OSError: a file cannot be read.
            ValueError: an array of another shape or type.
        """
        pixel_values = [self._process_face(image) for image in as_pictures(images)]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def _process_face(self, image: Picture) -> np.ndarray:
        pixels = torch.from_numpy(rgb_bytes(image).copy()).permute(2, 0, 1)[None].float()
        size = (self.size["height"], self.size["width"])
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return scale_to_unit_range(pixels[0]).numpy()


AutoConfig.register(IResNetConfig.model_type, IResNetConfig, exist_ok=True)
AutoModel.register(IResNetConfig, IResNetModel, exist_ok=True)
try:
    processors: dict[str, type] = {"pil": IResNetImageProcessor, "torchvision": IResNetImageProcessor}
    AutoImageProcessor.register(IResNetConfig, image_processor_classes=processors, exist_ok=True)
except TypeError:  # transformers before its processors had backends
    AutoImageProcessor.register(IResNetConfig, slow_image_processor_class=IResNetImageProcessor, exist_ok=True)
