"""The GPU that all plans count with, and what it reaches: one copy, so that parts of a plan can be added."""

NAME = "H100 with 80 GB"
GB = 80.0
PEAK_FLOPS = 990e12  # bf16 without sparsity (data sheet)
DOLLARS_PER_HOUR = 2.5  # ours: what renting one costs, roughly; put in your own
TRAIN_USE, GENERATE_USE, READ_USE = 0.35, 0.10, 0.25
"""Ours: shares of the peak that training, writing captions, and reading for a single token reach."""


def hours(flops: float, use: float) -> float:
    """GPU-hours for so many operations."""
    return flops / (PEAK_FLOPS * use) / 3600
