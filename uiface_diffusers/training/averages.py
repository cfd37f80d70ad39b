"""Averages of weights over the steps of a training."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import nn


class WeightAverage:
    """The exponential moving average (EMA) of a module's weights, with the published code's decay: after step s it
    keeps min(1 - (1 + s) ** -0.75, decay) of itself.

    Args:
        module (`torch.nn.Module`): on its device already.
        decay (`float`): the largest decay, in [0, 1].
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = module
        self.ema = EMAModel(module.parameters(), decay=decay, use_ema_warmup=True, power=0.75, foreach=True)

    def step(self) -> None:
        """Takes in the module's weights after an optimizer step."""
        self.ema.step(self.module.parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the module has the averaged weights and is in eval mode."""
        training = self.module.training
        self.ema.store(self.module.parameters())
        self.ema.copy_to(self.module.parameters())
        self.module.eval()
        try:
            yield
        finally:
            self.ema.restore(self.module.parameters())
            self.module.train(training)
