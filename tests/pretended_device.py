"""A device that is not there: its tensors hold CPU data and say that they are on `DEVICE`.

Within `PretendedDevice`, every operator is checked: operands on two devices are an error, as on a GPU, and what would
make the host wait for a GPU is counted by the line of our code that asked for it:

    with PretendedDevice() as pretended:
        model.to(pretended.device)
        model(inputs.to(pretended.device))
    assert not pretended.waits

It is a meta device with a number: of all devices without a driver, the one that torch runs `backward` on. What is on
`torch.device("meta")`, without a number, is left alone. Of other threads, operators with a tensor of the device are
checked, too; tensors cannot be made on it there.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta", 1)
OUR_CODE = tuple(str(REPOSITORY / folder) + "/" for folder in ("uiface_diffusers", "training", "benchmarks"))
# their results, or the shapes of these, are needed on the host
READING = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim", "unique_consecutive"}
READING |= {"repeat_interleave", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# of the device context that is entered
_active: list["PretendedDevice"] = []


class TwoDevicesError(RuntimeError):
    """An operator with operands on two devices."""


class PretendedTensor(torch.Tensor):
    """`elem`, a CPU tensor, as one on `DEVICE`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor):
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "layout": elem.layout}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, elem.size(), dtype=elem.dtype, device=DEVICE, **layout)
        wrapper.elem = elem
        return wrapper

    def __repr__(self, **options) -> str:
        return f"PretendedTensor({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self) -> list:
        _count("waits", "tolist")
        return self.elem.tolist()

    def numpy(self, *args, **options):
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy. Use Tensor.cpu() first ({_line()})")

    __array__ = numpy


def _line() -> str:
    """The innermost line of our code that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OUR_CODE):
            return f"{file.removeprefix(str(REPOSITORY) + '/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _count(counter: str, what: str) -> None:
    for pretended in _active[-1:]:
        getattr(pretended, counter)[f"{_line()} {what}"] += 1


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _count_copy(to_device: bool, from_device: bool, non_blocking: bool) -> None:
    if to_device == from_device:
        return
    # pageable memory is staged, and the device need not be waited for; the other way it has to be
    if to_device and non_blocking:
        _count("copies", "host to device")
    else:
        _count("waits", "host to device" if to_device else "device to host")


def _check(name: str, func, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> None:
    """Counts waits and refuses operands on two devices."""
    here = [each for each in tensors if isinstance(each, PretendedTensor)]
    elsewhere = [each for each in tensors if not isinstance(each, PretendedTensor) and each.dim()]
    if name in INDEXING:
        indices = [each for each in tree_leaves(args[1]) if isinstance(each, torch.Tensor)]
        if isinstance(args[0], PretendedTensor):
            on_host = [each for each in indices if not isinstance(each, PretendedTensor)]
            masks = [each for each in indices if each.dtype in (torch.bool, torch.uint8)]
            if on_host or masks:
                _count("waits", "index from the host" if on_host else "mask as an index")
        elsewhere = [each for each in elsewhere if not any(each is index for index in indices)]
        if not isinstance(args[0], PretendedTensor) and here:
            elsewhere.append(args[0])
    if here and elsewhere:
        raise TwoDevicesError(f"{func} with operands on {DEVICE} and {elsewhere[0].device} ({_line()})")
    if here and name in READING and kwargs.get("output_size") is None:
        _count("waits", name)


def _run(func, args: tuple, kwargs: dict):
    name = func._schema.name.partition("::")[2]
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    is_here = any(isinstance(each, PretendedTensor) for each in tensors)
    device = kwargs.get("device")
    makes_here = is_here if device is None else _is_here(device)
    if not is_here and not makes_here:
        return func(*args, **kwargs)
    if name == "_to_copy":
        _count_copy(makes_here, is_here, kwargs.get("non_blocking", False))
    elif name == "copy_":
        makes_here, is_source_here = (isinstance(each, PretendedTensor) for each in args[:2])
        _count_copy(makes_here, is_source_here, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        _check(name, func, args, kwargs, tensors)
    wrappers = {id(each.elem): each for each in tensors if isinstance(each, PretendedTensor)}
    args, kwargs = tree_map(lambda each: each.elem if isinstance(each, PretendedTensor) else each, (args, kwargs))
    if _is_here(kwargs.get("device")):
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if not makes_here:
        return out

    def wrap(each):
        if not isinstance(each, torch.Tensor):
            return each
        wrapper = wrappers.get(id(each))  # what is changed in place stays the same tensor
        return PretendedTensor(each) if wrapper is None else wrapper

    return tree_map(wrap, out)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Where torch treats a meta device in another way than a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_here(kwargs.get("device")):
            if not isinstance(args[0], torch.Tensor):
                return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])  # as on a GPU: made on the host
        if func is torch.Tensor.__setitem__ and isinstance(args[0], PretendedTensor):
            target, index, value = args
            # a number becomes a tensor of the host: where the shapes are equal it is copied, otherwise filled in
            return func(target, index, torch.as_tensor(value, dtype=target.dtype))
        return func(*args, **kwargs)


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if _is_here(device) else device)


class PretendedDevice:
    """Makes `device` usable within.

    Attributes:
        device (`torch.device`).
        waits (`Counter`): line of our code and reason -> how often the host would have waited for the device.
        copies (`Counter`): the same of copies to the device that do not wait.
    """

    device = DEVICE

    def __init__(self):
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __enter__(self) -> "PretendedDevice":
        self.stack = ExitStack()
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch, "autocast", _Autocast)  # torch has neither for this device
        patch.setattr(torch, "Generator", _Generator)
        # parameters stay the same objects when a module moves, as on a GPU: an optimizer may have them already
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        self.stack.enter_context(_Operators())
        self.stack.enter_context(_Functions())
        _active.append(self)
        return self

    def __exit__(self, *error) -> None:
        _active.remove(self)
        self.stack.close()
