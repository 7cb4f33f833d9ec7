"""Residual vector quantisation's search, all levels in one kernel."""

from kernels.rvq_lookup.api import rvq_lookup

__all__ = ["rvq_lookup"]
