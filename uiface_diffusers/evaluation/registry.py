"""All measures of a data set, in the order of the report."""

from .consistency import ContextMeasure
from .diversity import DiversityMeasure
from .leakage import LeakageMeasure
from .measure import Measure
from .precision_recall import ClassPrecisionRecallMeasure, PrecisionRecallMeasure
from .realism import RealismMeasure
from .separability import SeparabilityMeasure

MEASURES: list[type[Measure]] = [
    SeparabilityMeasure,
    ContextMeasure,
    LeakageMeasure,
    DiversityMeasure,
    RealismMeasure,
    PrecisionRecallMeasure,
    ClassPrecisionRecallMeasure,
]
