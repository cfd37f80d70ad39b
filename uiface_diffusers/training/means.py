"""Running means for the log of a training."""

import torch
from accelerate import Accelerator


class RunningMeans:
    """Means since the last `take`. Sums stay on the device, so that a step waits for nothing.

    Args:
        device (`torch.device`): of the values.
    """

    def __init__(self, device: torch.device):
        self.device, self.taken = device, 0  # losses in the last `take`
        self._clear()

    def _clear(self) -> None:
        self._means: dict[str, torch.Tensor] = {}  # of each name: sum and number
        self._losses = torch.zeros(2, device=self.device)  # number of finite ones, of all

    def count(self, losses: torch.Tensor) -> torch.Tensor:
        """Counts how many losses are finite; returns which, of the same shape."""
        finite = losses.detach().isfinite()
        self._losses += torch.stack([finite.float().sum(), torch.ones_like(finite, dtype=torch.float32).sum()])
        return finite

    def add_mean(self, name: str, values: torch.Tensor, where: torch.Tensor) -> None:
        """Adds the values, of any shape, at which `where` (booleans of the same shape) is true; others may be NaN."""
        chosen = torch.where(where, values.detach().float(), 0.0)
        pair = torch.stack([chosen.sum(), where.float().sum()])
        self._means[name] = self._means[name] + pair if name in self._means else pair

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        """The means over all processes since the last call, what had no value left out, and the share of losses that
        were finite (0 of none). Every process calls it, with the same names."""
        names = list(self._means)
        sums = torch.stack([self._losses, *(self._means[name] for name in names)])
        (finite, number), *pairs = accelerator.reduce(sums, "sum").tolist()
        self._clear()
        self.taken = int(number)
        means = {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}
        return means, finite / max(number, 1)
