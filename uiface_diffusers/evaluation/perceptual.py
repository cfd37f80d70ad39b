"""LPIPS (Zhang et al. 2018) with the `lpips` package, whose backbone may come from a file."""

import os
import warnings
from typing import TYPE_CHECKING

import torch

from ..files import read_safetensors

if TYPE_CHECKING:
    import lpips

NETWORKS = ("alex", "squeeze", "vgg")
TORCHVISION = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}


def _read_backbone(file: str | os.PathLike, network: str) -> dict[str, torch.Tensor]:
    try:
        return read_safetensors(file)
    except ValueError as error:
        convert = f"save_file(torch.load('FILE.pth', weights_only=True), '{TORCHVISION[network]}.safetensors')"
        raise ValueError(
            f"the LPIPS backbone `{network}` (--lpips-backbone): {error} A .pth file of torchvision is converted by"
            f" safetensors.torch.{convert}."
        ) from error


def load_lpips(network: str = "alex", backbone: str | os.PathLike | None = None) -> "lpips.LPIPS":
    """The perceptual distance of two pictures: `model(a, b)` of `(N, 3, height, width)` in [-1, 1] gives
    `(N, 1, 1, 1)`. In eval mode, weights without gradients; differentiable in the pictures.

    Args:
        network (`str`, defaults to `"alex"`): `"alex"`, `"squeeze"` or `"vgg"`.
        backbone (*optional*): safetensors file with the state dict of torchvision's model of this network, or of its
            convolutions (`features.N.weight`, `features.N.bias`); torchvision downloads it if not given. The linear
            heads are part of the `lpips` package.

    Raises:
        OSError: the backbone is not given and cannot be downloaded.
        ValueError: the file is missing, is damaged or is no safetensors file, or a tensor of the network is missing in
            it or has another shape.
    """
    import lpips  # of the extra `train`

    if network not in NETWORKS:
        raise ValueError(f"`network` has to be one of {NETWORKS} but is {network!r}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision and torch by deprecated arguments
        try:
            model = lpips.LPIPS(net=network, pnet_rand=backbone is not None, verbose=False)
        except (OSError, RuntimeError) as error:  # no network, or a download that was cut short
            name = TORCHVISION[network]
            raise OSError(
                f"the LPIPS backbone `{network}` cannot be downloaded ({error}): give its file by --lpips-backbone"
                " (`backbone`, in trainings --lpips_backbone). Where there is a network, it is made by"
                f" safetensors.torch.save_file(torchvision.models.{name}(weights='DEFAULT').state_dict(),"
                f" '{name}.safetensors')."
            ) from error
    if backbone is not None:
        given, own = _read_backbone(backbone, network), model.net.state_dict()
        # `slice2.3.weight` is torchvision's `features.3.weight`
        names = {name: "features." + name.split(".", 1)[1] for name in own}
        wrong = [n for key, n in names.items() if n not in given or given[n].shape != own[key].shape]
        if wrong:
            raise ValueError(f"{backbone} is no backbone of `{network}`: `{wrong[0]}` is missing or of another shape.")
        model.net.load_state_dict({key: given[name] for key, name in names.items()})
    return model.eval().requires_grad_(False)
