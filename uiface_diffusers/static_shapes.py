"""Takes the shapes out of a network that onnx2torch translated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


class Shapes(fx.Interpreter):
    """Runs a network and keeps the shape of what each node gives."""

    def __init__(self, network: fx.GraphModule):
        super().__init__(network)
        self.of: dict[fx.Node, torch.Size] = {}

    def run_node(self, node: fx.Node) -> Any:
        output = super().run_node(node)
        if isinstance(output, torch.Tensor):
            self.of[node] = output.shape
        return output


Operation = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]


class _Fixed(nn.Module):
    """An operation of one tensor whose other arguments are known."""

    def __init__(self, operation: Operation):
        super().__init__()
        self.operation = operation

    def forward(self, tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.operation(tensor)


def with_static_shapes(network: fx.GraphModule, example: torch.Tensor) -> None:
    """Writes shapes, axes and indices into the operations that read them from tensors of integers in every call:
    reading waits for the device, and keeps `torch.compile` from seeing one graph. In place; computes the same.

    Args:
        network: as `onnx2torch.convert` gives it, of fixed shapes.
        example: an input.
    """
    shapes = Shapes(network)
    shapes.run(example)
    for node in network.graph.nodes:
        if node.op != "call_module":
            continue
        constants = [network.get_buffer(argument.target) for argument in node.args[1:] if _is_constant(argument)]
        if len(constants) < len(node.args) - 1 or any(constant.is_floating_point() for constant in constants):
            continue
        operation = _operation(network.get_submodule(node.target), node, shapes.of, [c.tolist() for c in constants])
        if operation is not None:
            network.set_submodule(node.target, _Fixed(operation))
            node.args = node.args[:1]
    network.graph.eliminate_dead_code()
    network.recompile()


def _is_constant(argument: object) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _operation(
    module: nn.Module, node: fx.Node, shape_of: dict[fx.Node, torch.Size], constants: list[list[int]]
) -> Operation | None:
    """What `module` does at its constants, as a function of its first argument; None for one that is left as it is."""
    match type(module).__name__:
        case "OnnxReshape" | "OnnxSqueezeDynamicAxes" | "OnnxUnsqueezeDynamicAxes" if constants:
            shape = shape_of[node]
            return lambda tensor: tensor.reshape(shape)
        case "OnnxExpand":
            shape = shape_of[node]
            return lambda tensor: tensor.expand(shape)
        case "OnnxSplit13" if constants:
            (sizes,) = constants
            return lambda tensor: tensor.split(sizes, dim=module.axis)
        case "OnnxSlice":
            starts, ends, axes, *given = constants
            steps = given[0] if given else [1] * len(starts)
            index = [slice(None)] * len(shape_of[node.all_input_nodes[0]])
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                index[axis] = slice(start, end, step)
            return (lambda tensor: tensor[tuple(index)]) if min(steps) > 0 else None
    return None
