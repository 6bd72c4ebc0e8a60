"""Plans of batches of documents: which rank holds which rows, computed on the host from the lengths alone."""

from .dealing import deal_documents
from .packed import PackedBatch, check_labels, check_not_shifted, fingerprint, pack_documents
from .plan import DocumentPlan, Undivided, check_no_options, check_plan
from .planner import plan_documents

__all__ = [
    "DocumentPlan",
    "PackedBatch",
    "Undivided",
    "check_labels",
    "check_no_options",
    "check_not_shifted",
    "check_plan",
    "deal_documents",
    "fingerprint",
    "pack_documents",
    "plan_documents",
]
