"""The audit: the books of a database against a recomputation by the oracle."""

from tidemark.audit.books import AuditResult, Scope, audit_books
from tidemark.audit.piece import Findings, audit_piece

__all__ = ["AuditResult", "Findings", "Scope", "audit_books", "audit_piece"]
