"""LPIPS (Zhang et al. 2018) with the `lpips` package, whose backbone may come from a file."""

import os
import warnings
from typing import TYPE_CHECKING

from safetensors.torch import load_file

if TYPE_CHECKING:
    import lpips

NETWORKS = ("alex", "squeeze", "vgg")


def load_lpips(network: str = "alex", backbone: str | os.PathLike | None = None) -> "lpips.LPIPS":
    """The perceptual distance of two pictures: `model(a, b)` of `(N, 3, height, width)` in [-1, 1] gives
    `(N, 1, 1, 1)`. In eval mode, weights without gradients; differentiable in the pictures.

    Args:
        network (`str`, defaults to `"alex"`): `"alex"`, `"squeeze"` or `"vgg"`.
        backbone (*optional*): safetensors file with the state dict of torchvision's model of this network, or of its
            convolutions (`features.N.weight`, `features.N.bias`); torchvision downloads it if not given. The linear
            heads are part of the `lpips` package.

    Raises:
        ValueError: the file lacks a tensor of the network, or it has another shape.
    """
    import lpips  # of the extra `train`

    if network not in NETWORKS:
        raise ValueError(f"`network` has to be one of {NETWORKS} but is {network!r}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision and torch by deprecated arguments
        model = lpips.LPIPS(net=network, pnet_rand=backbone is not None, verbose=False)
    if backbone is not None:
        given, own = load_file(backbone), model.net.state_dict()
        # `slice2.3.weight` is torchvision's `features.3.weight`
        names = {name: "features." + name.split(".", 1)[1] for name in own}
        wrong = [n for key, n in names.items() if n not in given or given[n].shape != own[key].shape]
        if wrong:
            raise ValueError(f"{backbone} is no backbone of `{network}`: `{wrong[0]}` is missing or of another shape.")
        model.net.load_state_dict({key: given[name] for key, name in names.items()})
    return model.eval().requires_grad_(False)
