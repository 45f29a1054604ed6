"""Caption image sets with any captioner, so that a stopped job goes on where it was.

`caption_images` (here) writes the captions of a list of images to one JSONL file: evaluation uses it.
`job.caption_source` captions any image set into parquet shards, with one worker or many on one manifest:

    from caprl_utils.captions.job import caption_source
    result = caption_source("images/", "captions.parquet", "zoo:vlm-3b", Sampling(max_tokens=256))

    python -m caprl_utils.captions images/ --out captions.parquet --model zoo:vlm-3b
    python -m caprl_utils.captions.export llamafactory captions.parquet --out data/train.jsonl

This file names nothing of the second kind: what it imports is part of the cache key of every evaluation.
"""

from caprl_utils.captions.rows import (
    CHUNK_IMAGES,
    Caption,
    CaptionSet,
    caption_id,
    caption_images,
    chunk_seed,
    failure_message,
    token_counter,
)

__all__ = [
    "CHUNK_IMAGES", "Caption", "CaptionSet", "caption_id", "caption_images", "chunk_seed",
    "failure_message", "token_counter",
]  # fmt: skip
