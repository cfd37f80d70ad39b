from .class_structure import class_uniqueness, intra_class_consistency
from .comparison import compare_reports
from .consistency import identity_consistency
from .evaluate import evaluate_dataset
from .features import LpipsGridFeatures, TorchvisionFeatures
from .leakage import measure_leakage
from .perceptual import load_lpips
from .precision_recall import class_precision_recall, improved_precision_recall
from .realism import Realism, classifier_test, kernel_distance, measure_realism
from .recognizers import load_recognizer
from .reconstruction import reconstruction_quality
from .report import load_report
from .separability import measure_separability
from .verification import (
    VerificationResult,
    equal_error_rate,
    measure_verification,
    save_verification,
    verification_table,
    verify_benchmarks,
)

__all__ = [
    "LpipsGridFeatures",
    "Realism",
    "TorchvisionFeatures",
    "VerificationResult",
    "class_precision_recall",
    "class_uniqueness",
    "classifier_test",
    "compare_reports",
    "equal_error_rate",
    "evaluate_dataset",
    "identity_consistency",
    "improved_precision_recall",
    "intra_class_consistency",
    "kernel_distance",
    "load_lpips",
    "load_recognizer",
    "load_report",
    "measure_leakage",
    "measure_realism",
    "measure_separability",
    "measure_verification",
    "reconstruction_quality",
    "save_verification",
    "verification_table",
    "verify_benchmarks",
]
