"""Captions that repeat themselves until the token limit, the common failure of captioners."""

from __future__ import annotations

import re
from collections import Counter

MIN_REPEATS = 4  # ours: lists repeat a phrase two or three times, loops do so for the rest of the caption
MIN_CHARS = 60  # ours: shorter tails are dotted lines and table borders
MIN_SENTENCE_WORDS = 5  # ours: "Yes." may stand in a list more often
_TAIL = 20_000  # characters looked at


def is_loop(text: str) -> bool:
    """Whether a text ends in a phrase said at least `MIN_REPEATS` times, or says one sentence as often."""
    return tail_repeats(text) or sentence_repeats(text)


def tail_repeats(text: str) -> bool:
    """Whether the end of the text is one phrase over and over, the last time perhaps not whole.

    The prefix function of the reversed text gives the shortest period of every tail in linear time.
    """
    turned = text.rstrip()[-_TAIL:][::-1]
    border = [0] * len(turned)
    length = 0
    for place in range(1, len(turned)):
        while length and turned[place] != turned[length]:
            length = border[length - 1]
        length += turned[place] == turned[length]
        border[place] = length
        size = place + 1
        if size >= MIN_CHARS and size >= MIN_REPEATS * (size - length):
            return True
    return False


def sentence_repeats(text: str) -> bool:
    """Whether one sentence of some words stands `MIN_REPEATS` times in the text, wherever."""
    sentences = (part.strip().casefold() for part in re.split(r"(?<=[.!?。！？])\s*|\n+", text))
    counts = Counter(s for s in sentences if len(s.split()) >= MIN_SENTENCE_WORDS)
    return any(count >= MIN_REPEATS for count in counts.values())
