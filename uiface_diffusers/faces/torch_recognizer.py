"""A recognition model of a pack as a differentiable torch module."""

import os
import tempfile
from pathlib import Path

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import fx, nn

from ..files import why_unreadable
from ..pictures import from_unit_range
from ..static_shapes import Shapes, with_static_shapes
from .geometry import ALIGNED_SIZE


class TorchRecognizer(nn.Module):
    """An ONNX recognition model in torch, differentiable in its pictures; its weights are constants.

    Args:
        model_file: the ONNX file.
        mean (`float`): subtracted from RGB bytes, as insightface reads it from the file.
        std (`float`): divides them.

    Raises:
        ValueError: the translation does not compute what onnxruntime computes.
    """

    def __init__(self, model_file: str | os.PathLike, mean: float = 127.5, std: float = 127.5):
        super().__init__()
        import onnx2torch  # of the extra `train`

        self.mean, self.std = mean, std
        try:
            model = onnx.load(model_file)
        except Exception as error:  # protobuf's own
            raise ValueError(f"no ONNX model: {why_unreadable(model_file, error)}.") from error
        # For a batch of one all shapes are known: onnxruntime folds what is computed of them, and models that were
        # exported for one face translate as well. `vmap` brings the batch back.
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        with tempfile.TemporaryDirectory() as folder:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            folded = onnx.load(options.optimized_model_filepath)
        for node in folded.graph.node:
            while node.input and not node.input[-1]:  # optional inputs that are not given
                del node.input[-1]
        self.network = onnx2torch.convert(folded).eval().requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, nn.LayerNorm):  # onnx2torch reads the shape from a value info that may be missing
                module.normalized_shape = tuple(module.weight.shape)
        probe = torch.rand(1, 3, ALIGNED_SIZE, ALIGNED_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with_static_shapes(self.network, probe)
        expected = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: probe.numpy()})[0])
        deviation = (self.network(probe) - expected).abs().max().item()
        if not deviation < 1e-3 * max(1.0, expected.abs().max().item()):
            raise ValueError(f"{model_file} cannot be translated to torch: it deviates by {deviation} from ONNX.")

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Embeddings of aligned faces.

        Args:
            faces (`torch.Tensor` of shape `(N, 3, size, size)`): RGB in [-1, 1]; resized to 112x112 as training faces
                are (bilinear, with antialiasing).

        Returns:
            `torch.Tensor` of shape `(N, identity_dim)`: unit length.
        """
        return F.normalize(torch.vmap(self._features)(self._pixels(faces)[:, None])[:, 0])

    def _pixels(self, faces: torch.Tensor) -> torch.Tensor:
        size = (ALIGNED_SIZE, ALIGNED_SIZE)
        faces = F.interpolate(faces, size, mode="bilinear", antialias=True) if faces.shape[-2:] != size else faces
        return (from_unit_range(faces) - self.mean) / self.std

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        # a function of its own: `torch.compile` cannot name a module that `vmap` is given
        return self.network(pixels)

    def spatial(self) -> "SpatialRecognizer":
        """The same model up to its last map of features.

        Raises:
            ValueError: it has none of 7x7 to 14x14.
        """
        return SpatialRecognizer(self)


class SpatialRecognizer(nn.Module):
    """A `TorchRecognizer` up to its last map of features of 7x7 to 14x14, which an IResNet flattens; weights are
    shared.

    Raises:
        ValueError: it has none of 7x7 to 14x14.
    """

    def __init__(self, recognizer: TorchRecognizer):
        super().__init__()
        shapes = Shapes(recognizer.network)
        shapes.run(torch.zeros(1, 3, ALIGNED_SIZE, ALIGNED_SIZE))
        # a sixteenth of the picture to an eighth: EdgeFace ends in 3x3, and its maps of attention are 48x48; square,
        # since it also has maps whose channels come last
        squares = {node: shape[-1] for node, shape in shapes.of.items() if len(shape) == 4 and shape[-1] == shape[-2]}
        maps = [node for node, side in squares.items() if ALIGNED_SIZE // 16 <= side <= ALIGNED_SIZE // 8]
        if not maps:
            raise ValueError("the recognition model has no map of features: choose a convolutional one.")
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(recognizer.network.graph, copies)
        graph.output(copies[maps[-1]])
        self.recognizer_pixels, self.network = recognizer._pixels, fx.GraphModule(recognizer.network, graph)
        self.network.graph.eliminate_dead_code()
        self.network.recompile()

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Features `(N, C, h, w)` of faces `(N, 3, size, size)` in [-1, 1]; 7x7 of IResNets."""
        return torch.vmap(self.network)(self.recognizer_pixels(faces)[:, None])[:, 0]
