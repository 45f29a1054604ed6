"""Evaluation: benchmark registry, loaders, scoring, statistics."""
