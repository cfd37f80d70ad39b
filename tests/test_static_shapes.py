import collections

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils._python_dispatch import TorchDispatchMode

from uiface_diffusers.faces import TorchRecognizer


def write_recognizer(path) -> None:
    """A recognizer of 8 numbers that reads every kind of shape, axis and index from tensors."""
    numbers = {
        "flat": [1, 3, -1],
        "starts": [16],
        "ends": [2**62],
        "axes": [2],
        "steps": [784],
        "halves": [8, 8],
        "first_axis": [0],
        "wide": [3, 8],
        "row": [1, -1],
        "dot": [24, 8],
    }
    weights = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    constants[-1] = numpy_helper.from_array(weights, "dot")
    nodes = [
        helper.make_node("Reshape", ["face", "flat"], ["flattened"]),
        helper.make_node("Slice", ["flattened", "starts", "ends", "axes", "steps"], ["some"]),
        helper.make_node("Split", ["some", "halves"], ["left", "right"], axis=2),
        helper.make_node("Add", ["left", "right"], ["sum"]),
        helper.make_node("Squeeze", ["sum", "first_axis"], ["channels"]),
        helper.make_node("ReduceMax", ["channels"], ["most"], axes=[0], keepdims=1),
        helper.make_node("Expand", ["most", "wide"], ["repeated"]),
        helper.make_node("Mul", ["channels", "repeated"], ["product"]),
        helper.make_node("Reshape", ["product", "row"], ["features"]),
        helper.make_node("MatMul", ["features", "dot"], ["embedding"]),
    ]
    face = helper.make_tensor_value_info("face", TensorProto.FLOAT, ["n", 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(nodes, "recognizer", [face], [embedding], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def test_a_translated_recognizer_has_its_shapes_written_in(tmp_path):
    """It computes what onnxruntime computes, for a batch, reads no number back from a tensor, and is one graph."""
    write_recognizer(tmp_path / "recognizer.onnx")
    recognizer = TorchRecognizer(tmp_path / "recognizer.onnx")
    faces = torch.rand(5, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with Operators() as operators:
        embeddings = recognizer(faces)
    assert operators.names["_local_scalar_dense"] == 0 and operators.names["nonzero"] == 0
    session = onnxruntime.InferenceSession(tmp_path / "recognizer.onnx", providers=["CPUExecutionProvider"])
    expected = np.concatenate([session.run(None, {"face": face[None].numpy()})[0] for face in faces])
    expected = torch.from_numpy(expected / np.linalg.norm(expected, axis=1, keepdims=True))
    assert torch.allclose(embeddings, expected, atol=1e-5)
    assert torch._dynamo.explain(recognizer)(faces).graph_break_count == 0
    moved = faces.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(recognizer(moved)[:, 0].sum(), moved)
    step = faces + 1e-2 * gradient / gradient.norm()
    assert recognizer(step)[:, 0].sum() > embeddings[:, 0].sum()
