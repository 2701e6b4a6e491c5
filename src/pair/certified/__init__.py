"""Provable retrieval: hide windows that cover every patch of a family, rebuild, and prove.

See ``docs/guarantee.md`` for what is promised, under which assumptions, and what is not.
"""

from pair.certified.covering import Cover, PatchFamily, verify_covering, window_cover
from pair.certified.database import certified_out, certified_rank
from pair.certified.index import CertifiedIndex, Hit
from pair.certified.pooling import (
    DeltaCap,
    LowestMean,
    Maximum,
    Median,
    Minimum,
    lower_bound,
    upper_bound,
    with_plain,
)
from pair.certified.purifier import CertifiedPurifier, Views
from pair.certified.query import agree_or_reject, double_masked_recovery, recover
from pair.certified.report import Certificate, certify

__all__ = [
    "Certificate",
    "CertifiedIndex",
    "CertifiedPurifier",
    "Cover",
    "DeltaCap",
    "Hit",
    "LowestMean",
    "Maximum",
    "Median",
    "Minimum",
    "PatchFamily",
    "Views",
    "agree_or_reject",
    "certified_out",
    "certified_rank",
    "certify",
    "double_masked_recovery",
    "lower_bound",
    "recover",
    "upper_bound",
    "verify_covering",
    "window_cover",
    "with_plain",
]
