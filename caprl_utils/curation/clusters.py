"""Near-duplicates by meaning: images whose embeddings nearly agree (SemDeDup, arXiv 2303.09540; paper, appendix D).

1. Embedding: the filter model's own vision tower, mean over its tokens; SemDeDup takes CLIP.
2. k-means on the unit sphere cuts the set into clusters, and only images of one cluster are compared: time grows with
   the images times the size of a cluster, not with their square.
3. Of two that agree the one that came first in the source stays (SemDeDup: the one further from the centre), so a
   set that grows at its end keeps what it had, but for clusters that move.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CLUSTER_IMAGES = 1000  # ours: a cluster's similarities take 4 MB
_ROUNDS = 10
_CHUNK = 4096


def semantic_duplicates(
    ids: Sequence[str], features: np.ndarray, max_similarity: float, seed: int = 0
) -> dict[str, str]:
    """Image id -> id of the kept image that it repeats.

    features: (N, D), one row per image. max_similarity: cosine above which two images are one.
    """
    if not len(ids):
        return {}
    unit = np.asarray(features, dtype=np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    labels = _clusters(unit, -(-len(ids) // CLUSTER_IMAGES), seed)
    found: dict[str, str] = {}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        alike = unit[members] @ unit[members].T > max_similarity
        kept: list[int] = []
        for place in range(len(members)):
            copies = [other for other in kept if alike[place, other]]
            if copies:
                found[ids[members[place]]] = ids[members[copies[0]]]
            else:
                kept.append(place)
    return found


def _clusters(unit: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Cluster of each row by k-means with cosine similarity, (N,)."""
    if count == 1:
        return np.zeros(len(unit), dtype=int)
    rng = np.random.default_rng(seed)
    centres = unit[rng.choice(len(unit), count, replace=False)]
    labels = np.zeros(len(unit), dtype=int)
    for _ in range(_ROUNDS):
        for start in range(0, len(unit), _CHUNK):
            labels[start : start + _CHUNK] = (unit[start : start + _CHUNK] @ centres.T).argmax(1)
        for label in range(count):
            members = unit[labels == label]
            if len(members):
                mean = members.mean(0)
                centres[label] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return labels
