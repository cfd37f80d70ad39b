from .consistency import identity_consistency
from .leakage import measure_leakage
from .perceptual import load_lpips
from .recognizers import load_recognizer
from .reconstruction import reconstruction_quality
from .verification import (
    VerificationResult,
    equal_error_rate,
    measure_verification,
    save_verification,
    verification_table,
    verify_benchmarks,
)

__all__ = [
    "VerificationResult",
    "equal_error_rate",
    "identity_consistency",
    "load_lpips",
    "load_recognizer",
    "measure_leakage",
    "measure_verification",
    "reconstruction_quality",
    "save_verification",
    "verification_table",
    "verify_benchmarks",
]
