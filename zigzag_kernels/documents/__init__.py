"""Plans of batches of documents: which rank holds which rows, made on the host from the lengths alone."""

from .plan import DocumentPlan, Piece, Undivided
from .planner import plan_documents

__all__ = ["DocumentPlan", "Piece", "Undivided", "plan_documents"]
