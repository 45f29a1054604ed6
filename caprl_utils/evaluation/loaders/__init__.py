"""Benchmark data as samples, from the hub's layouts, the authors' JSON files, or a local folder."""

from __future__ import annotations

from caprl_utils.evaluation.loaders.sample import Loaded, Rejected, Sample

__all__ = ["Loaded", "Rejected", "Sample"]
