from .consistency import identity_consistency
from .leakage import measure_leakage
from .perceptual import load_lpips
from .reconstruction import reconstruction_quality
from .verification import equal_error_rate

__all__ = ["equal_error_rate", "identity_consistency", "load_lpips", "measure_leakage", "reconstruction_quality"]
