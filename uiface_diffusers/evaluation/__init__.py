from .class_structure import class_uniqueness, intra_class_consistency
from .comparison import compare_reports
from .consistency import identity_consistency
from .corruptions import corrupt, verify_corruptions
from .evaluate import evaluate_dataset
from .features import LpipsGridFeatures, TorchvisionFeatures
from .groups import measure_groups, pose_statistics, read_groups
from .identification import IdentificationResult, measure_identification, save_identification
from .leakage import measure_leakage
from .perceptual import load_lpips
from .precision_recall import class_precision_recall, improved_precision_recall
from .realism import Realism, classifier_test, kernel_distance, measure_realism
from .recognizers import load_recognizer
from .reconstruction import reconstruction_quality
from .report import load_report
from .separability import measure_separability
from .templates import TemplateFolder, TemplateResult, pool_templates, verify_templates
from .verification import (
    VerificationResult,
    equal_error_rate,
    measure_verification,
    save_verification,
    verification_table,
    verify_benchmarks,
)

__all__ = [
    "IdentificationResult",
    "LpipsGridFeatures",
    "Realism",
    "TemplateFolder",
    "TemplateResult",
    "TorchvisionFeatures",
    "VerificationResult",
    "class_precision_recall",
    "class_uniqueness",
    "classifier_test",
    "compare_reports",
    "corrupt",
    "equal_error_rate",
    "evaluate_dataset",
    "identity_consistency",
    "improved_precision_recall",
    "intra_class_consistency",
    "kernel_distance",
    "load_lpips",
    "load_recognizer",
    "load_report",
    "measure_groups",
    "measure_identification",
    "measure_leakage",
    "measure_realism",
    "measure_separability",
    "measure_verification",
    "pool_templates",
    "pose_statistics",
    "read_groups",
    "reconstruction_quality",
    "save_identification",
    "save_verification",
    "verification_table",
    "verify_benchmarks",
    "verify_corruptions",
    "verify_templates",
]
