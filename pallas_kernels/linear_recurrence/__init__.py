"""Elementwise linear recurrences, and what all functions over packed or padded sequences share."""

from pallas_kernels.linear_recurrence.api import linear_recurrence

__all__ = ["linear_recurrence"]
