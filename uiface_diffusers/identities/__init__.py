"""Banks of identity embeddings (`bank`, `published`), which of them are distinct (`selection`, `report`), and turning
them by an angle (`perturbation`)."""

from .bank import IDENTITIES, IdentityBank, bank_hash
from .perturbation import check_cosine_range, perturb_embeddings, safe_cosines
from .published import import_identities
from .report import BankReport, inspect_bank, text_histogram
from .selection import (
    CANDIDATE_ROWS,
    KNOWN_ROWS,
    DistinctIdentities,
    join_embeddings,
    keep_distinct,
    largest_cosines,
    sample_identities,
)

__all__ = [
    "CANDIDATE_ROWS",
    "IDENTITIES",
    "KNOWN_ROWS",
    "BankReport",
    "DistinctIdentities",
    "IdentityBank",
    "bank_hash",
    "check_cosine_range",
    "import_identities",
    "inspect_bank",
    "join_embeddings",
    "keep_distinct",
    "largest_cosines",
    "perturb_embeddings",
    "safe_cosines",
    "sample_identities",
    "text_histogram",
]
